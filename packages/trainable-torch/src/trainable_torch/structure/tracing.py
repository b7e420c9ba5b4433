"""What the model's graph tells: which operations follow which, and where a functional operation's output goes.

Only PyTorch's own symbolic tracing is used. A model it can't trace is traced piece by piece: each part that can be
traced still shows its layers' order, which is what folding needs.
"""

from __future__ import annotations

import copy
import operator
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F  # noqa: N812 - the name everyone reads
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainable_torch.batch_norm import SimulatedBatchNorm
from trainable_torch.kernels import eligible
from trainable_torch.layers import kind_of
from trainable_torch.structure.dataflow import SIZE_ATTRIBUTES, SIZE_METHODS, reads_values
from trainable_torch.structure.observing import OWN_OPERATIONS, SHAPE, name_of
from trainable_torch.structure.operands import operation_kind

DROPOUTS: dict[Any, Any] = {
    F.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout,
    F.feature_alpha_dropout: nn.FeatureAlphaDropout,
}
"""The modules of dropout, by their functions."""


KEPT = "kept"
"""Key in a node's ``meta`` when the model keeps its value in an attribute."""


class _Tracer(fx.Tracer):
    """Stops at every module whose kind is known, at PyTorch's own modules, and at wrappers.

    With `options` false, arguments whose default is None are None instead of being traced. With `inside` false, every
    module in the one that is traced is a single operation.
    """

    def __init__(self, *, options: bool = True, inside: bool = True) -> None:
        super().__init__()
        self.options, self.inside = options, inside

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if not self.inside or kind_of(m) is not None or isinstance(m, SimulatedBatchNorm):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(self, *args: Any, **kwargs: Any) -> Any:
        function, given = super().create_args_for_root(*args, **kwargs)
        if not self.options:
            given = [None if isinstance(arg, fx.Proxy) and _is_option(arg.node) else arg for arg in given]
        return function, given


class TracedModel(fx.GraphModule):
    """A graph module whose copies and pickles keep what `wrap` noted on it, its hooks and its mode; torch's don't."""

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedModel:
        copied = cast("TracedModel", super().__deepcopy__(memo))
        type(copied).__name__ = type(self).__name__  # each has a class of its own
        kept = {name: value for name, value in self.__dict__.items() if _is_kept(name, copied)}
        copied.__dict__.update({name: copy.deepcopy(value, memo) for name, value in kept.items()})
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self).__name__, *super().__reduce__()[1])


def _is_kept(name: str, model: nn.Module) -> bool:
    """Return whether an attribute of a traced model is lost, reset, or put into another order by a new graph module."""
    owned = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set", "training")
    return name not in model.__dict__ or name in owned or name.startswith(("_forward_", "_backward_"))


def _restored(class_name: str, body: dict[str, Any], import_block: str) -> TracedModel:
    """Return the traced model of a pickle."""
    plain: Any = fx.graph_module.reduce_graph_module(dict(body), import_block)
    model = TracedModel(plain, plain.graph, class_name)
    model.__dict__.update({name: value for name, value in body.items() if _is_kept(name, model)})
    return model


@dataclass(frozen=True)
class Untraceable:
    """Why a module can't be traced."""

    reason: str


def trace(model: nn.Module) -> fx.GraphModule | Untraceable:
    """Return the model as a graph that calls the model's own modules, or why there is none.

    A graph keeps the branches taken while tracing, and the numbers. So a model is traced in train mode, in eval mode,
    and without its optional arguments; if that makes a difference, it is untraceable. Dropout called as a function is
    allowed to differ in its ``training`` flag: it becomes a module.
    """
    replaced = "forward" in vars(model)  # the tracer takes the class's
    if replaced or type(model).__call__ is not nn.Module.__call__:
        problem = "its forward is replaced on the instance" if replaced else "its class has its own __call__"
        return Untraceable(f"{problem}, which symbolic tracing can't follow; {EXAMPLE_HELPS}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracing warns of what the reason below tells
            traced = _graph(model, training=True)
            others = {"in eval mode": _graph(model, training=False)}
            if any(_is_option(node) for node in traced.graph.nodes):
                others["without its optional arguments"] = _graph(model, training=True, options=False)
    except Exception as error:  # noqa: BLE001 - a model's forward may raise anything on a proxy
        return Untraceable(_obstacle(error))
    for when, other in others.items():
        node = _difference(traced, other)
        if node is not None:
            problem = f"it computes something else {when}, at {node.name}, which a trace would freeze in"
            return Untraceable(f"{problem}; {EXAMPLE_HELPS}")
    for node in _dropouts_of(traced, others["in eval mode"]):
        _make_module(traced, node)
    traced.recompile()
    modes = {
        name: getattr(module, "training", False) for name, module in model.named_modules()
    }  # a frozen script has none
    for name, module in traced.named_modules():
        module.training = modes.get(name, model.training)
    return traced


EXAMPLE_HELPS = "wrap(model, recipe, example=batch) looks at a run of the model instead"
"""What a reason says where an example would tell what tracing can't."""

_OBSTACLES = {
    "control flow": "control flow depends on a tensor's values or sizes",
    "co_varnames is too small": "its forward is replaced by a decorator that takes any arguments (*args, **kwargs)",
    "cannot be iterated": "it iterates over a tensor, or unpacks one",
    "can't be iterated": "it iterates over a tensor, or unpacks one",
    "not installed as a submodule": "it calls a module that is not registered in it",
    "'len' is not supported": "it takes the length of a tensor",
    "cannot be interpreted as an integer": "it needs the size of a tensor as a number",
    "expected Proxy": "it does something with a tensor that needs its values",
}
"""What stops PyTorch's tracer, by a part of its message."""


def _obstacle(error: Exception) -> str:
    """Return what in a model can't be followed, and where, from what the tracer raised."""
    text = str(error).split("\n", 1)[0]
    told = next((reason for mark, reason in _OBSTACLES.items() if mark in str(error)), "")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _is_of_torch(f.filename)]
    where = f" in {frames[-1].name} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{told or f'{type(error).__name__}: {text}'}{where}, which symbolic tracing can't follow; {EXAMPLE_HELPS}"


def _is_of_torch(path: str) -> bool:
    """Return whether a file is PyTorch's or this package's."""
    roots = (Path(torch.__file__).parent, Path(__file__).parent)
    return any(root in Path(path).parents for root in roots) or not Path(path).is_file()


def probe_graph(layer: nn.Module) -> fx.Graph | None:
    """Return the trace of a layer's own forward, with the modules inside as single operations; None without one."""
    if type(layer).__module__.startswith("torch.nn.") or "forward" in vars(layer):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _graph(layer, training=True, inside=False).graph
    except Exception:  # noqa: BLE001 - a forward may raise anything on a proxy
        return None


def _graph(model: nn.Module, *, training: bool, options: bool = True, inside: bool = True) -> TracedModel:
    """Return the trace of a model in one mode; tensors made while tracing become its buffers."""
    with _attributes_kept(model):
        for module in model.modules():
            module.training = training
        graph = _Tracer(options=options, inside=inside).trace(model)
        for proxy in tree_leaves([list(module.__dict__.items()) for module in model.modules()]):
            if isinstance(proxy, fx.Proxy):
                proxy.node.meta[KEPT] = True
        return TracedModel(model, graph, type(model).__name__)


@contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    """Put back what a model's forward, and the tracer, set on its modules."""
    kept = {module: dict(module.__dict__) for module in model.modules()}
    try:
        yield
    finally:
        for module, attributes in kept.items():
            module.__dict__.clear()
            module.__dict__.update(attributes)


def _is_option(node: fx.Node) -> bool:
    """Return whether a node is an argument whose default is None."""
    return node.op == "placeholder" and node.args == (None,)


def _difference(one: fx.GraphModule, other: fx.GraphModule) -> fx.Node | None:
    """Return the first node where two traces differ in more than a dropout that works in train mode only."""
    places: dict[fx.Node, int] = {
        node: place for traced in (one, other) for place, node in enumerate(traced.graph.nodes)
    }
    first: fx.Node
    for first, second in zip(one.graph.nodes, other.graph.nodes, strict=False):  # the last ones tell the lengths
        starts_dropping = (
            first.target in DROPOUTS
            and not dropout_arguments(first)["training"]
            and dropout_arguments(second)["training"]
        )
        if _content(one, first, places) != _content(other, second, places) or starts_dropping:
            return first
    return None


def _content(traced: fx.GraphModule, node: fx.Node, places: Mapping[fx.Node, int]) -> Any:
    """Return what a node does, comparable between traces."""
    arguments = (node.args, node.kwargs)
    if node.target in DROPOUTS:
        arguments = ((), {name: value for name, value in dropout_arguments(node).items() if name != "training"})
    told = fx.map_arg(arguments, lambda each: None if _is_option(each) else ("node", places[each]))
    if node.op == "get_attr" and str(node.target).startswith("_tensor_constant"):
        constant = getattr(traced, str(node.target))
        return node.op, constant.dtype, constant.tolist()
    return node.op, node.target, told


def dropout_arguments(node: fx.Node) -> dict[str, Any]:
    """Return a dropout function's arguments by name."""
    defaults = {"p": 0.5, "training": node.target not in (F.alpha_dropout, F.feature_alpha_dropout), "inplace": False}
    return {**defaults, **dict(zip(("input", *defaults), node.args, strict=False)), **node.kwargs}


def _dropouts_of(trained: fx.GraphModule, evaluated: fx.GraphModule) -> list[fx.Node]:
    """Return the dropout functions that work in train mode only."""
    pairs = zip(trained.graph.nodes, evaluated.graph.nodes, strict=True)
    return [
        node
        for node, other in pairs
        if node.target in DROPOUTS and dropout_arguments(node)["training"] and not dropout_arguments(other)["training"]
    ]


def _make_module(traced: fx.GraphModule, node: fx.Node) -> None:
    """Put a module in the place of a dropout function."""
    arguments, name = dropout_arguments(node), f"{node.name}_dropout"
    traced.add_submodule(name, DROPOUTS[node.target](p=arguments["p"], inplace=arguments["inplace"]))
    with traced.graph.inserting_after(node):
        replaced = traced.graph.call_module(name, (arguments["input"],))
    node.replace_all_uses_with(replaced)
    traced.graph.erase_node(node)


def ends_with_own_operation(layer: nn.Module) -> bool:
    """Return whether a layer's forward ends with the operation of its class on its own weight and bias.

    A convolution that pads its input first does; one that computes its weight, or adds something, does not. False where
    tracing can't tell.
    """
    return own_operations(layer) is not None


def own_operations(layer: nn.Module) -> list[fx.Node] | None:
    """Return the operation of a layer's class on its own weight and bias, in train mode and in eval mode.

    None where its forward does not end with it, or tracing can't tell.
    """
    if "forward" in vars(layer) or type(layer).__call__ is not nn.Module.__call__:
        return None  # the tracer takes the class's forward
    probe = layer.__new__(type(layer))
    probe.__dict__.update(layer.__dict__)
    probe._parameters = dict(layer._parameters)  # noqa: SLF001 - the layer's own stay as they are
    if probe._parameters.get("bias") is None and "weight" in probe._parameters:  # noqa: SLF001 - as above
        probe._parameters["bias"] = nn.Parameter(torch.empty(1))  # noqa: SLF001 - else no forward shows where it goes
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graphs = [_graph(probe, training=training).graph for training in (True, False)]
    except Exception:  # noqa: BLE001 - a forward may raise anything on a proxy
        return None
    found = [_own_operation(graph) for graph in graphs]
    return None if None in found else cast("list[fx.Node]", found)


def _own_operation(graph: fx.Graph) -> fx.Node | None:
    (output,) = [node for node in graph.nodes if node.op == "output"]
    last = output.args[0]
    if not isinstance(last, fx.Node) or last.op != "call_function" or called(last) not in OWN_OPERATIONS:
        return None
    named = dict(zip(("input", "weight", "bias"), last.args, strict=False)) | last.kwargs
    for name in ("weight", "bias"):
        own: list[fx.Node] = [node for node in graph.nodes if node.op == "get_attr" and node.target == name]
        if len(own) != 1 or own[0] is not named.get(name) or readers(own[0]) != [last]:
            return None
    return last


def tensors_read(module: nn.Module) -> tuple[set[int], set[int]]:
    """Return the ``id`` of each parameter and buffer that a traceable module's code, outside of layers, reads.

    The first set holds those whose values are read, the second one those that are asked for at all.
    """
    read: set[int] = set()
    asked: set[int] = set()
    for training in (True, False):
        with _ReadsBelow(read), _Reads(read, asked):
            traced = _graph(module, training=training)
        for node in traced.graph.nodes:
            if node.op == "get_attr":
                owner: Any = traced
                for part in str(node.target).split("."):
                    owner = getattr(owner, part)
                asked.add(id(owner))
                if readers(node):
                    read.add(id(owner))
    return read, asked | read


class _Reads(TorchFunctionMode):
    """Notes the tensors that functions are given while a model is traced."""

    def __init__(self, read: set[int], asked: set[int]) -> None:
        super().__init__()
        self.read, self.asked = read, asked

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        self.asked |= given
        if name_of(func) not in SIZE_ATTRIBUTES | SIZE_METHODS:
            self.read |= given
        return func(*args, **(kwargs or {}))


class _ReadsBelow(TorchDispatchMode):
    """Notes the tensors that are read without a function of PyTorch's Python interface, as scripts read them."""

    def __init__(self, read: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # PyTorch's has no annotations
        self.read = read

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.read.update(id(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor))
        return func(*args, **(kwargs or {}))


def readers(node: fx.Node) -> list[fx.Node]:
    """Return the nodes that look at the values of a node, not only at their number or type."""
    return [user for user in node.users if _reads(user, node)]


def _reads(user: fx.Node, node: fx.Node) -> bool:
    if user.op not in ("call_method", "call_function"):
        return True
    if user.target is getattr:
        return user.args[1] not in SIZE_ATTRIBUTES
    name = called(user)
    positions = [i for i, arg in enumerate(user.args) if node in _nodes(arg)]
    positions += [1] if any(node in _nodes(arg) for arg in user.kwargs.values()) else []
    return any(reads_values(name, position) for position in positions)


def _nodes(argument: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(argument, lambda node: found.append(node) or node)  # type: ignore[func-returns-value]
    return found


def called(node: fx.Node) -> str:
    """Return the name of the function or method that a node calls."""
    return node.target if isinstance(node.target, str) else name_of(node.target)


def rank_of(model: nn.Module, node: Any) -> int | None:
    """Return how many dimensions a node's value has, where the graph tells, or None."""
    if not isinstance(node, fx.Node):
        return None
    if SHAPE in node.meta:
        return len(node.meta[SHAPE])
    if node.op == "call_module":
        return _rank_of_module(model, node)
    return _rank_of_function(model, node) if node.op in ("call_method", "call_function") else None


def _rank_of_module(model: nn.Module, node: fx.Node) -> int | None:
    module = model.get_submodule(str(node.target))
    if not type(module).__module__.startswith("torch.nn."):
        return None  # who knows what its forward does
    if type(module) is nn.Flatten and (module.start_dim, module.end_dim) in _TO_MATRICES:
        return 2
    passes = isinstance(module, (nn.Linear, nn.Identity, *eligible.NORMALIZATION, *eligible.DROPOUT))
    kind = kind_of(module)
    if passes or (kind is not None and kind.op == "activation"):
        return rank_of(model, node.args[0] if node.args else None)
    return next((rank for cls, rank in _RANKS.items() if isinstance(module, cls)), None)


def _rank_of_function(model: nn.Module, node: fx.Node) -> int | None:
    if called(node) == "flatten":
        named = dict(zip(("input", "start_dim", "end_dim"), node.args, strict=False)) | node.kwargs
        return 2 if (named.get("start_dim", 0), named.get("end_dim", -1)) in _TO_MATRICES else None
    if called(node) in ("reshape", "view"):
        sizes = node.args[1:]
        if len(sizes) == 1:
            return len(sizes[0]) if isinstance(sizes[0], list | tuple) else None
        return len(sizes) or None
    ranks = [rank_of(model, each) for each in node.all_input_nodes if not _is_size(each)]
    elementwise = operation_kind(node.target) in ("activation", "add", "mul") or node.target in DROPOUTS
    return max(ranks) if elementwise and ranks and None not in ranks else None  # type: ignore[type-var]


_TO_MATRICES = ((1, -1), (0, -2))
"""Start and end of what a flatten joins, so that two dimensions are left of any number."""
_RANKS: dict[type[nn.Module], int] = {
    nn.Conv1d: 3, nn.Conv2d: 4, nn.Conv3d: 5, nn.ConvTranspose1d: 3, nn.ConvTranspose2d: 4, nn.ConvTranspose3d: 5,
}  # fmt: skip
"""Number of dimensions of what a layer returns of a batch."""


def traced_parts(model: nn.Module, prefix: str = "") -> list[tuple[str, fx.GraphModule]]:
    """Return the largest parts of a model that can be traced, with their names: the whole model if it can."""
    if kind_of(model) is not None or not any(True for _ in model.children()):
        return []
    graph_module = trace(model)
    if isinstance(graph_module, fx.GraphModule):
        return [(prefix, graph_module)]
    parts: list[tuple[str, fx.GraphModule]] = []
    for name, child in model.named_children():
        parts += traced_parts(child, f"{prefix}{name}.")
    return parts


def function_op(node: fx.Node) -> str | None:
    """Return the op kind of a functional node, None when it is not one we quantize."""
    if node.op not in ("call_function", "call_method"):
        return None
    op = operation_kind(node.target)
    return op if op and any(each.op != "get_attr" for each in quantizable_inputs(node)) else None


_OUT_OF_PLACE: dict[Any, Any] = {
    operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul,
    "add_": "add", "sub_": "sub", "mul_": "mul", "relu_": "relu", torch.relu_: torch.relu, F.relu_: F.relu,
}  # fmt: skip
"""What computes the same without changing its first argument."""


def made_out_of_place(node: fx.Node) -> bool:
    """Let an operation leave its first argument as it is; return false where somebody would notice.

    Quantizers stand before and behind an operation. What it writes into a tensor would not pass through them.
    """
    told = node.kwargs.get("inplace") is True or any(each is True for each in node.args[1:])
    if node.target not in _OUT_OF_PLACE and not (told and operation_kind(node.target) == "activation"):
        return True
    changed = node.args[0] if node.args else None
    if not isinstance(changed, fx.Node) or not _is_new(changed):
        return False
    places = {each: place for place, each in enumerate(node.graph.nodes)}
    if any(places[user] > places[node] for user in changed.users):
        return False
    node.target = _OUT_OF_PLACE.get(node.target, node.target)
    node.args = tuple(False if each is True else each for each in node.args)
    node.kwargs = {name: False if name == "inplace" else value for name, value in node.kwargs.items()}
    return True


def _is_new(node: fx.Node) -> bool:
    """Return whether a value shares its memory with no other one: a layer or an operation has made it."""
    if KEPT in node.meta:
        return False
    return node.op == "call_module" or (operation_kind(node.target) is not None and node.op.startswith("call_"))


def quantizable_inputs(node: fx.Node) -> list[fx.Node]:
    """Return the inputs of a functional node that are tensors of values: no sizes, no mask."""
    inputs = node.all_input_nodes
    if node.target is F.scaled_dot_product_attention:
        named = dict(zip(("query", "key", "value"), node.args, strict=False))
        inputs = [cast("fx.Node", {**named, **node.kwargs}[name]) for name in ("query", "key", "value")]
    return [each for each in dict.fromkeys(inputs) if not _is_size(each)]


def _is_size(node: fx.Node) -> bool:
    """Return whether a value is a tensor's size, or computed from nothing else."""
    if node.op == "call_method" and node.target in SIZE_METHODS:
        return True
    if node.target is getattr:
        return node.args[1] in SIZE_ATTRIBUTES
    return bool(node.all_input_nodes) and all(_is_size(each) for each in node.all_input_nodes)


def through_identities(part: nn.Module, node: fx.Node) -> fx.Node | None:
    """Return the only user of a node's value, looking past identities and dropout; None when there are several."""
    while len(node.users) == 1:
        (user,) = node.users
        passes = user.op == "call_module" and isinstance(
            part.get_submodule(str(user.target)),
            (nn.Identity, *eligible.DROPOUT),
        )
        if not passes:
            return user
        node = user
    return None
