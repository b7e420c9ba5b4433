"""Straight-through estimator; defined by `trainable_core.reference.ste`."""

from __future__ import annotations

from trainable_core.reference import ste
from trainable_keras.functions import Tensor
from trainable_keras.grid import Grid
from trainable_keras.quantizers.rounding import RoundingQuantizer


class SteQuantizer(RoundingQuantizer):
    """Fixed grid, identity gradient inside the range; see `trainable_core.reference.ste`."""

    declaration = ste.METHOD

    def straight_through(self, x: Tensor, grid: Grid) -> Tensor:
        """Return `x` on the grid."""
        return self.ops.ste_fake_quantize(x, grid)
