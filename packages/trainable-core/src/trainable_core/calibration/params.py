"""The two verbs of calibration: what an observer saw, or a weights tensor, to quantization params."""

from __future__ import annotations

import math
import operator
from dataclasses import replace
from numbers import Real

import numpy as np
from numpy.typing import ArrayLike

from trainable_core.calibration.objective import kl_objective, observed_power_objective
from trainable_core.calibration.observer import Float32, Float64, Observer, finite_float32
from trainable_core.calibration.percentile import exact_percentile, observed_percentile
from trainable_core.calibration.row_search import search_rows
from trainable_core.calibration.search import GridKind, search
from trainable_core.calibration.statistics import STATISTICAL, Moments, statistical_ends
from trainable_core.config import member
from trainable_core.constants import MIN_THRESHOLD, RANGE_MAX, RANGE_MIN, SIGNED, THRESHOLD
from trainable_core.enums import LUT_METHODS, CalibrationMethod, QuantizationMethod
from trainable_core.errors import CalibrationError, InvalidArgumentError, UnsupportedConfigError
from trainable_core.validation import MAX_THRESHOLD

MAX_BITS = 16


def calibrate_activation(
    observer: Observer,
    *,
    calibration_method: CalibrationMethod | str,
    quantization_method: QuantizationMethod | str,
    n_bits: int,
    signed: bool | None = None,
    min_threshold: float = MIN_THRESHOLD,
    percentile: float = 99.99,
    p: float = 2.0,
) -> dict[str, float | bool]:
    """Return the quantization params of an activation, from what an observer saw.

    Parameters
    ----------
    observer : Observer
        Has seen at least one value; it is not changed.
    calibration_method : CalibrationMethod or its value
        How to choose.
    quantization_method : QuantizationMethod or its name
        POWER_OF_TWO, SYMMETRIC or UNIFORM.
    n_bits : int
        Width of the codes, 1 to 16.
    signed : bool or None
        Whether the grid reaches below zero; None looks: it does when a negative value was seen. For UNIFORM, False puts
        the lower end at zero and True changes nothing.
    min_threshold : float
        Lower bound of the threshold, or of the range's width.
    percentile : float
        Percentage of the values that PERCENTILE keeps, in (0, 100].
    p : float
        Exponent of LP, > 0.

    Returns
    -------
    dict
        ``{THRESHOLD: float, SIGNED: bool}`` for the symmetric methods (a power of two for POWER_OF_TWO) and
        ``{RANGE_MIN: float, RANGE_MAX: float}``, ``range_min <= 0 <= range_max``, for UNIFORM. All are float32 numbers,
        so the grid is made from exactly these. Magnitudes beyond ``2**100`` (a range's beyond ``2**99``), which no
        config may hold, are cut there.

    Raises
    ------
    CalibrationError
        When the observer has seen nothing, or SAWB has no coefficients for the bit width.
    InvalidArgumentError
        When an argument is out of bounds; the message names it.
    UnsupportedConfigError
        When the quantization method is a look-up table.

    Notes
    -----
    *MINMAX* is exact. *PERCENTILE* leaves out ``floor((1 - percentile / 100) * count)`` values: the largest by
    magnitude for the symmetric methods (by value, where the grid isn't signed), half of them at each end for UNIFORM.
    An end found in the histogram is the outer edge of its bin, or the exact extreme where this is nearer to zero; so
    it is at most one bin too far out.

    *MSE*, *MAE* and *LP* measure on bin centres (moved inside the exact extremes) weighted by counts, and on zero
    itself. A fake-quantized value's distance from the value is the distance to the nearest grid point, which changes
    by no more than the value does. So for exponents >= 1 the p-th root of the mean error is off by at most half a
    bin's width; a bin is at most 1/4095 of the range from the lowest to the highest value and zero, with the default
    number of bins. Grids of more than 10 bits have steps as fine as the bins: there every bin stands as
    ``2**(n_bits - 10)`` points evenly spread, and the bound is a whole bin. *KL* compares histograms; see
    `measure.kl_divergence`. `search.search` says how candidates are chosen. The params chosen never measure
    worse than those of MINMAX.

    *LSQ* and *SAWB* are computed from means over bin centres, see `statistics.statistical_ends`. *LSQ_PLUS* is MSE, as
    in its paper.

    Examples
    --------
    >>> observer = Observer()
    >>> observer.update([0.0, 0.25, 0.5, 3.0])
    >>> calibrate_activation(observer, calibration_method="minmax", quantization_method="SYMMETRIC", n_bits=8)
    {'threshold': 3.0, 'is_signed': False}
    >>> calibrate_activation(observer, calibration_method="minmax", quantization_method="POWER_OF_TWO", n_bits=8)
    {'threshold': 4.0, 'is_signed': False}
    >>> calibrate_activation(observer, calibration_method="minmax", quantization_method="UNIFORM", n_bits=8)
    {'range_min': 0.0, 'range_max': 3.0}
    """
    subject = "calibrate_activation"
    method, exponent = _choice(subject, calibration_method, percentile, p)
    if signed is not None and not isinstance(signed, bool | np.bool_):
        raise InvalidArgumentError(subject, f"signed must be true, false or None, got {signed!r}")
    kind = _kind(subject, quantization_method, n_bits, min_threshold)
    if not isinstance(observer, Observer):
        raise CalibrationError(subject, f"observer must be an Observer, got {type(observer).__name__}")
    if observer.empty:
        raise CalibrationError(subject, "the observer has seen no values", "feed calibration data first.")
    kind = replace(kind, signed=observer.minimum < 0 if signed is None else bool(signed))
    extremes = kind.extremes(np.array([observer.minimum]), np.array([observer.maximum]))
    if method is CalibrationMethod.MINMAX:
        ends = kind.bounded(extremes)
    elif method is CalibrationMethod.PERCENTILE:
        ends = kind.bounded(observed_percentile(kind, observer, percentile))
    elif method is CalibrationMethod.KL:
        ends = search(kind, extremes, kl_objective(kind, observer))
    elif method in STATISTICAL and method is not CalibrationMethod.LSQ_PLUS:
        ends = statistical_ends(kind, method, Moments.of_observer(observer), extremes)
    else:
        ends = search(kind, extremes, observed_power_objective(kind, observer, exponent))
    low, high = float(ends[0, 0]), float(ends[1, 0])
    if kind.method is QuantizationMethod.UNIFORM:
        return {RANGE_MIN: low, RANGE_MAX: high}
    return {THRESHOLD: high, SIGNED: kind.signed}


def calibrate_weights(
    values: ArrayLike,
    *,
    calibration_method: CalibrationMethod | str,
    quantization_method: QuantizationMethod | str,
    n_bits: int,
    channels_axis: int | None = None,
    min_threshold: float = MIN_THRESHOLD,
    percentile: float = 99.99,
    p: float = 2.0,
) -> dict[str, float | list[float]]:
    """Return the quantization params of a weights tensor.

    Parameters
    ----------
    values : array of real numbers, any shape but empty
        The weights; they count as float32.
    calibration_method, quantization_method, n_bits
        As for `calibrate_activation`.
    channels_axis : int or None
        Axis with one threshold or range per index; negative counts from the end. None: one for the tensor.
    min_threshold, percentile, p
        As for `calibrate_activation`.

    Returns
    -------
    dict
        ``{THRESHOLD: t}`` (the grid is signed) or ``{RANGE_MIN: a, RANGE_MAX: b}``; numbers, or lists of one per
        channel, within the bounds that `calibrate_activation` keeps.

    Raises
    ------
    CalibrationError
        When there are no values, any is NaN or infinite, or SAWB has no coefficients for the bit width.
    InvalidArgumentError
        When an argument is out of bounds, or the tensor has no such axis; the message names it.
    UnsupportedConfigError
        When the quantization method is a look-up table.

    Notes
    -----
    All methods see every value, except for KL, which works on a histogram per channel. PERCENTILE leaves out
    ``floor((1 - percentile / 100) * n)`` of a channel's n values and gives the extreme of the rest. *MSE*, *MAE* and
    *LP* choose among many candidates; which of them are measured, and how, is told by `row_search`. What is chosen was
    measured on all values, and is never worse than what MINMAX chooses. A channel's params don't depend on the other
    channels. Memory: up to two copies of the tensor, and little else.

    *LSQ*, *LSQ_PLUS* and *SAWB* are computed from means, see `statistics.statistical_ends`.

    Examples
    --------
    >>> weights = np.array([[0.5, -2.0], [0.0, 0.0], [0.25, 0.125]])
    >>> calibrate_weights(
    ...     weights, calibration_method="minmax", quantization_method="SYMMETRIC", n_bits=8, channels_axis=0
    ... )
    {'threshold': [2.0, 1.52587890625e-05, 0.25]}
    >>> calibrate_weights(weights, calibration_method="minmax", quantization_method="UNIFORM", n_bits=8)
    {'range_min': -2.0, 'range_max': 0.5}
    """
    subject = "calibrate_weights"
    method, exponent = _choice(subject, calibration_method, percentile, p)
    kind = _kind(subject, quantization_method, n_bits, min_threshold)
    rows = rows_of(subject, finite_float32(values, subject), channels_axis)
    extremes = kind.extremes(rows.min(axis=1).astype(np.float64), rows.max(axis=1).astype(np.float64))
    if method is CalibrationMethod.MINMAX:
        ends = kind.bounded(extremes)
    elif method is CalibrationMethod.PERCENTILE:
        ends = kind.bounded(exact_percentile(kind, rows, percentile))
    elif method is CalibrationMethod.KL:
        ends = np.concatenate([_search_channel(kind, row, extremes[:, [i]]) for i, row in enumerate(rows)], axis=1)
    elif method in STATISTICAL:
        ends = statistical_ends(kind, method, Moments.of_rows(rows), extremes)
    else:
        ends = search_rows(kind, rows, exponent)
    low, high = ends.tolist()
    if channels_axis is None:
        low, high = low[0], high[0]
    return {RANGE_MIN: low, RANGE_MAX: high} if kind.method is QuantizationMethod.UNIFORM else {THRESHOLD: high}


def _choice(
    subject: str, method: CalibrationMethod | str, percentile: float, p: float
) -> tuple[CalibrationMethod, float]:
    """Return the checked method, and the exponent of its error where it has one."""
    try:
        chosen = member(CalibrationMethod, method)
    except ValueError as error:
        raise InvalidArgumentError(subject, f"calibration_method: {error}") from None
    if not _real(percentile) or not 0 < percentile <= 100:  # noqa: PLR2004 - per cent
        raise InvalidArgumentError(subject, f"percentile must be in (0, 100], got {percentile!r}")
    if not _real(p) or not p > 0:
        raise InvalidArgumentError(subject, f"p must be a positive number, got {p!r}")
    return chosen, error_exponent(chosen, p)


def error_exponent(method: CalibrationMethod, p: float) -> float:
    """Return what a search by a method raises the magnitude of an error to."""
    return {CalibrationMethod.LP: float(p), CalibrationMethod.MAE: 1.0}.get(method, 2.0)


def _kind(subject: str, quantization_method: QuantizationMethod | str, n_bits: int, min_threshold: float) -> GridKind:
    """Return the checked kind of a signed grid."""
    try:
        method = member(QuantizationMethod, quantization_method)
    except ValueError as error:
        raise InvalidArgumentError(subject, f"quantization_method: {error}") from None
    if method in LUT_METHODS:
        problem = f"quantization_method: {method} is a look-up table"
        raise UnsupportedConfigError(subject, problem, "calibration knows SYMMETRIC, POWER_OF_TWO and UNIFORM.")
    if isinstance(n_bits, bool) or not hasattr(n_bits, "__index__") or not 1 <= operator.index(n_bits) <= MAX_BITS:
        raise InvalidArgumentError(subject, f"n_bits must be an integer from 1 to {MAX_BITS}, got {n_bits!r}")
    limit = MAX_THRESHOLD / 2 if method is QuantizationMethod.UNIFORM else MAX_THRESHOLD
    if not _real(min_threshold) or not 0 <= min_threshold <= limit:
        problem = f"min_threshold must be a number from 0 to 2**{math.frexp(limit)[1] - 1}, got {min_threshold!r}"
        raise InvalidArgumentError(subject, problem)
    return GridKind(method, operator.index(n_bits), signed=True, min_threshold=float(min_threshold))


def _real(value: object) -> bool:
    """Return whether `value` is a finite real number."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond float64
        return False


def rows_of(subject: str, values: Float32, channels_axis: int | None) -> Float32:
    """Return the values as one row per channel, shape (C, n)."""
    if channels_axis is not None:
        axis_is_integer = hasattr(channels_axis, "__index__") and not isinstance(channels_axis, bool)
        if not axis_is_integer or not -values.ndim <= operator.index(channels_axis) < values.ndim:
            problem = f"channels_axis must be None or an axis of shape {values.shape}, got {channels_axis!r}"
            raise InvalidArgumentError(subject, problem)
    if not values.size:
        raise CalibrationError(subject, f"values of shape {values.shape} are empty")
    if channels_axis is None:
        return values.reshape(1, -1)
    channels = values.shape[channels_axis]
    return np.ascontiguousarray(np.moveaxis(values, channels_axis, 0).reshape(channels, -1))


def _search_channel(kind: GridKind, row: Float32, extremes: Float64) -> Float64:
    """Return the ends (2, 1) of least divergence for one channel's values."""
    observer = Observer()
    observer.update(row)
    return search(kind, extremes, kl_objective(kind, observer))
