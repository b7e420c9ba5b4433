"""From variables to the grid on tensors: core's numbers bit for bit, and its gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.keras.framework import FRAMEWORK, internal, numpy, pull_back, tensor
from tests.strategies import (
    GRIDS,
    float32s,
    min_thresholds,
    moderate_min_thresholds,
    n_bits,
    upstreams,
    without_subnormals,
)
from trainable_core import qparams
from trainable_core.constants import RANGE_MAX, RANGE_MIN, THRESHOLD
from trainable_core.enums import QuantizationMethod
from trainable_keras.grid import GridMaker

grids = internal("grid")

UNIT = 2.0**-24
TINY = np.finfo(np.float32).tiny
every_grid = pytest.mark.parametrize("method", GRIDS, ids=str)


def on_tensors(
    variables: dict[str, Any], method: QuantizationMethod, bits: int, *, signed: bool, min_threshold: float
) -> grids.Grid:
    if method is QuantizationMethod.UNIFORM:
        return grids.uniform(variables[RANGE_MIN], variables[RANGE_MAX], bits, min_threshold=min_threshold)
    power_of_two = method is QuantizationMethod.POWER_OF_TWO
    return grids.symmetric(
        variables[THRESHOLD], bits, signed=signed, power_of_two=power_of_two, min_threshold=min_threshold
    )


def pulled(arrays: dict[str, np.ndarray], make: Any, d_scale: Any, d_zero: Any) -> dict[str, np.ndarray]:
    """Return the gradients of the variables for upstream gradients of scale and zero point."""

    def function(*values: Any) -> Any:
        grid = make(dict(zip(arrays, values, strict=True)))
        return [grid.scale, grid.zero_point]

    found = pull_back(function, [tensor(values) for values in arrays.values()], [tensor(d_scale), tensor(d_zero)])
    return dict(zip(arrays, found, strict=True))


class Drawn:
    """Variables of one grid: any float32 numbers, per tensor or per channel."""

    def __init__(self, data: Any, method: QuantizationMethod, bounds: Any = min_thresholds) -> None:
        self.shape = data.draw(st.sampled_from([(), (1,), (5,)]))
        names = qparams.variable_names(method)
        size = int(np.prod(self.shape, dtype=np.int64))
        self.arrays = {name: data.draw(float32s(size)).reshape(self.shape) for name in names}
        self.method, self.bits = method, data.draw(n_bits)
        self.arguments = {"signed": data.draw(st.booleans()), "min_threshold": data.draw(bounds)}

    def grid(self, variables: dict[str, Any]) -> grids.Grid:
        return on_tensors(variables, self.method, self.bits, **self.arguments)

    def tensors(self) -> dict[str, Any]:
        return {name: tensor(values) for name, values in self.arrays.items()}


@every_grid
@given(st.data())
def test_numbers_are_bit_for_bit_those_of_core(method: QuantizationMethod, data: Any) -> None:
    drawn = Drawn(data, method)
    grid = drawn.grid(drawn.tensors())
    expected = qparams.from_variables(drawn.arrays, method, drawn.bits, **drawn.arguments)
    assert (grid.quant_min, grid.quant_max) == (expected.quant_min, expected.quant_max)
    assert tuple(grid.scale.shape) == tuple(grid.zero_point.shape) == drawn.shape
    assert numpy(grid.scale).tolist() == expected.scale.tolist()
    assert numpy(grid.zero_point).tolist() == expected.zero_point.tolist()
    assert grid.centered is (method is not QuantizationMethod.UNIFORM)


@every_grid
@given(st.data())
def test_ends_are_the_codes_counted_from_zero(method: QuantizationMethod, data: Any) -> None:
    drawn = Drawn(data, method)
    grid = drawn.grid(drawn.tensors())
    expected = qparams.from_variables(drawn.arrays, method, drawn.bits, **drawn.arguments)
    for end, code in zip(grid.ends, (expected.quant_min, expected.quant_max), strict=True):
        found = np.broadcast_to(end if isinstance(end, float) else numpy(end), drawn.shape)
        assert found.tolist() == (code - expected.zero_point).tolist()


@every_grid
@given(st.data())
def test_gradients_are_those_of_core(method: QuantizationMethod, data: Any) -> None:
    drawn = Drawn(data, method, moderate_min_thresholds)
    drawn.arrays = {name: without_subnormals(values) for name, values in drawn.arrays.items()}
    d_scale, d_zero = data.draw(upstreams(drawn.shape)), data.draw(upstreams(drawn.shape))
    if method is not QuantizationMethod.UNIFORM:
        d_zero = np.zeros_like(d_zero)
    actual = pulled(drawn.arrays, drawn.grid, d_scale, d_zero)
    expected = qparams.variable_gradients(drawn.arrays, method, drawn.bits, d_scale, d_zero, **drawn.arguments)
    grid = drawn.grid(drawn.tensors())
    step = numpy(grid.scale).astype(np.float64)
    if method is QuantizationMethod.UNIFORM:
        through_width = (np.abs(d_scale) + np.abs(d_zero) * numpy(grid.zero_point) / step) / grid.quant_max
        bounds = {RANGE_MIN: through_width + np.abs(d_zero) / step, RANGE_MAX: through_width}
    else:
        rounding = 2.0 if method is QuantizationMethod.POWER_OF_TWO else 1.0  # p / t is below 2
        bounds = {THRESHOLD: np.abs(d_scale) * rounding * 2.0 ** -(drawn.bits - int(drawn.arguments["signed"]))}
    for name, gradient in expected.items():
        error = np.abs(actual[name] - gradient)
        # six operations at most: product, two quotients, two sums, sign; and each engine takes subnormals for zeros
        assert (error <= 6 * UNIT * bounds[name] + 8 * TINY).all(), name


@every_grid
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_counts_as_zero(method: QuantizationMethod, value: float) -> None:
    arrays = {name: np.float32(-1.0 if name == RANGE_MIN else 2.0) for name in qparams.variable_names(method)}
    found = pulled(
        arrays, lambda given: on_tensors(given, method, 4, signed=True, min_threshold=0.0), np.float32(value), 0.0
    )
    assert [float(each) for each in found.values()] == [0.0] * len(arrays)


# Variable out of bounds, upstream gradient of the scale, and whether a descent step (against the gradient) leads back.
@pytest.mark.parametrize(
    ("threshold", "upstream", "moves"),
    [
        (-3.0, 1.0, False),
        (-3.0, -1.0, True),
        (0.1, 1.0, False),
        (0.1, -1.0, True),
        (2.0**101, -1.0, False),
        (2.0**101, 1.0, True),
        (np.nan, 1.0, False),
        (np.nan, -1.0, False),
    ],
)
@pytest.mark.parametrize("method", GRIDS[:2], ids=str)
def test_out_of_bounds_only_the_way_back_is_open(
    method: QuantizationMethod, threshold: float, upstream: float, moves: bool
) -> None:
    found = pulled(
        {THRESHOLD: np.float32(threshold)},
        lambda given: on_tensors(given, method, 4, signed=True, min_threshold=0.25),
        np.float32(upstream),
        0.0,
    )
    assert bool(found[THRESHOLD] != 0) is moves


def test_a_range_with_one_end_that_is_no_number_still_learns_the_other() -> None:
    found = pulled(
        {RANGE_MIN: np.float32(np.nan), RANGE_MAX: np.float32(2.0)},
        lambda given: on_tensors(given, QuantizationMethod.UNIFORM, 4, signed=True, min_threshold=0.0),
        1.0,
        0.0,
    )
    assert float(found[RANGE_MIN]) == 0.0
    # one quotient by 15, which an engine may take as a product with the inverse
    assert float(found[RANGE_MAX]) == pytest.approx(1 / 15, rel=4 * UNIT)


def test_a_function_is_made_once_for_each_kind_of_grid() -> None:
    """TensorFlow would trace a function with a gradient anew whenever it is another one."""
    made = []

    def with_gradient(forward: Any, backward: Any) -> Any:
        made.append(forward)
        return FRAMEWORK.functions.with_gradient(forward, backward)

    maker = GridMaker(replace(FRAMEWORK.functions, with_gradient=with_gradient), grids.Grid)
    for threshold in (1.0, 2.0):
        maker.symmetric(tensor([threshold]), 4, signed=True, power_of_two=False, min_threshold=0.0)
        maker.uniform(tensor([-threshold]), tensor([threshold]), 4, min_threshold=0.0)
    maker.symmetric(tensor([1.0]), 5, signed=True, power_of_two=False, min_threshold=0.0)
    assert len(made) == 3


def test_a_rounded_up_threshold_has_the_gradient_of_its_ratio() -> None:
    def power_of_two(given: dict[str, Any]) -> Any:
        return on_tensors(given, QuantizationMethod.POWER_OF_TWO, 4, signed=True, min_threshold=2.0**-16)

    arrays = {THRESHOLD: np.float32([3.0])}
    assert numpy(power_of_two({THRESHOLD: tensor([3.0])}).scale).tolist() == [0.5]  # 4 / 8
    expected = np.float32(np.float32(1 / 8) * np.float32(4 / 3))
    assert pulled(arrays, power_of_two, [1.0], [0.0])[THRESHOLD].tolist() == [expected]
