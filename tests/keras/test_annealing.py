"""Annealing on tensors: core's schedule, in float32 on Keras 3 and in float64 on Keras 2."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.keras.framework import KERAS_VERSION, integers, new_variable, numpy, only_tensorflow, tensor, tf
from trainable_core.schedule import LinearAnnealingScheduler
from trainable_keras import KerasLinearAnnealingScheduler

STEPS = st.integers(0, 2**24)  # every one of them is a float32 number
VALUES = st.floats(-(2.0**20), 2.0**20, width=32)
DTYPE, UNIT = {3: (np.float32, 2.0**-24), 2: (np.float64, 0.0)}[KERAS_VERSION]
"""The dtype of a schedule on tensors, and how far one operation in it may be from the operation of core."""


@st.composite
def schedules(draw: Any) -> tuple[KerasLinearAnnealingScheduler, LinearAnnealingScheduler]:
    start, end = sorted([draw(STEPS), draw(STEPS)])
    arguments = (start, end + 1, draw(VALUES), draw(VALUES))
    return KerasLinearAnnealingScheduler(*arguments), LinearAnnealingScheduler(*arguments)


def steps_around(schedule: LinearAnnealingScheduler, fractions: list[float]) -> np.ndarray:
    start, end = schedule.t_start, schedule.t_end
    inside = np.floor(start + (end - start) * np.array(fractions))
    return np.concatenate([[-1.0, 0.0, start], inside, [end, 2 * end]]).astype(np.float32)


@given(schedules(), st.lists(st.floats(0, 1), max_size=8))
def test_tensors_get_the_numbers_of_core_within_rounding(schedules: Any, fractions: list[float]) -> None:
    on_tensors, core = schedules
    steps = steps_around(core, fractions)
    expected = core(steps.astype(np.float64))
    values = numpy(on_tensors(tensor(steps)))
    assert values.dtype == DTYPE
    # Six roundings: step minus start, the inverse length, two products, one sum, and the bound; none is of a magnitude
    # above that of the two values and their difference. In float64 they are those of core.
    largest = 2 * max(abs(core.initial_val), abs(core.target_val)) + 2.0**-120
    assert (np.abs(values - expected) <= 6 * UNIT * largest).all()
    ends = (steps <= core.t_start) | (steps >= core.t_end)
    assert np.array_equal(values[ends], expected[ends].astype(DTYPE))


@only_tensorflow("the graph is one of tf.function")
def test_a_graph_gives_the_same_numbers_for_every_step_and_is_traced_once() -> None:
    schedule = KerasLinearAnnealingScheduler(t_start=3, t_end=17, initial_val=0.75, target_val=0.125)
    traces = []

    @tf.function
    def run(step: Any) -> Any:
        traces.append(step)
        return schedule(step)

    steps = range(25)
    core = LinearAnnealingScheduler(3, 17, 0.75, 0.125)
    # six roundings, as above, of numbers below 1
    assert max(abs(float(run(tf.constant(step))) - core(step)) for step in steps) <= 6 * UNIT
    assert len(traces) == 1


@given(schedules(), st.lists(st.floats(0, 1), max_size=4))
def test_plain_numbers_get_plain_numbers(schedules: Any, fractions: list[float]) -> None:
    on_tensors, core = schedules
    for step in steps_around(core, fractions).tolist():
        value = on_tensors(step)
        assert type(value) is float
        assert value == core(step)


@pytest.mark.parametrize("dtype", ["int32", "int64", "float32", "float16"])
def test_counters_of_any_dtype(dtype: str) -> None:
    schedule = KerasLinearAnnealingScheduler(t_start=10, t_end=20, initial_val=1.0, target_val=0.0)
    steps = integers([0, 10, 15, 20, 200], dtype)
    assert numpy(schedule(steps)).tolist() == [1.0, 1.0, 0.5, 0.0, 0.0]


def test_a_variable_is_a_step() -> None:
    schedule = KerasLinearAnnealingScheduler(t_start=10, t_end=20, initial_val=1.0, target_val=0.0)
    step = new_variable(15, "int32")
    assert float(numpy(schedule(step))) == 0.5


def test_it_is_a_schedule_of_core() -> None:
    schedule = KerasLinearAnnealingScheduler(t_start=10, t_end=20, initial_val=1.0, target_val=0.0)
    assert isinstance(schedule, LinearAnnealingScheduler)
    assert KerasLinearAnnealingScheduler.from_dict(schedule.to_dict()) == schedule
    assert copy.deepcopy(schedule) == schedule
    assert [schedule.finished(step) for step in (19, 20)] == [False, True]
