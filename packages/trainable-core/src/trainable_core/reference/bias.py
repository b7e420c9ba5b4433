"""Biases as integers: the grid that the sums of a layer's products are on, and the bias as a code on it.

An integer kernel multiplies codes of the input by codes of the weights and adds them up in int32. One unit of that sum
stands for ``scale_x * scale_w``. The kernel adds the bias before it leaves the sum, so the bias is a number of the same
units: an int32 code without a zero point.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from trainable_core.errors import IntegerRangeError

Float32 = NDArray[np.float32]

CODE_MIN: Final = -(2.0**31)
"""First code of an int32 bias."""
CODE_MAX: Final = 2.0**31 - 128
"""Last code of an int32 bias: the largest float32 number that int32 holds."""


def bias_scale(scale_x: Any, scale_w: Any, groups: int = 1) -> Float32:
    """Return the real width of one unit of a layer's sum of products.

    Parameters
    ----------
    scale_x : float32
        Scale of the layer's input, one number.
    scale_w : float32, () or (C,)
        Scale of its weight; per channel along the axis of the output channels.
    groups : int
        How often the weight's channels are repeated along the output: a transposed convolution of several groups has
        one weight channel for the same output channel of each group.

    Returns
    -------
    float32, shape of `scale_w`, or (groups * C,)

    Notes
    -----
    The product is rounded to float32 once. That is what both runtimes compute with: ONNX Runtime multiplies the two
    float32 scales, and requantizes with ``float32(float32(scale_x * scale_w) / scale_y)``; so does TensorFlow Lite per
    tensor, while per channel it multiplies them in float64, where the product is exact. Both store the scale of the
    bias as float32.

    Examples
    --------
    >>> bias_scale(np.float32(0.5), np.array([0.25, 0.1], np.float32))
    array([0.125, 0.05 ], dtype=float32)
    """
    scale = np.asarray(scale_x, np.float32).reshape(()) * np.asarray(scale_w, np.float32)
    return np.asarray(np.tile(scale, groups) if groups > 1 and scale.ndim else scale, np.float32)


def bias_codes(bias: Any, scale: Any) -> Float32:
    """Return the codes of a bias as float32 whole numbers, also those that int32 does not hold.

    Parameters
    ----------
    bias : float32, (C,)
        The bias in real units.
    scale : float32, () or (C,)
        What `bias_scale` returned.

    Returns
    -------
    float32, shape of `bias`

    Notes
    -----
    ``round(bias / scale)``, ties to even, both operations in float32: the same number in every framework. Beyond 2**24
    units the quotient is a whole number already.

    Examples
    --------
    >>> bias_codes(np.array([0.25, -0.75, 1.0], np.float32), np.float32(0.5))
    array([ 0., -2.,  2.], dtype=float32)
    """
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        return np.asarray(np.round(np.asarray(bias, np.float32) / np.asarray(scale, np.float32)), np.float32)


def fake_quantize_bias(bias: Any, scale: Any) -> Float32:
    """Return a bias on the grid of the layer's sums of products, in real units.

    Parameters
    ----------
    bias, scale
        As `bias_codes` takes them.

    Returns
    -------
    float32, shape of `bias`

    Notes
    -----
    The code times the scale, in float32. Codes beyond int32 saturate. Gradient: that of the result goes to the bias as
    it is, also where a code saturates, and none to the scales, which learn by the tensors that they are the scales of.

    Examples
    --------
    >>> fake_quantize_bias(np.array([0.25, -0.75, 1.0], np.float32), np.float32(0.5))
    array([ 0., -1.,  1.], dtype=float32)
    """
    codes = np.clip(bias_codes(bias, scale), np.float32(CODE_MIN), np.float32(CODE_MAX))
    return np.asarray(codes * np.asarray(scale, np.float32), np.float32)


def check_bias(subject: str, bias: Any, scale: Any) -> None:
    """Refuse a bias with a code that int32 does not hold.

    Parameters
    ----------
    subject : str
        Layer and attribute.
    bias, scale
        As `bias_codes` takes them.

    Raises
    ------
    IntegerRangeError
        Names the first such channel.
    """
    codes = bias_codes(bias, scale)
    wrong = np.flatnonzero(~((codes >= CODE_MIN) & (codes <= CODE_MAX)))
    if wrong.size:
        channel = int(wrong[0])
        value = float(np.asarray(bias, np.float32).reshape(-1)[channel])
        step = float(np.broadcast_to(np.asarray(scale, np.float32), codes.shape).reshape(-1)[channel])
        raise IntegerRangeError(subject, channel, wrong.size, value, step)
