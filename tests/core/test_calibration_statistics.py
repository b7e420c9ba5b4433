"""The initial values of LSQ, LSQ+ and SAWB, by hand."""

import math

import numpy as np
import pytest

from trainable_core.calibration import Observer, calibrate_activation, calibrate_weights
from trainable_core.calibration.observer import N_BINS
from trainable_core.errors import CalibrationError


def weights(values, method, grid="SYMMETRIC", n_bits=4, **more):
    return calibrate_weights(values, calibration_method=method, quantization_method=grid, n_bits=n_bits, **more)


def activation(values, method, grid="SYMMETRIC", n_bits=4, **more):
    observer = Observer()
    observer.update(values)
    return calibrate_activation(observer, calibration_method=method, quantization_method=grid, n_bits=n_bits, **more)


@pytest.mark.parametrize(("n_bits", "last"), [(1, 1), (2, 1), (3, 3), (8, 127)])
def test_lsq_takes_twice_the_mean_magnitude_over_the_root_of_the_last_code(n_bits, last):
    # Esser et al., 2.1: mean |x| is 2; the threshold is the scale times 2**(n_bits - 1)
    expected = np.float32(2 * 2 / math.sqrt(last) * 2 ** (n_bits - 1))
    assert weights([1.0, -3.0], "lsq", n_bits=n_bits) == {"threshold": expected}


def test_lsq_of_an_unsigned_activation_counts_its_own_last_code():
    # what is at the centre of its bin: the mean over bins is off by half a bin at most, here less than 4 / N_BINS
    found = activation([0.0, 0.0, 2.0, 6.0], "lsq", n_bits=2)
    assert found["is_signed"] is False
    assert found["threshold"] == pytest.approx(2 * 2 / math.sqrt(3) * 4, rel=4 / N_BINS)


def test_lsq_plus_keeps_three_standard_deviations_around_the_mean():
    # Bhalgat et al., 3.2: mean 2, sigma 1: |2 + 3| = 5
    assert weights([1.0, 3.0], "lsq_plus") == {"threshold": 5.0}
    assert weights([-1.0, -3.0], "lsq_plus") == {"threshold": 5.0}
    assert weights([1.0, 3.0], "lsq_plus", "POWER_OF_TWO") == {"threshold": 8.0}


def test_lsq_plus_searches_for_activations():
    values = np.linspace(0.0, 1.0, 50) ** 3
    assert activation(values, "lsq_plus", "UNIFORM") == activation(values, "mse", "UNIFORM")


@pytest.mark.parametrize(("n_bits", "factor"), [(2, 3.12 - 2.064), (3, 7.509 - 6.892)])
def test_sawb_weighs_the_two_means(n_bits, factor):
    # root mean square and mean magnitude are both 5
    assert weights([5.0, -5.0], "sawb", n_bits=n_bits)["threshold"] == pytest.approx(5 * factor, rel=2.0**-22)


def test_sawb_of_equal_magnitudes_that_would_be_negative_keeps_them():
    assert weights([5.0, -5.0], "sawb", n_bits=4) == {"threshold": 5.0}  # 12.68 - 12.80 < 0


@pytest.mark.parametrize("n_bits", [1, 5, 16])
def test_sawb_has_no_other_widths(n_bits):
    with pytest.raises(CalibrationError, match=f"2, 3, 4, 8 bits, not for {n_bits}"):
        weights([1.0, -2.0], "sawb", n_bits=n_bits)


def test_a_range_is_that_of_the_symmetric_grid():
    # threshold 3 (mean 0, sigma 1), steps of 1.5: from -2 to 1 of them
    assert weights([1.0, -1.0], "lsq_plus", "UNIFORM", n_bits=2) == {"range_min": -3.0, "range_max": 1.5}
    # threshold 5 on one side of zero, steps of 1.25: three of them
    assert weights([1.0, 3.0], "lsq_plus", "UNIFORM", n_bits=2) == {"range_min": 0.0, "range_max": 3.75}
    assert weights([-1.0, -3.0], "lsq_plus", "UNIFORM", n_bits=2) == {"range_min": -3.75, "range_max": 0.0}


@pytest.mark.parametrize("method", ["lsq", "lsq_plus", "sawb"])
@pytest.mark.parametrize("grid", ["SYMMETRIC", "POWER_OF_TWO", "UNIFORM"])
def test_channels_are_calibrated_by_themselves(method, grid):
    values = np.random.default_rng(0).normal(size=(3, 40)) * [[0.1], [1.0], [7.0]] + [[0.0], [3.0], [-1.0]]
    together = weights(values, method, grid, channels_axis=0)
    for name, found in together.items():
        assert found == [weights(row, method, grid)[name] for row in values]


@pytest.mark.parametrize("method", ["lsq", "lsq_plus", "sawb"])
def test_zeros_and_huge_weights_have_a_threshold(method):
    assert weights(np.zeros(4), method, min_threshold=0.5) == {"threshold": 0.5}
    assert weights([3e38, -3e38], method, n_bits=2) == {"threshold": 2.0**100}
