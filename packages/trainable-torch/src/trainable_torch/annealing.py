"""Annealing schedules on tensors; the numbers are those of `trainable_core.schedule`."""

from __future__ import annotations

import torch
from torch import Tensor

from trainable_core.schedule import AnnealingScheduler, LinearAnnealingScheduler


def value_at(schedule: AnnealingScheduler, t: Tensor) -> Tensor:
    """Return the value of any schedule at a step that is a tensor.

    Parameters
    ----------
    schedule : AnnealingScheduler
        The schedule.
    t : Tensor
        The step.

    Returns
    -------
    Tensor, float64, on the same device
        Of a straight line and a staircase the number that core gives, bit for bit. Cosine and exponential are those of
        PyTorch, which may differ from NumPy's by an ulp.
    """
    step = t.to(torch.float64)
    start, end = float(schedule.t_start), float(schedule.t_end)
    initial, target = float(schedule.initial_val), float(schedule.target_val)
    # by a tensor: CUDA multiplies by the inverse of a plain number, which is another number
    fraction = (step.clamp(start, end) - start) / torch.full_like(step, end - start)
    way = initial + (target - initial) * schedule.progress(fraction, torch)
    way = way.clamp(min(initial, target), max(initial, target))
    return torch.where(step >= end, target, torch.where(step <= start, initial, way))


class PytorchLinearAnnealingScheduler(LinearAnnealingScheduler):
    """Linear annealing whose step may be a tensor, so that a compiled model needs no new graph for each step.

    Takes the arguments of `trainable_core.schedule.LinearAnnealingScheduler`. Called with a Python number it is that
    class; called with a tensor it returns a float64 tensor on the same device, the same numbers bit for bit.
    """

    def __call__(self, t: int | Tensor) -> float | Tensor:  # type: ignore[override]
        """Return the annealed value at step `t`."""
        return value_at(self, t) if isinstance(t, Tensor) else super().__call__(t)
