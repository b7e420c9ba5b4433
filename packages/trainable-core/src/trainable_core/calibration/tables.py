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


ROUNDS = 100
"""Most rounds of k-means; in one dimension it comes to rest within some ten."""


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
    The threshold puts the largest magnitude on the last code, 127. The levels are those of k-means (Lloyd 1982) on all
    weights in 128ths of their thresholds, which begins with quantiles and is rounded in the end; where two of them are
    rounded to the same number, there are fewer.

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
    """Return the means of k-means on ascending values."""
    means = np.quantile(values, (np.arange(count) + 0.5) / count)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    for _ in range(ROUNDS):
        ends = np.concatenate([[0], np.searchsorted(values, (means[1:] + means[:-1]) / 2), [values.size]])
        sizes = np.diff(ends)
        found = np.where(sizes > 0, np.diff(sums[ends]) / np.maximum(sizes, 1), means)
        if np.array_equal(found, means):
            break
        means = np.sort(found)
    return np.asarray(means)
