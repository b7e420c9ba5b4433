"""A layer's certificate of exactness: whether a framework's float32 forward must give the codes that integers give.

float32 holds whole numbers up to ``2**24``. Where all scales are powers of two, and ``sum|w| * max|a| + |b| < 2**24``
in codes for every output channel, each partial sum of the float forward is a whole number of at most 24 bits times a
power of two. It is then exact in any order of summation, and equals the integer sum. Multiplying it by a power of two
is exact as well, and both round ties to even. So the codes are equal, for any input.

Where the sum fits but a scale is no power of two, the integer side is still exact, and the framework's rounding of
``code * scale`` may move a value that lies next to a tie to the other code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainable_core.integer.tensor import Quantized
from trainable_core.qparams import QParams

LIMIT = 2**24
"""Whole numbers below this are exact in float32."""


@dataclass(frozen=True)
class Certificate:
    """What can be said of a layer before it runs.

    Parameters
    ----------
    bound : int
        The largest sum of any channel, in codes, that any input can give.
    powers_of_two : bool
        Whether the scales of input, weights and output all are.
    """

    bound: int
    powers_of_two: bool

    @property
    def fits(self) -> bool:
        """Whether every partial sum is exact in float32."""
        return self.bound < LIMIT

    @property
    def exact(self) -> bool:
        """Whether the framework's codes must equal the runtime's, for any input."""
        return self.fits and self.powers_of_two


def are_powers_of_two(*scales: ArrayLike) -> bool:
    """Return whether all of these positive numbers are powers of two.

    Examples
    --------
    >>> are_powers_of_two(0.25, [1.0, 8.0]), are_powers_of_two(0.75)
    (True, False)
    """
    return all(bool((np.frexp(np.asarray(scale, np.float64))[0] == 0.5).all()) for scale in scales)  # noqa: PLR2004 - the mantissa of a power of two


def largest_code(grid: QParams) -> int:
    """Return the largest distance of a code of a grid from the code of zero."""
    zero = grid.zero_point.astype(np.int64)
    return int(max(np.max(grid.quant_max - zero), np.max(zero - grid.quant_min)))


def of_products(
    x: QParams, weight: Quantized, bias: NDArray[Any] | None, output: QParams | None, axis: int = 0
) -> Certificate:
    """Return the certificate of a linear layer or convolution.

    Parameters
    ----------
    x : QParams
        Grid of the input.
    weight : Quantized
        The weights.
    bias : int array or None
        Codes on the grid ``s_x * s_w``.
    output : QParams or None
        Grid of the output; None where it stays float.
    axis : int
        Axis of the output channels in the weights.

    Examples
    --------
    >>> grid = QParams(np.float32(0.5), np.int32(0), -128, 127)
    >>> of_products(grid, Quantized(np.int32([[3, -4]]), grid), np.int32([5]), grid)
    Certificate(bound=901, powers_of_two=True)
    """
    others = tuple(i for i in range(weight.codes.ndim) if i != axis % weight.codes.ndim)
    sums = np.abs(weight.counted).sum(axis=others) * largest_code(x)
    if bias is not None:
        sums = sums + np.abs(np.asarray(bias, np.int64))
    scales = [x.scale, weight.grid.scale, *([] if output is None else [output.scale])]
    return Certificate(int(sums.max(initial=0)), are_powers_of_two(*scales))


def of_sum(parts: list[QParams], output: QParams) -> Certificate:
    """Return the certificate of an addition, in steps of the finest scale."""
    finest = min(float(each.scale) for each in (*parts, output))
    bound = sum(largest_code(each) * float(each.scale) / finest for each in parts)
    return Certificate(int(np.ceil(bound)), are_powers_of_two(*(each.scale for each in (*parts, output))))


def of_product(x: QParams, y: QParams, output: QParams) -> Certificate:
    """Return the certificate of a multiplication of two tensors.

    Examples
    --------
    >>> grid = QParams(np.float32(0.5), np.int32(0), -128, 127)
    >>> of_product(grid, grid, grid)
    Certificate(bound=16384, powers_of_two=True)
    """
    return Certificate(largest_code(x) * largest_code(y), are_powers_of_two(x.scale, y.scale, output.scale))


def of_mean(x: QParams, number: int, output: QParams) -> Certificate:
    """Return the certificate of a mean of a number of values, which is exact where that is a power of two.

    Examples
    --------
    >>> grid = QParams(np.float32(0.5), np.int32(0), -128, 127)
    >>> of_mean(grid, 64, grid), of_mean(grid, 49, grid).exact
    (Certificate(bound=8192, powers_of_two=True), False)
    """
    return Certificate(largest_code(x) * number, are_powers_of_two(x.scale, output.scale, float(number)))
