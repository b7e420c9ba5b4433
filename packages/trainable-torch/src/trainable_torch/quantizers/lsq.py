"""Learned step size quantization; defined by `trainable_core.reference.lsq`."""

from __future__ import annotations

import functools

import torch
from mct_quantizers import QuantizationTarget, mark_quantizer

from trainable_core import enums
from trainable_core.enums import TrainingMethod
from trainable_core.reference import lsq
from trainable_torch import ops
from trainable_torch.quantizers.base import BasePytorchTrainableQuantizer
from trainable_torch.quantizers.ste import METHODS
from trainable_torch.ranks import has_group, world_size


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
            if self.ranks is not None:
                sharing *= self.ranks
            elif has_group():
                sharing *= world_size()
        if torch.compiler.is_compiling():  # which would trace through the cache
            return ops.Lsq(lsq.gradient_scale(sharing, quant_max))
        return _rule(sharing, quant_max)


@functools.lru_cache(maxsize=4096)
def _rule(sharing: int, quant_max: int) -> ops.Lsq:
    return ops.Lsq(lsq.gradient_scale(sharing, quant_max))


@mark_quantizer(QuantizationTarget.Weights, METHODS, TrainingMethod.LSQ)
class LsqWeightsQuantizer(LsqQuantizer):
    """LSQ for weights."""


@mark_quantizer(QuantizationTarget.Activation, METHODS, TrainingMethod.LSQ)
class LsqActivationQuantizer(LsqQuantizer):
    """LSQ for activations."""
