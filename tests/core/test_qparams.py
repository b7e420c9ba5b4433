"""The numbers of a grid: golden vectors, exact arithmetic, and what holds for any variables an optimizer leaves."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.golden import array, cases
from trainable_core import qparams
from trainable_core.constants import RANGE_MAX, RANGE_MIN, SIGNED, THRESHOLD
from trainable_core.enums import QuantizationMethod
from trainable_core.errors import UnsupportedConfigError
from trainable_core.qparams import QParams, from_params, from_variables, variable_gradients

SYMMETRIC, POWER_OF_TWO, UNIFORM = (QuantizationMethod[name] for name in ("SYMMETRIC", "POWER_OF_TWO", "UNIFORM"))
every_grid = pytest.mark.parametrize("method", [SYMMETRIC, POWER_OF_TWO, UNIFORM], ids=str)

n_bits = st.integers(1, 16)
min_thresholds = st.one_of(st.just(0.0), st.just(2.0**-16), st.floats(0, 2.0**100))
anything = st.floats(width=32) | st.integers(-130, 101).map(lambda e: 2.0**e)
positive = st.floats(2.0**-100, 2.0**100, width=32)


def any_variables(method: QuantizationMethod) -> Any:
    return st.fixed_dictionaries(dict.fromkeys(qparams.variable_names(method), anything))


def drawn_grid(method: QuantizationMethod, data: Any) -> tuple[QParams, int, float]:
    bits, least = data.draw(n_bits), data.draw(min_thresholds)
    signed = data.draw(st.booleans())
    return (
        from_variables(data.draw(any_variables(method)), method, bits, signed=signed, min_threshold=least),
        bits,
        least,
    )


# ---- golden vectors -------------------------------------------------------------------------------------------------


@cases("qparams")
def test_golden_grids(case: dict[str, Any]) -> None:
    method = QuantizationMethod[case["method"]]
    variables = {name: array(values, np.float32) for name, values in case["variables"].items()}
    grid = from_variables(
        variables,
        method,
        case["n_bits"],
        signed=case.get("signed", True),
        min_threshold=case.get("min_threshold", 0.0),
    )
    assert grid.scale.dtype == np.float32
    assert grid.zero_point.dtype == np.int32
    assert grid.scale.tolist() == case["scale"]
    assert grid.zero_point.tolist() == case["zero_point"]
    assert (grid.quant_min, grid.quant_max) == (case["quant_min"], case["quant_max"])
    assert qparams.inferable_params(grid, method) == case["deployed"]


# ---- any variables --------------------------------------------------------------------------------------------------


@every_grid
@given(st.data())
def test_a_grid_stays_in_bounds_whatever_the_variables_are(method: QuantizationMethod, data: Any) -> None:
    grid, bits, least = drawn_grid(method, data)
    codes = grid.quant_max - grid.quant_min + (method is not UNIFORM)
    extent = float(grid.scale) * (codes if grid.quant_min == 0 else -grid.quant_min)
    assert codes == 2**bits - (method is UNIFORM)
    assert extent >= max(least, 2.0**-100)
    # powers of two are rounded up to at most 2**100; a uniform scale is rounded up by one part in 2**(23 - n_bits)
    assert extent <= 2.0**100 * (1 + 2.0 ** (bits - 23) * (method is UNIFORM))
    assert grid.quant_min <= int(grid.zero_point) <= grid.quant_max


@every_grid
@given(st.data())
def test_what_is_deployed_is_the_same_grid(method: QuantizationMethod, data: Any) -> None:
    grid, bits, _ = drawn_grid(method, data)
    assume(grid.scale * 2.0**bits <= 2.0**98)  # ends held at 2**99 may be nudged beyond it, and would be held again
    params = qparams.inferable_params(grid, method)
    again = from_params(method, bits, grid.quant_min < 0, params)
    assert again.scale.tolist() == grid.scale.tolist()
    assert again.zero_point.tolist() == grid.zero_point.tolist()
    assert qparams.inferable_params(again, method) == params


@every_grid
@given(st.data())
def test_deployed_numbers_are_float32_numbers(method: QuantizationMethod, data: Any) -> None:
    params = qparams.inferable_params(drawn_grid(method, data)[0], method)
    for key in set(params) - {SIGNED}:
        assert type(params[key]) is float
        assert float(np.float32(params[key])) == params[key]
        assert params[key] or math.copysign(1, params[key]) == 1  # no negative zero


@given(st.data())
def test_every_uniform_code_stands_for_a_float32_number(data: Any) -> None:
    grid, bits, _ = drawn_grid(UNIFORM, data)
    scale = Fraction(float(grid.scale))
    for code in {1, 2**bits - 1, 2 ** (bits - 1) + 1, data.draw(st.integers(1, 2**bits - 1))} & set(range(2**bits)):
        assert Fraction(float(np.float32(code) * grid.scale)) == code * scale


@pytest.mark.parametrize("huge", [3.41e38, 1e300, math.inf])  # the first is just beyond float32
def test_numbers_beyond_float32_are_bounded_without_a_warning(huge: float) -> None:
    ends = np.array([huge, 1.0])
    assert [each.tolist() for each in qparams.hold_zero(-ends, ends)] == [[-(2.0**99), -1.0], [2.0**99, 1.0]]
    assert qparams.bound_threshold(ends, 0.0).tolist() == [2.0**100, 1.0]


@given(positive, n_bits)
def test_a_snapped_scale_is_the_next_short_number(scale: float, bits: int) -> None:
    snapped = Fraction(float(qparams.shorten_scale(scale, bits)))
    ulp = Fraction(2) ** (math.frexp(scale)[1] - (24 - bits))  # of 24 - n_bits significant bits
    assert snapped == math.ceil(Fraction(scale) / ulp) * ulp


@given(positive | st.integers(-100, 99).map(lambda e: float(np.nextafter(np.float32(2.0**e), np.float32(np.inf)))))
def test_a_power_of_two_is_the_next_one_and_exact(threshold: float) -> None:
    fraction, exponent = math.frexp(threshold)
    assert float(qparams.power_of_two_ceil(threshold)) == 2.0 ** (exponent - (fraction == 0.5))


@given(st.floats(0, 2.0**100))
def test_the_least_threshold_is_the_next_float32_number(least: float) -> None:
    bound = qparams.lower_bound(least)
    wanted = max(least, 2.0**-100)
    assert float(bound) >= wanted
    assert float(np.nextafter(bound, np.float32(0))) < wanted


@given(st.data())
def test_channels_are_a_loop(data: Any) -> None:
    method = data.draw(st.sampled_from([SYMMETRIC, POWER_OF_TWO, UNIFORM]))
    each = data.draw(st.lists(any_variables(method), min_size=1, max_size=4))
    arguments: dict[str, Any] = {"signed": data.draw(st.booleans()), "min_threshold": data.draw(min_thresholds)}
    bits = data.draw(n_bits)
    together = {name: np.array([one[name] for one in each], np.float32) for name in each[0]}
    grid = from_variables(together, method, bits, channels_axis=0, **arguments)
    alone = [from_variables(one, method, bits, **arguments) for one in each]
    assert grid.scale.tolist() == [float(one.scale) for one in alone]
    assert grid.zero_point.tolist() == [int(one.zero_point) for one in alone]


# ---- gradients of the variables -------------------------------------------------------------------------------------
# Inside the bounds they are checked against derivatives in test_reference.py; here is what happens at the bounds.


@pytest.mark.parametrize(
    ("threshold", "upstream", "moves"),
    [
        (0.5, 1.0, True),  # on the bound is inside
        (0.4, 1.0, False),
        (0.4, -1.0, True),  # a descent step raises the threshold
        (np.nan, -1.0, False),
        (-np.inf, -1.0, True),
        (np.inf, 1.0, True),
        (np.inf, -1.0, False),
        (2.0**100, -1.0, True),
    ],
)
@pytest.mark.parametrize("method", [SYMMETRIC, POWER_OF_TWO], ids=str)
def test_out_of_bounds_only_the_way_back_is_open(
    method: QuantizationMethod, threshold: float, upstream: float, moves: bool
) -> None:
    gradient = variable_gradients({THRESHOLD: threshold}, method, 4, upstream, min_threshold=0.5)[THRESHOLD]
    assert bool(gradient != 0) is moves
    assert np.isfinite(gradient)


# Ends of the range, gradients of scale and zero point, and which ends learn: 2 bits, least width 1.5.
@pytest.mark.parametrize(
    ("ends", "upstream", "learns"),
    [
        ((-1.0, 2.0), (1.0, 0.0), (True, True)),
        ((1.0, 3.0), (1.0, 0.0), (False, True)),  # a step would raise range_min still more: dL/da < 0, a > 0
        ((1.0, 3.0), (-1.0, 0.0), (True, True)),
        ((-0.5, 0.5), (1.0, 0.0), (False, False)),  # narrower than allowed, and a step would narrow it
        ((-0.5, 0.5), (-1.0, 0.0), (True, True)),
        ((np.nan, 2.0), (1.0, 0.0), (False, True)),
        ((-np.inf, np.inf), (-1.0, 0.0), (False, False)),
        ((-np.inf, np.inf), (1.0, 0.0), (True, True)),
    ],
)
def test_a_range_out_of_bounds_learns_only_the_way_back(
    ends: tuple[float, float], upstream: tuple[float, float], learns: tuple[bool, bool]
) -> None:
    gradients = variable_gradients({RANGE_MIN: ends[0], RANGE_MAX: ends[1]}, UNIFORM, 2, *upstream, min_threshold=1.5)
    assert (bool(gradients[RANGE_MIN] != 0), bool(gradients[RANGE_MAX] != 0)) == learns


@every_grid
@given(st.data())
def test_a_gradient_that_is_not_finite_counts_as_zero(method: QuantizationMethod, data: Any) -> None:
    upstream = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    variables = data.draw(any_variables(method))
    for pair in ((upstream, 0.0), (0.0, upstream), (upstream, -upstream)):
        for gradient in variable_gradients(variables, method, data.draw(n_bits), *pair).values():
            assert np.isfinite(gradient)


# ---- params and shapes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "params", "variables"),
    [
        (SYMMETRIC, {}, {}),
        (SYMMETRIC, {SIGNED: False}, {}),
        (SYMMETRIC, {THRESHOLD: 2.0, SIGNED: False}, {THRESHOLD: 2.0}),
        (POWER_OF_TWO, {THRESHOLD: [2.0, 3.0]}, {THRESHOLD: [2.0, 3.0]}),
        (UNIFORM, {RANGE_MIN: -1.0, RANGE_MAX: 2.0}, {RANGE_MIN: -1.0, RANGE_MAX: 2.0}),
        (UNIFORM, {THRESHOLD: 2.0}, {RANGE_MIN: -2.0, RANGE_MAX: 2.0}),
        (UNIFORM, {THRESHOLD: [2.0, 3.0], SIGNED: False}, {RANGE_MIN: [0.0, 0.0], RANGE_MAX: [2.0, 3.0]}),
    ],
)
def test_variables_from_params(method: QuantizationMethod, params: dict[str, Any], variables: dict[str, Any]) -> None:
    found = qparams.variables_from_params(params, method)
    assert {name: value.tolist() for name, value in found.items()} == variables
    assert all(value.dtype == np.float32 for value in found.values())


@pytest.mark.parametrize(
    ("method", "bits", "signed", "ends"),
    [
        (SYMMETRIC, 1, True, (-1, 0)),
        (SYMMETRIC, 4, True, (-8, 7)),
        (POWER_OF_TWO, 16, True, (-32768, 32767)),
        (POWER_OF_TWO, 1, False, (0, 1)),
        (UNIFORM, 8, True, (0, 255)),
        (UNIFORM, 8, False, (0, 255)),
    ],
)
def test_code_range(method: QuantizationMethod, bits: int, signed: bool, ends: tuple[int, int]) -> None:
    assert qparams.code_range(method, bits, signed=signed) == ends


@pytest.mark.parametrize("method", [QuantizationMethod.LUT_POT_QUANTIZER, QuantizationMethod.LUT_SYM_QUANTIZER])
def test_a_look_up_table_has_no_scale(method: QuantizationMethod) -> None:
    with pytest.raises(UnsupportedConfigError, match=method.name):
        from_variables({THRESHOLD: 1.0}, method, 4)


@pytest.mark.parametrize("axis", [0, 1, -1, -3])
def test_a_grid_lies_along_its_axis(axis: int) -> None:
    channels = (2, 3, 4)[axis]
    grid = QParams(np.arange(1, channels + 1, dtype=np.float32), np.zeros(channels, np.int32), -8, 7, axis)
    along = grid.along(3)
    assert np.broadcast_shapes(along.scale.shape, (2, 3, 4)) == (2, 3, 4)
    assert along.scale.shape == along.zero_point.shape
    values = np.ones((2, 3, 4)) * along.scale
    assert grid.reduce(values).tolist() == (grid.scale * (24 / channels)).tolist()
    assert grid.sharing(values.size) == 24 // channels


def test_a_grid_for_the_whole_tensor_has_no_axis() -> None:
    grid = QParams(np.float32(1), np.int32(0), -8, 7)
    assert grid.along(3) is grid
    assert grid.reduce(np.ones((2, 3), np.float32)) == 6.0
    assert grid.sharing(6) == 6
