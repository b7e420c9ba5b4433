"""The loops of grids, which `trainable_torch.kernels.native` has numba compile; importing this needs numba.

They are `trainable_torch.grid`'s functions of tensors, operation by operation in float32, without a tensor for each:
for a weight of a hundred channels these cost more than its fake quantization. Arrays come as addresses of float32
numbers, one per channel; the numbers of a grid as four such rows: inverse, scale, first and last code from zero.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from numba import carray  # type: ignore[attr-defined] # numba says not what it exports

from trainable_core.validation import MAX_THRESHOLD

MAX = np.float32(MAX_THRESHOLD)
LIMIT = np.float32(MAX_THRESHOLD / 2)
ZERO, ONE = np.float32(0.0), np.float32(1.0)


def _held(variable: Any, gradient: Any, low: Any, high: Any) -> Any:
    inside = low <= variable <= high
    back_in = (variable < low and gradient < ZERO) or (variable > high and gradient > ZERO)
    return gradient if (inside or back_in) and math.isfinite(gradient) else ZERO


def _clipped(value: Any, low: Any, high: Any, instead: Any) -> Any:
    """Return the value between two bounds, and something instead of NaN."""
    if value != value:  # noqa: PLR0124 - NaN
        return instead
    if value < low:
        return low
    return high if value > high else value  # noqa: FURB136 - the comparison that the tensors' clamp makes


held, clipped = numba.njit(_held), numba.njit(_clipped)


def symmetric(  # noqa: PLR0917 - a function in C's manner
    thresholds: Any,
    numbers: Any,
    lowest: float,
    per_step: float,
    first_code: float,
    last_code: float,
    channels: int,
    power_of_two: int,
) -> None:
    """Put inverse, scale and ends, `channels` of each, into `numbers`; the scale is ``SymmetricScale.forward``'s."""
    threshold, grid = carray(thresholds, channels, np.float32), carray(numbers, (4, channels), np.float32)
    bits = carray(numbers, (4, channels), np.int32)
    low, factor = np.float32(lowest), np.float32(per_step)
    for i in range(channels):
        grid[1, i] = clipped(threshold[i], low, MAX, low)
        if power_of_two:
            bits[1, i] = (bits[1, i] + np.int32(0x007FFFFF)) & np.int32(0x7F800000)
        grid[1, i] *= factor
        grid[0, i] = ONE / grid[1, i]
        grid[2, i], grid[3, i] = np.float32(first_code), np.float32(last_code)


def uniform(range_mins: Any, range_maxs: Any, numbers: Any, lowest: float, channels: int, quant_max: int) -> None:
    """Put inverse, scale and ends, `channels` of each, into `numbers`; scale and ends by ``UniformGrid.forward``."""
    range_min, range_max = carray(range_mins, channels, np.float32), carray(range_maxs, channels, np.float32)
    grid, bits = carray(numbers, (4, channels), np.float32), carray(numbers, (4, channels), np.int32)
    low, last_code = np.float32(lowest), np.float32(quant_max)
    for i in range(channels):
        first = clipped(range_min[i], -LIMIT, ZERO, ZERO)
        last = clipped(range_max[i], ZERO, LIMIT, ZERO)
        grid[1, i] = clipped(last - first, low, MAX, low) / last_code
        bits[1, i] = (bits[1, i] + np.int32(quant_max)) & np.int32(~quant_max)
        zero_point = clipped(np.rint(-first / grid[1, i]), ZERO, last_code, ZERO)
        grid[0, i] = ONE / grid[1, i]
        grid[2, i], grid[3, i] = ZERO - zero_point, last_code - zero_point


def _added(sums: Any, kind: int, channel: int, lines: int, channels: int) -> Any:
    """Return a channel's sum over its lines, added in float64, rounded once."""
    total = 0.0
    for line in range(channel, lines, channels):
        total += sums[kind, line]
    return np.float32(total)


added = numba.njit(_added)


def symmetric_gradients(  # noqa: PLR0913, PLR0917 - as above
    line_sums: Any,
    numbers: Any,
    thresholds: Any,
    d_thresholds: Any,
    lowest: float,
    per_step: float,
    gradient_scale: float,
    lines: int,
    channels: int,
    power_of_two: int,
) -> None:
    """Put ``SymmetricScale.gradient`` of each line's sums of slopes into `d_thresholds`."""
    sums, grid = carray(line_sums, (1, lines), np.float64), carray(numbers, (4, channels), np.float32)
    threshold, out = carray(thresholds, channels, np.float32), carray(d_thresholds, channels, np.float32)
    low, factor, steps = np.float32(lowest), np.float32(per_step), np.float32(1.0 / per_step)
    amount = np.float32(gradient_scale)
    for i in range(channels):
        gradient = added(sums, 0, i, lines, channels) * amount * factor
        if power_of_two:
            gradient *= grid[1, i] * steps / clipped(threshold[i], low, MAX, low)
        out[i] = held(threshold[i], gradient, low, MAX)


def uniform_gradients(  # noqa: PLR0913, PLR0917 - as above
    line_sums: Any,
    numbers: Any,
    range_mins: Any,
    range_maxs: Any,
    d_mins: Any,
    d_maxs: Any,
    lowest: float,
    gradient_scale: float,
    lines: int,
    channels: int,
    quant_max: int,
) -> None:
    """Put ``UniformGrid.gradients`` of each line's two sums into `d_mins` and `d_maxs`."""
    sums, grid = carray(line_sums, (2, lines), np.float64), carray(numbers, (4, channels), np.float32)
    range_min, range_max = carray(range_mins, channels, np.float32), carray(range_maxs, channels, np.float32)
    d_min, d_max = carray(d_mins, channels, np.float32), carray(d_maxs, channels, np.float32)
    low, last_code = np.float32(lowest), np.float32(quant_max)
    amount = np.float32(gradient_scale)
    for i in range(channels):
        slope, outside = added(sums, 0, i, lines, channels), added(sums, 1, i, lines, channels)
        scale, zero_point = grid[1, i], ZERO - grid[2, i]
        d_scale, d_zero = slope * amount, -outside * scale * amount
        first = clipped(range_min[i], -LIMIT, ZERO, ZERO)
        last = clipped(range_max[i], ZERO, LIMIT, ZERO)
        through_width = (d_scale - d_zero * zero_point / scale) / last_code
        through_width = held(last - first, through_width, low, MAX)
        d_min[i] = held(range_min[i], -through_width - d_zero / scale, -LIMIT, ZERO)
        d_max[i] = held(range_max[i], through_width, ZERO, LIMIT)
