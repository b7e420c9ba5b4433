"""Learned step size quantization; defined by `trainable_core.reference.lsq`."""

from __future__ import annotations

from mct_quantizers import QuantizationTarget, mark_quantizer

from trainable_core.enums import TrainingMethod
from trainable_core.reference import lsq
from trainable_keras.keras2 import ops
from trainable_keras.keras2.engine import Tensor, replicas
from trainable_keras.keras2.grid import Grid
from trainable_keras.keras2.quantizers.base import BaseKerasTrainableQuantizer
from trainable_keras.keras2.quantizers.ste import METHODS


class LsqQuantizer(BaseKerasTrainableQuantizer):
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
            return ops.lsq_fake_quantize(x, grid)
        return ops.lsq_fake_quantize(x, grid, replicas() if self.ranks is None else self.ranks)


@mark_quantizer(QuantizationTarget.Weights, METHODS, TrainingMethod.LSQ)
class LsqWeightsQuantizer(LsqQuantizer):
    """LSQ for weights."""


@mark_quantizer(QuantizationTarget.Activation, METHODS, TrainingMethod.LSQ)
class LsqActivationQuantizer(LsqQuantizer):
    """LSQ for activations."""
