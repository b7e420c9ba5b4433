"""What each call of a deployed model does, as `trainable_core.export.network` tells it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainable_keras.batch_norm import Simulated
from trainable_keras.framework import Framework
from trainable_keras.graph import PASSING, Call
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
    is_row : bool
        Whether it is told as of an image of one row: its input has one axis between rows and channels.
    """

    op: str
    options: Mapping[str, Any] = field(default_factory=dict)
    obstacle: str = ""
    inputs: int | None = None
    is_row: bool = False


NOTHING = Told("", inputs=1)


def pair(value: Any) -> tuple[int, int]:
    """Return two numbers, given as one or as two."""
    return (int(value[0]), int(value[1])) if isinstance(value, list | tuple) else (int(value), int(value))


def told(framework: Framework, operation: Any, call: Call, inputs: list[Shape], output: Shape) -> Told:
    """Return what a call does, without the activation function that a layer may have beside.

    Parameters
    ----------
    framework : Framework
        The model's Keras.
    operation : layer or operation
        What is called.
    call : Call
        With what it is called.
    inputs : list of tuple
        Shapes of its inputs.
    output : tuple
        Shape of its first output.
    """
    function = framework.function(operation)
    if function:
        return _function(function, operation, call, inputs, output)
    name = own_class(operation).__name__
    stock = getattr(framework.module.layers, name, None) is own_class(operation)
    if not stock:
        return Told(name, obstacle=f"{name} is a class of its own, and what it computes is not known")
    if name in PASSING or isinstance(operation, (framework.passing, Simulated)):
        return NOTHING
    clamp = clamp_of(operation, name, "")
    if clamp is not None:
        return Told("clip", {"low": clamp[0], "high": clamp[1]}, inputs=1)
    if name in _OF_NUMBERS:
        return _OF_NUMBERS[name](framework.functions.to_numpy, operation, inputs[0])
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
    return _elementwise(name, layer, lambda *_, default: default)


def _elementwise(name: str, operation: Any, argument: Callable[..., Any]) -> Told:
    """Return what an activation function does that is more than a clamp.

    Parameters
    ----------
    name : str
        Of the function.
    operation : layer or operation
        What calls it.
    argument : callable
        Returns an argument of it by its names, with a default.
    """
    op = ACTIVATIONS.get(name, name)
    if op == "hard_sigmoid" and own_class(operation).__module__.startswith(_OF_A_FIFTH):
        return Told(op, obstacle="its slope is a fifth, and what is known is the one of a sixth")
    if op == "leaky_relu":
        return Told(op, {"slope": float(argument("negative_slope", "alpha", default=0.2))})
    if op == "gelu" and argument("approximate", default=False):
        return Told(op, obstacle="it is approximated by a tanh")
    if op == "elu" and float(argument("alpha", default=1.0)) != 1.0:
        return Told(op, obstacle=f"its slope is {argument('alpha', default=1.0)}, and kernels have 1")
    return Told(op)


ACTIVATIONS = {
    "Elu": "elu", "Gelu": "gelu", "HardSigmoid": "hard_sigmoid", "HardSilu": "hard_swish", "LeakyRelu": "leaky_relu",
    "Sigmoid": "sigmoid", "Silu": "silu", "Tanh": "tanh",
    "hard_silu": "hard_swish", "swish": "silu",
    "math.sigmoid": "sigmoid", "sigmoid": "sigmoid", "math.tanh": "tanh", "nn.elu": "elu", "nn.gelu": "gelu",
    "nn.leaky_relu": "leaky_relu", "nn.silu": "silu", "nn.swish": "silu",
}  # fmt: skip
"""Activation functions by the names that Keras 3, TensorFlow and layers have for them."""

_OF_A_FIFTH = "tf_keras"
"""The Keras whose `hard_sigmoid` is ``clip(0.2 x + 0.5)``; of the other it is ``relu6(x + 3) / 6``."""


# ---- layers ---------------------------------------------------------------------------------------------------------


def _layout(layer: Any) -> str:
    return CHANNELS_FIRST if getattr(layer, "data_format", None) == "channels_first" else ""


def _of_row(value: Any) -> tuple[int, int]:
    """Return a number for the one axis of a row as those of an image of one row."""
    return (1, int(value[0] if isinstance(value, list | tuple) else value))


def _convolution_of_row(op: str) -> Callable[[Any, list[Shape], Shape], Told]:
    def make(layer: Any, _: list[Shape], __: Shape) -> Told:
        strides, dilations = _of_row(layer.strides), _of_row(layer.dilation_rate)
        groups = int(getattr(layer, "groups", 1) or 1)
        options = {"strides": strides, "dilations": dilations, "padding": layer.padding, "groups": groups}
        causal = "its padding is causal" if layer.padding == "causal" else ""
        return Told(op, options, _layout(layer) or causal, is_row=True)

    return make


def _pooling_of_row(op: str) -> Callable[[Any, list[Shape], Shape], Told]:
    def make(layer: Any, _: list[Shape], __: Shape) -> Told:
        options = {"size": _of_row(layer.pool_size), "strides": _of_row(layer.strides), "padding": layer.padding}
        return Told(op, options, _layout(layer), is_row=True)

    return make


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
    axes = tuple(range(1, len(inputs[0]) - 1))
    return Told("max", {"axes": axes, "keepdims": bool(layer.keepdims)}, _layout(layer))


def _upsampling(layer: Any, inputs: list[Shape], output: Shape) -> Told:
    op = {"nearest": "resize_nearest", "bilinear": "resize_bilinear"}.get(layer.interpolation)
    if op is None:
        return Told("resize", obstacle=f"its interpolation is {layer.interpolation}")
    unknown = "the size of its input is not known" if None in inputs[0][1:3] else ""
    return Told(op, {"size": output[1:3]}, _layout(layer) or unknown)


def _cropping(layer: Any, _: list[Shape], output: Shape) -> Told:
    top, left = (int(each[0]) for each in layer.cropping)
    unknown = "the size of its input is not known" if None in output[1:3] else ""
    return Told("crop", {"begins": (0, top, left, 0)}, _layout(layer) or unknown)


def _separable(layer: Any, _: list[Shape], __: Shape) -> Told:
    return Told(
        type(layer).__name__,
        obstacle="between its two convolutions there is no quantizer; a DepthwiseConv2D and a Conv2D have one",
    )


def _leaky_relu(layer: Any, _: list[Shape], __: Shape) -> Told:
    slope = getattr(layer, "negative_slope", getattr(layer, "alpha", None))
    return Told("leaky_relu", {"slope": float(np.asarray(slope))})


def _elu(layer: Any, _: list[Shape], __: Shape) -> Told:
    slope = float(np.asarray(layer.alpha))
    return Told("elu", obstacle="" if slope == 1.0 else f"its slope is {slope}, and kernels have 1")


# ---- layers of numbers that are no weights --------------------------------------------------------------------------


def _is_along_channels(value: NDArray[Any], shape: Shape) -> bool:
    """Return whether there is one number, or one for each channel."""
    return value.size in (1, shape[-1])


def _rescaling(_: Callable[[Any], NDArray[Any]], layer: Any, shape: Shape) -> Told:
    numbers = [np.asarray(each, np.float32).reshape(-1) for each in (layer.scale, layer.offset)]
    problem = "" if all(_is_along_channels(each, shape) for each in numbers) else "its scales are not of channels"
    return Told("arithmetic", {"parts": (("mul", numbers[0]), ("add", numbers[1]))}, problem)


def _normalization(to_numpy: Callable[[Any], NDArray[Any]], layer: Any, shape: Shape) -> Told:
    mean, variance = (np.asarray(to_numpy(each), np.float32).reshape(-1) for each in (layer.mean, layer.variance))
    deviation = np.maximum(np.sqrt(variance), np.float32(1e-7))
    is_known = _is_along_channels(mean, shape) and not getattr(layer, "invert", False)
    problem = "" if is_known else "its means are not of channels, or it is inverted"
    return Told("arithmetic", {"parts": (("sub", mean), ("div", deviation))}, problem)


def _batch_normalization(to_numpy: Callable[[Any], NDArray[Any]], layer: Any, shape: Shape) -> Told:
    axes = layer.axis if isinstance(layer.axis, list | tuple) else [layer.axis]
    if [int(axis) % len(shape) for axis in axes] != [len(shape) - 1]:
        return Told("BatchNormalization", obstacle=CHANNELS_FIRST)
    mean, variance = (np.asarray(to_numpy(each), np.float32) for each in (layer.moving_mean, layer.moving_variance))
    inverse = np.float32(1) / np.sqrt(variance + np.float32(layer.epsilon))
    if layer.gamma is not None:
        inverse = inverse * to_numpy(layer.gamma)
    shift = -mean * inverse
    if layer.beta is not None:
        shift = to_numpy(layer.beta) + shift
    return Told("arithmetic", {"parts": (("mul", inverse), ("add", shift))}, inputs=1)


_OF_NUMBERS = {
    "BatchNormalization": _batch_normalization,
    "Normalization": _normalization,
    "Rescaling": _rescaling,
}
"""Layers that compute with numbers that are no weights, by class name."""


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
    "AveragePooling1D": _pooling_of_row("average_pool"),
    "AveragePooling2D": _pooling("average_pool"),
    "Concatenate": _concatenation,
    "Conv1D": _convolution_of_row("conv"),
    "Conv2D": _convolution("conv"),
    "Conv2DTranspose": _convolution("conv_transpose"),
    "Dense": lambda *_: Told("linear"),
    "Cropping2D": _cropping,
    "DepthwiseConv1D": _convolution_of_row("depthwise_conv"),
    "DepthwiseConv2D": _convolution("depthwise_conv"),
    "ELU": _elu,
    "Flatten": _reshape,
    "GlobalAveragePooling1D": _global_average,
    "GlobalAveragePooling2D": _global_average,
    "GlobalMaxPooling1D": _global_maximum,
    "GlobalMaxPooling2D": _global_maximum,
    "LeakyReLU": _leaky_relu,
    "MaxPooling1D": _pooling_of_row("max_pool"),
    "MaxPooling2D": _pooling("max_pool"),
    "Multiply": lambda *_: Told("mul"),
    "Reshape": _reshape,
    "SeparableConv1D": _separable,
    "SeparableConv2D": _separable,
    "Softmax": _softmax,
    "UpSampling2D": _upsampling,
    "ZeroPadding2D": _padding,
}
"""Keras's layers that can be told, by class name."""


# ---- functional operations ------------------------------------------------------------------------------------------


def _function(name: str, operation: Any, call: Call, inputs: list[Shape], output: Shape) -> Told:
    """Return what a functional operation does: one of Keras 3 keeps its arguments, TensorFlow's are in the call."""
    kwargs = call.kwargs or {}

    def argument(*names: str, default: Any = None) -> Any:
        for each in names:
            if each in kwargs:
                return kwargs[each]
            if hasattr(operation, each):
                return getattr(operation, each)
        return default

    if name in CLAMPS:
        return Told("clip", dict(zip(("low", "high"), CLAMPS[name], strict=True)))
    if name in _WITH_NUMBERS and len(inputs) == 1:
        return _with_number(_WITH_NUMBERS[name], call, inputs[0])
    if name in _TWO:
        return Told(_TWO[name])
    if name in ACTIVATIONS:
        return _elementwise(name, operation, argument)
    if name in ("Reshape", "Ravel", "ExpandDims", "Squeeze", "reshape", "expand_dims", "squeeze"):
        return _reshape(operation, inputs, output)
    return _along_axes(name, argument, inputs)


def _along_axes(name: str, argument: Callable[..., Any], inputs: list[Shape]) -> Told:
    """Return what a functional operation does that has an axis or some."""
    if name in ("Concatenate", "concat"):
        return Told("cat", {"axis": int(argument("axis", default=-1))})
    if name in ("Softmax", "nn.softmax"):
        return Told("softmax", {"axis": int(argument("axis", default=-1))})
    if name in ("Mean", "math.reduce_mean"):
        axis = argument("axis")
        axes = axis if isinstance(axis, list | tuple) else [axis]
        if axis is None or len(inputs[0]) < 3:  # noqa: PLR2004 - rows and channels are no axes of a mean
            return Told(name, obstacle="its mean is over all axes")
        found = tuple(sorted(int(each) % len(inputs[0]) for each in axes))
        return Told("mean", {"axes": found, "keepdims": bool(argument("keepdims", default=False))})
    return Told(name)


def _with_number(op: str, call: Call, shape: Shape) -> Told:
    """Return what a function of a tensor and a number, or a number for each channel, does."""
    operands = [*call.args, *(call.kwargs or {}).values()]
    numbers = [each for each in operands[:2] if isinstance(each, int | float | np.ndarray | np.number)]
    is_first = bool(operands) and operands[0] is numbers[0] if numbers else False
    if len(numbers) != 1 or (is_first and op in ("sub", "div")):
        return Told(op, obstacle="one of its operands is a constant that is not known as a number")
    value = np.asarray(numbers[0], np.float32).reshape(-1)
    problem = "" if _is_along_channels(value, shape) else "one of its operands is a constant tensor"
    return Told("arithmetic", {"parts": ((op, value),)}, problem, inputs=1)


_WITH_NUMBERS = {
    "Add": "add", "Divide": "div", "Multiply": "mul", "Subtract": "sub", "TrueDivide": "div",
    "__operators__.add": "add", "math.add": "add", "math.divide": "div", "math.multiply": "mul", "math.subtract": "sub",
    "math.truediv": "div",
}  # fmt: skip
"""Functions of two tensors, or of one and a number."""

_TWO = {
    "Add": "add", "__operators__.add": "add", "math.add": "add", "Multiply": "mul", "math.multiply": "mul",
}  # fmt: skip
"""Functions of two tensors."""
