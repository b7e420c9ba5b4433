"""Thresholds for the levels of a look-up table, and levels for those that learn."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from trainable_core.calibration.measure import power_error
from trainable_core.calibration.observer import Float64, finite_float32
from trainable_core.calibration.params import error_exponent, rows_of
from trainable_core.calibration.search import COARSE, FINE, NEAR
from trainable_core.constants import LUT_VALUES, MIN_THRESHOLD, THRESHOLD
from trainable_core.enums import CalibrationMethod, QuantizationMethod
from trainable_core.qparams import TABLE_STEPS, QParams, from_variables


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
    reach = max(abs(level) for level in levels) / TABLE_STEPS
    best = largest = np.abs(rows).max(axis=1).astype(np.float64) / reach

    def grid(thresholds: Float64) -> QParams:
        table: dict[str, Any] = {"levels": levels, "min_threshold": min_threshold, "channels_axis": 0}
        return from_variables({THRESHOLD: thresholds}, quantization_method, 8, **table)

    if calibration_method is not CalibrationMethod.MINMAX:
        exponent, octaves = error_exponent(calibration_method, p), np.zeros(largest.shape)
        for tried in (-COARSE, NEAR * FINE):
            candidates = [octaves + each for each in (0.0, *tried)]
            errors = power_error(rows, None, [grid(largest * np.exp2(each)) for each in candidates], exponent)
            octaves = np.asarray(candidates)[errors.argmin(axis=0), np.arange(largest.size)]
        best = largest * np.exp2(octaves)
    thresholds = (grid(best).scale * np.float32(TABLE_STEPS)).tolist()
    return {THRESHOLD: thresholds[0] if channels_axis is None else thresholds, LUT_VALUES: list(levels)}


BINS = 2
"""Bins for a code in the search for levels: borders between two levels are found up to half a code."""


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
    thresholds = np.abs(rows).max(axis=1).astype(np.float64) * TABLE_STEPS / (TABLE_STEPS - 1)
    table: dict[str, Any] = {"levels": (0,), "min_threshold": min_threshold, "channels_axis": 0}
    scale = from_variables({THRESHOLD: thresholds}, quantization_method, 8, **table).scale
    steps = np.sort(rows.astype(np.float64) / scale[:, np.newaxis], axis=None)
    levels = sorted({int(level) for level in np.clip(np.rint(_means(steps, count)), -TABLE_STEPS, TABLE_STEPS - 1)})
    bounded = (scale * np.float32(TABLE_STEPS)).tolist()
    return {THRESHOLD: bounded[0] if channels_axis is None else bounded, LUT_VALUES: levels}


def _means(values: Float64, count: int) -> Float64:
    """Return the means of the least squared error on ascending values, at most `count`."""
    starts = np.flatnonzero(np.diff(np.rint(values * BINS), prepend=-np.inf))
    ends = np.append(starts, values.size)
    numbers, sums, squares = (
        np.concatenate([[0.0], np.cumsum(each)])[ends] for each in (np.ones(values.size), values, values**2)
    )
    size, total, square = (
        each - each[:, np.newaxis] for each in (numbers, sums, squares)
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
