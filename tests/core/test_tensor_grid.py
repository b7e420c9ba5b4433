"""Grids on NumPy's own functions are bit for bit those of `qparams`, gradients included."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given

from tests.strategies import float32s, min_thresholds, n_bits
from trainable_core import qparams
from trainable_core.enums import QuantizationMethod
from trainable_keras import grid as tensor_grid

SYMMETRIC, POWER_OF_TWO, UNIFORM = (QuantizationMethod[n] for n in ("SYMMETRIC", "POWER_OF_TWO", "UNIFORM"))


def quiet(function):
    def called(*arguments):
        with np.errstate(all="ignore"):
            return function(*arguments)

    return called


class WithGradient:
    """A function that remembers how its gradient is made."""

    made: ClassVar[list[WithGradient]] = []

    def __init__(self, forward, backward):
        self.forward, self.backward = quiet(forward), quiet(backward)
        self.made.append(self)

    def __call__(self, *arguments):
        self.arguments, self.output = arguments, self.forward(*arguments)
        return self.output

    def gradient(self, upstream):
        return self.backward(np.asarray(upstream, np.float32), self.output, *self.arguments)


NUMPY = tensor_grid.Functions(
    maximum=np.maximum,
    minimum=np.minimum,
    where=np.where,
    isnan=np.isnan,
    isfinite=np.isfinite,
    round=np.round,
    zeros_like=np.zeros_like,
    stack=np.stack,
    all_of=np.logical_and,
    any_of=np.logical_or,
    bits_and=lambda bits, mask: np.bitwise_and(bits, np.int32(mask)),
    number=np.float32,
    float_bits=lambda x: np.asarray(x, np.float32).view(np.int32),
    bits_float=lambda x: np.asarray(x, np.int32).view(np.float32),
    divide_by=lambda x, number: x / np.float32(number),
    with_gradient=WithGradient,
)


@pytest.fixture
def maker():
    WithGradient.made.clear()
    return tensor_grid.GridMaker(NUMPY, tensor_grid.GridNumbers)


MAKER = tensor_grid.GridMaker(NUMPY, tensor_grid.GridNumbers)


def assert_is(grid, expected):
    assert np.array_equal(np.asarray(grid.scale), expected.scale)
    assert np.array_equal(np.asarray(grid.zero_point), expected.zero_point.astype(np.float32))
    assert (grid.quant_min, grid.quant_max) == (expected.quant_min, expected.quant_max)


@pytest.mark.parametrize("method", [SYMMETRIC, POWER_OF_TWO], ids=str)
@pytest.mark.parametrize("signed", [True, False])
@given(threshold=float32s(3), bits=n_bits, least=min_thresholds)
def test_thresholds_give_the_grid_of_qparams(method, signed, threshold, bits, least):
    pot = method is POWER_OF_TWO
    grid = MAKER.symmetric(threshold, bits, signed=signed, power_of_two=pot, min_threshold=least)
    given_to = {"threshold": threshold}
    assert_is(grid, qparams.from_variables(given_to, method, bits, signed=signed, min_threshold=least, channels_axis=0))
    assert grid.centered


@given(low=float32s(3), high=float32s(3), bits=n_bits, least=min_thresholds)
def test_ranges_give_the_grid_of_qparams(low, high, bits, least):
    grid = MAKER.uniform(low, high, bits, min_threshold=least)
    given_to = {"range_min": low, "range_max": high}
    assert_is(grid, qparams.from_variables(given_to, UNIFORM, bits, signed=True, min_threshold=least, channels_axis=0))
    assert not grid.centered


@pytest.mark.parametrize(
    ("threshold", "upstream", "passes"),
    [(1.0, 3.0, True), (-1.0, 3.0, False), (-1.0, -3.0, True), (2.0**101, 3.0, True), (2.0**101, -3.0, False)],
)
def test_out_of_bounds_only_the_way_back_is_open(maker, threshold, upstream, passes):
    maker.symmetric(np.float32([threshold]), 4, signed=True, power_of_two=False, min_threshold=2.0**-16)
    (gradient,) = WithGradient.made[0].gradient([upstream])
    assert gradient.tolist() == [upstream / 8 if passes else 0.0]  # 4 signed bits: eight steps to the threshold


def test_a_rounded_up_threshold_has_the_gradient_of_its_ratio(maker):
    maker.symmetric(np.float32([3.0]), 4, signed=True, power_of_two=True, min_threshold=2.0**-16)
    assert WithGradient.made[0].output.tolist() == [0.5]  # 4 / 8
    assert WithGradient.made[0].gradient([1.0])[0].tolist() == [np.float32(np.float32(1 / 8) * np.float32(4 / 3))]


def test_a_gradient_that_is_not_finite_counts_as_zero(maker):
    maker.uniform(np.float32([-1.0]), np.float32([1.0]), 4, min_threshold=2.0**-16)
    for value in (np.nan, np.inf):
        low, high = WithGradient.made[0].gradient([[value], [0.0]])
        assert low.tolist() == high.tolist() == [0.0]


def test_a_function_is_made_once_for_each_kind_of_grid(maker):
    for threshold in (1.0, 2.0):
        maker.symmetric(np.float32([threshold]), 4, signed=True, power_of_two=False, min_threshold=0.0)
    maker.symmetric(np.float32([1.0]), 5, signed=True, power_of_two=False, min_threshold=0.0)
    assert len(WithGradient.made) == 2


def test_ends_of_a_centered_grid_are_numbers():
    assert tensor_grid.ends(np.zeros(2), -8, 7, centered=True) == (-8.0, 7.0)
    low, high = tensor_grid.ends(np.array([3.0, 0.0]), 0, 15, centered=False)
    assert (low.tolist(), high.tolist()) == ([-3.0, 0.0], [12.0, 15.0])
