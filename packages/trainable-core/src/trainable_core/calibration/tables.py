"""Thresholds for the levels of a look-up table, and levels for those that learn."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from trainable_core.calibration.measure import power_error
from trainable_core.calibration.objective import points_of
from trainable_core.calibration.observer import Float32, Float64, Observer, finite_float32
from trainable_core.calibration.params import error_exponent, rows_of
from trainable_core.calibration.percentile import observed_percentile
from trainable_core.calibration.search import COARSE, FINE, NEAR, GridKind
from trainable_core.constants import LUT_VALUES, MIN_THRESHOLD, SIGNED, THRESHOLD
from trainable_core.enums import CalibrationMethod, QuantizationMethod
from trainable_core.qparams import QParams, from_variables, table_ends, table_steps


def calibrate_table(
    values: ArrayLike,
    levels: tuple[int, ...],
    *,
    calibration_method: CalibrationMethod,
    quantization_method: QuantizationMethod,
    channels_axis: int | None = None,
    min_threshold: float = MIN_THRESHOLD,
    p: float = 2.0,
) -> dict[str, Any]:
    """Return the quantization params of a weights tensor on a look-up table.

    Parameters
    ----------
    values : array of real numbers, any shape but empty
        The weights; they count as float32.
    levels : tuple of int
        The table, ascending, whole numbers from -128 to 127.
    calibration_method : CalibrationMethod
        MINMAX puts the outermost level on the largest magnitude; MAE and LP look for the least error of their kind, and
        every other method for the least squared error.
    quantization_method : QuantizationMethod
        LUT_SYM_QUANTIZER or LUT_POT_QUANTIZER.
    channels_axis : int or None
        Axis with one threshold per index; negative counts from the end. None: one for the tensor.
    min_threshold : float
        Lower bound.
    p : float
        Exponent of LP.

    Returns
    -------
    dict
        ``{THRESHOLD: t, LUT_VALUES: levels}``; a number, or a list of one per channel.

    Raises
    ------
    CalibrationError
        When there are no values, or any is NaN or infinite.
    InvalidArgumentError
        When the tensor has no such axis.

    Notes
    -----
    Candidates are the threshold of MINMAX times the ratios `search.COARSE`, then times `search.FINE` around the best.

    Examples
    --------
    >>> calibrate_table(
    ...     [0.5, -1.5],
    ...     (-96, -32, 32, 96),
    ...     calibration_method=CalibrationMethod.MINMAX,
    ...     quantization_method=QuantizationMethod.LUT_SYM_QUANTIZER,
    ... )
    {'threshold': 2.0, 'lut_values': [-96, -32, 32, 96]}
    """
    rows = rows_of("calibrate_table", finite_float32(values, "calibrate_table"), channels_axis)
    table = _Table(quantization_method, min_threshold, signed=True)
    exponent = None if calibration_method is CalibrationMethod.MINMAX else error_exponent(calibration_method, p)
    largest = np.abs(rows).max(axis=1).astype(np.float64)
    thresholds = table.threshold(rows, None, levels, largest, exponent)
    return {THRESHOLD: thresholds[0] if channels_axis is None else thresholds, LUT_VALUES: list(levels)}


def calibrate_activation_table(
    observer: Observer,
    levels: tuple[int, ...],
    *,
    calibration_method: CalibrationMethod,
    quantization_method: QuantizationMethod,
    signed: bool,
    min_threshold: float = MIN_THRESHOLD,
    percentile: float = 99.99,
    p: float = 2.0,
) -> dict[str, Any]:
    """Return the quantization params of an activation on a look-up table, from what an observer saw.

    Parameters
    ----------
    observer : Observer
        Has seen at least one value; it is not changed.
    levels : tuple of int
        The table, ascending: whole numbers from -128 to 127, or from 0 to 255 where it is not signed.
    calibration_method : CalibrationMethod
        As for `calibrate_table`; PERCENTILE puts the last level on the end of so many values.
    quantization_method : QuantizationMethod
        LUT_POT_QUANTIZER or LUT_SYM_QUANTIZER.
    signed : bool
        Whether the table reaches below zero.
    min_threshold, percentile, p
        As for `calibrate_activation`.

    Returns
    -------
    dict
        ``{THRESHOLD: t, SIGNED: signed, LUT_VALUES: levels}``.

    Raises
    ------
    CalibrationError
        When the observer has seen nothing.

    Notes
    -----
    Errors are measured on the centres of the observer's bins, and on zero, as `calibrate_activation` does.

    Examples
    --------
    >>> observer = Observer()
    >>> observer.update([0.0, 0.5, 3.0])
    >>> calibrate_activation_table(
    ...     observer,
    ...     (0, 48, 96, 192),
    ...     calibration_method=CalibrationMethod.MINMAX,
    ...     quantization_method=QuantizationMethod.LUT_POT_QUANTIZER,
    ...     signed=False,
    ... )
    {'threshold': 4.0, 'is_signed': False, 'lut_values': [0, 48, 96, 192]}
    """
    points, counts = _seen(observer)
    table = _Table(quantization_method, min_threshold, signed=signed)
    clips = calibration_method in {CalibrationMethod.MINMAX, CalibrationMethod.PERCENTILE}
    largest = _largest(observer, calibration_method, percentile, signed=signed)
    exponent = None if clips else error_exponent(calibration_method, p)
    (threshold,) = table.threshold(points[None], counts, levels, largest, exponent)
    return {THRESHOLD: threshold, SIGNED: bool(signed), LUT_VALUES: list(levels)}


BINS = 2
"""Bins for a code in the search for levels: borders between two levels are found up to half a code."""

HALVINGS = 6
"""How often the threshold of an activation is halved in the search: a few values may be that far from the others."""


def calibrate_levels(
    values: ArrayLike,
    count: int,
    *,
    quantization_method: QuantizationMethod,
    channels_axis: int | None = None,
    min_threshold: float = MIN_THRESHOLD,
) -> dict[str, Any]:
    """Return the quantization params of a weights tensor on a look-up table whose levels are found, too.

    Parameters
    ----------
    values : array of real numbers, any shape but empty
        The weights; they count as float32.
    count : int
        The most levels.
    quantization_method : QuantizationMethod
        LUT_SYM_QUANTIZER or LUT_POT_QUANTIZER.
    channels_axis : int or None
        Axis with one threshold per index; negative counts from the end. None: one for the tensor.
    min_threshold : float
        Lower bound.

    Returns
    -------
    dict
        ``{THRESHOLD: t, LUT_VALUES: levels}``; a number, or a list of one per channel.

    Raises
    ------
    CalibrationError
        When there are no values, or any is NaN or infinite.
    InvalidArgumentError
        When the tensor has no such axis.

    Notes
    -----
    The threshold puts the largest magnitude on the last code, 127. The levels are those of k-means on all weights in
    128ths of their thresholds, rounded in the end; where two of them are rounded to the same number, there are fewer.
    In one dimension the best means follow from those of fewer values (Wang and Song, "Ckmeans.1d.dp: Optimal k-means
    Clustering in One Dimension by Dynamic Programming", The R Journal 3(2), 2011); here from those of fewer bins.

    Examples
    --------
    >>> calibrate_levels([1.27, 1.25, -0.6, -0.62], 2, quantization_method=QuantizationMethod.LUT_SYM_QUANTIZER)
    {'threshold': 1.2799999713897705, 'lut_values': [-61, 126]}
    """
    rows = rows_of("calibrate_levels", finite_float32(values, "calibrate_levels"), channels_axis)
    table = _Table(quantization_method, min_threshold, signed=True)
    grid = table.grid(np.abs(rows).max(axis=1).astype(np.float64) * table.beyond_last, (0,))
    levels = table.levels(rows, None, grid, count)
    bounded = (grid.scale * np.float32(grid.threshold_steps)).tolist()
    return {THRESHOLD: bounded[0] if channels_axis is None else bounded, LUT_VALUES: list(levels)}


def calibrate_activation_levels(
    observer: Observer,
    count: int,
    *,
    calibration_method: CalibrationMethod,
    quantization_method: QuantizationMethod,
    signed: bool,
    min_threshold: float = MIN_THRESHOLD,
    percentile: float = 99.99,
    p: float = 2.0,
) -> dict[str, Any]:
    """Return the quantization params of an activation on a look-up table whose levels are found, from what was seen.

    Parameters
    ----------
    observer : Observer
        Has seen at least one value; it is not changed.
    count : int
        The most levels.
    calibration_method, quantization_method, signed, min_threshold, percentile, p
        As for `calibrate_activation_table`.

    Returns
    -------
    dict
        ``{THRESHOLD: t, SIGNED: signed, LUT_VALUES: levels}``.

    Raises
    ------
    CalibrationError
        When the observer has seen nothing.

    Notes
    -----
    The levels are those of `calibrate_levels`, on the centres of the observer's bins as often as each was seen. MINMAX
    puts the largest value on the last code, and PERCENTILE that of so many values. Every other method tries the
    threshold of MINMAX and `HALVINGS` halves of it, each with levels of its own, and keeps that of the least error: the
    codes of a table are whole numbers, and a value far from all others leaves these few.

    Examples
    --------
    >>> observer = Observer()
    >>> observer.update([0.0, 0.0, 0.5, 0.5, 3.0])
    >>> calibrate_activation_levels(
    ...     observer,
    ...     4,
    ...     calibration_method=CalibrationMethod.MSE,
    ...     quantization_method=QuantizationMethod.LUT_POT_QUANTIZER,
    ...     signed=False,
    ... )
    {'threshold': 4.0, 'is_signed': False, 'lut_values': [0, 32, 192]}
    """
    points, counts = _seen(observer)
    table = _Table(quantization_method, min_threshold, signed=signed)
    clips = calibration_method in {CalibrationMethod.MINMAX, CalibrationMethod.PERCENTILE}
    largest = _largest(observer, calibration_method, percentile, signed=signed) * table.beyond_last
    found: list[tuple[float, QParams]] = []
    exponent = error_exponent(calibration_method, p)
    for octave in range(1 if clips else 1 + HALVINGS):
        thresholds = largest * 2.0**-octave
        grid = table.grid(thresholds, table.levels(points[None], counts, table.grid(thresholds, (0,)), count))
        found.append((float(power_error(points[None], counts, [grid], exponent)[0, 0]), grid))
    _, best = min(found, key=lambda each: each[0])
    (threshold,) = (best.scale * np.float32(best.threshold_steps)).tolist()
    return {THRESHOLD: threshold, SIGNED: bool(signed), LUT_VALUES: list(best.levels)}


class _Table:
    """The tables of a method, with one threshold for each row of values.

    Parameters
    ----------
    method : QuantizationMethod
        LUT_SYM_QUANTIZER or LUT_POT_QUANTIZER.
    min_threshold : float
        Lower bound.
    signed : bool
        Whether they reach below zero.
    """

    def __init__(self, method: QuantizationMethod, min_threshold: float, *, signed: bool) -> None:
        self.method, self.min_threshold, self.signed = method, min_threshold, signed

    @property
    def beyond_last(self) -> float:
        """What the largest magnitude is multiplied by for the threshold that puts it on the last code."""
        return table_steps(signed=self.signed) / table_ends(signed=self.signed)[1]

    def grid(self, thresholds: Float64, levels: tuple[int, ...]) -> QParams:
        """Return the table with these thresholds, one per row; they are bounded, and rounded up to powers of two."""
        fixed: dict[str, Any] = {"min_threshold": self.min_threshold, "channels_axis": 0, "signed": self.signed}
        return from_variables({THRESHOLD: thresholds}, self.method, 8, **fixed, levels=levels)

    def threshold(
        self,
        rows: Float32,
        counts: Float64 | None,
        levels: tuple[int, ...],
        largest: Float64,
        exponent: float | None,
    ) -> list[float]:
        """Return the thresholds of rows of values, as often as `counts` says; see `calibrate_table`.

        Without an exponent the outermost level is put on the largest magnitude of each row.
        """
        best = largest = largest * table_steps(signed=self.signed) / max(abs(level) for level in levels)
        if exponent is not None:
            octaves = np.zeros(largest.shape)
            for tried in (-COARSE, NEAR * FINE):
                candidates = [octaves + each for each in (0.0, *tried)]
                grids = [self.grid(largest * np.exp2(each), levels) for each in candidates]
                errors = power_error(rows, counts, grids, exponent)
                octaves = np.asarray(candidates)[errors.argmin(axis=0), np.arange(largest.size)]
            best = largest * np.exp2(octaves)
        grid = self.grid(best, levels)
        thresholds: list[float] = (grid.scale * np.float32(grid.threshold_steps)).tolist()
        return thresholds

    def levels(self, rows: Float32, counts: Float64 | None, grid: QParams, count: int) -> tuple[int, ...]:
        """Return the levels of the least squared error of values on a grid, at most so many."""
        steps = np.clip(rows.astype(np.float64) / grid.scale[:, np.newaxis], grid.quant_min, grid.quant_max).ravel()
        order = np.argsort(steps, kind="stable")
        each = np.ones(steps.size) if counts is None else counts[order]
        return tuple(sorted({int(level) for level in np.rint(_means(steps[order], each, count))}))


def _seen(observer: Observer) -> tuple[Float32, Float64]:
    """Return the centres of the bins of an observer, and zero, with how often each was seen."""
    points, counts = points_of(observer, 1)
    points, counts = np.append(points, np.float32(0)), np.append(counts, float(observer.zeros))
    return points[counts > 0], counts[counts > 0]


def _largest(observer: Observer, method: CalibrationMethod, percentile: float, *, signed: bool) -> Float64:
    """Return the largest magnitude that a table is to hold, shape (1,)."""
    if method is CalibrationMethod.PERCENTILE:
        kind = GridKind(QuantizationMethod.SYMMETRIC, 8, signed=signed, min_threshold=0.0)
        return np.asarray(observed_percentile(kind, observer, percentile)[1])
    low = -observer.minimum if signed else 0.0
    return np.asarray([max(observer.maximum, low, 0.0)])


def _means(values: Float64, each: Float64, count: int) -> Float64:
    """Return the means of the least squared error on ascending values, each as often as it says, at most `count`."""
    starts = np.flatnonzero(np.diff(np.rint(values * BINS), prepend=-np.inf))
    ends = np.append(starts, values.size)
    numbers, sums, squares = (
        np.concatenate([[0.0], np.cumsum(summed)])[ends] for summed in (each, each * values, each * values**2)
    )
    size, total, square = (
        summed - summed[:, np.newaxis] for summed in (numbers, sums, squares)
    )  # of the bins from row to column
    with np.errstate(divide="ignore", invalid="ignore"):
        errors = np.where(size > 0, square - total**2 / size, np.inf)
    least, begins = errors[0], []
    for _ in range(min(count, len(starts)) - 1):
        tried = least[:, np.newaxis] + errors
        begins.append(tried.argmin(axis=0))
        least = tried.min(axis=0)
    borders = [len(starts)]
    for begin in reversed(begins):
        borders.append(int(begin[borders[-1]]))
    borders = [0, *reversed(borders)]
    return np.asarray(np.diff(sums[borders]) / np.diff(numbers[borders]))
