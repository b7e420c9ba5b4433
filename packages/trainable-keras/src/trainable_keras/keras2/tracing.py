"""The graph of a Keras 2 model, and the op kinds of what it calls.

Keras keeps the graph of a functional or Sequential model in private attributes; only this module reads them.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from trainable_keras.graph import Call, Graph
from trainable_keras.keras2.engine import keras
from trainable_keras.keras2.layers import TYPES, is_operation
from trainable_keras.layers import FUNCTIONS_OF_TENSORFLOW
from trainable_keras.two_classes import own_class


def graph_of(model: Any) -> Graph | None:
    """Return the calls of a functional or Sequential model, None of what has no graph.

    A model with a `call` of its own class has none: what it runs is not known.
    """
    if not (isinstance(model, keras.Model) and getattr(model, "_is_graph_network", False)):
        return None
    if str(own_class(model).call.__module__).partition(".")[0] != keras.Model.__module__.partition(".")[0]:
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
    return Graph(calls, tf.nest.flatten(model.outputs), tf.nest.flatten(model.inputs))


def op_of(operation: Any) -> str | None:
    """Return the op kind of a layer or a functional operation, None where it is unknown."""
    if is_operation(operation):
        return FUNCTIONS_OF_TENSORFLOW.get(str(operation.symbol)) if hasattr(operation, "symbol") else None
    kind = TYPES.kind_of(operation)
    return None if kind is None else kind.op


def function_of(operation: Any) -> str:
    """Return the name of a functional operation, an empty string for a layer."""
    return str(getattr(operation, "symbol", type(operation).__name__)) if is_operation(operation) else ""
