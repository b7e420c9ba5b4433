"""Annealing: exact at the ends, monotone between, clean in JSON."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainable_core.errors import InvalidArgumentError
from trainable_core.schedule import LinearAnnealingScheduler

STEPS = st.one_of(st.integers(0, 10**6), st.floats(0, 1e6))
VALUES = st.floats(-1e300, 1e300)
GOOD = {"t_start": 10, "t_end": 20, "initial_val": 1.0, "target_val": 0.0}


@st.composite
def schedulers(draw):
    start, end = sorted([draw(STEPS), draw(STEPS)])
    return LinearAnnealingScheduler(start, end if float(end) > float(start) else start + 1, draw(VALUES), draw(VALUES))


@pytest.mark.parametrize(
    ("t", "value"),
    [
        (-5, 1.0),
        (0, 1.0),
        (10, 1.0),
        (11, 0.9),
        (12.5, 0.75),
        (15, 0.5),
        (20, 0.0),
        (21, 0.0),
        (math.inf, 0.0),
        (-math.inf, 1.0),
    ],
)
def test_golden(t, value):
    result = LinearAnnealingScheduler(**GOOD)(t)
    assert type(result) is float
    assert result == value


def test_arrays_elementwise():
    scheduler = LinearAnnealingScheduler(0, 4, -1.0, 1.0)
    result = scheduler(np.array([[0, 1, 2], [3, 4, 5]]))
    assert result.dtype == np.float64
    np.testing.assert_array_equal(result, [[-1.0, -0.5, 0.0], [0.5, 1.0, 1.0]])
    assert scheduler(np.float32(1.0)) == scheduler(np.array(1)) == -0.5
    assert scheduler(np.zeros(0)).shape == (0,)


@settings(max_examples=200, deadline=None)
@given(schedulers(), st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_monotone_and_exact_at_both_ends(scheduler, fractions):
    start, end = float(scheduler.t_start), float(scheduler.t_end)
    inside = np.sort(start + (end - start) * np.array(fractions))
    near = [math.nextafter(end, -math.inf), end, math.nextafter(end, math.inf), end + 1e9]
    steps = np.sort(np.concatenate([[-1.0, start], inside, near]))
    values = scheduler(steps)
    direction = np.sign(scheduler.target_val - scheduler.initial_val)
    assert (np.diff(values) * direction >= 0).all()
    assert (values[steps <= start] == scheduler.initial_val).all()
    assert (values[steps >= end] == scheduler.target_val).all()
    assert [scheduler(step) for step in steps.tolist()] == values.tolist()


def test_rounding_does_not_lead_past_the_target():
    start, end, last = 0.5, 2.0**52 + 3, 2.0**52 + 2
    assert (last - start) / (end - start) == 1.0  # already, in float64
    overshoots = 0
    for initial, target in np.random.default_rng(0).lognormal(sigma=3, size=(500, 2)).tolist():
        low, high = sorted([initial, target])
        overshoots += not low <= initial + (target - initial) * 1.0 <= high
        assert low <= LinearAnnealingScheduler(start, end, initial, target)(last) <= high
    assert overshoots  # so the bounds are needed


def test_finished():
    scheduler = LinearAnnealingScheduler(**GOOD)
    assert [scheduler.finished(t) for t in (0, 10, 19.999, 20, 21)] == [False, False, False, True, True]
    assert scheduler.finished(np.int64(20)) is True


@settings(max_examples=100, deadline=None)
@given(schedulers())
def test_json_round_trip(scheduler):
    document = json.loads(json.dumps(scheduler.to_dict(), allow_nan=False))
    restored = LinearAnnealingScheduler.from_dict(document)
    assert restored == scheduler
    assert restored.to_dict() == scheduler.to_dict() == document


def test_numpy_fields_become_plain_numbers():
    scheduler = LinearAnnealingScheduler(np.int64(0), np.float32(2), np.float64(1), np.float16(0.5))
    assert scheduler == LinearAnnealingScheduler(0, 2.0, 1.0, 0.5)
    assert {key: type(value) for key, value in scheduler.to_dict().items()} == {
        "t_start": int,
        "t_end": float,
        "initial_val": float,
        "target_val": float,
    }


def test_frozen_and_hashable():
    scheduler = LinearAnnealingScheduler(**GOOD)
    with pytest.raises(AttributeError):
        scheduler.t_end = 30
    assert hash(scheduler) == hash(LinearAnnealingScheduler(**GOOD))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("t_start", -1),
        ("t_start", math.nan),
        ("t_start", True),
        ("t_start", "0"),
        ("t_start", None),
        ("t_start", 20),
        ("t_end", 10),
        ("t_end", 9),
        ("t_end", math.inf),
        ("t_end", 10**400),
        ("initial_val", math.nan),
        ("initial_val", math.inf),
        ("initial_val", 1j),
        ("target_val", -math.inf),
        ("target_val", "0.1"),
        ("target_val", np.zeros(2)),
    ],
)
def test_bad_fields_are_named(field, value):
    with pytest.raises(InvalidArgumentError, match=field):
        LinearAnnealingScheduler(**{**GOOD, field: value})


def test_steps_that_are_one_number_in_float64():
    with pytest.raises(InvalidArgumentError, match="t_end"):
        LinearAnnealingScheduler(2**60, 2**60 + 1, 1.0, 0.0)


def test_distance_beyond_float64():
    with pytest.raises(InvalidArgumentError, match="target_val"):
        LinearAnnealingScheduler(0, 1, -1e308, 1e308)


@pytest.mark.parametrize("t", [math.nan, [0.0, math.nan], "3", None, 1j, True])
def test_bad_steps(t):
    with pytest.raises(InvalidArgumentError, match="t must"):
        LinearAnnealingScheduler(**GOOD)(t)


@pytest.mark.parametrize(
    ("document", "facts"),
    [
        ({**GOOD, "t_stop": 3}, ["t_stop", "t_start"]),
        ({"t_start": 0, "t_end": 1}, ["initial_val", "target_val"]),
        ({**GOOD, "t_end": 10}, ["t_end"]),
    ],
)
def test_bad_documents(document, facts):
    with pytest.raises(InvalidArgumentError) as caught:
        LinearAnnealingScheduler.from_dict(document)
    assert all(fact in str(caught.value) for fact in facts)
