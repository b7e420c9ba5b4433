"""Adaptive rounding in NumPy: the regularizer and its gradient, the ways out of the options, and what stays."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from trainable_core.errors import InvalidArgumentError
from trainable_core.qparams import QParams
from trainable_core.reference import adaround, affine
from trainable_core.schedule import CosineAnnealingScheduler

GRID = QParams(np.float32(0.5), np.int32(0), -8, 7)
WEIGHTS = hnp.arrays(np.float32, 6, elements=st.floats(-5, 5, width=16))
VARIABLES = hnp.arrays(np.float64, 6, elements=st.floats(-3, 3))


@given(WEIGHTS)
def test_with_nothing_learned_values_are_the_weights_and_the_nearest_codes(x):
    found = adaround.soft_rounding(x, GRID, np.zeros(6))
    np.testing.assert_allclose(found.soft, np.clip(x, -4, 3.5), atol=1e-12)
    away = np.abs(x / 0.5 - np.floor(x / 0.5) - 0.5) > 1e-9  # ties go up
    assert np.array_equal(found.hard[away], affine.fake_quantize(x, GRID)[away])


@given(WEIGHTS, VARIABLES)
def test_a_weight_goes_to_one_of_its_two_neighbours_and_one_on_a_code_stays(x, rounding):
    found = adaround.soft_rounding(x, GRID, rounding)
    inside = np.clip(x, -4, 3.5)
    assert (np.abs(found.hard - inside) < 0.5 + 1e-9).all()
    on_a_code = inside * 2 == np.round(inside * 2)
    assert np.array_equal(found.hard[on_a_code], inside[on_a_code])
    assert np.array_equal(affine.fake_quantize(found.hard.astype(np.float32), GRID), found.hard)


@given(WEIGHTS, VARIABLES, st.sampled_from([2.0, 8.0, 20.0]))
def test_gradients_are_those_of_the_values_and_of_the_regularizer(x, rounding, beta):
    step = 1e-6
    here = adaround.soft_rounding(x, GRID, rounding)
    _, gradient = adaround.regularizer(here.h, here.dh, beta)
    there, back = (adaround.soft_rounding(x, GRID, rounding + sign * step) for sign in (1, -1))
    smooth = (here.dh > 0) == (there.dh > 0)
    smooth &= ((here.dh > 0) == (back.dh > 0)) & (here.derivative > 0)
    # central differences: an error of step**2 times a third derivative below beta**3, and rounding of 1e-16 / step
    found = (there.soft - back.soft) / (2 * step)
    np.testing.assert_allclose(found[smooth], here.derivative[smooth], atol=1e-7)
    terms = [1 - np.abs(2 * each.h - 1) ** beta for each in (there, back)]
    np.testing.assert_allclose(((terms[0] - terms[1]) / (2 * step))[smooth], gradient[smooth], atol=1e-6)


def test_the_regularizer_by_hand():
    # a weight half way costs 1, a decided one nothing
    assert adaround.regularizer(np.array([0.5, 0.0, 1.0, 0.75]), np.ones(4), 2.0)[0] == pytest.approx(1.75)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: adaround.checked_beta({"t_start": 0}, "q"), "q: beta: missing"),
        (lambda: adaround.checked_beta({**adaround.BETA, "target_val": 1.0}, "q"), "greater than 1"),
        (lambda: adaround.checked_beta(3, "q"), "a schedule is a mapping"),
        (lambda: adaround.checked_weight(-1, "q"), "from 0"),
        (lambda: adaround.checked_weight(True, "q"), "from 0"),
        (lambda: adaround.checked_weight(float("inf"), "q"), "from 0"),
    ],
)
def test_wrong_options_are_refused(call, told):
    with pytest.raises(InvalidArgumentError, match=told):
        call()


def test_any_schedule_is_one():
    cosine = {**adaround.BETA, "kind": "cosine"}
    assert isinstance(adaround.checked_beta(cosine, "q"), CosineAnnealingScheduler)
