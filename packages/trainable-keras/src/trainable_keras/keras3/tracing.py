"""The graph of a Keras 3 model, and the op kinds of what it calls.

Keras keeps the graph of a functional or Sequential model in private attributes; only this module reads them.
"""

from __future__ import annotations

from typing import Any

import keras
from keras.src.models.functional import Functional  # there is no public name for it

from trainable_keras.graph import Call, Graph
from trainable_keras.keras3.layers import TYPES, is_layer
from trainable_keras.layers import FUNCTIONS
from trainable_keras.two_classes import own_class


def _is_graph(layer: Any) -> bool:
    """Return whether a layer is a model that Keras runs through as a graph: functional, or Sequential and built.

    One with a `call` of its own class is not: what it runs is not known.
    """
    if isinstance(layer, keras.Sequential):
        return bool(layer.built and layer._functional) and _runs_graph(layer, keras.Sequential)  # noqa: SLF001 - as said above
    return isinstance(layer, Functional) and _runs_graph(layer, Functional)


def _runs_graph(layer: Any, cls: type[Any]) -> bool:
    own = own_class(layer)
    return own.call is cls.call and own.__call__ is cls.__call__


def graph_of(model: Any) -> Graph | None:
    """Return the calls of a functional or Sequential model, None of what has no graph."""
    if not _is_graph(model):
        return None
    functional = model._functional if isinstance(model, keras.Sequential) else model  # noqa: SLF001 - as above
    by_depth = functional._nodes_by_depth  # noqa: SLF001 - as above
    nodes = [node for depth in sorted(by_depth, reverse=True) for node in by_depth[depth]]
    calls = [
        Call(node.operation, node.input_tensors, node.outputs, node.arguments.args, node.arguments.kwargs)
        for node in nodes
        if node.operation is not None and not node.is_input
    ]
    return Graph(calls, functional.outputs, functional.inputs)


def op_of(operation: Any) -> str | None:
    """Return the op kind of a layer or functional operation, None when it is unknown."""
    kind = TYPES.kind_of(operation)
    if kind is not None:
        return kind.op
    return None if is_layer(operation) else FUNCTIONS.get(type(operation).__name__)


def function_of(operation: Any) -> str:
    """Return the name of a functional operation, an empty string for a layer."""
    return "" if is_layer(operation) else type(operation).__name__
