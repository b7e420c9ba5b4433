"""Along which axis of a weight the channels lie whose sizes differ: that is where thresholds belong."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def axis_gains(weight: Array, seed: int = 0) -> tuple[float, ...]:
    """Return what thresholds along each axis gain because of how the weight's elements are arranged, in decibels.

    Parameters
    ----------
    weight : float array
        A weight of at least one dimension, finite.
    seed : int
        Of the arrangement at random that is compared with.

    Returns
    -------
    tuple of float
        For each axis. Of a weight whose elements could as well be anywhere, all are near zero.

    Notes
    -----
    A channel with the largest magnitude m has steps in proportion to m, and so a mean squared error in proportion to
    m**2. The gain is the ratio of the average m**2 of the channels of a weight whose elements were shuffled to that of
    the weight itself. Comparing with the shuffled weight leaves out what finer thresholds gain anyway: an axis with
    many short channels would otherwise always seem to be the right one.

    Examples
    --------
    >>> weight = np.random.default_rng(1).normal(size=(16, 64)) * np.logspace(-2, 0, 16)[:, None]
    >>> [bool(gain > 6) for gain in axis_gains(weight)]
    [True, False]
    """
    magnitudes = np.abs(np.asarray(weight, np.float64))
    shuffled = np.random.default_rng(seed).permutation(magnitudes.ravel()).reshape(magnitudes.shape)
    gains = []
    for axis in range(magnitudes.ndim):
        others = tuple(each for each in range(magnitudes.ndim) if each != axis)
        own, chance = (float(np.square(each.max(axis=others)).mean()) for each in (magnitudes, shuffled))
        gains.append(10 * float(np.log10(chance / own)) if own > 0 and chance > 0 else 0.0)
    return tuple(gains)
