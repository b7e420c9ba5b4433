"""Learned step size quantization; defined by `trainable_core.reference.lsq`."""

from __future__ import annotations

from mct_quantizers import QuantizationTarget, mark_quantizer

from trainable_core import enums
from trainable_core.enums import TrainingMethod
from trainable_core.reference import lsq
from trainable_torch import ops
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

    def rule(self, sharing: int, quant_max: int) -> ops.Lsq:
        """Return LSQ for as many elements as share a scale."""
        if self.quantization_config.target is enums.QuantizationTarget.Activation:
            sharing *= world_size() if self.ranks is None else self.ranks
        return ops.Lsq(lsq.gradient_scale(sharing, quant_max))


@mark_quantizer(QuantizationTarget.Weights, METHODS, TrainingMethod.LSQ)
class LsqWeightsQuantizer(LsqQuantizer):
    """LSQ for weights."""


@mark_quantizer(QuantizationTarget.Activation, METHODS, TrainingMethod.LSQ)
class LsqActivationQuantizer(LsqQuantizer):
    """LSQ for activations."""
