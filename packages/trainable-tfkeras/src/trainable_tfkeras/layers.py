"""Which Keras layers are which op kind, and which of their weights can be quantized; the table is core's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import tensorflow as tf

from trainable_core.errors import ModelError, UnsupportedConfigError
from trainable_core.keras_layers import FUNCTIONS_OF_TENSORFLOW, KINDS, LIST, LayerKind, einsum_channels_axis
from trainable_core.plan import OPS, LayerInfo, WeightInfo
from trainable_tfkeras.engine import keras

_REGISTERED: dict[type, LayerKind] = {}

_OPERATIONS = frozenset(
    {"TFOpLambda", "SlicingOpLambda", "TensorFlowOpLayer", "ClassMethod", "InstanceMethod", "InstanceProperty"}
)
"""Layer types that Keras makes of TensorFlow functions called on its symbolic tensors."""


DEPTHWISE_KERNEL = "depthwise_kernel"
"""What Keras 2 calls the kernel of a depthwise convolution."""


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
        When the op kind is unknown or `cls` is no layer type.
    """
    if not (isinstance(cls, type) and issubclass(cls, keras.layers.Layer)):
        raise UnsupportedConfigError("register_layer", f"{cls!r} is not a subclass of tf.keras.layers.Layer")
    if op not in OPS:
        raise UnsupportedConfigError("register_layer", f"op {op!r} is not one of {', '.join(OPS)}")
    _REGISTERED[cls] = LayerKind(op, dict(weights or {}), tuple(inputs))


def is_operation(layer: Any) -> bool:
    """Return whether a layer of a graph is a TensorFlow function."""
    return type(layer).__name__ in _OPERATIONS


def function_op(operation: Any) -> str | None:
    """Return the op kind of a functional operation, None when it is a layer or not one we quantize."""
    return FUNCTIONS_OF_TENSORFLOW.get(str(operation.symbol)) if hasattr(operation, "symbol") else None


def stock_name(layer: Any) -> str:
    """Return the class name of a layer of Keras's own, an empty string for a subclass."""
    name = type(layer).__name__
    return name if getattr(keras.layers, name, None) is type(layer) else ""


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
    if kind.op == "depthwise_conv" and isinstance(layer, (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)):
        return replace(kind, weights={DEPTHWISE_KERNEL: kind.weights["kernel"]})
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


def owner_of(layer: Any, attribute: str) -> list[tuple[Any, str]]:
    """Return (layer, attribute) for each step of an attribute path: the last is the weight's owner and its name.

    Raises
    ------
    UnsupportedConfigError
        When it leads to no variable.
    """
    steps: list[tuple[Any, str]] = []
    owner = layer
    for part in attribute.split("."):
        name = part if hasattr(owner, part) else f"_{part}"
        steps.append((owner, name))
        owner = getattr(owner, name, None)
    if not isinstance(owner, tf.Variable):
        raise UnsupportedConfigError(f"{layer.name}: {attribute}", "the layer has no such weight")
    return steps


def weight_of(layer: Any, attribute: str) -> Any:
    """Return the variable that an attribute path of a layer leads to; UnsupportedConfigError when there is none."""
    owner, name = owner_of(layer, attribute)[-1]
    return getattr(owner, name)


def layer_info(name: str, layer: Any, kind: LayerKind) -> LayerInfo:
    """Return what core needs to know of a layer.

    Raises
    ------
    ModelError
        When the layer is not built.
    """
    if kind.weights and not layer.built:
        raise ModelError(f"layer {name!r} has no weights yet", "build the model, or call it once with an example.")
    weights = {}
    for attribute, axis in kind.weights.items():
        shape = tuple(weight_of(layer, attribute).shape)
        weights[attribute] = WeightInfo(shape, axis % len(shape))
    return LayerInfo(name, kind.op, weights)
