"""Fake quantization on NumPy's own functions is bit for bit the reference's with ties up, gradients included."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.test_tensor_grid import NUMPY
from trainable_core.enums import TieRule
from trainable_core.qparams import QParams
from trainable_core.reference import affine, lsq, ste
from trainable_keras.grid import GridNumbers
from trainable_keras.ops import Functions, HalfUp

# infinities less themselves are part of the formula, and NumPy warns of them
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
UNKNOWN = np.float32(30.0)
"""What a graph knows of a size before it runs: that there will be a number."""

GRIDS = {
    "signed": QParams(np.float32(0.37), np.int32(0), -8, 7),
    "unsigned": QParams(np.float32(0.11), np.int32(0), 0, 15),
    "zero point": QParams(np.float32(0.23), np.int32(5), 0, 15),
    "channels": QParams(np.float32([0.1, 0.7, 3.0]), np.int32([0, 0, 0]), -2, 1, 1),
    "channels with zero points": QParams(np.float32([0.1, 0.7, 3.0]), np.int32([0, 3, 1]), 0, 3, 1),
}
every_grid = pytest.mark.parametrize("on", GRIDS.values(), ids=GRIDS)
multiples = st.integers(-40, 40).map(lambda halves: halves / 2)  # ties and codes in equal parts
numbers = multiples | st.floats(-30, 30, width=32) | st.sampled_from([np.inf, -np.inf, -0.0, 1e-40])
arrays = st.lists(st.tuples(numbers, numbers, numbers), min_size=1, max_size=8).map(np.float32)


class Traced:
    """Functions of arrays, and the last gradient that was defined."""

    def __init__(self) -> None:
        self.backward = None
        self.compiled = 0

    def with_gradient(self, forward, backward):
        def function(*arguments):
            output = forward(*arguments)
            self.backward = lambda upstream: backward(upstream, output, *arguments)
            return output

        return function

    def fused(self, plain, compiled=None):
        self.compiled += 1
        return compiled or plain


def half_up(size=np.size) -> tuple[HalfUp, Traced]:
    traced = Traced()
    functions = Functions(
        **{**vars(NUMPY), "with_gradient": traced.with_gradient},
        floor=np.floor,
        cast=np.asarray,
        stop_gradient=lambda x: x,
        sum=np.sum,
        rsqrt=lambda x: np.float32(1) / np.sqrt(np.float32(x)),
        size=size,
        reciprocal=lambda x: np.float32(1) / x,
        steps_of=lambda x, scale, *_, centered: x * (np.float32(1) / scale),
        fused=traced.fused,
    )
    return HalfUp(functions), traced


def tensors(on: QParams) -> GridNumbers:
    along = on.along(2)
    zero_point = along.zero_point.astype(np.float32)
    return GridNumbers(along.scale, zero_point, on.quant_min, on.quant_max, not zero_point.any())


def scaled(x: np.ndarray, on: QParams) -> np.ndarray:
    """Return numbers in units of the scale, so that ties are ties in float32."""
    with np.errstate(over="ignore"):
        return x * on.along(2).scale


@every_grid
@given(x=arrays)
def test_values_are_the_references(on: QParams, x: np.ndarray) -> None:
    rules, _ = half_up()
    x = scaled(x, on)
    expected = affine.fake_quantize(x, on, tie_rule=TieRule.HALF_UP)
    for rule in (rules.ste_fake_quantize, rules.lsq_fake_quantize):
        assert np.array_equal(rule(x, tensors(on)), expected)
    zero_point = None if tensors(on).centered else tensors(on).zero_point
    assert np.array_equal(rules.snap(x, tensors(on).scale, zero_point, on.quant_min, on.quant_max), expected)


@every_grid
@given(x=arrays, data=st.data())
def test_gradients_are_the_references(on: QParams, x: np.ndarray, data: st.DataObject) -> None:
    rules, traced = half_up()
    x = scaled(x, on)
    upstream = np.float32(data.draw(st.lists(st.integers(-8, 8), min_size=x.size, max_size=x.size))).reshape(x.shape)
    rules.ste_fake_quantize(x, tensors(on))
    d_x, *nothing = traced.backward(upstream)
    assert np.array_equal(d_x, ste.gradients(x, upstream, on).x)
    assert not np.any(nothing[0])
    rules.lsq_fake_quantize(x, tensors(on))
    d_x, d_scale, *d_zero_point = traced.backward(upstream)
    expected = lsq.gradients(x, upstream, on, tie_rule=TieRule.HALF_UP)
    assert np.array_equal(d_x, expected.x)
    # at most 24 float32 terms of at most 8 * 15 each, added in any order
    assert np.allclose(np.ravel(d_scale), np.ravel(expected.scale), rtol=0, atol=24 * 24 * 8 * 15 * 2.0**-24)
    if d_zero_point:
        atol = 24 * 24 * 8 * float(on.scale.max()) * 2.0**-24
        assert np.allclose(np.ravel(d_zero_point[0]), np.ravel(expected.zero_point), rtol=0, atol=atol)


def test_nan_stays() -> None:
    rules, _ = half_up()
    assert np.isnan(rules.ste_fake_quantize(np.float32([[np.nan]]), tensors(GRIDS["signed"]))).all()


@pytest.mark.parametrize("replicas", [1, 4])
def test_the_gradient_scale_counts_the_elements_of_all_replicas(replicas: int) -> None:
    x = np.zeros((10, 3), np.float32)
    for scale, sharing in ((np.float32(1), 30), (np.ones((1, 3), np.float32), 10)):
        expected = lsq.gradient_scale(sharing * replicas, 7)
        assert half_up()[0].gradient_scale(x, scale, 7, replicas) == expected
        later = half_up(lambda _: UNKNOWN)[0].gradient_scale(x, scale, 7, replicas)
        assert later == pytest.approx(expected, rel=4 * 2.0**-24)  # a division, a root, a reciprocal, a product


def test_replicas_share_a_grid() -> None:
    rules, traced = half_up()
    x = np.float32([[0.5, -3.0, 9.0]])
    slopes = []
    for replicas in (1, 4):
        rules.lsq_fake_quantize(x, tensors(GRIDS["signed"]), replicas)
        slopes.append(float(traced.backward(np.ones_like(x))[1]))
    assert slopes[0] == 2 * slopes[1] != 0


def test_functions_are_compiled_once_for_each_kind_of_grid() -> None:
    rules, traced = half_up()
    for _ in range(3):
        rules.lsq_fake_quantize(np.zeros((1, 3), np.float32), tensors(GRIDS["signed"]))
    assert traced.compiled == 2  # the values, and the terms of the gradient
