"""How Keras 3's layers are quantized: the shared table, and what of it Keras itself has quantized or adapted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import keras

from trainable_core.recipe.layers import LayerKind
from trainable_keras.layers import LayerTypes


class _LayerTypes(LayerTypes):
    def kind_of(self, layer: Any) -> LayerKind | None:
        """Return how a layer is quantized, or None when its type is unknown."""
        kind = super().kind_of(layer)
        if kind is None or not kind.weights:
            return kind
        if getattr(layer, "quantization_mode", None):
            return replace(kind, weights={}, unsupported=f"Keras has quantized it to {layer.quantization_mode} already")
        if getattr(layer, "lora_enabled", False):
            return replace(kind, weights={}, unsupported="its weight is computed from LoRA adapters; merge them first")
        return kind


TYPES = _LayerTypes(keras.layers, keras.Variable)
"""Keras's own layer types and those that were registered."""


def is_layer(operation: Any) -> bool:
    """Return whether it is a layer, not a functional operation."""
    return isinstance(operation, keras.layers.Layer)
