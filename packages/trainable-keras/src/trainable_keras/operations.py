"""What layers and functional operations do with single values, whichever Keras they are of: clamp, pass on, compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trainable_keras.graph import PASSING

Clamp = tuple[float | None, float | None]
"""The lowest and the highest value that a clamp leaves; None where it leaves all."""

_MOVING = PASSING | {
    "Cropping1D", "Cropping2D", "Cropping3D", "Flatten", "GlobalMaxPooling1D", "GlobalMaxPooling2D",
    "GlobalMaxPooling3D", "MaxPooling1D", "MaxPooling2D", "MaxPooling3D", "Permute", "RepeatVector", "Reshape",
    "UpSampling1D", "UpSampling2D", "UpSampling3D", "ZeroPadding1D", "ZeroPadding2D", "ZeroPadding3D",
}  # fmt: skip
"""Names of Keras's layers whose results hold values of their input, and zeros; in inference."""

_MOVING_FUNCTIONS = frozenset(
    (
        "ExpandDims", "Flip", "GetItem", "Max", "MaxPool", "Moveaxis", "Ravel", "Repeat", "Reshape", "Roll", "Squeeze",
        "Swapaxes", "Tile", "Transpose",
        "__operators__.getitem", "expand_dims", "math.reduce_max", "nn.max_pool", "nn.max_pool2d", "reshape",
        "squeeze", "tile", "transpose",
    )
)  # fmt: skip
"""Functional operations of which the same holds, by their names in Keras 3 and in TensorFlow."""

CLAMPS: dict[str, Clamp] = {
    "Relu": (0.0, None),
    "Relu6": (0.0, 6.0),
    "nn.relu": (0.0, None),
    "nn.relu6": (0.0, 6.0),
    "relu": (0.0, None),
    "relu6": (0.0, 6.0),
}
"""Functions that clamp, by the name of an operation or of an activation function."""


def activation_name(layer: Any) -> str:
    """Return the name of a layer's activation function; empty where it has none that changes anything."""
    name = str(getattr(getattr(layer, "activation", None), "__name__", getattr(layer, "activation", None) or ""))
    return "" if name == "linear" else name


def clamp_of(operation: Any, stock: str, function: str) -> Clamp | None:
    """Return what an activation clamps its input to; None where it does something else.

    Parameters
    ----------
    operation : layer or operation
        What is called.
    stock : str
        Class name of a layer of Keras's own, an empty string for anything else.
    function : str
        Name of a functional operation, an empty string for a layer.
    """
    if function:
        return CLAMPS.get(function)
    if stock == "Activation":
        return CLAMPS.get(activation_name(operation))
    if stock != "ReLU":
        return None
    slope, threshold = (getattr(operation, name, None) for name in ("negative_slope", "threshold"))
    if float(slope or 0.0) or float(threshold or 0.0):
        return None
    highest = operation.max_value
    return 0.0, None if highest is None else float(highest)


def passes(operation: Any, stock: str, function: str) -> bool:
    """Return whether an operation's result holds values of its first input, and zeros; as for `clamp_of`."""
    if function:
        return function in _MOVING_FUNCTIONS or clamp_of(operation, stock, function) == (0.0, None)
    if stock in _MOVING:
        return getattr(operation, "interpolation", "nearest") == "nearest"
    return clamp_of(operation, stock, function) == (0.0, None) or (
        stock == "Activation" and not activation_name(operation)
    )


Names = Callable[[Any], str]
"""Returns the name of a layer or functional operation; empty where it has none."""
