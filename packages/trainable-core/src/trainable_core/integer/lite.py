"""Operations on codes as TensorFlow Lite's families of kernels carry them out.

`XNNPACK` is what the runtime uses by default. What it does not take, such as weights of 4 bits, is computed by the
runtime's own `OPTIMIZED` kernels; `REFERENCE` ones are portable. All three round otherwise. Layouts are those of
`trainable_core.integer`; a result is clipped to the codes that an activation function leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from math import prod
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainable_core.integer.elementwise import clip
from trainable_core.integer.requantization import (
    FLOAT32,
    INT32_BITS,
    Requantizer,
    fixed_point,
    float32_multiplier,
    float64_multiplier,
    multiply_float32,
    multiply_q31,
)
from trainable_core.integer.tensor import Int64, Quantized, clipped
from trainable_core.qparams import QParams

XNNPACK, OPTIMIZED, REFERENCE = "XNNPACK", "TFLite", "TFLite reference"
"""Names of the families of kernels."""

ADD_BITS = 20
"""Bits by which both families scale the operands of an addition."""


@dataclass(frozen=True)
class Clamp:
    """The codes that an activation function leaves.

    Parameters
    ----------
    low, high : int
        First and last code.
    """

    low: int
    high: int

    def __call__(self, x: Quantized) -> Quantized:
        """Return codes held within the ends."""
        return clip(x, self.low, self.high)


def clamp_of(activation: str, grid: QParams) -> Clamp:
    """Return what an activation function leaves of a grid: ``NONE``, ``RELU`` or ``RELU6``.

    Examples
    --------
    >>> clamp_of("RELU6", QParams(np.float32(0.05), np.int32(-128), -128, 127))
    Clamp(low=-128, high=-8)
    """
    low, high, zero = grid.quant_min, grid.quant_max, int(grid.zero_point)
    if activation != "NONE":
        low = max(low, zero)
    if activation == "RELU6":
        high = min(high, zero + int(np.rint(np.float32(6.0) / np.float32(grid.scale))))
    return Clamp(low, high)


def multiply_twice(total: NDArray[Any], multiplier: NDArray[Any]) -> Int64:
    """Return ``total * multiplier`` with a 31-bit multiplier, rounded twice, ties up both times.

    Notes
    -----
    As `multiply_q31`, but ties of the shift go up: what the instructions ``vqrdmulh`` and ``vrshl`` of ARM do, and
    TensorFlow Lite's optimized kernels on other processors too.

    Examples
    --------
    >>> multiply_twice(np.array([2, 6, -2, -6]), np.asarray(0.25))
    array([ 1,  2,  0, -1])
    """
    mantissa, exponent = fixed_point(multiplier)
    left, right = np.maximum(exponent, 0), np.maximum(-exponent, 0)
    shifted = (np.asarray(total, np.int64) * (np.int64(1) << left)).astype(np.int32).astype(np.int64)
    high = (shifted * mantissa + (1 << (INT32_BITS - 1))) >> INT32_BITS
    return np.asarray((high + np.where(right > 0, (np.int64(1) << right) >> 1, 0)) >> right)


def linear_multiplier(input_scale: ArrayLike, weight_scale: ArrayLike, output_scale: ArrayLike) -> NDArray[np.float64]:
    """Return ``(s_x * s_w) / s_y``, the product rounded to float32: ``GetQuantizedConvolutionMultipler`` per tensor."""
    product = np.asarray(input_scale, np.float32) * np.asarray(weight_scale, np.float32)
    return np.asarray(product.astype(np.float64) / np.asarray(output_scale, np.float64))


def requantizer(kernels: str, *, linear: bool = False) -> Requantizer:
    """Return how a family of kernels requantizes sums of products.

    Parameters
    ----------
    kernels : str
        `XNNPACK`, `OPTIMIZED` or `REFERENCE`.
    linear : bool
        Whether it is FULLY_CONNECTED, not a convolution.
    """
    if kernels == XNNPACK:
        return FLOAT32
    multiplier = linear_multiplier if linear else float64_multiplier
    if kernels == REFERENCE:
        return Requantizer("gemmlowp", multiplier, multiply_q31)
    return Requantizer("gemmlowp, ties up", multiplier, multiply_twice)


def _fixed_point(kernels: str) -> Callable[[NDArray[Any], NDArray[Any]], Int64]:
    """Return how a family without floating point multiplies single codes."""
    return multiply_q31 if kernels == REFERENCE else multiply_twice


def add(x: Quantized, y: Quantized, output: QParams, kernels: str = XNNPACK) -> Quantized:
    """Return the codes of a sum.

    Notes
    -----
    XNNPACK (``xnn_init_qs8_add_minmax_scalar_params``): ``(a * m_a + b * m_b + 2**(s - 1)) >> s`` with codes counted
    from zero, ``r = s_x / s_y`` in float32, ``s = 20 - floor(log2(max(r_a, r_b)))`` and ``m = rint(r * 2**s)``; so ties
    go up. TensorFlow Lite (``reference_integer_ops::AddFunc``): both operands are shifted left by 20 bits and put on
    the scale ``2 * max(s_x)``, and their sum is requantized, each time by `multiply_q31`, or `multiply_twice` in the
    optimized kernels.

    Examples
    --------
    >>> grid = QParams(np.float32(1.0), np.int32(0), -128, 127)
    >>> one, two = Quantized(np.int32([1, -1]), grid), Quantized(np.int32([2, -2]), grid)
    >>> add(one, two, QParams(np.float32(2.0), np.int32(0), -128, 127)).codes.tolist()  # 1.5 and -1.5
    [2, -1]
    """
    if kernels == XNNPACK:
        ratios = [np.float32(np.float32(each.grid.scale) / np.float32(output.scale)) for each in (x, y)]
        shift = ADD_BITS - (int(np.frexp(max(ratios))[1]) - 1)
        a, b = (int(np.rint(np.ldexp(np.float64(ratio), shift))) for ratio in ratios)
        total = x.counted * a + y.counted * b + (1 << (shift - 1))
        return clipped(total >> shift, output)
    multiplied = _fixed_point(kernels)
    scales = [np.float64(each.grid.scale) for each in (x, y)]
    widest = 2.0 * max(scales)
    shifted = [
        multiplied(each.counted << ADD_BITS, np.asarray(scale / widest))
        for each, scale in zip((x, y), scales, strict=True)
    ]
    last = np.asarray(widest / (2.0**ADD_BITS * np.float64(output.scale)))
    return clipped(multiplied(shifted[0] + shifted[1], last), output)


class Ties(Enum):
    """How XNNPACK rounds means and products of two tensors, which its versions do in different ways.

    `trainable_core.export.tflite.runtime` finds out which version it is by its means.
    """

    EVEN = "even"
    """To the nearest whole number of steps, ties to even; then the zero point is added (TensorFlow 2.15)."""
    EVEN_CODE = "even code"
    """Steps and zero point together, ties to the even code (LiteRT 2.3)."""
    AWAY = "away"
    """Of means: steps and zero point together, ties away from code 0 (TensorFlow 2.21)."""


def multiply(
    x: Quantized, y: Quantized, output: QParams, kernels: str = XNNPACK, ties: Ties = Ties.EVEN_CODE
) -> Quantized:
    """Return the codes of a product.

    Notes
    -----
    Products of codes counted from zero are requantized; the multiplier is ``(s_x * s_y) / s`` in float32 in all
    families (``xnn_qs8_vmul``, ``mul::Prepare``). XNNPACK rounds those of two tensors as `ties` says, and those with
    one number for all channels before it adds the zero point; they differ where the zero point is odd. How the version
    with `Ties.AWAY` rounds ties of products is not known.
    """
    multiplier = float32_multiplier(x.grid.scale, y.grid.scale, output.scale)
    product: Int64 = x.counted * y.counted
    if kernels == XNNPACK and ties is not Ties.EVEN and x.codes.shape[-1:] == y.codes.shape[-1:]:
        return _from_code_zero(product, multiplier, output)
    if kernels == OPTIMIZED and x.codes.size != y.codes.size:
        kernels = REFERENCE
    multiplied = multiply_float32 if kernels == XNNPACK else _fixed_point(kernels)
    return clipped(multiplied(product, multiplier), output)


def _from_code_zero(
    total: NDArray[Any], multiplier: ArrayLike, output: QParams, ties: Ties = Ties.EVEN_CODE
) -> Quantized:
    """Return the codes of ``total * multiplier``, rounded once the zero point is added."""
    zero = np.float32(output.zero_point)
    steps = total.astype(np.float32) * np.asarray(multiplier, np.float32) + zero
    away = np.trunc(steps + np.copysign(np.float32(0.5), steps))
    rounded = np.clip(away if ties is Ties.AWAY else np.rint(steps), -(2.0**31), 2.0**31)
    return clipped(rounded.astype(np.int64) - int(output.zero_point), output)


def mean(
    x: Quantized, axes: Sequence[int], output: QParams, kernels: str = XNNPACK, ties: Ties = Ties.EVEN_CODE
) -> Quantized:
    """Return the codes of a mean over some axes, which are left with size one.

    Notes
    -----
    XNNPACK: ``sum * M`` in float32 with ``M = s_x / (s_y * n)``, rounded as `ties` says. TensorFlow Lite: the
    multiplier of ``s_x / s_y`` is divided by `n` in whole numbers (``reduce::EvalMean``).
    """
    total = x.counted.sum(axis=tuple(axes), keepdims=True)
    number = prod(x.codes.shape[axis] for axis in axes)
    if kernels == XNNPACK:
        scale = np.float32(np.float32(x.grid.scale) / (np.float32(output.scale) * np.float32(number)))
        if ties is not Ties.EVEN:
            return _from_code_zero(total, scale, output, ties)
        return clipped(multiply_float32(total, np.asarray(scale)), output)
    multiplier = float64_multiplier(x.grid.scale, 1.0, output.scale)
    return clipped(multiply_q31(total, multiplier / number), output)
