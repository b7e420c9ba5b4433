"""Requantization: from the 32-bit sum of a layer to the codes of its output.

A layer with input scale ``s_x``, weight scale ``s_w`` and output scale ``s_y`` has a sum ``a`` of products of codes
that stands for ``a * s_x * s_w``. Its output counted from zero is ``round(a * M)`` with ``M = s_x * s_w / s_y``.
Runtimes differ in how they hold ``M`` and how they round:

- `FLOAT32`: ``M = float32(float32(s_x * s_w) / s_y)``, ``rint(float32(a) * M)``, ties to even. ONNX Runtime's
  QLinearConv, QLinearMatMul and QGemm (``MlasRequantizeOutput``), and XNNPACK's ``fp32`` requantization, which
  TensorFlow Lite uses by default.
- `GEMMLOWP`: ``M = m * 2**e`` with a 31-bit integer ``m``, computed in float64; a doubling high multiplication that
  rounds to nearest, and a rounding right shift (Jacob et al., 2018, section 2.2; gemmlowp's
  ``SaturatingRoundingDoublingHighMul`` and ``RoundingDivideByPOT``). TensorFlow Lite's reference and INT4 kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainable_core.integer.tensor import Int64

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


@dataclass(frozen=True)
class Requantizer:
    """One runtime's way from a sum to codes.

    Parameters
    ----------
    name : str
        Its name in targets and reports.
    multiplier : callable
        From the scales of input, weight and output to ``M``.
    multiplied : callable
        From sums and ``M`` to whole numbers counted from zero, not yet saturated at the ends of a grid.
    """

    name: str
    multiplier: Callable[[ArrayLike, ArrayLike, ArrayLike], NDArray[Any]]
    multiplied: Callable[[NDArray[Any], NDArray[Any]], Int64]


def float32_multiplier(input_scale: ArrayLike, weight_scale: ArrayLike, output_scale: ArrayLike) -> NDArray[np.float32]:
    """Return ``(s_x * s_w) / s_y``, each operation rounded to float32."""
    product = np.asarray(input_scale, np.float32) * np.asarray(weight_scale, np.float32)
    return np.asarray(product / np.asarray(output_scale, np.float32))


def multiply_float32(total: NDArray[Any], multiplier: NDArray[Any]) -> Int64:
    """Return ``rint(float32(total) * multiplier)``, ties to even.

    Examples
    --------
    >>> multiply_float32(np.array([1, 3, 5, -3]), np.float32(0.5))
    array([ 0,  2,  2, -2])
    """
    product = np.asarray(total).astype(np.float32) * np.asarray(multiplier, np.float32)
    return np.rint(np.clip(product, INT32_MIN, INT32_MAX)).astype(np.int64)


def float64_multiplier(input_scale: ArrayLike, weight_scale: ArrayLike, output_scale: ArrayLike) -> NDArray[np.float64]:
    """Return ``s_x * s_w / s_y`` in float64."""
    product = np.asarray(input_scale, np.float64) * np.asarray(weight_scale, np.float64)
    return np.asarray(product / np.asarray(output_scale, np.float64))


def fixed_point(multiplier: ArrayLike) -> tuple[Int64, Int64]:
    """Return 31-bit mantissas ``m`` and exponents ``e`` with ``multiplier = m * 2**(e - 31)``, rounded half up.

    Examples
    --------
    >>> [int(each) for each in fixed_point(0.75)]
    [1610612736, 0]
    """
    fraction, exponent = np.frexp(np.asarray(multiplier, np.float64))
    mantissa = np.floor(fraction * 2.0**31 + 0.5).astype(np.int64)
    carried = mantissa == 2**31
    mantissa, exponent = np.where(carried, mantissa // 2, mantissa), np.where(carried, exponent + 1, exponent)
    small = exponent < -INT32_BITS
    return np.where(small, 0, mantissa), np.where(small, 0, exponent).astype(np.int64)


INT32_BITS = 31
"""Bits of a 32-bit integer beside its sign."""


def multiply_q31(total: NDArray[Any], multiplier: NDArray[Any]) -> Int64:
    """Return ``total * multiplier`` by gemmlowp's fixed-point arithmetic, which rounds twice.

    Notes
    -----
    With ``m`` and ``e`` of `fixed_point`: where ``e > 0`` the sum is shifted left by ``e``. Then it is multiplied by
    ``m / 2**31`` and rounded to nearest, ties up (``SaturatingRoundingDoublingHighMul``). Where ``e < 0`` it is shifted
    right by ``-e`` and rounded to nearest, ties away from zero (``RoundingDivideByPOT``).

    Examples
    --------
    >>> multiply_q31(np.array([1, 3, 5, -3]), np.asarray(0.5))
    array([ 1,  2,  3, -1])
    >>> multiply_q31(np.array([2, 6, -2, -6]), np.asarray(0.25))
    array([ 1,  2, -1, -2])
    """
    mantissa, exponent = fixed_point(multiplier)
    left, right = np.maximum(exponent, 0), np.maximum(-exponent, 0)
    shifted = np.asarray(total, np.int64) * (np.int64(1) << left)
    shifted = shifted.astype(np.int32).astype(np.int64)  # a 32-bit register
    product = shifted * mantissa
    nudged = product + np.where(product >= 0, 1 << 30, 1 - (1 << 30))
    high = np.where(nudged >= 0, nudged >> INT32_BITS, -((-nudged) >> INT32_BITS))  # C's division truncates
    mask = (np.int64(1) << right) - 1
    remainder = high & mask
    threshold = (mask >> 1) + (high < 0)
    return np.asarray((high >> right) + (remainder > threshold))


FLOAT32 = Requantizer("float32", float32_multiplier, multiply_float32)
"""ONNX Runtime and XNNPACK."""

GEMMLOWP = Requantizer("gemmlowp", float64_multiplier, multiply_q31)
"""TensorFlow Lite's reference kernels."""
