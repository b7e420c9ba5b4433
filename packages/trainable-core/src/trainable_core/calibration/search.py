"""The search for the clipping range of least error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainable_core.calibration.observer import Float32, Float64
from trainable_core.constants import RANGE_MAX, RANGE_MIN, THRESHOLD
from trainable_core.enums import QuantizationMethod
from trainable_core.qparams import (
    QParams,
    bound_threshold,
    code_range,
    from_variables,
    hold_zero,
    lower_bound,
    power_of_two_ceil,
    shorten_scale,
)
from trainable_core.validation import MAX_THRESHOLD

NEAR, FAR = 1 / 32, 1 / 4
"""Spacing of the coarse candidates in octaves: down to 1/8 of the largest, and from there down to 2**-16."""

KNEE, DEPTH = 3, 16

COARSE = np.concatenate([np.arange(0, KNEE, NEAR), np.arange(KNEE, DEPTH + FAR, FAR)])
"""Octaves below the largest candidate: 149 ratios from 1 to 2**-16."""

FINE = np.concatenate([np.arange(-15, 0), np.arange(1, 16)]) / 16
"""Second level: 30 ratios around the best one, in units of the coarse spacing there."""

OCTAVES = np.arange(0.0, 24)
"""Candidates for powers of two."""

Objective = Callable[[Float64], Float64]
"""Errors (R, C) of candidate ends (R, 2, C)."""


@dataclass(frozen=True)
class GridKind:
    """What is fixed about a grid before calibration. A range is a pair of ends, lower end first, in a float64 array.

    Parameters
    ----------
    method : QuantizationMethod
        POWER_OF_TWO, SYMMETRIC or UNIFORM.
    n_bits : int
        Width of the codes.
    signed : bool
        Whether the grid may reach below zero.
    min_threshold : float
        Lower bound of the threshold, or of the range's width.
    """

    method: QuantizationMethod
    n_bits: int
    signed: bool
    min_threshold: float

    @property
    def reach(self) -> float:
        """Ratio of a threshold to the real value of its last code, which is as far as a threshold helps.

        The last code of a symmetric grid is one step short of the threshold. A signed 1-bit grid has no positive code.
        """
        _, last = code_range(self.method, self.n_bits, signed=self.signed)
        return 1.0 if self.method is QuantizationMethod.UNIFORM or last == 0 else (last + 1) / last

    def extremes(self, low: Float64, high: Float64) -> Float64:
        """Return the ends, shape (2, C), that clip no value in ``[low, high]`` which the grid can hold."""
        high = np.maximum(high, 0.0)
        low = np.minimum(low, 0.0) if self.signed else np.zeros_like(high)
        if self.method is not QuantizationMethod.UNIFORM and self.signed:
            high = np.maximum(high, -low)
            low = -high
        return np.stack([low, high])

    def bounded(self, ends: Float64) -> Float64:
        """Return the nearest ends that the grid can have, shape (..., 2, C): float32 numbers within all bounds.

        Symmetric thresholds are the upper ends; they end up in ``[min_threshold, 2**100]``, as powers of two where the
        method asks for it. Ranges hold zero, end at ``2**99`` and are at least `min_threshold` wide: the end further
        from zero moves.
        """
        low, high = ends[..., 0, :], ends[..., 1, :]
        if self.method is QuantizationMethod.UNIFORM:
            low, high = (end.astype(np.float64) for end in hold_zero(low, high))
            width = float(lower_bound(self.min_threshold))
            narrow, upward = high - low < width, high >= -low
            low, high = np.where(narrow & ~upward, -width, low), np.where(narrow & upward, width, high)
            return np.stack([low, high], axis=-2)
        threshold = bound_threshold(np.minimum(high, MAX_THRESHOLD), self.min_threshold)
        if self.method is QuantizationMethod.POWER_OF_TWO:
            threshold = power_of_two_ceil(threshold)
        high = threshold.astype(np.float64)
        return np.stack([-high if self.signed else np.zeros_like(high), high], axis=-2)

    def bound_in_place(self, ends: Float32) -> Float32:
        """Bound ends (..., 2, C) as `bounded` does, where zero lies between them as in multiples of the `extremes`."""
        low, high = ends[..., 0, :], ends[..., 1, :]
        if self.method is not QuantizationMethod.UNIFORM:
            np.clip(high, lower_bound(self.min_threshold), np.float32(MAX_THRESHOLD), out=high)
            if self.method is QuantizationMethod.POWER_OF_TWO:
                high[...] = power_of_two_ceil(high)
            np.multiply(high, np.float32(-1 if self.signed else 0), out=low)
            return ends
        limit, width = np.float32(MAX_THRESHOLD / 2), lower_bound(self.min_threshold)
        np.maximum(low, -limit, out=low)
        np.minimum(high, limit, out=high)
        # half as wide again: a difference of float32 numbers is off by less
        if (high - low < width * np.float32(1.5)).any():
            ends[...] = self.bounded(ends.astype(np.float64))
        return ends

    def levels(self, ends: Float32 | Float64) -> tuple[Float32, Float32, Float32]:
        """Return scale, first and last code counted from zero (S, C), float32, of bounded ends (S, 2, C).

        These are the numbers of `qparams`. Bounds hold already, so what is left of it is two or ten operations.
        """
        low, high = ends[:, 0].astype(np.float32), ends[:, 1].astype(np.float32)
        first, last = code_range(self.method, self.n_bits, signed=self.signed)
        if self.method is not QuantizationMethod.UNIFORM:
            scale = high * np.float32(2.0 ** -(self.n_bits - int(self.signed)))
            codes = (np.broadcast_to(np.float32(code), scale.shape) for code in (first, last))
            return (scale, *codes)  # type: ignore[return-value] # two codes
        scale = shorten_scale((high - low) / np.float32(last), self.n_bits)
        zero_point = np.negative(low, out=low)
        np.divide(zero_point, scale, out=zero_point)
        np.rint(zero_point, out=zero_point)
        np.clip(zero_point, np.float32(0), np.float32(last), out=zero_point)
        return scale, np.float32(0) - zero_point, np.float32(last) - zero_point

    def qparams(self, ends: Float64) -> QParams:
        """Return the grid of bounded ends, shape (2, C), with C scales along axis 0."""
        uniform = self.method is QuantizationMethod.UNIFORM
        variables = {RANGE_MIN: ends[0], RANGE_MAX: ends[1]} if uniform else {THRESHOLD: ends[1]}
        return from_variables(
            variables,
            self.method,
            self.n_bits,
            signed=self.signed,
            min_threshold=self.min_threshold,
            channels_axis=0,
        )


def search(kind: GridKind, extremes: Float64, objective: Objective) -> Float64:
    """Return the range of least error among the candidates, for each channel.

    Parameters
    ----------
    kind : GridKind
        The grid.
    extremes : float64 array, shape (2, C)
        Ends that clip nothing.
    objective : callable
        Errors (R, C) of R bounded candidates (R, 2, C).

    Returns
    -------
    float64 array, shape (2, C)
        Bounded ends. Never worse than the bounded extremes, which are the first candidate and win all ties.

    Notes
    -----
    Candidates are the extremes times a ratio, then bounded.

    - POWER_OF_TWO: the powers of two from the rounded-up extreme downward, 24 in all. The extreme is taken times
      `GridKind.reach` first, so that the power whose last code still holds the largest value is among them.
    - SYMMETRIC: `COARSE` ratios of the extreme times `GridKind.reach`, then `FINE` ones around the best: 0.14 per cent
      apart near the extreme, 1.1 per cent apart below an eighth of it.
    - UNIFORM: the same ratios for both ends at once; then, by coordinates, for the upper end and for the lower end
      alone, coarse; then both, upper and lower, fine. A channel on one side of zero has one end to move.

    The error as a function of the range has many shallow minima, so this is a good range and not always the best.
    """
    best = kind.bounded(extremes)
    least = objective(best[None])[0]
    octaves = np.zeros_like(extremes)  # (2, C) of the best so far, against the extremes

    def sweep(moving: NDArray[np.bool_], candidates: Float64) -> None:
        """Try candidates (R, 2, C) or (R, 1, 1), in octaves, for the moving ends (2, C)."""
        nonlocal best, least, octaves
        tried = np.where(moving, candidates, octaves)
        ends = kind.bounded(extremes * np.exp2(tried))
        errors = objective(ends)
        winner = errors.argmin(axis=0)
        columns = np.arange(least.size)
        better = errors[winner, columns] < least
        best = np.where(better, ends[winner, :, columns].T, best)
        octaves = np.where(better, tried[winner, :, columns].T, octaves)
        least = np.where(better, errors[winner, columns], least)

    both = np.ones(extremes.shape, np.bool_)
    if kind.method is QuantizationMethod.POWER_OF_TWO:
        sweep(both, (math.log2(kind.reach) - OCTAVES)[:, None, None])
        return best
    moves = [both]
    two_sided = (extremes != 0).all(axis=0)
    if kind.method is QuantizationMethod.UNIFORM and two_sided.any():
        # a channel with one end stays out, or its result would depend on whether others have two
        upper = np.stack([np.zeros_like(two_sided), two_sided])
        moves += [upper, upper[::-1]]
    for moving in moves:
        sweep(moving, (math.log2(kind.reach) - COARSE)[:, None, None])
    for moving in moves:
        spacing = np.where(octaves > -KNEE, NEAR, FAR)
        sweep(moving, octaves + spacing * FINE[:, None, None])
    return best
