"""Learned step size quantization; defined by `trainable_core.reference.lsq`."""

from __future__ import annotations

from mct_quantizers import QuantizationTarget, mark_quantizer
from torch import Tensor

from trainable_core.enums import TrainingMethod
from trainable_core.reference import lsq
from trainable_torch import ops
from trainable_torch.grid import Grid
from trainable_torch.quantizers.base import BasePytorchTrainableQuantizer
from trainable_torch.quantizers.ste import METHODS
from trainable_torch.ranks import world_size


class LsqQuantizer(BasePytorchTrainableQuantizer):
    """Thresholds and ranges learn with the weights; see `trainable_core.reference.lsq`.

    Notes
    -----
    An activation's scale is shared by the batches of all ranks, so N counts them all, taking every rank's batch to be
    as large as this one's: a job of many processes learns the thresholds that one process learns from the whole batch.
    """

    declaration = lsq.METHOD

    ranks: int | None = None
    """Number of ranks that share a batch; by default all of the process group. Set it where some see the same data."""

    def rule(self, x: Tensor, grid: Grid) -> ops.Lsq:
        """Return LSQ on the grid, for as many elements as share a scale."""
        sharing = x.numel() // max(grid.leaves[0].numel(), 1)
        if self.activation_quantization():
            sharing *= world_size() if self.ranks is None else self.ranks
        return ops.Lsq(grid, lsq.gradient_scale(sharing, grid.quant_max))

    def fake_quantize(self, x: Tensor, grid: Grid, training: bool) -> Tensor:  # noqa: ARG002, FBT001 - the base's signature
        """Return `x` on the grid."""
        return ops.fake_quantize(x, self.rule(x, grid))


@mark_quantizer(QuantizationTarget.Weights, METHODS, TrainingMethod.LSQ)
class LsqWeightsQuantizer(LsqQuantizer):
    """LSQ for weights."""


@mark_quantizer(QuantizationTarget.Activation, METHODS, TrainingMethod.LSQ)
class LsqActivationQuantizer(LsqQuantizer):
    """LSQ for activations."""
