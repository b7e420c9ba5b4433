"""Ranges that follow from a few statistics of the values: the initial values of LSQ, of LSQ+ and of SAWB.

References
----------
Esser et al., "Learned Step Size Quantization", ICLR 2020, arXiv:1902.08153, section 2.1.
Bhalgat et al., "LSQ+: Improving low-bit quantization through learnable offsets and better initialization", CVPR
Workshops 2020, arXiv:2004.09576, section 3.2.
Choi et al., "Accurate and Efficient 2-bit Quantized Neural Networks", MLSys 2019, section 4 (SAWB).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from trainable_core.calibration.objective import points_of
from trainable_core.calibration.observer import Float32, Float64, Observer
from trainable_core.calibration.search import GridKind
from trainable_core.enums import CalibrationMethod, QuantizationMethod
from trainable_core.errors import CalibrationError
from trainable_core.qparams import code_range

SAWB: Mapping[int, tuple[float, float]] = {
    2: (3.12, -2.064),
    3: (7.509, -6.892),
    4: (12.68, -12.80),
    8: (31.76, -35.04),
}
"""Coefficients c1 and c2 by bit width: least squares over six distributions, as published with the method."""

DEVIATIONS = 3
"""Standard deviations that LSQ+ keeps on either side of the mean."""

STATISTICAL = (CalibrationMethod.LSQ, CalibrationMethod.LSQ_PLUS, CalibrationMethod.SAWB)
"""The methods that need no search and no order of the values."""


@dataclass(frozen=True)
class Moments:
    """Means over the values of each channel; float64 arrays of shape (C,).

    Parameters
    ----------
    mean, magnitude, square : float64 array
        Of the values, of their magnitudes, and of their squares.
    """

    mean: Float64
    magnitude: Float64
    square: Float64

    @classmethod
    def of_rows(cls, rows: Float32) -> Moments:
        """Return the moments of each row of values (C, n)."""
        values = rows.astype(np.float64)
        return cls(values.mean(axis=1), np.abs(values).mean(axis=1), np.square(values).mean(axis=1))

    @classmethod
    def of_observer(cls, observer: Observer) -> Moments:
        """Return the moments of what an observer saw, as if all values of a bin were at its centre."""
        points, counts = points_of(observer, 1)
        values, shares = points.astype(np.float64), counts / observer.count
        sums = (values @ shares, np.abs(values) @ shares, np.square(values) @ shares)
        return cls(*(np.asarray([float(each)]) for each in sums))


def statistical_ends(kind: GridKind, method: CalibrationMethod, moments: Moments, extremes: Float64) -> Float64:
    """Return the range that a paper starts training with, for each channel.

    Parameters
    ----------
    kind : GridKind
        The grid.
    method : CalibrationMethod
        LSQ, LSQ_PLUS or SAWB.
    moments : Moments
        Of the values.
    extremes : float64 array, shape (2, C)
        Ends that clip no value; they say on which sides of zero there are values.

    Returns
    -------
    float64 array, shape (2, C)
        Bounded ends.

    Raises
    ------
    CalibrationError
        When SAWB has no coefficients for the bit width.

    Notes
    -----
    - *LSQ*: ``scale = 2 mean|x| / sqrt(p)`` with p the last code (section 2.1).
    - *LSQ+*: ``scale = max(|mean - 3 sigma|, |mean + 3 sigma|) / 2**(n_bits - 1)`` (section 3.2, weights).
    - *SAWB*: ``threshold = c1 sqrt(mean x**2) + c2 mean|x|`` (equation 3). *Deviation:* the paper's levels are the
      ``2**n_bits`` evenly spaced ones from -threshold to threshold, and zero is none of them; on our grids the
      threshold is one step beyond the last code.

    UNIFORM takes the range of the symmetric grid of as many bits, signed where there are values on both sides of zero,
    else from zero to the side where they are. *Deviation:* a signed 1-bit grid has ``p == 0``; 1 is taken instead. A
    threshold that is not positive, as SAWB's may be where all magnitudes are alike, counts as the largest magnitude.
    """
    two_sided = (extremes < 0).any(axis=0) & (extremes > 0).any(axis=0)
    is_uniform = kind.method is QuantizationMethod.UNIFORM
    signed = two_sided if is_uniform else np.full(two_sided.shape, kind.signed)
    thresholds = {sign: _threshold(method, kind.n_bits, moments, signed=sign) for sign in (False, True)}
    threshold = np.where(signed, thresholds[True], thresholds[False])
    largest = np.abs(extremes).max(axis=0)
    threshold = np.where(threshold > 0, threshold, largest)
    if not is_uniform:
        return kind.bounded(np.stack([-threshold, threshold]))
    # the last code of a symmetric grid is one step short of its threshold
    reach = threshold * np.where(signed, 1 - 2.0 ** (1 - kind.n_bits), 1 - 2.0**-kind.n_bits)
    reach = np.where(reach > 0, reach, threshold)  # of 1 bit
    below = np.where(two_sided, -threshold, np.where(extremes[0] < 0, -reach, 0.0))
    return kind.bounded(np.stack([below, np.where(extremes[1] > 0, reach, 0.0)]))


def _threshold(method: CalibrationMethod, n_bits: int, moments: Moments, *, signed: bool) -> Float64:
    """Return the threshold of a symmetric grid, shape (C,)."""
    if method is CalibrationMethod.SAWB:
        if n_bits not in SAWB:
            known = ", ".join(map(str, SAWB))
            problem = f"sawb has coefficients for {known} bits, not for {n_bits}"
            raise CalibrationError("calibration", problem, "calibrate with mse.")
        first, second = SAWB[n_bits]
        return np.asarray(first * np.sqrt(moments.square) + second * moments.magnitude)
    if method is CalibrationMethod.LSQ_PLUS:
        sigma = np.sqrt(np.maximum(moments.square - np.square(moments.mean), 0.0))
        # the larger one of |mean - 3 sigma| and |mean + 3 sigma|
        return np.asarray(np.abs(moments.mean) + DEVIATIONS * sigma)
    last = max(code_range(QuantizationMethod.SYMMETRIC, n_bits, signed=signed)[1], 1)
    return 2 * moments.magnitude / math.sqrt(last) * 2.0 ** (n_bits - int(signed))
