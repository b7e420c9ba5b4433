"""Annealing schedules on tensors; the numbers are those of `trainable_core.schedule`."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from trainable_core.schedule import LinearAnnealingScheduler


class KerasLinearAnnealingScheduler(LinearAnnealingScheduler):
    """Linear annealing whose step may be a tensor or a variable, so that a compiled model needs no new graph per step.

    Takes the arguments of `trainable_core.schedule.LinearAnnealingScheduler`. Called with a Python number or a NumPy
    array it is that class; called with a tensor it returns a float32 tensor, within two ulp of the same numbers (not
    every engine has float64), exact at both ends and beyond.
    """

    def __call__(self, t: Any) -> Any:
        """Return the annealed value at step `t`."""
        if not (isinstance(t, keras.Variable) or ops.is_tensor(t)):
            return super().__call__(t)
        step = ops.cast(t, "float32")
        low, high = sorted((float(self.initial_val), float(self.target_val)))
        start, end = float(self.t_start), float(self.t_end)
        fraction = (ops.minimum(ops.maximum(step, start), end) - start) * (1.0 / (end - start))
        line = self.initial_val + (self.target_val - self.initial_val) * fraction
        line = ops.minimum(ops.maximum(line, low), high)
        line = ops.where(step <= start, ops.cast(self.initial_val, "float32"), line)
        return ops.where(step >= end, ops.cast(self.target_val, "float32"), line)
