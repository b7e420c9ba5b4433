"""What the model's graph tells: which operations follow which, and where a functional operation's output goes.

Only PyTorch's own symbolic tracing is used. A model it can't trace is traced piece by piece: each part that can be
traced still shows its layers' order, which is what folding needs.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from torch import fx, nn
from torch.nn import functional as F  # noqa: N812 - the name everyone reads

from trainable_torch.kernels import eligible
from trainable_torch.layers import FUNCTIONS, kind_of

_DROPOUTS: dict[Any, Any] = {
    F.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout,
    F.feature_alpha_dropout: nn.FeatureAlphaDropout,
}
_SIZE_METHODS = {"size", "dim", "ndimension", "numel", "nelement", "stride"}
_SIZE_ATTRIBUTES = {"shape", "ndim", "dtype", "device"}


class _Tracer(fx.Tracer):
    """Stops at every module whose kind is known, at PyTorch's own modules, and at wrappers.

    With `options` false, arguments whose default is None are None instead of being traced.
    """

    def __init__(self, *, options: bool = True) -> None:
        super().__init__()
        self.options = options

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return kind_of(m) is not None or super().is_leaf_module(m, module_qualified_name)

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
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracing warns of what the reason below tells
            traced = _graph(model, training=True)
            others = {"in eval mode": _graph(model, training=False)}
            if any(_is_option(node) for node in traced.graph.nodes):
                others["without its optional arguments"] = _graph(model, training=True, options=False)
    except Exception as error:  # noqa: BLE001 - a model's forward may raise anything on a proxy
        text = str(error).split("\n", 1)[0]
        return Untraceable(f"symbolic tracing stopped: {type(error).__name__}: {text}")
    for when, other in others.items():
        node = _difference(traced, other)
        if node is not None:
            return Untraceable(f"it computes something else {when}, at {node.name}, which a trace would freeze in")
    for node in _dropouts_of(traced, others["in eval mode"]):
        _make_module(traced, node)
    traced.recompile()
    modes = {
        name: getattr(module, "training", False) for name, module in model.named_modules()
    }  # a frozen script has none
    for name, module in traced.named_modules():
        module.training = modes.get(name, model.training)
    return traced


def _graph(model: nn.Module, *, training: bool, options: bool = True) -> TracedModel:
    """Return the trace of a model in one mode; tensors made while tracing become its buffers."""
    with _attributes_kept(model):
        for module in model.modules():
            module.training = training
        graph = _Tracer(options=options).trace(model)
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
        starts_dropping = first.target in _DROPOUTS and not _dropout(first)["training"] and _dropout(second)["training"]
        if _content(one, first, places) != _content(other, second, places) or starts_dropping:
            return first
    return None


def _content(traced: fx.GraphModule, node: fx.Node, places: Mapping[fx.Node, int]) -> Any:
    """Return what a node does, comparable between traces."""
    arguments = (node.args, node.kwargs)
    if node.target in _DROPOUTS:
        arguments = ((), {name: value for name, value in _dropout(node).items() if name != "training"})
    told = fx.map_arg(arguments, lambda each: None if _is_option(each) else ("node", places[each]))
    if node.op == "get_attr" and str(node.target).startswith("_tensor_constant"):
        constant = getattr(traced, str(node.target))
        return node.op, constant.dtype, constant.tolist()
    return node.op, node.target, told


def _dropout(node: fx.Node) -> dict[str, Any]:
    """Return a dropout function's arguments by name."""
    defaults = {"p": 0.5, "training": node.target not in (F.alpha_dropout, F.feature_alpha_dropout), "inplace": False}
    return {**defaults, **dict(zip(("input", *defaults), node.args, strict=False)), **node.kwargs}


def _dropouts_of(trained: fx.GraphModule, evaluated: fx.GraphModule) -> list[fx.Node]:
    """Return the dropout functions that work in train mode only."""
    pairs = zip(trained.graph.nodes, evaluated.graph.nodes, strict=True)
    return [
        node
        for node, other in pairs
        if node.target in _DROPOUTS and _dropout(node)["training"] and not _dropout(other)["training"]
    ]


def _make_module(traced: fx.GraphModule, node: fx.Node) -> None:
    """Put a module in the place of a dropout function."""
    arguments, name = _dropout(node), f"{node.name}_dropout"
    traced.add_submodule(name, _DROPOUTS[node.target](p=arguments["p"], inplace=arguments["inplace"]))
    with traced.graph.inserting_after(node):
        replaced = traced.graph.call_module(name, (arguments["input"],))
    node.replace_all_uses_with(replaced)
    traced.graph.erase_node(node)


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
    op = FUNCTIONS.get(node.target)
    return op if op and any(each.op != "get_attr" for each in quantizable_inputs(node)) else None


def quantizable_inputs(node: fx.Node) -> list[fx.Node]:
    """Return the inputs of a functional node that are tensors of values: no sizes, no mask."""
    inputs = node.all_input_nodes
    if node.target is F.scaled_dot_product_attention:
        named = dict(zip(("query", "key", "value"), node.args, strict=False))
        inputs = [cast("fx.Node", {**named, **node.kwargs}[name]) for name in ("query", "key", "value")]
    return [each for each in dict.fromkeys(inputs) if not _is_size(each)]


def _is_size(node: fx.Node) -> bool:
    """Return whether a value is a tensor's size, or computed from nothing else."""
    if node.op == "call_method" and node.target in _SIZE_METHODS:
        return True
    if node.target is getattr:
        return node.args[1] in _SIZE_ATTRIBUTES
    return bool(node.all_input_nodes) and all(_is_size(each) for each in node.all_input_nodes)


def through_identities(part: fx.GraphModule, node: fx.Node) -> fx.Node | None:
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
