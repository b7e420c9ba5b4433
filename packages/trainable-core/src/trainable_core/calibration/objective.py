"""What the search minimizes: measures of error, bound to the values or to the histogram they are taken on."""

from __future__ import annotations

import numpy as np

from trainable_core.calibration.measure import kl_divergence, power_error
from trainable_core.calibration.observer import Float32, Float64, Observer
from trainable_core.calibration.search import GridKind, Objective

CENTRE_BITS = 10
"""Up to this width a bin's centre stands for the bin; each further bit doubles the points that do."""


def power_objective(kind: GridKind, rows: Float32, exponent: float, weights: Float64 | None = None) -> Objective:
    """Return the mean error to the power `exponent` of rows of values (C, n); `weights` (n,) are multiplicities."""
    return lambda ends: power_error(rows, weights, [kind.qparams(candidate) for candidate in ends], exponent)


def observed_power_objective(kind: GridKind, observer: Observer, exponent: float) -> Objective:
    """Return the same for what an observer saw: points that stand for the bins, and exact zeros."""
    points, counts = points_of(observer, 2 ** max(kind.n_bits - CENTRE_BITS, 0))
    points, counts = np.append(points, np.float32(0)), np.append(counts, float(observer.zeros))

    def objective(ends: Float64) -> Float64:
        """Measure the candidates as if each had a channel with these points: all in a few operations."""
        grids = kind.qparams(ends[:, :, 0].T)
        return power_error(np.broadcast_to(points, (len(ends), points.size)), counts, [grids], exponent).T

    return objective


def kl_objective(kind: GridKind, observer: Observer) -> Objective:
    """Return the divergence of the histogram of one channel, zeros left out."""
    points, counts = points_of(observer, 1)

    def objective(ends: Float64) -> Float64:
        return kl_divergence(points, counts, kind.qparams(ends[:, :, 0].T))[:, None]

    return objective


def points_of(observer: Observer, parts: int) -> tuple[Float32, Float64]:
    """Return the centres of equal parts of the occupied bins, moved inside the exact extremes, and their counts.

    Examples
    --------
    >>> observer = Observer(n_bins=4)
    >>> observer.update([0.5, 0.75, 3.25])
    >>> points_of(observer, 1)
    (array([0.5 , 3.25], dtype=float32), array([2., 1.]))
    >>> points_of(observer, 2)[0]
    array([0.5 , 0.75, 3.25, 3.25], dtype=float32)
    """
    counts, edges = observer.counts, observer.edges
    (used,) = np.nonzero(counts)
    width = edges[1] - edges[0]
    points = edges[used, None] + width * (np.arange(parts) + 0.5) / parts
    inside = np.clip(points.ravel(), observer.minimum, observer.maximum).astype(np.float32)
    return inside, np.repeat(counts[used] / parts, parts)
