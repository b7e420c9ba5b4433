"""Fake quantization on tensors: what a method's author calls.

`fake_quantize` snaps a tensor to a grid and brings gradients back by one of two rules, `Ste` or `Lsq`; `snap` is the
forward alone, the very formula that is deployed. See `trainable_torch.kernels.plain` for the formula.
"""

from __future__ import annotations

from torch import Tensor

from trainable_torch.grid import Grid
from trainable_torch.kernels import fake_quantize, snap
from trainable_torch.kernels.plain import Lsq, Rule, Ste

__all__ = ["Lsq", "Rule", "Ste", "fake_quantize", "lsq_fake_quantize", "snap", "ste_fake_quantize"]


def ste_fake_quantize(x: Tensor, grid: Grid) -> Tensor:
    """Return `x` snapped to the grid, gradient by `trainable_core.reference.ste`; float32."""
    return fake_quantize(x, grid, Ste())


def lsq_fake_quantize(x: Tensor, grid: Grid, gradient_scale: float) -> Tensor:
    """Return `x` snapped to the grid, gradients by `trainable_core.reference.lsq`; float32."""
    return fake_quantize(x, grid, Lsq(gradient_scale))
