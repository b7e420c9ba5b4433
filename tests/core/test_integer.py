"""The arithmetic of integer kernels, against hand-made vectors and against definitions written as loops."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from trainable_core.integer import certificate, elementwise, pooling, products
from trainable_core.integer.products import Window
from trainable_core.integer.requantization import FLOAT32, GEMMLOWP, fixed_point, multiply_float32, multiply_q31
from trainable_core.integer.tensor import Quantized
from trainable_core.qparams import QParams


def grid(scale: float = 1.0, zero: int = 0, low: int = 0, high: int = 255, axis: int | None = None) -> QParams:
    return QParams(np.asarray(scale, np.float32), np.asarray(zero, np.int32), low, high, axis)


def quantized(codes, scale: float = 1.0, zero: int = 0, low: int = -128, high: int = 127) -> Quantized:
    return Quantized(np.asarray(codes, np.int32), grid(scale, zero, low, high))


def random(*shape: int, low: int = -128, high: int = 128, seed: int = 0):
    return np.random.default_rng(seed).integers(low, high, shape)


# ---- requantization -------------------------------------------------------------------------------------------------


def test_ties_go_to_even_in_float32_and_away_from_even_in_fixed_point():
    totals = np.array([1, 3, 5, -1, -3, -5])
    half = FLOAT32.multiplier(0.5, 1.0, 1.0)
    assert multiply_float32(totals, half).tolist() == [0, 2, 2, 0, -2, -2]
    # 0.5 is a mantissa of 2**30 without a shift: SaturatingRoundingDoublingHighMul alone, which rounds ties up
    assert multiply_q31(totals, GEMMLOWP.multiplier(0.5, 1.0, 1.0)).tolist() == [1, 2, 3, 0, -1, -2]


def test_fixed_point_rounds_twice():
    # 0.21875 = 0.875 / 4. 2 * 0.875 = 1.75 -> 2; 2 / 4 = 0.5 -> 1. In one step 2 * 0.21875 = 0.4375 -> 0.
    assert multiply_q31(np.array([2]), np.asarray(0.21875)).tolist() == [1]
    assert multiply_float32(np.array([2]), np.float32(0.21875)).tolist() == [0]


def test_fixed_point_numbers_are_31_bit_mantissas():
    assert [int(each) for each in fixed_point(1.0)] == [2**30, 1]
    assert [int(each) for each in fixed_point(1.0 - 2.0**-40)] == [2**30, 1]  # rounds up to one
    assert [int(each) for each in fixed_point(2.0**-40)] == [0, 0]  # too small for 31 shifts


def test_a_large_sum_is_rounded_to_float32_first():
    total = np.array([2**24 + 1])
    assert multiply_float32(total, np.float32(1)).tolist() == [2**24]
    assert multiply_q31(total, np.asarray(1.0)).tolist() == [2**24 + 1]


# ---- products -------------------------------------------------------------------------------------------------------


def convolved(x, weight, window):
    """Return a convolution by its definition, one output at a time."""
    window = window.of_rank(2)
    top, left, bottom, right = window.pads
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    per_group, outputs = weight.shape[1], weight.shape[0] // window.groups
    rows, columns = (
        (padded.shape[2 + i] - (weight.shape[2 + i] - 1) * window.dilations[i] - 1) // window.strides[i] + 1
        for i in range(2)
    )
    y = np.zeros((x.shape[0], weight.shape[0], rows, columns), np.int64)
    for n, o, i, j in np.ndindex(*y.shape):
        first = o // outputs * per_group
        for c, u, v in np.ndindex(*weight.shape[1:]):
            row, column = (
                i * window.strides[0] + u * window.dilations[0],
                j * window.strides[1] + v * window.dilations[1],
            )
            y[n, o, i, j] += padded[n, first + c, row, column] * weight[o, c, u, v]
    return y


WINDOWS = {
    "plain": (Window(), 2, (3, 2, 3, 2)),
    "padded": (Window(pads=(1, 0, 2, 1)), 2, (3, 2, 3, 3)),
    "strided": (Window(strides=(2, 1)), 2, (3, 2, 2, 3)),
    "dilated": (Window(dilations=(2, 1), pads=(1, 1, 1, 1)), 2, (3, 2, 2, 3)),
    "grouped": (Window(groups=2), 4, (6, 2, 2, 2)),
    "depthwise": (Window(groups=4, pads=(1, 1, 1, 1)), 4, (4, 1, 3, 3)),
}


@pytest.mark.parametrize("case", WINDOWS)
def test_a_convolution_is_its_definition(case):
    window, channels, shape = WINDOWS[case]
    x, weight = random(2, channels, 5, 6), random(*shape, seed=1)
    assert np.array_equal(products.convolve_codes(x, weight, window), convolved(x, weight, window))


@pytest.mark.parametrize(("stride", "pads", "extra", "groups", "dilation"), [
    ((1, 1), (0, 0, 0, 0), (0, 0), 1, (1, 1)), ((2, 2), (0, 0, 0, 0), (0, 0), 1, (1, 1)),
    ((2, 3), (1, 0, 1, 2), (1, 0), 1, (1, 1)), ((2, 2), (1, 1, 1, 1), (1, 1), 2, (2, 1)),
    ((2, 1), (2, 2, 2, 2), (0, 0), 2, (1, 1)),
])  # fmt: skip
def test_a_transposed_convolution_scatters_its_inputs(stride, pads, extra, groups, dilation):
    x, weight = random(2, 4, 3, 4), random(4, 3, 3, 2, seed=1)
    window = Window(stride, dilation, pads, groups, extra)
    sizes = [
        (x.shape[2 + i] - 1) * stride[i] + (weight.shape[2 + i] - 1) * dilation[i] + 1 + extra[i] for i in range(2)
    ]
    y = np.zeros((2, 3 * groups, *sizes), np.int64)
    per_group = 4 // groups
    for n, c, i, j in np.ndindex(*x.shape):
        for o, u, v in np.ndindex(*weight.shape[1:]):
            place = c // per_group * 3 + o, i * stride[0] + u * dilation[0], j * stride[1] + v * dilation[1]
            y[(n, *place)] += x[n, c, i, j] * weight[c, o, u, v]
    cut = y[:, :, pads[0] : sizes[0] - pads[2], pads[1] : sizes[1] - pads[3]]
    assert np.array_equal(products.convolve_transposed_codes(x, weight, window), cut)


def test_sums_wrap_around_at_32_bits():
    assert products.with_bias(np.array([[2**31 - 1]]), [1], -1).tolist() == [[-(2**31)]]


def test_a_linear_layer_has_one_multiplier_for_each_channel():
    weight = Quantized(np.int32([[1, 1], [1, 1]]), QParams(np.float32([0.5, 0.25]), np.int32([0, 0]), -8, 7, 0))
    y = products.linear(quantized([[3, 4]]), weight, [0, 1], grid(1.0, 10))
    assert y.codes.tolist() == [[14, 12]]  # 7 / 2 = 3.5 -> 4, (7 + 1) / 4 = 2; counted from 10


def test_codes_saturate_at_the_ends_of_the_grid():
    weight = quantized([[100]])
    assert products.linear(quantized([[100]]), weight, None, grid(1.0, 3, 0, 15)).codes.tolist() == [[15]]
    assert products.linear(quantized([[-100]]), weight, None, grid(1.0, 3, 0, 15)).codes.tolist() == [[0]]


def test_what_is_padded_has_the_code_of_zero():
    x = Quantized(np.full((1, 1, 1, 1), 7, np.int32), grid(1.0, 7))
    y = products.convolution(x, quantized(np.ones((1, 1, 3, 3))), None, grid(1.0, 5), Window(pads=(1, 1, 1, 1)))
    assert y.codes.tolist() == [[[[5]]]]


def test_products_of_16_bit_codes_are_exact():
    x, y = random(1, 70, low=-32768, high=32768), random(70, 1, low=-32768, high=32768, seed=1)
    assert products.matmul_codes(x, y).item() == sum(int(a) * int(b) for a, b in zip(x[0], y[:, 0], strict=True))


# ---- elementwise ----------------------------------------------------------------------------------------------------


def test_quantizing_rounds_ties_to_even_before_the_zero_point_is_added():
    assert elementwise.quantize([0.5, 1.5, -0.5, -1.5, 1e9, -np.inf], grid(1.0, 3)).codes.tolist() == [
        3,
        5,
        3,
        1,
        255,
        0,
    ]


def test_a_sum_is_rounded_once():
    x, y = quantized([1, 1, 3], 0.5, 0, 0, 255), quantized([0, 4, 4], 0.25, 0, 0, 255)
    # 0.5, 1.5 and 2.5 in steps of 1
    assert elementwise.add(x, y, grid(1.0)).codes.tolist() == [0, 2, 2]


def test_zero_points_of_both_operands_count():
    x, y = quantized([10], 1.0, 10, 0, 255), quantized([23], 1.0, 20, 0, 255)
    assert elementwise.add(x, y, grid(1.0, 100)).codes.tolist() == [103]
    assert elementwise.multiply(x, y, grid(1.0, 100)).codes.tolist() == [100]


def test_a_part_on_the_same_grid_is_copied_and_another_one_is_rounded():
    same, other = quantized([[7]], 1.0, 2, 0, 255), quantized([[5]], 0.5, 0, 0, 255)
    assert elementwise.concatenate([same, other], grid(1.0, 2), 1).codes.tolist() == [[7, 4]]  # 2.5 -> 2


def test_relu_on_codes_is_relu_on_values():
    x = np.linspace(-3, 3, 41).astype(np.float32)
    to = grid(0.1, 25, 0, 40)
    assert np.array_equal(
        elementwise.relu(elementwise.quantize(x, to)).codes, elementwise.quantize(np.maximum(x, 0), to).codes
    )


# ---- pooling --------------------------------------------------------------------------------------------------------


def test_the_mean_of_all_positions_is_rounded_once():
    x = quantized([[[[1, 2], [3, 4]]], [[[1, 1], [2, 2]]]], 1.0, 0, 0, 255)
    assert pooling.global_average_pool(x, grid(1.0)).codes.reshape(-1).tolist() == [2, 2]  # 2.5 and 1.5


def test_padding_is_left_out_of_a_mean_unless_it_counts():
    x = quantized([[[[4, 4], [4, 4]]]], 1.0, 0, 0, 255)
    window = Window(strides=(2, 2), pads=(1, 1, 1, 1))
    assert pooling.average_pool(x, (2, 2), grid(1.0), window).codes.reshape(-1).tolist() == [4, 4, 4, 4]
    counted = pooling.average_pool(x, (2, 2), grid(1.0), window, count_include_pad=True)
    assert counted.codes.reshape(-1).tolist() == [1, 1, 1, 1]


def test_a_maximum_takes_no_padding_and_rounds_sizes_up_if_asked():
    x = quantized([[[[-5, -6, -7]]]])
    window = Window(strides=(1, 2), pads=(0, 0, 0, 0))
    assert pooling.max_pool(x, (1, 2), window).codes.reshape(-1).tolist() == [-5]
    assert pooling.max_pool(x, (1, 2), window, ceil=True).codes.reshape(-1).tolist() == [-5, -7]


def test_a_border_has_the_code_of_zero_or_repeats():
    x = quantized([[[[5, 6, 7]]]], 1.0, 3, 0, 255)
    borders = [(0, 0), (0, 0), (0, 0), (1, 1)]
    assert pooling.pad(x, borders).codes.reshape(-1).tolist() == [3, 5, 6, 7, 3]
    assert pooling.pad(x, borders, "reflect").codes.reshape(-1).tolist() == [6, 5, 6, 7, 6]


# ---- certificates ---------------------------------------------------------------------------------------------------


def test_a_certificate_counts_the_worst_input_of_the_worst_channel():
    x = grid(0.5, 100)  # codes count from -100 to 155
    found = certificate.of_products(x, quantized([[1, -2], [3, 3]]), np.int32([7, -9]), grid(0.25))
    assert found.bound == 6 * 155 + 9
    assert found.exact


@pytest.mark.parametrize(("scale", "fits", "exact"), [(0.5, True, True), (0.3, True, False)])
def test_only_powers_of_two_make_a_framework_exact(scale, fits, exact):
    found = certificate.of_products(grid(scale), quantized([[1]]), None, None)
    assert (found.fits, found.exact) == (fits, exact)


def test_long_sums_do_not_fit_into_24_bits():
    weight = Quantized(np.full((1, 600), 127, np.int32), grid(1.0, 0, -128, 127))
    assert certificate.of_products(grid(1.0), weight, None, None).bound == 600 * 127 * 255 >= 2**24
    assert not certificate.of_products(grid(1.0), weight, None, None).fits


def test_a_certified_layer_is_exact_in_float32_in_any_order():
    rng = np.random.default_rng(0)
    x, weight = random(4, 500, low=0, high=256), random(3, 500, seed=1)
    to = Quantized(weight.astype(np.int32), grid(2.0**-7, 0, -128, 127))
    assert certificate.of_products(grid(2.0**-4), to, None, None).fits
    values = (x * np.float32(2.0**-4)).astype(np.float32), (weight * np.float32(2.0**-7)).astype(np.float32)
    exact = products.matmul_codes(x, weight.T) * 2.0**-11
    for order in itertools.islice((rng.permutation(500) for _ in itertools.count()), 3):
        total = np.zeros((4, 3), np.float32)
        for index in order:
            total = total + values[0][:, index, None] * values[1][None, :, index]
        assert np.array_equal(total, exact)
