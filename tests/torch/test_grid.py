"""Grids computed on tensors: bit for bit those of core, whatever an optimizer left in the variables."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import GRIDS, float32s, min_thresholds, moderate_min_thresholds, n_bits, upstreams
from tests.torch.strategies import every_device
from trainable_core import qparams
from trainable_core.constants import RANGE_MAX, RANGE_MIN, THRESHOLD
from trainable_core.enums import QuantizationMethod
from trainable_torch import grid as grids

UNIT = 2.0**-24  # relative error of one float32 operation

every_grid = pytest.mark.parametrize("method", GRIDS, ids=str)


def on_tensors(
    variables: dict[str, torch.Tensor], method: QuantizationMethod, bits: int, *, signed: bool, min_threshold: float
) -> grids.Grid:
    form = grids.form(method, bits, signed=signed, min_threshold=min_threshold)
    given = tuple(variables[name] for name in qparams.variable_names(method))
    return form.grid(given, given[0].shape)


class Drawn:
    """Variables of one grid: any float32 numbers, per tensor or per channel."""

    def __init__(self, data: Any, method: QuantizationMethod, bounds: Any = min_thresholds) -> None:
        self.shape = data.draw(st.sampled_from([(), (1,), (5,), (0,)]))
        names = qparams.variable_names(method)
        size = int(np.prod(self.shape, dtype=np.int64))
        self.arrays = {name: data.draw(float32s(size)).reshape(self.shape) for name in names}
        self.method, self.bits = method, data.draw(n_bits)
        self.arguments = {"signed": data.draw(st.booleans()), "min_threshold": data.draw(bounds)}

    def grid(self, variables: dict[str, torch.Tensor]) -> grids.Grid:
        return on_tensors(variables, self.method, self.bits, **self.arguments)

    def tensors(self, device: str = "cpu") -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(array.copy()).to(device) for name, array in self.arrays.items()}


@every_device
@every_grid
@given(st.data())
def test_numbers_are_bit_for_bit_those_of_core(method: QuantizationMethod, device: str, data: Any) -> None:
    drawn = Drawn(data, method)
    grid = drawn.grid(drawn.tensors(device))
    expected = qparams.from_variables(drawn.arrays, method, drawn.bits, **drawn.arguments)
    assert (grid.quant_min, grid.quant_max) == (expected.quant_min, expected.quant_max)
    assert grid.scale.dtype is grid.zero_point.dtype is torch.float32
    assert grid.scale.shape == grid.zero_point.shape == drawn.shape
    assert grid.scale.tolist() == expected.scale.tolist()
    assert grid.zero_point.tolist() == expected.zero_point.tolist()
    assert grid.centered is (method is not QuantizationMethod.UNIFORM)


@every_grid
@given(st.data())
def test_ends_are_the_codes_counted_from_zero(method: QuantizationMethod, data: Any) -> None:
    drawn = Drawn(data, method)
    grid = drawn.grid(drawn.tensors())
    expected = qparams.from_variables(drawn.arrays, method, drawn.bits, **drawn.arguments)
    for end, code in zip(grid.ends, (expected.quant_min, expected.quant_max), strict=True):
        assert torch.as_tensor(end).broadcast_to(drawn.shape).tolist() == (code - expected.zero_point).tolist()


@every_grid
@given(st.data())
def test_scale_and_its_inverse_are_normal_numbers(method: QuantizationMethod, data: Any) -> None:
    drawn = Drawn(data, method)
    scale = drawn.grid(drawn.tensors()).scale
    assert ((scale >= 2.0**-116) & (scale <= 2.0**100)).all()
    assert (scale.reciprocal() >= 2.0**-126).all()


@every_grid
@given(st.data())
def test_gradients_are_those_of_core(method: QuantizationMethod, data: Any) -> None:
    drawn = Drawn(data, method, moderate_min_thresholds)
    variables = {name: tensor.requires_grad_() for name, tensor in drawn.tensors().items()}
    grid = drawn.grid(variables)
    d_scale, d_zero = data.draw(upstreams(drawn.shape)), data.draw(upstreams(drawn.shape))
    loss = (grid.scale * torch.from_numpy(d_scale)).sum()
    if method is QuantizationMethod.UNIFORM:
        loss = loss + (grid.zero_point * torch.from_numpy(d_zero)).sum()
    loss.backward()
    expected = qparams.variable_gradients(drawn.arrays, method, drawn.bits, d_scale, d_zero, **drawn.arguments)
    step = grid.scale.detach().numpy().astype(np.float64)
    if method is QuantizationMethod.UNIFORM:
        zero_point = grid.zero_point.detach().numpy()
        through_width = (np.abs(d_scale) + np.abs(d_zero) * zero_point / step) / grid.quant_max
        bounds = {RANGE_MIN: through_width + np.abs(d_zero) / step, RANGE_MAX: through_width}
    else:
        rounding = 2.0 if method is QuantizationMethod.POWER_OF_TWO else 1.0  # p / t is below 2
        bounds = {THRESHOLD: np.abs(d_scale) * rounding * 2.0 ** -(drawn.bits - int(drawn.arguments["signed"]))}
    for name, gradient in expected.items():
        error = np.abs(variables[name].grad.numpy() - gradient)
        assert (error <= 6 * UNIT * bounds[name]).all(), (
            name
        )  # six operations at most: product, 2 quotients, 2 sums, sign


@every_grid
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_gradient_that_is_not_finite_counts_as_zero(method: QuantizationMethod, value: float) -> None:
    variables = {
        name: torch.tensor(-1.0 if name == RANGE_MIN else 2.0, requires_grad=True)
        for name in qparams.variable_names(method)
    }
    on_tensors(variables, method, 4, signed=True, min_threshold=0.0).scale.backward(torch.tensor(value))
    assert [float(variable.grad) for variable in variables.values()] == [0.0] * len(variables)


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
        (torch.nan, 1.0, False),
        (torch.nan, -1.0, False),
    ],
)
@pytest.mark.parametrize("method", GRIDS[:2], ids=str)
def test_out_of_bounds_only_the_way_back_is_open(
    method: QuantizationMethod, threshold: float, upstream: float, moves: bool
) -> None:
    variable = torch.tensor(threshold, requires_grad=True)
    on_tensors({THRESHOLD: variable}, method, 4, signed=True, min_threshold=0.25).scale.backward(torch.tensor(upstream))
    assert bool(variable.grad != 0) is moves


def test_a_range_with_one_end_that_is_no_number_still_learns_the_other() -> None:
    ends = {RANGE_MIN: torch.tensor(torch.nan, requires_grad=True), RANGE_MAX: torch.tensor(2.0, requires_grad=True)}
    on_tensors(ends, QuantizationMethod.UNIFORM, 4, signed=True, min_threshold=0.0).scale.backward()
    assert float(ends[RANGE_MIN].grad) == 0.0
    assert float(ends[RANGE_MAX].grad) == np.float32(1) / np.float32(15)


@every_grid
def test_no_gradient_is_asked_for_means_none_is_kept(method: QuantizationMethod) -> None:
    variables = {name: torch.tensor(-1.0 if name == RANGE_MIN else 2.0) for name in qparams.variable_names(method)}
    assert not on_tensors(variables, method, 4, signed=True, min_threshold=0.0).scale.requires_grad


@every_grid
def test_vmap_is_a_loop(method: QuantizationMethod) -> None:
    batch = {
        RANGE_MIN: torch.tensor([-1.0, torch.nan, 3.0]),
        RANGE_MAX: torch.tensor([0.3, 2.0, -torch.inf]),
        THRESHOLD: torch.tensor([1.3, torch.nan, -7.0]),
    }
    batch = {name: batch[name] for name in qparams.variable_names(method)}

    def scale(variables: dict[str, torch.Tensor]) -> torch.Tensor:
        return on_tensors(variables, method, 4, signed=True, min_threshold=0.25).scale

    each = [scale({name: values[index] for name, values in batch.items()}) for index in range(3)]
    assert torch.vmap(scale)(batch).tolist() == torch.stack(each).tolist()
