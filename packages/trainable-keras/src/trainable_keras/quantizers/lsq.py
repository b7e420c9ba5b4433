"""Learned step size quantization; defined by `trainable_core.reference.lsq`."""

from __future__ import annotations

from trainable_core.reference import lsq
from trainable_keras.functions import Tensor
from trainable_keras.grid import Grid
from trainable_keras.quantizers.base import KerasQuantizer


class LsqQuantizer(KerasQuantizer):
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

    def fake_quantize(self, x: Tensor, grid: Grid, training: bool) -> Tensor:  # noqa: ARG002, FBT001 - the base's signature
        """Return `x` on the grid."""
        if not self.activation_quantization():
            return self.ops.lsq_fake_quantize(x, grid)
        return self.ops.lsq_fake_quantize(x, grid, self.functions.replicas() if self.ranks is None else self.ranks)
