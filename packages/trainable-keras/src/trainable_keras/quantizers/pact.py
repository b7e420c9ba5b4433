"""Parameterized clipping activation; defined by `trainable_core.reference.pact`."""

from __future__ import annotations

from trainable_core.backend.options import PactOptions
from trainable_core.reference import pact
from trainable_keras.functions import Tensor
from trainable_keras.grid import Grid
from trainable_keras.quantizers.base import KerasQuantizer


class PactQuantizer(PactOptions, KerasQuantizer):
    """The clipping bound learns from what is beyond it; see `trainable_core.reference.pact`.

    Its arguments are those of `trainable_core.backend.options.PactOptions`.
    """

    declaration = pact.METHOD

    def fake_quantize(self, x: Tensor, grid: Grid, training: bool) -> Tensor:  # noqa: ARG002, FBT001 - the base's signature
        """Return `x` on the grid."""
        f, (low, high), scale = self.functions, grid.ends, self.functions.stop_gradient(grid.scale)
        steps = f.steps_of(f.stop_gradient(x), scale, grid.quant_min, grid.quant_max, centered=grid.centered)
        below, above, zeros = steps < low, steps >= high, f.zeros_like(x)
        inside = f.all_of(steps >= low, steps < high)
        slope = f.where(above, zeros + high, f.where(below, zeros + low, zeros))
        if self.calibrated_gradient:
            slope = f.where(inside, self.ops.round_half_up(steps) - steps, slope)
        d_zero = f.where(f.any_of(below, above), zeros - scale, zeros)
        return self.ops.by_slopes(x, grid, f.where(inside, zeros + 1.0, zeros), slope, d_zero)
