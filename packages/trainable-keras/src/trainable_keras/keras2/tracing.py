"""What a model's graph tells: which layers and operations follow which.

Keras keeps the graph of a functional or Sequential model in private attributes; only this module reads them.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from trainable_keras.graph import Call, Graph
from trainable_keras.keras2.engine import keras
from trainable_keras.keras2.layers import function_op, is_operation, kind_of


def is_graph(layer: Any) -> bool:
    """Return whether a layer is a model that Keras can run through as a graph: functional, or Sequential and built."""
    return isinstance(layer, keras.Model) and bool(getattr(layer, "_is_graph_network", False))


def graph_of(model: Any) -> Graph | None:
    """Return the calls of a functional or Sequential model, None of a layer that `is_graph` refuses."""
    if not is_graph(model):
        return None
    by_depth = model._nodes_by_depth  # noqa: SLF001 - as said above
    nodes = [node for depth in sorted(by_depth, reverse=True) for node in by_depth[depth] if not node.is_input]
    calls = [
        Call(
            node.layer,
            list(node.keras_inputs),
            tf.nest.flatten(node.outputs),
            tuple(node.call_args),
            dict(node.call_kwargs),
        )
        for node in nodes
    ]
    return Graph(calls, tf.nest.flatten(model.outputs))


def op_of(operation: Any) -> str | None:
    """Return the op kind of a layer or a functional operation, None where it is unknown."""
    if is_operation(operation):
        return function_op(operation)
    kind = kind_of(operation)
    return None if kind is None else kind.op


def layers_within(layer: Any) -> list[Any]:
    """Return a layer and all layers inside it, each once."""
    found = {id(each): each for each in layer._flatten_layers(include_self=True, recursive=True)}  # noqa: SLF001 - as above
    return list(found.values())


def direct_layers(layer: Any) -> list[Any]:
    """Return the layers that a layer holds itself."""
    return list(layer._flatten_layers(include_self=False, recursive=False))  # noqa: SLF001 - as above
