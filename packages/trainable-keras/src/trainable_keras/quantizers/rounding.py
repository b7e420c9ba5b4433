"""The rounding gradient as an option of a method; defined by `trainable_core.reference.rounding`."""

from __future__ import annotations

import math
from typing import Any

from trainable_core.backend.options import RoundingOptions
from trainable_core.reference import rounding as reference
from trainable_keras.functions import Tensor
from trainable_keras.grid import Grid
from trainable_keras.quantizers.base import KerasQuantizer


class RoundingQuantizer(RoundingOptions, KerasQuantizer):
    """Base of the methods that let the user choose what passes back through rounding.

    Its arguments are those of `trainable_core.backend.options.RoundingOptions`.
    """

    def straight_through(self, x: Tensor, grid: Grid) -> Tensor:
        """Return `x` on the grid, with the method's gradient where rounding is straight-through."""
        raise NotImplementedError

    def gradient_constant(self, x: Tensor, grid: Grid) -> Any:  # noqa: ARG002 - for those that learn
        """Return what the gradients of scale and zero point are multiplied by; 0 where they are not learned."""
        return 0.0

    def is_inside(self, steps: Tensor, low: Any, high: Any) -> Tensor:
        """Return where the gradient passes: inside the range, its ends included."""
        return self.functions.all_of(steps >= low, steps <= high)

    def fake_quantize(self, x: Tensor, grid: Grid, training: bool) -> Tensor:  # noqa: ARG002, FBT001 - the base's signature
        """Return `x` on the grid."""
        if self.rounding.is_straight_through:
            return self.straight_through(x, grid)
        f, (low, high) = self.functions, grid.ends
        scale = f.stop_gradient(grid.scale)
        steps = f.steps_of(f.stop_gradient(x), scale, grid.quant_min, grid.quant_max, centered=grid.centered)
        inside, zeros = self.is_inside(steps, low, high), f.zeros_like(x)
        at = f.where(inside, steps, zeros)
        codes = self.ops.round_half_up(at)
        slope, by_sign = self._slopes(at, codes, grid.quant_max - grid.quant_min)
        d_x = f.where(inside, slope, zeros)
        if not self.learns_grid:
            return self.ops.by_slopes(x, grid, d_x, by_sign=None if by_sign is None else (by_sign, zeros))
        constant = self.gradient_constant(x, grid)
        above, below = steps >= high, steps <= low
        edge = f.where(above, zeros + high, f.where(below, zeros + low, zeros))
        d_scale = f.where(inside, codes - slope * at, edge) * constant
        d_zero = f.where(f.any_of(below, above), zeros - scale, zeros) * constant
        signed = None if by_sign is None else (by_sign, -(by_sign * at) * constant)
        return self.ops.by_slopes(x, grid, d_x, d_scale, d_zero, by_sign=signed)

    def _slopes(self, at: Tensor, codes: Tensor, span: int) -> tuple[Tensor, Tensor]:
        """Return the slope, and what the sign of the upstream gradient is multiplied by to be added to it, or None."""
        f, rounding = self.functions, self.rounding
        if rounding.name == reference.EWGS:
            return f.zeros_like(at) + 1.0, (at - codes) * (rounding.strength / span)
        if rounding.name == reference.FOURIER:
            wave = rounding.wave * f.cos(math.pi * (at - codes))
            return (1.0 - wave) / (1.0 + wave), None
        bend = f.tanh(rounding.steepness * (at - f.floor(at) - 0.5))
        return rounding.peak * (1.0 - bend * bend), None
