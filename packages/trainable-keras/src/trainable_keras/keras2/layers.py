"""How Keras 2's layers are quantized: the shared table, and the one weight that has another name here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import tensorflow as tf

from trainable_core.recipe.layers import LayerKind
from trainable_keras.keras2.engine import keras
from trainable_keras.layers import DEPTHWISE_KERNEL, LayerTypes

_OPERATIONS = frozenset(
    {"TFOpLambda", "SlicingOpLambda", "TensorFlowOpLayer", "ClassMethod", "InstanceMethod", "InstanceProperty"}
)
"""Layer types that Keras makes of TensorFlow functions called on its symbolic tensors."""

_DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)


class _LayerTypes(LayerTypes):
    def kind_of(self, layer: Any) -> LayerKind | None:
        """Return how a layer is quantized, or None when its type is unknown."""
        kind = super().kind_of(layer)
        if kind is not None and kind.op == "depthwise_conv" and isinstance(layer, _DEPTHWISE):
            return replace(kind, weights={DEPTHWISE_KERNEL: kind.weights["kernel"]})
        return kind


TYPES = _LayerTypes(keras.layers, tf.Variable)
"""Keras's own layer types and those that were registered."""


def is_operation(layer: Any) -> bool:
    """Return whether a layer of a graph is a TensorFlow function."""
    return type(layer).__name__ in _OPERATIONS


def is_layer(operation: Any) -> bool:
    """Return whether it is a layer with a purpose of its own, not one that stands for a TensorFlow function."""
    return not is_operation(operation)
