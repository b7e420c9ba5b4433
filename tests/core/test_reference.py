"""The reference against golden vectors, exact arithmetic, and derivatives of the surrogates that it declares."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.golden import array, cases, grid_of, tie_rule_of
from trainable_core.constants import RANGE_MAX, RANGE_MIN, THRESHOLD
from trainable_core.enums import QuantizationMethod, TieRule
from trainable_core.qparams import QParams, from_variables, variable_gradients
from trainable_core.reference import affine, dqa, lsq, ste

UNIT = 2.0**-24  # relative error of one float32 operation
EXACT = 64 * 2.0**-53  # a few dozen float64 operations

GRIDS = (QuantizationMethod.SYMMETRIC, QuantizationMethod.POWER_OF_TWO, QuantizationMethod.UNIFORM)
every_grid = pytest.mark.parametrize("method", GRIDS, ids=str)
every_tie_rule = pytest.mark.parametrize("tie_rule", TieRule, ids=lambda rule: rule.value)

float32s = st.floats(width=32, allow_nan=False)


@st.composite
def variables(draw: Any, method: QuantizationMethod) -> dict[str, np.ndarray]:
    """Return variables of a size at which no intermediate is denormal or infinite."""
    size = st.floats(2.0**-20, 2.0**20, width=32)
    if method is QuantizationMethod.UNIFORM:
        return {RANGE_MIN: np.asarray(-draw(size), np.float32), RANGE_MAX: np.asarray(draw(size), np.float32)}
    return {THRESHOLD: np.asarray(draw(size), np.float32)}


@st.composite
def grids(draw: Any, method: QuantizationMethod) -> QParams:
    return from_variables(draw(variables(method)), method, draw(st.integers(1, 16)), signed=draw(st.booleans()))


@st.composite
def inputs(draw: Any, grid: QParams) -> np.ndarray:
    """Return values on and beyond the grid, ties and their neighbours included, and anything else."""
    low, high = int(grid.quant_min - grid.zero_point), int(grid.quant_max - grid.zero_point)
    code = st.integers(low - 3, high + 3)
    near = st.builds(
        lambda k, part, by: np.nextafter(np.float32((k + part) * float(grid.scale)), np.float32(by)),
        code,
        st.sampled_from([0.0, 0.25, 0.5]),
        st.sampled_from([-np.inf, 0.0, np.inf]),
    )
    ties = st.builds(lambda k: np.float32((k + 0.5) * float(grid.scale)), code)
    return np.array(draw(st.lists(st.one_of(ties, near, float32s), max_size=12)), np.float32)


# ---- golden vectors -------------------------------------------------------------------------------------------------


@cases("affine")
def test_golden_codes_and_values(case: dict[str, Any]) -> None:
    grid, tie_rule, x = grid_of(case), tie_rule_of(case), array(case["x"], np.float32)
    codes = affine.quantize(x, grid, tie_rule=tie_rule)
    assert codes.dtype == np.int32
    assert codes.tolist() == case["codes"]
    values = affine.fake_quantize(x, grid, tie_rule=tie_rule)
    assert values.dtype == np.float32
    assert values.tolist() == case["values"]
    assert not np.signbit(values[values == 0]).any()
    assert affine.dequantize(codes, grid).tolist() == case["values"]


@cases("ste")
def test_golden_straight_through_gradients(case: dict[str, Any]) -> None:
    grid = grid_of(case)
    gradients = ste.gradients(array(case["x"]), array(case["upstream"]), grid)
    assert gradients.x.tolist() == case["d_x"]
    assert gradients.scale.tolist() == gradients.zero_point.tolist() == np.zeros(grid.scale.shape).tolist()


@cases("lsq")
def test_golden_learned_step_gradients(case: dict[str, Any]) -> None:
    grid, method = grid_of(case), QuantizationMethod[case["method"]]
    gradients = lsq.gradients(array(case["x"]), array(case["upstream"]), grid, tie_rule=tie_rule_of(case))
    assert gradients.x.tolist() == case["d_x"]
    np.testing.assert_allclose(gradients.scale, case["d_scale"], rtol=EXACT)
    np.testing.assert_allclose(gradients.zero_point, case["d_zero_point"], rtol=EXACT)
    learned = variable_gradients(case["params"], method, case["n_bits"], gradients.scale, gradients.zero_point)
    assert set(learned) == set(case["d_variables"])
    for name, expected in case["d_variables"].items():
        np.testing.assert_allclose(learned[name], expected, rtol=EXACT)


@cases("dqa")
def test_golden_attention(case: dict[str, Any]) -> None:
    grids_of = [grid_of(case, width) for width in case["widths"]]
    arguments = (grids_of, case["logits"], case["temperature"])
    x = array(case["x"])
    np.testing.assert_allclose(dqa.fake_quantize(x, *arguments), case["values"], rtol=EXACT)
    gradients = dqa.gradients(x, array(case["upstream"]), *arguments)
    np.testing.assert_allclose(gradients.x, case["d_x"], rtol=EXACT)
    np.testing.assert_allclose(gradients.logits, case["d_logits"], rtol=EXACT)
    arguments = (case["logits"], case["temperature"], case["widths"])
    np.testing.assert_allclose(dqa.bit_cost(*arguments), case["bit_cost"], rtol=EXACT)
    np.testing.assert_allclose(dqa.bit_cost_gradient(*arguments), case["d_bit_cost"], rtol=EXACT)


# ---- values ---------------------------------------------------------------------------------------------------------


@given(hnp.arrays(np.float32, st.integers(0, 20), elements=st.floats(width=32)))
def test_ties_are_what_exact_arithmetic_says(v: np.ndarray) -> None:
    ties = np.rint(np.clip(v, -1e6, 1e6)) + np.float32(0.5)
    with_ties = np.concatenate([v, ties, *(np.nextafter(ties, np.float32(to)) for to in (-np.inf, 0.0, np.inf))])
    even, up = (affine.round_steps(with_ties, rule) for rule in (TieRule.HALF_EVEN, TieRule.HALF_UP))
    for value, to_even, upwards in zip(with_ties.tolist(), even.tolist(), up.tolist(), strict=True):
        if math.isfinite(value):
            assert to_even == round(Fraction(value))
            assert upwards == math.floor(Fraction(value) + Fraction(1, 2))
        else:
            assert to_even == upwards == value or (math.isnan(to_even) and math.isnan(upwards))


@every_tie_rule
@every_grid
@given(st.data())
def test_codes_are_those_of_exact_arithmetic_but_at_ties(
    method: QuantizationMethod, tie_rule: TieRule, data: Any
) -> None:
    grid = data.draw(grids(method))
    x = data.draw(inputs(grid))
    width = (grid.quant_max - grid.quant_min + 1).bit_length() - 1
    for value, code in zip(x.tolist(), affine.quantize(x, grid, tie_rule=tie_rule).tolist(), strict=True):
        if math.isinf(value):
            assert code == (grid.quant_max if value > 0 else grid.quant_min)
            continue
        steps = Fraction(value) / Fraction(float(grid.scale))
        rounded = round(steps) if tie_rule is TieRule.HALF_EVEN else math.floor(steps + Fraction(1, 2))
        expected = min(max(rounded + int(grid.zero_point), grid.quant_min), grid.quant_max)
        if code != expected:
            # two float32 operations, each off by half a unit of a number below 2**n_bits
            assert abs(code - expected) == 1
            assert abs(abs(steps - math.floor(steps)) - Fraction(1, 2)) <= Fraction(2.0 * 2.0**width * UNIT)


@every_tie_rule
@every_grid
@given(st.data())
def test_values_stand_for_the_codes(method: QuantizationMethod, tie_rule: TieRule, data: Any) -> None:
    grid = data.draw(grids(method))
    x = data.draw(inputs(grid))
    codes = affine.quantize(x, grid, tie_rule=tie_rule)
    np.testing.assert_array_equal(affine.fake_quantize(x, grid, tie_rule=tie_rule), affine.dequantize(codes, grid))


@every_tie_rule
@every_grid
@given(st.data())
def test_order_is_kept_and_quantizing_again_changes_nothing(
    method: QuantizationMethod, tie_rule: TieRule, data: Any
) -> None:
    grid = data.draw(grids(method))
    y = affine.fake_quantize(np.sort(data.draw(inputs(grid))), grid, tie_rule=tie_rule)
    assert (np.diff(y) >= 0).all()
    np.testing.assert_array_equal(affine.fake_quantize(y, grid, tie_rule=tie_rule), y)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_dtype_of_the_input_is_kept(dtype: Any) -> None:
    grid = QParams(np.float32(0.5), np.int32(0), -8, 7)
    assert affine.fake_quantize(np.zeros((2, 0), dtype), grid).dtype == dtype
    assert affine.fake_quantize(dtype(0.3), grid) == dtype(0.5)
    assert dqa.fake_quantize(np.zeros(3, dtype), [grid, grid], [0.0, 0.0], 1.0).dtype == dtype
    assert affine.fake_quantize([1, 2], grid).dtype == np.float32
    assert dqa.fake_quantize([1, 2], [grid, grid], [0.0, 0.0], 1.0).dtype == np.float32


def test_numbers_beyond_float32_saturate_without_a_warning() -> None:
    grid = QParams(np.float32(0.5), np.int32(0), -8, 7)
    x = np.array([1e300, -1e300])
    assert affine.fake_quantize(x, grid).tolist() == [3.5, -4.0]
    np.testing.assert_allclose(dqa.fake_quantize(x, [grid, grid], [0.0, 1.0], 1.0), [3.5, -4.0], rtol=EXACT)
    assert lsq.gradients(x, np.ones(2), grid).x.tolist() == [0.0, 0.0]


def test_a_half_precision_result_beyond_its_range_is_infinite() -> None:
    grid = QParams(np.float32(2.0**15), np.int32(0), -8, 7)
    x = np.float16([6e4, -6e4])
    assert affine.fake_quantize(x, grid).tolist() == [np.inf, -np.inf]
    assert dqa.fake_quantize(x, [grid, grid], [0.0, 0.0], 1.0).tolist() == [np.inf, -np.inf]


def test_a_signalling_nan_is_a_nan() -> None:
    x = np.array([0x7F800001], np.uint32).view(np.float32)
    grid = QParams(np.float32(0.5), np.int32(0), -8, 7)
    assert np.isnan(affine.fake_quantize(x, grid)).all()
    assert affine.quantize(x, grid).tolist() == [-8]


def test_default_widths_double_twice_up_to_sixteen() -> None:
    expected = {1: [1, 2, 4], 3: [3, 6, 12], 5: [5, 10, 16], 8: [8, 16], 12: [12, 16], 16: [16]}
    assert {width: dqa.default_widths(width) for width in expected} == expected


@pytest.mark.parametrize(
    ("sharing", "quant_max", "expected"), [(900, 1, 1 / 30), (4, 7, 28**-0.5), (9, 0, 1 / 3), (0, 127, 127**-0.5)]
)
def test_gradient_scale(sharing: int, quant_max: int, expected: float) -> None:
    assert lsq.gradient_scale(sharing, quant_max) == pytest.approx(expected, rel=EXACT)


# ---- gradients are derivatives of the declared surrogates -----------------------------------------------------------
#
# A surrogate replaces each rounding r(v) by v + c with the constant c = r(v0) - v0 at the point in question: it has the
# values of the forward pass there, and the straight-through gradient. It is analytic on each branch, so its derivative
# is a difference with an imaginary step (Squire and Trapp, 1998): Im f(v + ih) / h has no cancellation, and for
# h = 1e-30 no truncation error in float64.

STEP = 1e-30


def derivative(function: Any, point: float) -> float:
    return function(point + 1j * STEP).imag / STEP


@st.composite
def away_from_ties(draw: Any, grid: QParams) -> np.ndarray:
    """Return values at least 1/16 of a step from every tie and every end, where no branch changes."""
    low, high = int(grid.quant_min - grid.zero_point), int(grid.quant_max - grid.zero_point)
    codes = draw(st.lists(st.integers(low - 3, high + 3), min_size=1, max_size=8))
    parts = draw(st.lists(st.sampled_from([-7, -4, -1, 1, 3, 7]), min_size=len(codes), max_size=len(codes)))
    return (np.array(codes) + np.array(parts) / 16) * float(grid.scale)


def surrogate_grid(
    method: QuantizationMethod, at: dict[str, float], grid: QParams, n_bits: int, *, signed: bool
) -> Any:
    """Return the function from variables to scale and zero point, with the roundings of this point held."""
    if method is not QuantizationMethod.UNIFORM:
        steps = 2.0 ** (n_bits - int(signed))
        held = float(grid.scale) * steps / at[THRESHOLD]  # 2**(ceil(log2 t) - log2 t); 1 for SYMMETRIC
        return lambda v: (v[THRESHOLD] * held / steps, 0.0)
    # the roundings of scale and zero point together nudge the range: its ends move by a constant
    low = (grid.quant_min - int(grid.zero_point)) * float(grid.scale) - at[RANGE_MIN]
    high = (grid.quant_max - int(grid.zero_point)) * float(grid.scale) - at[RANGE_MAX]

    def numbers(v: dict[str, Any]) -> tuple[Any, Any]:
        scale = ((v[RANGE_MAX] + high) - (v[RANGE_MIN] + low)) / grid.quant_max
        return scale, -(v[RANGE_MIN] + low) / scale

    return numbers


@every_grid
@given(st.data())
def test_learned_step_gradients_are_derivatives_of_the_surrogate(method: QuantizationMethod, data: Any) -> None:
    at, n_bits, signed = data.draw(variables(method)), data.draw(st.integers(1, 8)), data.draw(st.booleans())
    grid = from_variables(at, method, n_bits, signed=signed)
    x = data.draw(away_from_ties(grid))
    upstream = np.array(data.draw(st.lists(st.integers(-8, 8), min_size=x.size, max_size=x.size)), np.float64)
    at = {name: float(value) for name, value in at.items()}
    numbers = surrogate_grid(method, at, grid, n_bits, signed=signed)
    v0 = x / float(grid.scale)
    low, high = int(grid.quant_min - grid.zero_point), int(grid.quant_max - grid.zero_point)

    def loss(variables_of: dict[str, Any], values: Any) -> Any:
        scale, zero_point = numbers(variables_of)
        between = values / scale + (np.rint(v0) - v0)
        outside = np.where(v0 < low, grid.quant_min, grid.quant_max) - zero_point
        return (upstream * np.where((v0 > low) & (v0 < high), between, outside) * scale).sum()

    gradients = lsq.gradients(x, upstream, grid)
    for index in range(x.size):
        moved = derivative(lambda value, i=index: loss(at, np.where(np.arange(x.size) == i, value, x)), x[index])
        assert gradients.x[index] == pytest.approx(moved, rel=EXACT)

    learned = variable_gradients(at, method, n_bits, gradients.scale, gradients.zero_point, signed=signed)
    g = lsq.gradient_scale(x.size, grid.quant_max)
    for name, gradient in learned.items():
        expected = g * derivative(lambda value, n=name: loss({**at, n: value}, x), at[name])
        # The reference rounds x, 1 / scale and their product to float32: three units of v in round(v) - v; everything
        # else is float64, whose error is that of sums that may cancel.
        chain = 1.0 / grid.quant_max if method is QuantizationMethod.UNIFORM else 2.0 ** (1 - n_bits + int(signed))
        largest = np.abs(np.clip(v0, low, high)) + 1
        bound = g * (np.abs(upstream) * largest).sum() * (3 * UNIT + EXACT) * chain
        ends = g * np.abs(upstream).sum() * EXACT * 2.0**n_bits  # the terms of the ends that cancel
        assert abs(gradient - expected) <= bound + ends, name


@given(st.data())
def test_attention_gradients_are_derivatives_of_the_surrogate(data: Any) -> None:
    method = data.draw(st.sampled_from(GRIDS))
    at = data.draw(variables(method))
    widths = sorted(data.draw(st.sets(st.integers(1, 8), min_size=1, max_size=3)))
    grids_of = [from_variables(at, method, width) for width in widths]
    x = data.draw(away_from_ties(grids_of[-1]))
    upstream = np.array(data.draw(st.lists(st.integers(-8, 8), min_size=x.size, max_size=x.size)), np.float64)
    logits = np.array(data.draw(st.lists(st.integers(-8, 8), min_size=len(widths), max_size=len(widths)))) / 4
    temperature = data.draw(st.sampled_from([0.25, 1.0, 4.0]))
    values = [affine.fake_quantize(x, grid) for grid in grids_of]

    def attention(of: Any) -> Any:
        weights = np.exp(of / temperature)
        return weights / weights.sum()

    def mixed(of: Any) -> Any:
        return sum(weight * (upstream * value).sum() for weight, value in zip(attention(of), values, strict=True))

    gradients = dqa.gradients(x, upstream, grids_of, logits, temperature)
    cost_gradient = dqa.bit_cost_gradient(logits, temperature, widths)
    size = max(float(np.abs(upstream * value).sum()) for value in values)
    for k in range(len(widths)):

        def only(value: Any, index: int = k) -> Any:
            return np.where(np.arange(len(logits)) == index, value, logits)

        expected = derivative(lambda value, f=only: mixed(f(value)), logits[k])
        assert abs(gradients.logits[k] - expected) <= EXACT * size / temperature
        expected = derivative(lambda value, f=only: (attention(f(value)) * widths).sum(), logits[k])
        assert abs(cost_gradient[k] - expected) <= EXACT * max(widths) / temperature

    # each candidate is y = x + c inside its grid, constant outside
    inside = np.array([ste.inside(x, grid) for grid in grids_of])
    np.testing.assert_allclose(gradients.x, upstream * (attention(logits)[:, None] * inside).sum(0), rtol=EXACT)


@every_grid
@given(st.data())
def test_straight_through_gradients_are_derivatives_of_the_surrogate(method: QuantizationMethod, data: Any) -> None:
    grid = data.draw(grids(method).filter(lambda of: of.quant_max - of.quant_min < 2**8))
    x = data.draw(away_from_ties(grid))
    low, high = (float((end - grid.zero_point) * grid.scale) for end in (grid.quant_min, grid.quant_max))
    for value, gradient in zip(x.tolist(), ste.gradients(x, np.full(x.shape, 3.0), grid).x.tolist(), strict=True):
        # clip(x), with the rounding as a constant
        moved = derivative(lambda v: v if low < v.real < high else complex(min(max(v.real, low), high)), value)
        assert gradient == pytest.approx(3.0 * moved, rel=EXACT)
