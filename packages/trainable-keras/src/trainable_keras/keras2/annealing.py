"""Annealing schedules on tensors; the numbers are those of `trainable_core.schedule`."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from trainable_core.schedule import LinearAnnealingScheduler


class KerasLinearAnnealingScheduler(LinearAnnealingScheduler):
    """Linear annealing whose step may be a tensor or a variable, so that a graph needs no retracing for each step.

    Takes the arguments of `trainable_core.schedule.LinearAnnealingScheduler`. Called with a Python number or a NumPy
    array it is that class; called with a tensor it returns a float64 tensor, the same numbers bit for bit in eager mode
    and in a graph.
    """

    def __call__(self, t: Any) -> Any:
        """Return the annealed value at step `t`."""
        if not isinstance(t, tf.Variable | tf.Tensor):
            return super().__call__(t)
        step = tf.cast(t, tf.float64)
        start, end = float(self.t_start), float(self.t_end)
        initial, target = float(self.initial_val), float(self.target_val)
        # by what looks like it depends on the step: a graph multiplies by the inverse of a constant, another number
        length = tf.where(step >= start, tf.constant(end - start, tf.float64), tf.constant(1.0, tf.float64))
        fraction = (tf.clip_by_value(step, start, end) - start) / length
        line = tf.clip_by_value(initial + (target - initial) * fraction, min(initial, target), max(initial, target))
        line = tf.where(step <= start, tf.constant(initial, tf.float64), line)
        return tf.where(step >= end, tf.constant(target, tf.float64), line)
