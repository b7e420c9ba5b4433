"""The rounding gradient as an option of a method; defined by `trainable_core.reference.rounding`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainable_core.backend.options import RoundingOptions
from trainable_core.reference import rounding as reference
from trainable_torch import ops
from trainable_torch.grid import Grid
from trainable_torch.quantizers.base import BasePytorchTrainableQuantizer


class RoundingQuantizer(RoundingOptions, BasePytorchTrainableQuantizer):
    """Base of the methods that let the user choose what passes back through rounding.

    Its arguments are those of `trainable_core.backend.options.RoundingOptions`.
    """

    def gradient_constant(self, sharing: int, quant_max: int) -> float:  # noqa: ARG002 - for those that learn
        """Return what the gradients of scale and zero point are multiplied by; 0 where they are not learned."""
        return 0.0

    def is_inside(self, steps: Tensor, low: Tensor | int, high: Tensor | int) -> Tensor:
        """Return where the gradient passes: inside the range, its ends included."""
        return (steps >= low) & (steps <= high)

    def fake_quantize(self, x: Tensor, grid: Grid, training: bool) -> Tensor:  # noqa: FBT001 - mctq's call
        """Return `x` on the grid; the straight-through estimator is a `rule`, the others give slopes."""
        if self.rounding.is_straight_through:
            return super().fake_quantize(x, grid, training)
        steps, (low, high) = grid.steps(x).detach(), grid.ends
        inside = self.is_inside(steps, low, high)
        at = torch.where(inside, steps, 0.0)
        codes = at.round()
        slope, by_sign = _slopes(at, codes, self.rounding, grid.quant_max - grid.quant_min)
        d_x = torch.where(inside, slope, 0.0)
        constant = self.gradient_constant(x.numel() // max(grid.scale.numel(), 1), grid.quant_max)
        if not self.learns_grid:
            return ops.by_slopes(x, grid, d_x, by_sign=None if by_sign is None else (by_sign, 0 * at))
        above, below = steps >= high, steps <= low
        edge = torch.where(above, high, torch.where(below, low, 0.0)).to(at.dtype)
        d_scale = torch.where(inside, codes - slope * at, edge) * constant
        d_zero = torch.where(above | below, -grid.scale.detach() * constant, 0.0)
        signed = None if by_sign is None else (by_sign, -by_sign * at * constant)
        return ops.by_slopes(x, grid, d_x, d_scale, d_zero, by_sign=signed)


def _slopes(at: Tensor, codes: Tensor, rounding: reference.Rounding, span: int) -> tuple[Tensor | float, Tensor | None]:
    """Return the slope, and what the sign of the upstream gradient is multiplied by to be added to it."""
    if rounding.name == reference.EWGS:
        return torch.ones_like(at), (at - codes) * (rounding.strength / span)
    if rounding.name == reference.FOURIER:
        wave = rounding.wave * (math.pi * (at - codes)).cos()
        return (1 - wave) / (1 + wave), None
    bend = (rounding.steepness * (at - at.floor() - 0.5)).tanh()
    return rounding.peak * (1 - bend.square()), None
