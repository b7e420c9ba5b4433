"""Which Keras layers are which op kind, and which of their weights can be quantized; the table is core's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import keras

from trainable_core.errors import ModelError, ShapeMismatchError, UnsupportedConfigError
from trainable_core.keras_layers import KINDS, LIST, einsum_channels_axis
from trainable_core.plan import LayerInfo, LayerKind, WeightInfo, declared_kind

_REGISTERED: dict[type, LayerKind] = {}


def register_layer(
    cls: type, op: str, weights: Mapping[str, int] | None = None, inputs: tuple[str, ...] = ("inputs",)
) -> None:
    """Tell how a layer type of your own is quantized.

    Parameters
    ----------
    cls : type
        Layer type; subclasses are meant too.
    op : str
        Its op kind, one of `trainable_core.recipe.OPS`.
    weights : mapping of str to int, optional
        Axis of the output channels, by weight attribute.
    inputs : tuple of str
        Names of its tensor arguments, in positional order.

    Raises
    ------
    UnsupportedConfigError
        When the op kind is unknown, `cls` is no layer type, or an axis or a name is not one.
    """
    if not (isinstance(cls, type) and issubclass(cls, keras.layers.Layer)):
        raise UnsupportedConfigError("register_layer", f"{cls!r} is not a subclass of keras.layers.Layer")
    _REGISTERED[cls] = declared_kind(op, weights, inputs)


def kind_of(layer: Any) -> LayerKind | None:
    """Return how a layer is quantized, or None when its type is unknown."""
    for cls in type(layer).__mro__:
        kind = _REGISTERED.get(cls)
        if kind is None and getattr(keras.layers, cls.__name__, None) is cls:
            kind = KINDS.get(cls.__name__)
        if kind is not None:
            break
    else:
        return None
    if kind.weights and getattr(layer, "quantization_mode", None):
        return replace(kind, weights={}, unsupported=f"Keras has quantized it to {layer.quantization_mode} already")
    if kind.weights and getattr(layer, "lora_enabled", False):
        return replace(kind, weights={}, unsupported="its weight is computed from LoRA adapters; merge them first")
    if isinstance(layer, keras.layers.EinsumDense):
        try:
            axis = einsum_channels_axis(layer.equation)
        except UnsupportedConfigError as error:
            return replace(kind, weights={}, unsupported=error.problem)
        return replace(kind, weights={"kernel": axis})
    if kind.inputs and kind.inputs[0].endswith(LIST):
        shapes = (layer.get_build_config() or {}).get("input_shape") or ()
        name = kind.inputs[0].removesuffix(LIST)
        return replace(kind, inputs=tuple(f"{name}.{index}" for index in range(len(shapes))))
    return kind


def find_weight(layer: Any, attribute: str) -> keras.Variable | None:
    """Return the variable that an attribute path of a layer leads to, None when it leads to none."""
    owner = layer
    for part in attribute.split("."):
        owner = getattr(owner, part, getattr(owner, f"_{part}", None))
    return owner if isinstance(owner, keras.Variable) else None


def weight_of(layer: Any, attribute: str) -> keras.Variable:
    """Return the variable that an attribute path of a layer leads to.

    Raises
    ------
    UnsupportedConfigError
        When there is none.
    """
    found = find_weight(layer, attribute)
    if found is None:
        raise UnsupportedConfigError("QuantizationWrapper", f"the layer has no weight {attribute!r}")
    return found


def layer_info(name: str, layer: Any, kind: LayerKind) -> LayerInfo:
    """Return what core needs to know of a layer.

    Raises
    ------
    ModelError
        When the layer is not built, or has no weight of a registered name.
    ShapeMismatchError
        When a registered axis is not one of the weight's.
    """
    if kind.weights and not layer.built:
        raise ModelError(f"layer {name!r} has no weights yet", "build the model, or call it once with an example.")
    weights = {}
    for attribute, axis in kind.weights.items():
        weight = find_weight(layer, attribute)
        if weight is None:
            raise ModelError(
                f"layer {name!r} has no weight {attribute!r}", f"register_layer({type(layer).__name__}, ...) names it."
            )
        shape = tuple(weight.shape)
        if not -len(shape) <= axis < len(shape):
            raise ShapeMismatchError(f"{name}.{attribute}", f"an axis of a tensor of shape {shape}", axis)
        weights[attribute] = WeightInfo(shape, axis % len(shape))
    return LayerInfo(name, kind.op, weights)
