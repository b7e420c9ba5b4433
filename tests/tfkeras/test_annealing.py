"""The schedule on tensors gives core's numbers, in eager mode and in a graph."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from trainable_core import LinearAnnealingScheduler
from trainable_keras.keras2 import KerasLinearAnnealingScheduler

ARGUMENTS = {"t_start": 3, "t_end": 17, "initial_val": 0.7, "target_val": 0.1}
numbers = st.floats(-100, 100)


@given(st.integers(0, 50), st.integers(1, 50), numbers, numbers, st.integers(0, 200))
def test_tensors_give_cores_numbers_bit_for_bit(start, length, initial, target, step):
    arguments = (start, start + length, initial, target)
    expected = LinearAnnealingScheduler(*arguments)(step)
    assert float(KerasLinearAnnealingScheduler(*arguments)(tf.constant(step))) == expected


def test_a_graph_gives_the_same_numbers_for_every_step():
    schedule = KerasLinearAnnealingScheduler(**ARGUMENTS)
    traces = []

    @tf.function
    def run(step):
        traces.append(step)
        return schedule(step)

    steps = range(25)
    found = [float(run(tf.constant(step))) for step in steps]
    assert found == [LinearAnnealingScheduler(**ARGUMENTS)(step) for step in steps]
    assert len(traces) == 1


def test_variables_numbers_and_arrays_are_taken():
    schedule = KerasLinearAnnealingScheduler(**ARGUMENTS)
    assert float(schedule(tf.Variable(10))) == schedule(10)
    assert np.array_equal(schedule([3, 17]), [0.7, 0.1])


@pytest.mark.parametrize("step", [3, 17])
def test_the_ends_are_exact(step):
    assert float(KerasLinearAnnealingScheduler(**ARGUMENTS)(tf.constant(step))) == {3: 0.7, 17: 0.1}[step]
