"""Oscillations by hand: what counts as one, when a code is frozen, and the term that dampens them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from trainable_core.qparams import QParams
from trainable_core.reference import affine, gradual
from trainable_core.reference.oscillation import Oscillations, codes, counted, dampening, frozen, held

GRID = QParams(np.float32(0.5), np.int32(0), -4, 3)
UNIFORM = QParams(np.float32(0.25), np.int32(3), 0, 15)


def seen(history, momentum=0.5):
    """Return the state after a weight of one element had these codes, one after the other."""
    state = Oscillations.none((1,))
    for code in history:
        state = counted(state, np.array([code], np.float32), momentum)
    return state


@pytest.mark.parametrize(
    ("history", "frequency"),
    [
        ([0, 0, 0], 0.0),
        ([0, 1, 2, 3], 0.0),  # always the same way
        ([0, 1, 0], 0.5),
        ([0, 1, 1, 1, 0], 0.5),  # however long it stays
        ([0, 1, 0, 1], 0.75),
        ([0, 1, 0, 0], 0.25),  # and is forgotten
        ([0, 2, 1, 0], 0.25),  # the first way back counts, the second goes on
        ([5, 4, 5], 0.5),
    ],
)
def test_a_change_back_is_an_oscillation(history, frequency):
    assert seen(history).frequency.tolist() == [frequency]


def test_the_first_codes_are_no_change():
    assert seen([7]).frequency.tolist() == [0.0]
    assert seen([7]).average.tolist() == [7.0]


def test_a_code_is_frozen_at_its_average_and_stays():
    state = frozen(seen([0, 1, 0, 1, 1]), threshold=0.3)  # averages: 0, 0.5, 0.25, 0.625, 0.8125
    assert state.frozen.tolist() == [1.0]
    later = counted(state, np.array([-3], np.float32), 0.5)
    assert later.code.tolist() == [1.0]
    assert frozen(later, 0.0).frozen.tolist() == [1.0]


def test_at_the_threshold_nothing_is_frozen():
    state = seen([0, 1, 0])
    assert np.isnan(frozen(state, 0.5).frozen).all()
    assert not np.isnan(frozen(state, np.nextafter(np.float32(0.5), np.float32(0))).frozen).any()


@pytest.mark.parametrize("grid", [GRID, UNIFORM])
def test_a_frozen_element_has_its_code_whatever_the_weight_and_the_scale_become(grid):
    x = np.array([0.9, -0.3, 0.1], np.float32)
    state = Oscillations.none((3,))
    state = counted(state, codes(x, grid), 0.5)
    state = Oscillations(**{**vars(state), "frozen": np.array([2, np.nan, -1], np.float32)})
    for scale in (grid.scale, grid.scale * np.float32(1.37)):
        now = QParams(scale, grid.zero_point, grid.quant_min, grid.quant_max)
        values = affine.fake_quantize(held(x + 1, now, state), now)
        assert codes(values, now)[[0, 2]].tolist() == [2.0, -1.0]
        assert values[1] == affine.fake_quantize((x + 1)[1:2], now)[0]


@given(hnp.arrays(np.float32, 5, elements=st.floats(-4, 4, width=32)), st.sampled_from([GRID, UNIFORM]))
def test_the_gradient_is_that_of_the_term_where_no_code_changes(x, grid):
    h = 2.0**-12
    there, back = (dampening(x + np.float32(step), grid, 0.75) for step in (h, -h))
    same = (codes(x + np.float32(h), grid) == codes(x - np.float32(h), grid)).all()
    low, high = affine.ends(grid, 1)
    ends = np.array([low, high], np.float32).reshape(-1) * grid.scale
    if same and (np.abs(x[:, None] - ends) > 2 * h).all():
        # a quadratic has exact differences; float32 rounds the inputs by up to 2**-22, at slopes below 4
        assert abs((there[0] - back[0]) / (2 * h) - dampening(x, grid, 0.75)[1].sum()) < 5 * 4 * 2.0**-22 / h


def test_dampening_by_hand():
    # distances -0.2, 0.1 and 0; outside, clipped and quantized values are equal
    term, gradient = dampening(np.array([0.3, -0.9, 9.0, -9.0]), GRID, 2.0)
    assert term == pytest.approx(2 * (0.04 + 0.01), rel=1e-6)
    assert gradient.tolist() == pytest.approx([-0.8, 0.4, 0.0, 0.0], rel=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("step", [0, 1, 12345])
def test_the_share_of_float_values_is_the_one_asked_for(share, step):
    x = np.zeros((64, 256), np.float32)
    found = (gradual.mixed(x, x + 1, share, step) == 0).mean()
    # of 2**14 independent draws, five standard deviations
    assert abs(found - share) <= 5 * 2.0**-7 * np.sqrt(share * (1 - share))


def test_draws_differ_between_steps_and_neighbours():
    one, other = gradual.draws((4096,), 5), gradual.draws((4096,), 6)
    correlations = [np.corrcoef(one, other)[0, 1], np.corrcoef(one[1:], one[:-1])[0, 1]]
    assert np.abs(correlations).max() < 5 / np.sqrt(4096)  # of independent numbers: five standard deviations
    assert one.tobytes() == gradual.draws((64, 64), 5).reshape(-1).tobytes()
