"""Annealing schedules on tensors; the numbers are those of `trainable_core.schedule`."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from trainable_core.schedule import AnnealingScheduler, LinearAnnealingScheduler


def value_at(schedule: AnnealingScheduler, t: Any) -> Any:
    """Return the value of any schedule at a step that is a tensor or a variable.

    Returns
    -------
    Tensor, float64
        Of a straight line and a staircase the number that core gives, bit for bit, in eager mode and in a graph. Cosine
        and exponential are those of TensorFlow, which may differ from NumPy's by an ulp.
    """
    step = tf.cast(t, tf.float64)
    start, end = float(schedule.t_start), float(schedule.t_end)
    initial, target = float(schedule.initial_val), float(schedule.target_val)
    # by what looks like it depends on the step: a graph multiplies by the inverse of a constant, another number
    length = tf.where(step >= start, tf.constant(end - start, tf.float64), tf.constant(1.0, tf.float64))
    fraction = (tf.clip_by_value(step, start, end) - start) / length
    way = initial + (target - initial) * schedule.progress(fraction, tf)
    way = tf.clip_by_value(way, min(initial, target), max(initial, target))
    way = tf.where(step <= start, tf.constant(initial, tf.float64), way)
    return tf.where(step >= end, tf.constant(target, tf.float64), way)


class KerasLinearAnnealingScheduler(LinearAnnealingScheduler):
    """Linear annealing whose step may be a tensor or a variable, so that a graph needs no retracing for each step.

    Takes the arguments of `trainable_core.schedule.LinearAnnealingScheduler`. Called with a Python number or a NumPy
    array it is that class; called with a tensor it returns a float64 tensor, the same numbers bit for bit in eager mode
    and in a graph.
    """

    def __call__(self, t: Any) -> Any:
        """Return the annealed value at step `t`."""
        return value_at(self, t) if isinstance(t, tf.Variable | tf.Tensor) else super().__call__(t)
