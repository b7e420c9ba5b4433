"""What each call of a deployed model does, as `trainable_core.export.network` tells it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trainable_keras.framework import Framework
from trainable_keras.graph import PASSING
from trainable_keras.operations import CLAMPS, activation_name, clamp_of
from trainable_keras.two_classes import own_class

Shape = tuple[int | None, ...]

CHANNELS_FIRST = "its channels come first"


@dataclass(frozen=True)
class Told:
    """What a call does.

    Parameters
    ----------
    op : str
        As `Step` has it; an empty string where it passes its input on.
    options : mapping
        As `Step` has them.
    obstacle : str
        Why no integer kernel computes it as it is set up; empty where nothing is in the way.
    inputs : int or None
        How many of its inputs it reads; None for all.
    """

    op: str
    options: Mapping[str, Any] = field(default_factory=dict)
    obstacle: str = ""
    inputs: int | None = None


NOTHING = Told("", inputs=1)


def pair(value: Any) -> tuple[int, int]:
    """Return two numbers, given as one or as two."""
    return (int(value[0]), int(value[1])) if isinstance(value, list | tuple) else (int(value), int(value))


def told(framework: Framework, operation: Any, kwargs: Mapping[str, Any], inputs: list[Shape], output: Shape) -> Told:
    """Return what a call does, without the activation function that a layer may have beside.

    Parameters
    ----------
    framework : Framework
        The model's Keras.
    operation : layer or operation
        What is called.
    kwargs : mapping
        What it is called with by name.
    inputs : list of tuple
        Shapes of its inputs.
    output : tuple
        Shape of its first output.
    """
    function = framework.function(operation)
    if function:
        return _function(function, operation, kwargs, inputs, output)
    name = own_class(operation).__name__
    stock = getattr(framework.module.layers, name, None) is own_class(operation)
    if not stock:
        return Told(name, obstacle=f"{name} is a class of its own, and what it computes is not known")
    if name in PASSING or isinstance(operation, framework.passing):
        return NOTHING
    clamp = clamp_of(operation, name, "")
    if clamp is not None:
        return Told("clip", {"low": clamp[0], "high": clamp[1]}, inputs=1)
    make = _LAYERS.get(name)
    return Told(name) if make is None else make(operation, inputs, output)


def activation_of(layer: Any) -> Told | None:
    """Return what the activation function that a layer has beside does; None where there is none."""
    name = activation_name(layer)
    if not name:
        return None
    if name in CLAMPS:
        return Told("clip", dict(zip(("low", "high"), CLAMPS[name], strict=True)))
    if name == "softmax":
        return Told("softmax", {"axis": -1})
    return Told(name)


# ---- layers ---------------------------------------------------------------------------------------------------------


def _layout(layer: Any) -> str:
    return CHANNELS_FIRST if getattr(layer, "data_format", None) == "channels_first" else ""


def _convolution(op: str) -> Callable[[Any, list[Shape], Shape], Told]:
    def make(layer: Any, _: list[Shape], __: Shape) -> Told:
        options = {
            "strides": pair(layer.strides),
            "dilations": pair(layer.dilation_rate),
            "padding": layer.padding,
            "groups": int(getattr(layer, "groups", 1) or 1),
        }
        obstacle = _layout(layer)
        if op == "conv_transpose" and getattr(layer, "output_padding", None) is not None:
            obstacle = obstacle or "its output_padding is given"
        return Told(op, options, obstacle)

    return make


def _pooling(op: str) -> Callable[[Any, list[Shape], Shape], Told]:
    def make(layer: Any, _: list[Shape], __: Shape) -> Told:
        options = {"size": pair(layer.pool_size), "strides": pair(layer.strides), "padding": layer.padding}
        return Told(op, options, _layout(layer))

    return make


def _global_average(layer: Any, inputs: list[Shape], _: Shape) -> Told:
    axes = tuple(range(1, len(inputs[0]) - 1))
    return Told("mean", {"axes": axes, "keepdims": bool(layer.keepdims)}, _layout(layer))


def _global_maximum(layer: Any, inputs: list[Shape], _: Shape) -> Told:
    sizes = inputs[0][1:3]
    if len(inputs[0]) != 4 or None in sizes or not layer.keepdims:  # noqa: PLR2004 - an image
        return Told("max_pool", obstacle="its maximum is over an image of unknown size, or without keepdims")
    return Told("max_pool", {"size": sizes, "strides": sizes, "padding": "valid"}, _layout(layer))


def _reshape(layer: Any, inputs: list[Shape], output: Shape) -> Told:
    unknown = sum(size is None for size in output[1:])
    problem = "the sizes of its output are not known" if unknown and unknown + (output[0] is None) > 1 else ""
    if len(inputs[0]) > 2 and getattr(layer, "data_format", None) == "channels_first":  # noqa: PLR2004 - it turns them
        problem = CHANNELS_FIRST
    return Told("reshape", {"shape": tuple(output[1:])}, problem, inputs=1)


def _padding(layer: Any, _: list[Shape], __: Shape) -> Told:
    (top, bottom), (left, right) = layer.padding
    pads = ((0, 0), (int(top), int(bottom)), (int(left), int(right)), (0, 0))
    return Told("pad", {"pads": pads}, _layout(layer))


def _concatenation(layer: Any, _: list[Shape], __: Shape) -> Told:
    return Told("cat", {"axis": int(layer.axis)})


def _softmax(layer: Any, _: list[Shape], __: Shape) -> Told:
    axis = layer.axis
    several = isinstance(axis, list | tuple) and len(axis) > 1
    first = int(axis[0]) if isinstance(axis, list | tuple) else int(axis)
    return Told("softmax", {"axis": first}, "its softmax is along several axes" if several else "", inputs=1)


def _activation(layer: Any, _: list[Shape], __: Shape) -> Told:
    return activation_of(layer) or NOTHING


_LAYERS: dict[str, Callable[[Any, list[Shape], Shape], Told]] = {
    "Activation": _activation,
    "Add": lambda *_: Told("add"),
    "AveragePooling2D": _pooling("average_pool"),
    "Concatenate": _concatenation,
    "Conv2D": _convolution("conv"),
    "Conv2DTranspose": _convolution("conv_transpose"),
    "Dense": lambda *_: Told("linear"),
    "DepthwiseConv2D": _convolution("depthwise_conv"),
    "Flatten": _reshape,
    "GlobalAveragePooling1D": _global_average,
    "GlobalAveragePooling2D": _global_average,
    "GlobalMaxPooling2D": _global_maximum,
    "MaxPooling2D": _pooling("max_pool"),
    "Multiply": lambda *_: Told("mul"),
    "Reshape": _reshape,
    "Softmax": _softmax,
    "ZeroPadding2D": _padding,
}
"""Keras's layers that can be told, by class name."""


# ---- functional operations ------------------------------------------------------------------------------------------


def _function(name: str, operation: Any, kwargs: Mapping[str, Any], inputs: list[Shape], output: Shape) -> Told:
    """Return what a functional operation does: one of Keras 3 keeps its arguments, TensorFlow's are in the call."""

    def argument(*names: str, default: Any = None) -> Any:
        for each in names:
            if each in kwargs:
                return kwargs[each]
            if hasattr(operation, each):
                return getattr(operation, each)
        return default

    if name in CLAMPS:
        return Told("clip", dict(zip(("low", "high"), CLAMPS[name], strict=True)))
    if name in _TWO:
        constant = "" if len(inputs) == 2 else "one of its operands is a constant without a quantizer"  # noqa: PLR2004 - two operands
        return Told(_TWO[name], obstacle=constant)
    if name in ("Concatenate", "concat"):
        return Told("cat", {"axis": int(argument("axis", default=-1))})
    if name in ("Softmax", "nn.softmax"):
        return Told("softmax", {"axis": int(argument("axis", default=-1))})
    if name in ("Reshape", "Ravel", "ExpandDims", "Squeeze", "reshape", "expand_dims", "squeeze"):
        return _reshape(operation, inputs, output)
    if name in ("Mean", "math.reduce_mean"):
        axis = argument("axis")
        axes = axis if isinstance(axis, list | tuple) else [axis]
        if axis is None or len(inputs[0]) < 3:  # noqa: PLR2004 - rows and channels are no axes of a mean
            return Told(name, obstacle="its mean is over all axes")
        found = tuple(sorted(int(each) % len(inputs[0]) for each in axes))
        return Told("mean", {"axes": found, "keepdims": bool(argument("keepdims", default=False))})
    return Told(name)


_TWO = {
    "Add": "add", "__operators__.add": "add", "math.add": "add", "Multiply": "mul", "math.multiply": "mul",
}  # fmt: skip
"""Functions of two tensors."""
