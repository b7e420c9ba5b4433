"""Straight-through estimator; defined by `trainable_core.reference.ste`."""

from __future__ import annotations

from trainable_core.reference import ste
from trainable_keras.functions import Tensor
from trainable_keras.grid import Grid
from trainable_keras.quantizers.base import KerasQuantizer


class SteQuantizer(KerasQuantizer):
    """Fixed grid, identity gradient inside the range; see `trainable_core.reference.ste`."""

    declaration = ste.METHOD

    def fake_quantize(self, x: Tensor, grid: Grid, training: bool) -> Tensor:  # noqa: ARG002, FBT001 - the base's signature
        """Return `x` on the grid."""
        return self.ops.ste_fake_quantize(x, grid)
