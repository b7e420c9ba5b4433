"""What a model's graph tells: which layers and operations follow which.

Keras keeps the graph of a functional or Sequential model in private attributes; only this module reads them.
"""

from __future__ import annotations

from typing import Any

import keras

from trainable_keras.graph import Call, Graph
from trainable_keras.keras3.layers import kind_of
from trainable_keras.layers import FUNCTIONS


def is_graph(layer: Any) -> bool:
    """Return whether a layer is a model that Keras can run through as a graph: functional, or Sequential and built."""
    if isinstance(layer, keras.Sequential):
        return bool(layer.built)
    return isinstance(layer, keras.Model) and hasattr(layer, "_run_through_graph")


def function_op(operation: Any) -> str | None:
    """Return the op kind of a functional operation, None when it is a layer or not one we quantize."""
    if isinstance(operation, keras.layers.Layer):
        return None
    return FUNCTIONS.get(type(operation).__name__)


def layers_within(layer: Any) -> list[Any]:
    """Return a layer and all layers inside it, each once."""
    found = {id(each): each for each in layer._flatten_layers(include_self=True, recursive=True)}  # noqa: SLF001 - as above
    return list(found.values())


def direct_layers(layer: Any) -> list[Any]:
    """Return the layers that a layer holds itself."""
    return list(layer._flatten_layers(include_self=False, recursive=False))  # noqa: SLF001 - as above


def graph_of(model: Any) -> Graph | None:
    """Return the calls of a functional or Sequential model, None of a layer that `is_graph` refuses."""
    if not is_graph(model):
        return None
    functional = model._functional if isinstance(model, keras.Sequential) else model  # noqa: SLF001 - as above
    by_depth = functional._nodes_by_depth  # noqa: SLF001 - as above
    nodes = [node for depth in sorted(by_depth, reverse=True) for node in by_depth[depth]]
    calls = [
        Call(node.operation, node.input_tensors, node.outputs)
        for node in nodes
        if node.operation is not None and not node.is_input
    ]
    return Graph(calls, functional.outputs)


def op_of(operation: Any) -> str | None:
    """Return the op kind of a layer or functional operation, None when it is unknown."""
    kind = kind_of(operation)
    return function_op(operation) if kind is None else kind.op
