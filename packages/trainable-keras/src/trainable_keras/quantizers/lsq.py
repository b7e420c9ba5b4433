"""Learned step size quantization; defined by `trainable_core.reference.lsq`."""

from __future__ import annotations

from typing import Any

from trainable_core.reference import lsq
from trainable_keras.functions import Tensor
from trainable_keras.grid import Grid
from trainable_keras.quantizers.rounding import RoundingQuantizer


class LsqQuantizer(RoundingQuantizer):
    """Thresholds and ranges learn with the weights; see `trainable_core.reference.lsq`.

    Notes
    -----
    An activation's scale is shared by the batches of all replicas of a ``tf.distribute`` strategy, so N counts them
    all, taking every replica's batch to be as large as this one's: they learn the thresholds that one device learns
    from the whole batch.
    """

    declaration = lsq.METHOD

    ranks: int | None = None
    """Number of replicas that share a batch; by default all of the strategy. Set it where some see the same data."""

    def straight_through(self, x: Tensor, grid: Grid) -> Tensor:
        """Return `x` on the grid."""
        return self.ops.lsq_fake_quantize(x, grid, self._replicas())

    def gradient_constant(self, x: Tensor, grid: Grid) -> Any:
        """Return LSQ's gradient scale."""
        return self.ops.gradient_scale(x, grid.scale, grid.quant_max, self._replicas())

    def is_inside(self, steps: Tensor, low: Any, high: Any) -> Tensor:
        """Return where the gradient passes: strictly inside the range."""
        return self.functions.all_of(steps > low, steps < high)

    def _replicas(self) -> int:
        """Return how many batches like this one share the grid."""
        if not self.activation_quantization():
            return 1
        return self.functions.replicas() if self.ranks is None else self.ranks
