"""What the model's graph tells: which operations follow which, and where a functional operation's output goes.

Only PyTorch's own symbolic tracing is used. A model it can't trace is traced piece by piece: each part that can be
traced still shows its layers' order, which is what folding needs.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any, cast

from torch import fx, nn

from trainable_torch.layers import FUNCTIONS, kind_of

_DROPOUTS = {
    nn.functional.dropout: nn.Dropout,
    nn.functional.dropout1d: nn.Dropout1d,
    nn.functional.dropout2d: nn.Dropout2d,
    nn.functional.dropout3d: nn.Dropout3d,
    nn.functional.alpha_dropout: nn.AlphaDropout,
}


class _Tracer(fx.Tracer):
    """Stops at every module whose kind is known, at PyTorch's own modules, and at wrappers."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return kind_of(m) is not None or super().is_leaf_module(m, module_qualified_name)


class TracedModel(fx.GraphModule):
    """A graph module whose copies keep what `wrap` noted on it, its hooks and its mode; torch's own lose them."""

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedModel:
        copied = cast("TracedModel", super().__deepcopy__(memo))
        for name, value in self.__dict__.items():
            if name not in copied.__dict__ or name in ("_forward_pre_hooks", "_forward_hooks", "training"):
                copied.__dict__[name] = copy.deepcopy(value, memo)
        return copied


@dataclass(frozen=True)
class Untraceable:
    """Why a module can't be traced."""

    reason: str


def trace(model: nn.Module) -> fx.GraphModule | Untraceable:
    """Return the model as a graph that calls the model's own modules, or why there is none.

    A graph keeps the branches taken while tracing. Dropout called as a function would keep its ``training`` flag, so it
    becomes a module; any other call that was given ``training=`` makes the model untraceable.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracing warns of what the reason below tells
            tracer = _Tracer()
            graph = tracer.trace(model)
            graph_module = TracedModel(model, graph, type(model).__name__)
    except Exception as error:  # noqa: BLE001 - a model's forward may raise anything on a proxy
        text = str(error).split("\n", 1)[0]
        return Untraceable(f"symbolic tracing stopped: {type(error).__name__}: {text}")
    for node in list(graph_module.graph.nodes):
        if node.op != "call_function" or "training" not in node.kwargs:
            continue
        dropout = _DROPOUTS.get(node.target)
        if dropout is None:
            return Untraceable(
                f"{node.name} was traced with training={node.kwargs['training']!r}, which would be frozen in"
            )
        name = f"{node.name}_dropout"
        graph_module.add_submodule(name, dropout(p=node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)))
        with graph_module.graph.inserting_after(node):
            replaced = graph_module.graph.call_module(name, (node.args[0],))
        node.replace_all_uses_with(replaced)
        graph_module.graph.erase_node(node)
    graph_module.recompile()
    graph_module.train(model.training)
    return graph_module


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
    if op is None or not node.args:
        return None
    tensors = [arg for arg in node.all_input_nodes if arg.op != "get_attr"]
    return op if tensors else None


def through_identities(part: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """Return the only user of a node's value, looking past identities and dropout; None when there are several."""
    while len(node.users) == 1:
        (user,) = node.users
        passes = user.op == "call_module" and isinstance(
            part.get_submodule(str(user.target)),
            nn.Identity | nn.modules.dropout._DropoutNd,  # noqa: SLF001 - dropout's base
        )
        if not passes:
            return user
        node = user
    return None
