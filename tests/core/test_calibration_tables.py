"""Tables: levels by k-means, and what they do with weights that leave them no choice."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from trainable_core.calibration.tables import calibrate_levels
from trainable_core.enums import QuantizationMethod
from trainable_core.errors import CalibrationError

SYM, POT = QuantizationMethod.LUT_SYM_QUANTIZER, QuantizationMethod.LUT_POT_QUANTIZER


def error_of(values: np.ndarray, levels: list[float]) -> float:
    return float((np.abs(values[:, None] - np.asarray(levels)).min(1) ** 2).sum())


def best_error(values: np.ndarray, count: int) -> float:
    """Return the least error of any levels: those of neighbours that share one are their mean."""
    ends = itertools.combinations(range(1, values.size), count - 1)
    parts = (np.split(np.sort(values), list(each)) for each in ends)
    return min(sum(float(((part - part.mean()) ** 2).sum()) for part in each) for each in parts)


@pytest.mark.parametrize("seed", range(20))
def test_levels_are_the_best_there_are(seed):
    random = np.random.default_rng(seed)
    values = random.integers(-127, 128, 12).astype(np.float32)
    values[0] = 127  # so that the threshold is 128, and each value a whole code
    found = calibrate_levels(values, 3, quantization_method=SYM)
    assert found["threshold"] == 128
    best = best_error(values.astype(np.float64), 3)
    # a mean that is rounded by up to a half adds the square of that for each of its values
    assert best <= error_of(values, found["lut_values"]) <= best + values.size / 4


def test_levels_are_where_the_weights_are():
    values = np.repeat([-1.0, -0.5, 0.25, 1.0], [5, 50, 100, 2])
    found = calibrate_levels(values, 4, quantization_method=SYM)
    levels = np.asarray(found["lut_values"]) * found["threshold"] / 128
    np.testing.assert_allclose(levels, [-1, -0.5, 0.25, 1], atol=found["threshold"] / 256)  # half a code


@pytest.mark.parametrize("method", [SYM, POT])
@pytest.mark.parametrize(
    ("values", "levels"), [(np.zeros(6), 1), (np.full(3, 0.7), 1), ([3e38, -3e38, 1.0], 3), ([1e-30, 2e-30], 1)]
)
def test_there_are_no_more_levels_than_values(values, levels, method):
    found = calibrate_levels(np.asarray(values, np.float32), 8, quantization_method=method)
    assert len(found["lut_values"]) == levels
    assert np.isfinite(found["threshold"])
    assert found["threshold"] > 0
    assert (np.log2(found["threshold"]) % 1 == 0) or method is SYM


def test_each_channel_has_a_threshold_and_all_share_the_levels():
    values = np.outer([1.0, 0.001], [-1.0, 0.2, 0.5, 1.0])
    found = calibrate_levels(values, 4, quantization_method=SYM, channels_axis=0)
    # a threshold puts the largest weight on code 127
    np.testing.assert_allclose(found["threshold"], [128 / 127, 0.128 / 127], rtol=2.0**-22)
    assert found["lut_values"] == [-127, 25, 64, 127]


@pytest.mark.parametrize("values", [[], [1.0, np.nan], [np.inf]])
def test_weights_that_are_no_numbers_are_refused(values):
    with pytest.raises(CalibrationError):
        calibrate_levels(values, 2, quantization_method=SYM)
