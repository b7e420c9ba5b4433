"""Look-up tables with fixed levels and a learned threshold; defined by `trainable_core.reference.table`."""

from __future__ import annotations

from trainable_core.reference import table
from trainable_keras.functions import Tensor
from trainable_keras.grid import Grid
from trainable_keras.quantizers.base import KerasQuantizer


class TableQuantizer(KerasQuantizer):
    """Base of the methods whose levels are fixed: a subclass says which they are, by `levels`."""

    def fake_quantize(self, x: Tensor, grid: Grid, training: bool) -> Tensor:  # noqa: ARG002, FBT001 - the base's signature
        """Return `x` on the levels."""
        f, levels, signed = self.functions, self.levels, self.signed
        scale, given, zeros = f.stop_gradient(grid.scale), f.stop_gradient(x), f.zeros_like(x)
        values = self.ops.snap_to_levels(given, f.hide_shape(scale), levels, signed=signed)
        steps, (first, last) = given / scale, table.edges(levels)
        inside = f.all_of(steps > first, steps < last)
        codes = f.round(f.where(inside, values / scale, zeros))
        end = f.where(steps >= last, zeros + levels[-1], f.where(steps <= first, zeros + levels[0], zeros))
        last_code = table.last_code(self.quantization_config.n_bits, signed=signed)
        constant = self.ops.gradient_scale(x, scale, last_code)  # that of `table.gradient_scale`
        d_scale = f.where(inside, codes - steps, end) * constant
        return self.ops.by_slopes(x, grid, f.where(inside, zeros + 1.0, zeros), d_scale, values=values)
