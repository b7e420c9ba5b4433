"""Annealing schedules on tensors; the numbers are those of `trainable_core.schedule`."""

from __future__ import annotations

import torch
from torch import Tensor

from trainable_core.schedule import LinearAnnealingScheduler


class PytorchLinearAnnealingScheduler(LinearAnnealingScheduler):
    """Linear annealing whose step may be a tensor, so that a compiled model needs no new graph for each step.

    Takes the arguments of `trainable_core.schedule.LinearAnnealingScheduler`. Called with a Python number it is that
    class; called with a tensor it returns a float64 tensor on the same device, the same numbers bit for bit.
    """

    def __call__(self, t: int | Tensor) -> float | Tensor:  # type: ignore[override]
        """Return the annealed value at step `t`."""
        if not isinstance(t, Tensor):
            return super().__call__(t)
        step = t.to(torch.float64)
        low, high = sorted((self.initial_val, self.target_val))
        factor = (step - self.t_start) / (self.t_end - self.t_start)
        value = self.initial_val + (self.target_val - self.initial_val) * factor
        value = torch.where(step <= self.t_start, self.initial_val, value.clamp(low, high))
        return torch.where(step >= self.t_end, self.target_val, value)
