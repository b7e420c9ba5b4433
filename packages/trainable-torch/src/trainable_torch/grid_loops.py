"""The loops of per-channel grids, which `trainable_torch.native` has numba compile; importing this needs numba.

They are `trainable_torch.grid`'s functions of tensors, operation by operation in float32, without a tensor for each:
for a weight of a hundred channels these cost more than its fake quantization. Arrays come as addresses of float32
numbers, one per channel.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from numba import carray  # type: ignore[attr-defined] # numba says not what it exports

from trainable_core.checks import MAX_THRESHOLD

MAX = np.float32(MAX_THRESHOLD)
LIMIT = np.float32(MAX_THRESHOLD / 2)
ZERO = np.float32(0.0)


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


def symmetric(thresholds: Any, scales: Any, lowest: float, per_step: float, channels: int, power_of_two: int) -> None:
    """Compute ``SymmetricScale.forward``."""
    threshold, scale = carray(thresholds, channels, np.float32), carray(scales, channels, np.float32)
    bits = carray(scales, channels, np.int32)
    low, factor = np.float32(lowest), np.float32(per_step)
    for i in range(channels):
        scale[i] = clipped(threshold[i], low, MAX, low)
        if power_of_two:
            bits[i] = (bits[i] + np.int32(0x007FFFFF)) & np.int32(0x7F800000)
        scale[i] *= factor


def symmetric_gradient(  # noqa: PLR0917 - a function in C's manner
    thresholds: Any,
    scales: Any,
    d_scales: Any,
    d_thresholds: Any,
    lowest: float,
    per_step: float,
    channels: int,
    power_of_two: int,
) -> None:
    """Compute ``SymmetricScale.gradient``."""
    threshold, scale = carray(thresholds, channels, np.float32), carray(scales, channels, np.float32)
    upstream, out = carray(d_scales, channels, np.float32), carray(d_thresholds, channels, np.float32)
    low, factor, steps = np.float32(lowest), np.float32(per_step), np.float32(1.0 / per_step)
    for i in range(channels):
        gradient = upstream[i] * factor
        if power_of_two:
            gradient *= scale[i] * steps / clipped(threshold[i], low, MAX, low)
        out[i] = held(threshold[i], gradient, low, MAX)


def uniform(  # noqa: PLR0917 - as above
    range_mins: Any, range_maxs: Any, scales: Any, zero_points: Any, lowest: float, channels: int, quant_max: int
) -> None:
    """Compute ``UniformGrid.forward``."""
    range_min, range_max = carray(range_mins, channels, np.float32), carray(range_maxs, channels, np.float32)
    scale, zero_point = carray(scales, channels, np.float32), carray(zero_points, channels, np.float32)
    bits = carray(scales, channels, np.int32)
    low, last_code = np.float32(lowest), np.float32(quant_max)
    for i in range(channels):
        first = clipped(range_min[i], -LIMIT, ZERO, ZERO)
        last = clipped(range_max[i], ZERO, LIMIT, ZERO)
        scale[i] = clipped(last - first, low, MAX, low) / last_code
        bits[i] = (bits[i] + np.int32(quant_max)) & np.int32(~quant_max)
        zero_point[i] = clipped(np.rint(-first / scale[i]), ZERO, last_code, ZERO)


def uniform_gradients(  # noqa: PLR0913, PLR0917 - as above
    range_mins: Any,
    range_maxs: Any,
    scales: Any,
    zero_points: Any,
    d_scales: Any,
    d_zeros: Any,
    d_mins: Any,
    d_maxs: Any,
    lowest: float,
    channels: int,
    quant_max: int,
) -> None:
    """Compute ``UniformGrid.gradients``."""
    range_min, range_max = carray(range_mins, channels, np.float32), carray(range_maxs, channels, np.float32)
    scale, zero_point = carray(scales, channels, np.float32), carray(zero_points, channels, np.float32)
    d_scale, d_zero = carray(d_scales, channels, np.float32), carray(d_zeros, channels, np.float32)
    d_min, d_max = carray(d_mins, channels, np.float32), carray(d_maxs, channels, np.float32)
    low, last_code = np.float32(lowest), np.float32(quant_max)
    for i in range(channels):
        first = clipped(range_min[i], -LIMIT, ZERO, ZERO)
        last = clipped(range_max[i], ZERO, LIMIT, ZERO)
        through_width = (d_scale[i] - d_zero[i] * zero_point[i] / scale[i]) / last_code
        through_width = held(last - first, through_width, low, MAX)
        d_min[i] = held(range_min[i], -through_width - d_zero[i] / scale[i], -LIMIT, ZERO)
        d_max[i] = held(range_max[i], through_width, ZERO, LIMIT)
