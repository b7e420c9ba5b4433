"""Tables: levels by k-means, and what they do with weights that leave them no choice."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainable_core.calibration.observer import Observer
from trainable_core.calibration.tables import (
    calibrate_activation_levels,
    calibrate_activation_table,
    calibrate_levels,
    calibrate_table,
)
from trainable_core.constants import LUT_VALUES, MIN_THRESHOLD, SIGNED, THRESHOLD
from trainable_core.enums import CalibrationMethod, QuantizationMethod, QuantizationTarget
from trainable_core.errors import CalibrationError
from trainable_core.qparams import from_params
from trainable_core.reference import affine, apot
from trainable_core.validation import check_params

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


# ---- activations ----------------------------------------------------------------------------------------------------


def seen(values) -> Observer:
    """Return an observer that has seen some values."""
    observer = Observer()
    observer.update(np.asarray(values, np.float32))
    return observer


def levels_of(values, count, method=CalibrationMethod.MINMAX, *, signed=False, grid=POT, **more):
    fixed = {"calibration_method": method, "quantization_method": grid, "signed": signed}
    return calibrate_activation_levels(seen(values), count, **fixed, **more)


def table_of(values, levels, method=CalibrationMethod.MINMAX, *, signed=False, grid=POT, **more):
    fixed = {"calibration_method": method, "quantization_method": grid, "signed": signed}
    return calibrate_activation_table(seen(values), levels, **fixed, **more)


def squared_error(values, found, n_bits):
    grid = from_params(POT, n_bits, found[SIGNED], found)
    return float(((affine.fake_quantize(np.asarray(values, np.float64), grid) - values) ** 2).mean())


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("signed", [True, False])
def test_activation_levels_are_the_best_there_are_as_often_as_values_were_seen(seed, signed):
    random = np.random.default_rng(seed)
    # whole codes, which are far enough apart for bins of their own
    codes = random.integers(-127 if signed else 0, 128 if signed else 256, 7)
    codes[0] = 127 if signed else 255
    values = np.repeat(codes, random.integers(1, 3, 7)).astype(np.float32)
    found = levels_of(values, 3, signed=signed)
    assert found[THRESHOLD] == (128 if signed else 256)
    assert found[SIGNED] is signed
    best = best_error(values.astype(np.float64), 3)
    assert best <= error_of(values, found[LUT_VALUES]) <= best + values.size / 4


def test_a_threshold_that_is_far_from_nearly_all_values_is_halved():
    values = np.append(np.random.default_rng(0).normal(0, 1, 20_000) ** 2, 300.0)
    errors = {}
    for method in (CalibrationMethod.MINMAX, CalibrationMethod.MSE, CalibrationMethod.PERCENTILE):
        found = levels_of(values, 16, method)
        errors[method] = squared_error(np.sort(values)[:-1], found, 4)
        assert found[THRESHOLD] == (512 if method is CalibrationMethod.MINMAX else found[THRESHOLD])
    assert errors[CalibrationMethod.PERCENTILE] < errors[CalibrationMethod.MINMAX] / 4
    whole = {method: squared_error(values, levels_of(values, 16, method), 4) for method in errors}
    assert whole[CalibrationMethod.MSE] == min(whole.values())


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("method", [CalibrationMethod.MSE, CalibrationMethod.MAE, CalibrationMethod.KL])
def test_the_threshold_of_an_activations_levels_is_the_best_power_of_two(method, signed):
    values = np.abs(np.random.default_rng(1).standard_t(3, 5000)) * (1 if not signed else [1, -1] * 2500)
    levels = apot.levels(3, "q", signed=signed)
    found = table_of(values, levels, method, signed=signed)

    def error(threshold):
        grid = from_params(POT, 3, signed, {THRESHOLD: threshold, LUT_VALUES: list(levels)})
        power = 1 if method is CalibrationMethod.MAE else 2
        return (np.abs(affine.fake_quantize(values, grid) - values) ** power).mean()

    assert error(found[THRESHOLD]) == min(error(2.0**octave) for octave in range(-4, 10))
    assert found[LUT_VALUES] == list(levels)


def test_weights_and_activations_with_a_sign_get_the_same_threshold():
    values = np.random.default_rng(2).integers(-100, 101, 500) / 64  # each has a bin of its own
    levels = apot.levels(4, "q")
    for method in (CalibrationMethod.MINMAX, CalibrationMethod.MSE, CalibrationMethod.MAE):
        fixed = {"calibration_method": method, "quantization_method": SYM}
        of_weights = calibrate_table(values, levels, **fixed)[THRESHOLD]
        # a bin's centre is off by at most a 4095th of the range
        assert table_of(values, levels, method, signed=True, grid=SYM)[THRESHOLD] == pytest.approx(of_weights, rel=0.01)


@given(
    st.lists(st.floats(-(2.0**120), 2.0**120, width=32), min_size=1, max_size=20),
    st.booleans(),
    st.sampled_from(CalibrationMethod),
    st.integers(1, 4),
)
def test_activations_tables_are_what_a_config_takes(values, signed, method, n_bits):
    tables = [levels_of(values, 2**n_bits, method, signed=signed)]
    if n_bits > 1:
        tables.append(table_of(values, apot.levels(n_bits, "q", signed=signed), method, signed=signed))
    for found in tables:
        check_params(found, POT, n_bits, QuantizationTarget.Activation)
        assert np.log2(found[THRESHOLD]) % 1 == 0
        assert found[THRESHOLD] >= MIN_THRESHOLD
        assert np.isfinite(affine.fake_quantize(np.asarray(values), from_params(POT, n_bits, signed, found))).all()


def test_activations_that_nobody_saw_have_no_table():
    fixed = {"calibration_method": CalibrationMethod.MSE, "quantization_method": POT, "signed": True}
    with pytest.raises(CalibrationError):
        calibrate_activation_levels(Observer(), 4, **fixed)
    with pytest.raises(CalibrationError):
        calibrate_activation_table(Observer(), (0, 1), **fixed)
