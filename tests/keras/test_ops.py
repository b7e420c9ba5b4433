"""Fake quantization on tensors: the reference's values and gradients, bit for bit where arithmetic is exact."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.golden import array, cases, grid_of
from tests.keras.framework import FRAMEWORK, internal, numpy, only_tensorflow, pull_back, tensor, tf
from tests.strategies import assert_same_bits, grids, inputs, shapes, upstreams
from trainable_core.enums import TieRule
from trainable_core.qparams import QParams
from trainable_core.reference import affine, lsq, ste
from trainable_keras.ops import HalfUp

ops = internal("ops")
Grid = internal("grid").Grid

HALF_UP = TieRule.HALF_UP
UNIT = 2.0**-24


def on_tensors(grid: QParams, ndim: int) -> Grid:
    """Return core's grid as the tensors that a quantizer makes."""
    along = grid.along(ndim)
    centered = not along.zero_point.any()
    return Grid(tensor(along.scale), tensor(along.zero_point), grid.quant_min, grid.quant_max, centered)


def snapped(x: np.ndarray, grid: QParams) -> np.ndarray:
    on = on_tensors(grid, x.ndim)
    zero_point = None if on.centered else on.zero_point
    return numpy(ops.snap(tensor(x), on.scale, zero_point, on.quant_min, on.quant_max))


@st.composite
def grids_and_inputs(draw: Any) -> tuple[QParams, np.ndarray]:
    shape = draw(shapes())
    grid = draw(grids(shape))
    return grid, draw(inputs(grid, shape))


def pulled(rule: Any, x: np.ndarray, grid: QParams, upstream: np.ndarray) -> list[np.ndarray]:
    """Return the gradients of input, scale and zero point that a rule gives."""
    on = on_tensors(grid, x.ndim)

    def function(x: Any, scale: Any, zero_point: Any) -> Any:
        return rule(x, Grid(scale, zero_point, on.quant_min, on.quant_max, on.centered))

    return pull_back(function, [tensor(x), on.scale, on.zero_point], tensor(upstream))


@given(grids_and_inputs())
def test_values_are_those_of_the_reference(drawn: tuple[QParams, np.ndarray]) -> None:
    grid, x = drawn
    assert_same_bits(snapped(x, grid), affine.fake_quantize(x, grid, tie_rule=HALF_UP))


@given(grids_and_inputs())
def test_every_gradient_rule_has_the_same_values(drawn: tuple[QParams, np.ndarray]) -> None:
    grid, x = drawn
    expected, on = snapped(x, grid), on_tensors(grid, x.ndim)
    assert_same_bits(numpy(ops.ste_fake_quantize(tensor(x), on)), expected)
    assert_same_bits(numpy(ops.lsq_fake_quantize(tensor(x), on)), expected)


@cases("affine", HALF_UP)
def test_golden_values(case: dict[str, Any]) -> None:
    grid, x = grid_of(case), array(case["x"], np.float32)
    y = snapped(x, grid)
    assert y.tolist() == case["values"]
    assert not np.signbit(y[y == 0]).any()


def test_ties_go_up() -> None:
    grid = QParams(np.float32(1.0), np.int32(0), -8, 7, None)
    assert snapped(np.float32([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]), grid).tolist() == [-2.0, -1.0, 0.0, 1.0, 2.0, 3.0]


def test_just_below_a_tie_stays_down() -> None:
    """``floor(v + 0.5)`` would round the largest number below one half up."""
    grid = QParams(np.float32(1.0), np.int32(0), -8, 7, None)
    below = np.nextafter(np.float32(0.5), np.float32(0))
    assert snapped(np.float32([below, 2.0**23 + 1]), QParams(np.float32(1.0), np.int32(0), -8, 2**15, None))[0] == 0.0
    assert snapped(np.array([below]), grid).tolist() == [0.0]


def without_subnormals(x: np.ndarray, grid: QParams) -> np.ndarray:
    """Return `x` with zeros where it or ``x / scale`` is subnormal: engines take those for zeros."""
    tiny = np.finfo(np.float32).tiny
    return np.where((np.abs(x) < tiny) | (np.abs(affine.steps(x, grid)) < tiny), np.float32(0), x)


@given(grids_and_inputs(), st.data())
def test_straight_through_gradient_is_exactly_that_of_the_reference(
    drawn: tuple[QParams, np.ndarray], data: Any
) -> None:
    grid, x = drawn
    x, upstream = without_subnormals(x, grid), data.draw(upstreams(x.shape))
    d_x, d_scale, d_zero = pulled(ops.ste_fake_quantize, x, grid, upstream)
    assert d_x.tolist() == ste.gradients(x, upstream, grid).x.tolist()
    assert not d_scale.any()
    assert not d_zero.any()


@given(grids_and_inputs(), st.data())
def test_learned_step_input_gradient_is_exactly_that_of_the_reference(
    drawn: tuple[QParams, np.ndarray], data: Any
) -> None:
    grid, x = drawn
    x, upstream = without_subnormals(x, grid), data.draw(upstreams(x.shape))
    d_x = pulled(ops.lsq_fake_quantize, x, grid, upstream)[0]
    assert d_x.tolist() == lsq.gradients(x, upstream, grid, tie_rule=HALF_UP).x.tolist()


@cases("ste")
def test_golden_straight_through_gradients(case: dict[str, Any]) -> None:
    grid, x = grid_of(case), array(case["x"], np.float32)
    d_x = pulled(ops.ste_fake_quantize, x, grid, array(case["upstream"], np.float32))[0]
    assert d_x.tolist() == case["d_x"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_upstream_gradient_that_is_not_finite_stays_where_it_is(value: float) -> None:
    grid, x = QParams(np.float32(0.5), np.int32(0), -8, 7, None), np.float32([0.25, 0.75, 9.0])
    for rule in (ops.ste_fake_quantize, ops.lsq_fake_quantize):
        d_x = pulled(rule, x, grid, np.float32([1.0, value, 1.0]))[0]
        assert d_x[0] == 1.0
        assert d_x[2] == 0.0


def test_the_gradient_scale_counts_the_elements_that_share_a_scale() -> None:
    for scale, sharing in ((np.float32(0.5), 24), (np.full((1, 3), 0.5, np.float32), 8)):
        expected = lsq.gradient_scale(sharing, 7)
        found = ops.gradient_scale(tensor(np.zeros((8, 3))), tensor(scale), 7)
        assert float(numpy(found) if hasattr(found, "shape") else found) == pytest.approx(expected, rel=4 * UNIT)


@pytest.mark.parametrize("replicas", [1, 4])
def test_the_gradient_scale_counts_the_elements_of_all_replicas(replicas: int) -> None:
    x = tensor(np.zeros((10, 3)))
    for scale, sharing in ((tensor(1.0), 30), (tensor(np.ones((1, 3))), 10)):
        assert ops.gradient_scale(x, scale, 7, replicas) == lsq.gradient_scale(sharing * replicas, 7)


@only_tensorflow("a graph of tf.function knows no size of its batches")
def test_the_gradient_scale_of_a_batch_of_any_size_is_found_when_the_graph_runs() -> None:
    run = tf.function(
        lambda x: ops.gradient_scale(x, tensor(np.ones((1, 3))), 7), input_signature=[tf.TensorSpec([None, 3])]
    )
    for size in (10, 4):
        # a division, a root, a reciprocal, a product
        expected = pytest.approx(lsq.gradient_scale(size, 7), rel=4 * UNIT)
        assert float(run(tensor(np.zeros((size, 3))))) == expected


def test_replicas_share_a_grid() -> None:
    on = on_tensors(QParams(np.float32(0.37), np.int32(0), -8, 7), 2)
    x = tensor([[0.5, -3.0, 9.0]])
    slopes = []
    for replicas in (1, 4):
        _, slope = pull_back(
            lambda x, scale, n=replicas: ops.lsq_fake_quantize(x, Grid(scale, on.zero_point, -8, 7, centered=True), n),
            [x, on.scale],
            tensor(np.ones((1, 3))),
        )
        slopes.append(float(slope))
    assert slopes[0] == 2 * slopes[1] != 0


def test_functions_are_compiled_once_for_each_kind_of_grid() -> None:
    compiled = []

    def fused(plain: Any, given: Any = None) -> Any:
        compiled.append(plain)
        return given or plain

    rules = HalfUp(replace(FRAMEWORK.functions, fused=fused))
    on = on_tensors(QParams(np.float32(0.37), np.int32(0), -8, 7), 2)
    for _ in range(3):
        rules.lsq_fake_quantize(tensor(np.zeros((1, 3))), on)
    assert len(compiled) == 2  # the values, and the terms of the gradient


@pytest.mark.parametrize(
    "grid",
    [
        QParams(np.float32(2.0**-5), np.int32(0), -128, 127),
        QParams(np.float32(0.1), np.int32(0), -128, 127),
        QParams(np.float32(3.7e-6), np.int32(0), 0, 2**16 - 1),
        QParams(np.float32(2.0**-3), np.int32(77), 0, 255),
    ],
    ids=["power of two", "any scale", "16 bits", "zero point"],
)
def test_ties_that_are_moved_go_to_the_even_code_and_no_other_value_changes_its_code(grid: QParams) -> None:
    low, high = (end - int(grid.zero_point) for end in (grid.quant_min, grid.quant_max))
    at = (np.arange(2 * low - 3, 2 * high + 4) / 2 * grid.scale).astype(np.float32)  # codes, ties, and beyond the ends
    x = np.concatenate([at, np.nextafter(at, np.float32(np.inf)), np.nextafter(at, np.float32(-np.inf))])
    x = np.concatenate([x, np.float32([np.inf, -np.inf, np.nan, 3e38, -0.0])])
    moved = numpy(FRAMEWORK.quantizer.ops.ties_to_even(tensor(x), tensor(grid.scale)))
    assert_same_bits(snapped(moved, grid), affine.fake_quantize(x, grid, tie_rule=TieRule.HALF_EVEN))


def test_the_gradient_passes_by_moved_ties() -> None:
    x, upstream = np.float32([0.5, 1.5, 0.25, -2.5]), np.float32([1.0, -2.0, 3.0, -4.0])
    moved = FRAMEWORK.quantizer.ops.ties_to_even
    found, of_scale = pull_back(moved, [tensor(x), tensor(np.float32(1.0))], tensor(upstream))
    assert found.tolist() == upstream.tolist()
    assert of_scale == 0
