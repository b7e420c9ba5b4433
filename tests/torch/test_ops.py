"""Fake quantization on tensors: values of the reference and of torch's kernels, gradients of the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.golden import array, cases, grid_of
from tests.strategies import grids, inputs, shapes, upstreams
from tests.torch.strategies import assert_same_bits, every_device
from trainable_core.enums import TieRule
from trainable_core.qparams import QParams
from trainable_core.reference import affine, lsq, ste
from trainable_torch import ops
from trainable_torch.grid import Grid


def on_tensors(grid: QParams, ndim: int, device: str = "cpu", *, learned: bool = False) -> Grid:
    """Return core's grid as the tensors that a quantizer makes; `learned`: as leaves that get gradients."""
    along = grid.along(ndim)
    scale, zero_point = (
        torch.tensor(value, dtype=torch.float32).to(device) for value in (along.scale, along.zero_point)
    )
    centered = not along.zero_point.any()
    return Grid(
        scale.requires_grad_(learned), zero_point.requires_grad_(learned), grid.quant_min, grid.quant_max, centered
    )


@st.composite
def grids_and_inputs(draw: Any) -> tuple[QParams, np.ndarray]:
    shape = draw(shapes())
    grid = draw(grids(shape))
    return grid, draw(inputs(grid, shape))


# ---- values ---------------------------------------------------------------------------------------------------------


@every_device
@given(grids_and_inputs())
def test_values_are_those_of_the_reference(device: str, drawn: tuple[QParams, np.ndarray]) -> None:
    grid, x = drawn
    tensors = on_tensors(grid, x.ndim, device)
    y = ops.snap(torch.from_numpy(x).to(device), tensors.scale, *tensors.ends)
    assert_same_bits(y.cpu(), torch.from_numpy(affine.fake_quantize(x, grid, tie_rule=TieRule.HALF_EVEN)))


@given(st.data())
def test_finite_values_are_those_of_torch_s_kernels(data: Any) -> None:
    shape = data.draw(shapes())
    grid = data.draw(grids(shape))
    x = data.draw(inputs(grid, shape, nan=False, finite=True))
    # The kernels cast to int64 before they clip; beyond 2**63 steps the one per channel is wrong, see test_inferable.
    x = torch.from_numpy(np.where(np.abs(affine.steps(x, grid)) < 2.0**62, x, np.float32(0)))
    scale, zero_point = torch.tensor(grid.scale), torch.tensor(grid.zero_point)
    ends = (grid.quant_min, grid.quant_max)
    if grid.channels_axis is None:
        expected = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, *ends)
    else:
        axis = grid.channels_axis % len(shape)
        expected = torch.fake_quantize_per_channel_affine(x, scale, zero_point, axis, *ends)
    tensors = on_tensors(grid, len(shape))
    assert_same_bits(ops.snap(x, tensors.scale, *tensors.ends), expected)


@given(grids_and_inputs())
def test_every_gradient_rule_has_the_same_values(drawn: tuple[QParams, np.ndarray]) -> None:
    grid, x = drawn
    tensors, x = on_tensors(grid, x.ndim), torch.from_numpy(x)
    expected = ops.snap(x, tensors.scale, *tensors.ends)
    assert_same_bits(ops.ste_fake_quantize(x, tensors), expected)
    assert_same_bits(ops.lsq_fake_quantize(x, tensors, 0.5), expected)


@cases("affine", TieRule.HALF_EVEN)
def test_golden_values(case: dict[str, Any]) -> None:
    grid, x = grid_of(case), torch.from_numpy(array(case["x"], np.float32))
    tensors = on_tensors(grid, x.dim())
    y = ops.snap(x, tensors.scale, *tensors.ends)
    assert y.tolist() == case["values"]
    assert not y.signbit()[y == 0].any()


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_any_memory_layout(layout: str) -> None:
    tensors = on_tensors(QParams(np.float32([0.1, 0.3, 0.7]), np.int32([0, 0, 0]), -8, 7, 0), 2)
    x = torch.linspace(-3.0, 3.0, 15)
    x = {"transposed": x.view(5, 3).t(), "strided": x.view(3, 5)[:, ::2], "expanded": x[:1].expand(3, 5)}[layout]
    before = x.clone()
    assert_same_bits(ops.snap(x, tensors.scale, *tensors.ends), ops.snap(before, tensors.scale, *tensors.ends))
    assert_same_bits(x, before)


# ---- gradients ------------------------------------------------------------------------------------------------------


@given(grids_and_inputs(), st.data())
def test_straight_through_gradient_is_exactly_that_of_the_reference(
    drawn: tuple[QParams, np.ndarray], data: Any
) -> None:
    grid, x = drawn
    upstream = data.draw(upstreams(x.shape))
    tensor = torch.from_numpy(x).requires_grad_()
    ops.ste_fake_quantize(tensor, on_tensors(grid, x.ndim)).backward(torch.from_numpy(upstream))
    assert tensor.grad.tolist() == ste.gradients(x, upstream, grid).x.tolist()


@given(grids_and_inputs(), st.data())
def test_learned_step_input_gradient_is_exactly_that_of_the_reference(
    drawn: tuple[QParams, np.ndarray], data: Any
) -> None:
    grid, x = drawn
    upstream = data.draw(upstreams(x.shape))
    tensor = torch.from_numpy(x).requires_grad_()
    ops.lsq_fake_quantize(tensor, on_tensors(grid, x.ndim, learned=True), 0.5).backward(torch.from_numpy(upstream))
    assert tensor.grad.tolist() == lsq.gradients(x, upstream, grid).x.tolist()


@given(st.data())
def test_each_term_of_the_scale_s_gradient_is_that_of_the_reference(data: Any) -> None:
    """One element per channel: no sum, so the terms agree but for the roundings of two products."""
    shape = (data.draw(st.integers(1, 12)),)
    grid = data.draw(grids(shape, per_channel=True))
    x, upstream = data.draw(inputs(grid, shape)), data.draw(upstreams(shape))
    tensors = on_tensors(grid, 1, learned=True)
    factor = lsq.gradient_scale(1, grid.quant_max)
    ops.lsq_fake_quantize(torch.from_numpy(x), tensors, factor).backward(torch.from_numpy(upstream))
    expected = lsq.gradients(x, upstream, grid)
    for actual, terms in ((tensors.scale, expected.scale), (tensors.zero_point, expected.zero_point)):
        # two products and the factor's own rounding, each half a unit of 2**-23; a denormal is off by 2**-149 at most
        np.testing.assert_allclose(actual.grad.numpy(), terms, rtol=4 * 2.0**-24, atol=2.0**-148)


@cases("ste")
def test_golden_straight_through_gradients(case: dict[str, Any]) -> None:
    x = torch.from_numpy(array(case["x"], np.float32)).requires_grad_()
    upstream = torch.from_numpy(array(case["upstream"], np.float32))
    ops.ste_fake_quantize(x, on_tensors(grid_of(case), x.dim())).backward(upstream)
    assert x.grad.tolist() == case["d_x"]


@cases("lsq", TieRule.HALF_EVEN)
def test_golden_learned_step_gradients(case: dict[str, Any]) -> None:
    grid = grid_of(case)
    x = torch.from_numpy(array(case["x"], np.float32)).requires_grad_()
    tensors = on_tensors(grid, x.dim(), learned=True)
    factor = lsq.gradient_scale(grid.sharing(x.numel()), grid.quant_max)
    ops.lsq_fake_quantize(x, tensors, factor).backward(torch.from_numpy(array(case["upstream"], np.float32)))
    assert x.grad.tolist() == case["d_x"]
    # a handful of exact terms, then the factor: two roundings
    np.testing.assert_allclose(tensors.scale.grad.squeeze(), case["d_scale"], rtol=2.0**-22)
    np.testing.assert_allclose(tensors.zero_point.grad.squeeze(), case["d_zero_point"], rtol=2.0**-22)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("rule", ["ste", "lsq"])
def test_an_upstream_gradient_that_is_not_finite_stays_where_it_is(rule: str, value: float) -> None:
    tensors = on_tensors(QParams(np.float32(0.5), np.int32(0), -8, 7), 1)
    x = torch.tensor([-9.0, 0.1, 0.2, 9.0], requires_grad=True)
    y = ops.ste_fake_quantize(x, tensors) if rule == "ste" else ops.lsq_fake_quantize(x, tensors, 1.0)
    y.backward(torch.tensor([value, value, 1.0, value]))
    np.testing.assert_array_equal(x.grad, [0.0, value, 1.0, 0.0])


def test_gradients_nobody_needs_are_not_computed() -> None:
    tensors = on_tensors(QParams(np.float32(0.5), np.int32(0), -8, 7), 1, learned=True)
    x = torch.tensor([0.1, 0.2])
    ops.lsq_fake_quantize(x, tensors, 1.0).sum().backward()
    assert x.grad is None
    assert tensors.scale.grad is not None
    assert not ops.lsq_fake_quantize(x, on_tensors(QParams(np.float32(0.5), np.int32(0), -8, 7), 1), 1.0).requires_grad


@pytest.mark.parametrize("rule", ["ste", "lsq"])
def test_training_keeps_nothing_the_size_of_the_tensor_but_the_tensor(rule: str) -> None:
    tensors = on_tensors(QParams(np.float32(0.5), np.int32(3), 0, 15), 1, learned=rule == "lsq")
    x = torch.linspace(-4.0, 4.0, 100).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = ops.ste_fake_quantize(x, tensors) if rule == "ste" else ops.lsq_fake_quantize(x, tensors, 1.0)
    large = [tensor for tensor in kept if tensor.numel() > 1]
    assert [tensor.data_ptr() for tensor in large] == [x.data_ptr()]
    assert y.requires_grad
