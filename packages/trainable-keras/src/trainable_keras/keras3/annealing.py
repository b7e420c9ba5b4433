"""Annealing schedules on tensors; the numbers are those of `trainable_core.schedule`."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from trainable_core.schedule import AnnealingScheduler, LinearAnnealingScheduler


def value_at(schedule: AnnealingScheduler, t: Any) -> Any:
    """Return the value of any schedule at a step that is a tensor or a variable.

    Returns
    -------
    Tensor, float32
        Within a few ulp of core's number (not every engine has float64), exact at both ends and beyond.
    """
    step = ops.cast(t, "float32")
    low, high = sorted((float(schedule.initial_val), float(schedule.target_val)))
    start, end = float(schedule.t_start), float(schedule.t_end)
    fraction = (ops.minimum(ops.maximum(step, start), end) - start) * (1.0 / (end - start))
    way = schedule.initial_val + (schedule.target_val - schedule.initial_val) * schedule.progress(fraction, ops)
    way = ops.minimum(ops.maximum(way, low), high)
    way = ops.where(step <= start, ops.cast(schedule.initial_val, "float32"), way)
    return ops.where(step >= end, ops.cast(schedule.target_val, "float32"), way)


class KerasLinearAnnealingScheduler(LinearAnnealingScheduler):
    """Linear annealing whose step may be a tensor or a variable, so that a compiled model needs no new graph per step.

    Takes the arguments of `trainable_core.schedule.LinearAnnealingScheduler`. Called with a Python number or a NumPy
    array it is that class; called with a tensor it returns a float32 tensor, within two ulp of the same numbers (not
    every engine has float64), exact at both ends and beyond.
    """

    def __call__(self, t: Any) -> Any:
        """Return the annealed value at step `t`."""
        return value_at(self, t) if isinstance(t, keras.Variable) or ops.is_tensor(t) else super().__call__(t)
