"""Which Keras layers are which op kind, and which of their weights can be quantized; the table is core's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import tensorflow as tf

from trainable_core.recipe.layers import LayerInfo, LayerKind
from trainable_keras import layers as keras_layers
from trainable_keras.keras2.engine import keras
from trainable_keras.layers import FUNCTIONS_OF_TENSORFLOW, LayerTypes

TYPES = LayerTypes(keras.layers)
"""Keras's own layer types and those that were registered."""

_OPERATIONS = frozenset(
    {"TFOpLambda", "SlicingOpLambda", "TensorFlowOpLayer", "ClassMethod", "InstanceMethod", "InstanceProperty"}
)
"""Layer types that Keras makes of TensorFlow functions called on its symbolic tensors."""


DEPTHWISE_KERNEL = "depthwise_kernel"
"""What Keras 2 calls the kernel of a depthwise convolution."""

_DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)


def register_layer(
    cls: type, op: str, weights: Mapping[str, int] | None = None, inputs: tuple[str, ...] = ("inputs",)
) -> None:
    """Tell how a layer type of your own is quantized.

    Parameters
    ----------
    cls : type
        Layer type; subclasses are meant too.
    op : str
        Its op kind, one of `trainable_core.recipe.document.OPS`.
    weights : mapping of str to int, optional
        Axis of the output channels, by weight attribute.
    inputs : tuple of str
        Names of its tensor arguments, in positional order.

    Raises
    ------
    InvalidArgumentError
        When the op kind is unknown, `cls` is no layer type, or an axis or a name is not one.
    """
    TYPES.register(cls, op, weights, inputs)


def is_operation(layer: Any) -> bool:
    """Return whether a layer of a graph is a TensorFlow function."""
    return type(layer).__name__ in _OPERATIONS


def is_layer(layer: Any) -> bool:
    """Return whether it is a layer with a purpose of its own, not one that stands for a TensorFlow function."""
    return not is_operation(layer)


def function_op(operation: Any) -> str | None:
    """Return the op kind of a functional operation, None when it is a layer or not one we quantize."""
    return FUNCTIONS_OF_TENSORFLOW.get(str(operation.symbol)) if hasattr(operation, "symbol") else None


def kind_of(layer: Any) -> LayerKind | None:
    """Return how a layer is quantized, or None when its type is unknown."""
    kind = TYPES.kind_of(layer)
    if kind is not None and kind.op == "depthwise_conv" and isinstance(layer, _DEPTHWISE):
        return replace(kind, weights={DEPTHWISE_KERNEL: kind.weights["kernel"]})
    return kind


def find_weight(layer: Any, attribute: str) -> Any | None:
    """Return the variable that an attribute path of a layer leads to, None when it leads to none."""
    return keras_layers.find_weight(layer, attribute, tf.Variable)


def layer_info(name: str, layer: Any, kind: LayerKind) -> LayerInfo:
    """Return what core needs to know of a layer; see `trainable_keras.layers.layer_info`."""
    return keras_layers.layer_info(name, layer, kind, find_weight)
