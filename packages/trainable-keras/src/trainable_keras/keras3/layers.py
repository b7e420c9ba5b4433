"""Which Keras layers are which op kind, and which of their weights can be quantized; the table is core's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import keras

from trainable_core.recipe.layers import LayerInfo, LayerKind
from trainable_keras import layers as keras_layers
from trainable_keras.layers import LayerTypes

TYPES = LayerTypes(keras.layers)
"""Keras's own layer types and those that were registered."""


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


def is_layer(operation: Any) -> bool:
    """Return whether it is a layer, not a functional operation."""
    return isinstance(operation, keras.layers.Layer)


def kind_of(layer: Any) -> LayerKind | None:
    """Return how a layer is quantized, or None when its type is unknown."""
    kind = TYPES.kind_of(layer)
    if kind is None or not kind.weights:
        return kind
    if getattr(layer, "quantization_mode", None):
        return replace(kind, weights={}, unsupported=f"Keras has quantized it to {layer.quantization_mode} already")
    if getattr(layer, "lora_enabled", False):
        return replace(kind, weights={}, unsupported="its weight is computed from LoRA adapters; merge them first")
    return kind


def find_weight(layer: Any, attribute: str) -> keras.Variable | None:
    """Return the variable that an attribute path of a layer leads to, None when it leads to none."""
    return keras_layers.find_weight(layer, attribute, keras.Variable)


def layer_info(name: str, layer: Any, kind: LayerKind) -> LayerInfo:
    """Return what core needs to know of a layer; see `trainable_keras.layers.layer_info`."""
    return keras_layers.layer_info(name, layer, kind, find_weight)
