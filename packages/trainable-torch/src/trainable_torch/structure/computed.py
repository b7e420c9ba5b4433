"""Whether a model uses a quantized weight as it is, or computes something else of it first, which is on no grid."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from trainable_torch.structure.dataflow import SIZE_ATTRIBUTES, SIZE_METHODS
from trainable_torch.structure.observing import name_of
from trainable_torch.structure.tracing import called, probe_graph

_MOVES = frozenset(
    (
        "reshape", "view", "flatten", "unflatten", "permute", "transpose", "t", "T", "mT", "swapaxes", "swapdims",
        "movedim", "moveaxis", "contiguous", "clone", "detach", "to", "type", "float", "half", "bfloat16", "double",
        "type_as", "view_as", "reshape_as", "expand", "expand_as", "repeat", "repeat_interleave", "tile", "squeeze",
        "unsqueeze", "narrow", "select", "getitem", "__getitem__", "index_select", "gather", "chunk", "split",
        "tensor_split", "unbind", "cat", "concat", "concatenate", "stack", "flip", "roll", "pad", "neg", "__neg__",
        "embedding", "broadcast_to", "alias", "data", "rearrange", "tril", "triu", "diagonal", "as_strided", "H",
        "requires_grad_", "cpu", "cuda",
    )
)  # fmt: skip
"""Operations whose results hold values of their input, zeros, and negated values: all on its grid."""
_SCALES = frozenset(("mul", "__mul__", "__rmul__", "multiply", "div", "__truediv__", "divide", "truediv"))
"""Operations that only change the scale of the grid, by a number."""
_OTHER = (
    frozenset(("__get__", "__set__", "__repr__", "backward", "register_hook", "has_names"))
    | SIZE_METHODS
    | SIZE_ATTRIBUTES
)


def keeps_the_grid(name: str, tensors: int, *, numbers: bool) -> bool:
    """Return whether what an operation makes of a weight is on the weight's grid, or on one of another scale."""
    return name in _MOVES or (name in _SCALES and tensors == 1 and numbers)


def reason(operation: str) -> str:
    """Return what is told of a weight that is not used as it is."""
    return f"what is used is the result of {operation} on the quantized weight, which is on no grid"


def of_layer(layer: nn.Module, attributes: Iterable[str]) -> dict[str, str]:
    """Return what a layer's own forward computes of its weights before it uses them, by weight.

    The forward is traced; nothing is known of one that can't be.
    """
    graph = probe_graph(layer)
    return {} if graph is None else in_graph(graph, attributes)


def in_graph(graph: fx.Graph, names: Iterable[str]) -> dict[str, str]:
    """Return the operation that makes something else of each parameter in a graph, by the parameter's name."""
    found: dict[str, str] = {}
    wanted = set(names)
    source: dict[fx.Node, str] = {}
    constant: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr":
            constant.add(node)
            if node.target in wanted:
                source[node] = str(node.target)
            continue
        inputs = node.all_input_nodes
        if node.op not in ("call_function", "call_method") or not inputs or not constant.issuperset(inputs):
            continue
        name = str(node.args[1]) if called(node) == "getattr" else called(node)
        if name in SIZE_METHODS | SIZE_ATTRIBUTES:
            continue
        constant.add(node)
        of = next((source[each] for each in inputs if each in source), None)
        if of is None:
            continue
        if keeps_the_grid(name, len(inputs), numbers=True):
            source[node] = of
        else:
            found.setdefault(of, name)
    return found


class Uses(TorchFunctionMode):
    """Notes what a model computes of weights alone while it is entered.

    Parameters
    ----------
    weights : mapping of str to Tensor
        Quantized weights by name, as readers get them.
    constants : iterable of Tensor
        All parameters and buffers.
    """

    def __init__(self, weights: Mapping[str, Tensor], constants: Iterable[Tensor]) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self._names = {id(weight): name for name, weight in weights.items()}
        self._constants = {id(each) for each in constants}
        self._kept: list[Any] = [*weights.values()]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function, and note it when it makes something else of a weight."""
        result = func(*args, **(kwargs or {}))
        name = name_of(func)
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if name in _OTHER or not given or any(id(each) not in self._constants for each in given):
            return result
        made = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        self._kept += made  # else another tensor may get their identities
        self._constants |= {id(each) for each in made}
        of = next((self._names[id(each)] for each in given if id(each) in self._names), None)
        if of is not None and not any(id(each) in self._names for each in made):
            if keeps_the_grid(name, len(given), numbers=True):
                self._names |= {id(each): of for each in made}
            elif made:
                self.found.setdefault(of, name)
        return result
