"""TensorFlow Lite's arithmetic on codes, on numbers worked out by hand."""

import numpy as np
import pytest

from trainable_core.integer import lite
from trainable_core.integer.requantization import multiply_q31
from trainable_core.integer.tensor import Quantized
from trainable_core.qparams import QParams


def grid(scale: float, zero: int = 0) -> QParams:
    return QParams(np.float32(scale), np.int32(zero), -128, 127)


def codes(values, scale: float, zero: int = 0) -> Quantized:
    return Quantized(np.asarray(values, np.int32), grid(scale, zero))


def test_optimized_kernels_round_ties_of_the_shift_up_and_reference_ones_away_from_zero():
    # 1/4 is 2**30 / 2**31, shifted by one: 2 -> 1 -> 0.5, 6 -> 3 -> 1.5, and their negatives
    total = np.array([2, 6, -2, -6])
    assert lite.multiply_twice(total, np.asarray(0.25)).tolist() == [1, 2, 0, -1]
    assert multiply_q31(total, np.asarray(0.25)).tolist() == [1, 2, -1, -2]


def test_fixed_point_rounds_before_it_shifts():
    # 5 * 0.1875 is 0.9375; but 0.1875 = 0.75 / 4, and 5 * 0.75 = 3.75 becomes 4 first; 1 * 0.75 becomes 1, then 0.25
    assert lite.multiply_twice(np.array([5, 1, 2, 3]), np.asarray(0.1875)).tolist() == [1, 0, 1, 1]
    # 2 * 0.1875 = 0.375 would be 0: 1.5 became 2, and 2 / 4 is a tie


def test_a_multiplier_above_one_shifts_left_first():
    assert lite.multiply_twice(np.array([3, -3]), np.asarray(2.5)).tolist() == [8, -7]  # 7.5 and -7.5, ties up


@pytest.mark.parametrize(
    ("kernels", "expected"),
    [(lite.XNNPACK, [2, -1, 1, 0]), (lite.OPTIMIZED, [2, -1, 1, 0]), (lite.REFERENCE, [2, -2, 1, -1])],
)
def test_ties_of_an_addition(kernels, expected):
    one, other = codes([1, -1, 0, 0], 1.0), codes([2, -2, 1, -1], 1.0)  # 1.5, -1.5, 0.5, -0.5 on the grid of the sum
    assert lite.add(one, other, grid(2.0), kernels).codes.tolist() == expected


def test_the_multipliers_of_an_addition_have_21_bits():
    # with r = 1 + 2**-21, 20 - floor(log2(r)) = 20 bits behind the point round it to 1: 100 + 0 stays 100
    scale = np.float32(1.0 + 2.0**-21)
    found = lite.add(codes([100], float(scale)), codes([0], 2.0**-9), grid(1.0), lite.XNNPACK)
    assert found.codes.tolist() == [100]


@pytest.mark.parametrize("kernels", [lite.XNNPACK, lite.OPTIMIZED, lite.REFERENCE])
def test_sums_and_products_saturate_and_count_from_the_zero_point(kernels):
    one, other = codes([127, 10], 1.0, 7), codes([127, -3], 1.0, -3)
    assert lite.add(one, other, grid(1.0, -5), kernels).codes.tolist() == [127, -2]  # 120 + 130 and 3 + 0
    assert lite.multiply(one, other, grid(1.0, -5), kernels).codes.tolist() == [127, -5]


@pytest.mark.parametrize(
    ("kernels", "expected"), [(lite.XNNPACK, [0, 2]), (lite.OPTIMIZED, [1, 2]), (lite.REFERENCE, [1, 2])]
)
def test_ties_of_a_product(kernels, expected):
    one, other = codes([1, 3], 0.5), codes([1, 1], 1.0)  # 0.5 and 1.5; XNNPACK's go to the even code
    assert lite.multiply(one, other, grid(1.0), kernels).codes.tolist() == expected


@pytest.mark.parametrize("kernels", [lite.XNNPACK, lite.OPTIMIZED, lite.REFERENCE])
def test_a_mean_is_over_the_axes_that_are_named(kernels):
    x = codes(np.arange(12).reshape(1, 2, 2, 3), 0.5, 2)
    # of channel 0: codes 0, 3, 6, 9 count from 2: mean 2.5 steps of 0.5 = 5 steps of 0.25
    assert lite.mean(x, (1, 2), grid(0.25), kernels).codes.tolist() == [[[[5, 7, 9]]]]


def test_an_activation_function_leaves_codes_from_zero_to_six():
    assert lite.clamp_of("NONE", grid(0.1, -100)) == lite.Clamp(-128, 127)
    assert lite.clamp_of("RELU", grid(0.1, -100)) == lite.Clamp(-100, 127)
    assert lite.clamp_of("RELU6", grid(0.1, -100)) == lite.Clamp(-100, -40)
    assert lite.clamp_of("RELU6", grid(0.01, -100)) == lite.Clamp(-100, 127)
    assert lite.clamp_of("RELU", grid(0.1, -100))(codes([-128, -99], 0.1, -100)).codes.tolist() == [-100, -99]


def test_a_linear_layer_multiplies_its_scales_in_float32():
    scales = np.float32(0.1), np.float32(0.3), np.float32(0.7)
    product = np.float32(scales[0] * scales[1])
    assert lite.linear_multiplier(*scales) == np.float64(product) / np.float64(scales[2])
    assert lite.linear_multiplier(*scales) != np.prod(np.float64(scales[:2])) / np.float64(scales[2])


@pytest.mark.parametrize(
    ("ties", "expected"), [(lite.Ties.EVEN, [1, 3, 1]), (lite.Ties.EVEN_CODE, [2, 2, 0]), (lite.Ties.AWAY, [2, 3, 1])]
)
def test_ties_of_means_in_three_versions_of_xnnpack(ties, expected):
    x = codes([[1, 0], [3, 0], [-1, 0]], 1.0)  # means of 0.5, 1.5 and -0.5; with the zero point 1.5, 2.5 and 0.5
    assert lite.mean(x, (1,), grid(1.0, 1), ties=ties).codes.reshape(-1).tolist() == expected


@pytest.mark.parametrize(("ties", "expected"), [(lite.Ties.EVEN, [1, 3]), (lite.Ties.EVEN_CODE, [2, 2])])
def test_ties_of_products_of_tensors_count_from_the_zero_point_in_some_versions(ties, expected):
    one, other = codes([1, 3], 0.5), codes([1, 1], 1.0)  # 0.5 and 1.5
    assert lite.multiply(one, other, grid(1.0, 1), ties=ties).codes.tolist() == expected
    assert lite.multiply(one, codes([1], 1.0), grid(1.0, 1), ties=ties).codes.tolist() == [1, 3]
