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
        start, end = float(self.t_start), float(self.t_end)
        initial, target = float(self.initial_val), float(self.target_val)
        # by a tensor: CUDA multiplies by the inverse of a plain number, which is another number
        fraction = (step.clamp(start, end) - start) / torch.full_like(step, end - start)
        line = (initial + (target - initial) * fraction).clamp(min(initial, target), max(initial, target))
        return torch.where(step >= end, target, torch.where(step <= start, initial, line))
