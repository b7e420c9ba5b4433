"""The range that holds a given percentage of the values."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from trainable_core.calibration.observer import Float32, Float64, Int64, Observer
from trainable_core.calibration.search import GridKind
from trainable_core.enums import QuantizationMethod


def left_out(percentile: float, count: int) -> int:
    """Return ``floor((1 - percentile / 100) * count)``, computed on the decimal number that was written.

    Examples
    --------
    >>> left_out(99.99, 10_000), left_out(99.99, 9_999), left_out(100, 7)
    (1, 0, 0)
    """
    return math.floor((100 - Fraction(str(percentile))) * count / 100)


def exact_percentile(kind: GridKind, rows: Float32, percentile: float) -> Float64:
    """Return the ends (2, C) that hold the percentage of each row of values (C, n)."""
    size = rows.shape[1]
    cut = left_out(percentile, size)
    if kind.method is QuantizationMethod.UNIFORM:
        cut //= 2
        ordered = np.partition(rows, [cut, size - 1 - cut], axis=1)[:, [cut, size - 1 - cut]].astype(np.float64)
        return kind.extremes(ordered[:, 0], ordered[:, 1])
    kept = np.partition(np.abs(rows), size - 1 - cut, axis=1)[:, size - 1 - cut].astype(np.float64)
    return kind.extremes(-kept, kept)


def observed_percentile(kind: GridKind, observer: Observer, percentile: float) -> Float64:
    """Return the ends (2, 1) that hold the percentage of what an observer saw.

    An end is the outer edge of a bin, or the extreme where that is nearer to zero.
    """
    counts, edges = observer.counts, observer.edges
    negative = int((edges < 0).sum())
    up, down = counts[negative:], counts[:negative][::-1]  # outward from zero
    width = edges[1] - edges[0]
    lowest, highest = min(observer.minimum, 0.0), max(observer.maximum, 0.0)
    cut = left_out(percentile, observer.count)
    if kind.method is QuantizationMethod.UNIFORM:
        low = max(-_bins_kept(down, cut // 2) * width, lowest)
        high = min(_bins_kept(up, cut // 2) * width, highest)
    else:
        folded = np.zeros(max(up.size, down.size), np.int64)
        folded[: up.size] += up
        if kind.signed:
            folded[: down.size] += down
        low, high = 0.0, min(_bins_kept(folded, cut) * width, max(highest, -lowest) if kind.signed else highest)
    return kind.extremes(np.array([low]), np.array([high]))


def _bins_kept(counts: Int64, cut: int) -> int:
    """Return how many bins, counted outward from zero, hold all but the `cut` values furthest out."""
    beyond = counts[::-1].cumsum()  # values in the outermost bin, in the two outermost, ...
    return int((beyond > cut).sum())
