"""Learned step size quantization; defined by `trainable_core.reference.lsq`."""

from __future__ import annotations

import functools

import torch
from mct_quantizers import QuantizationTarget, mark_quantizer
from torch import Tensor

from trainable_core import enums
from trainable_core.enums import TrainingMethod
from trainable_core.reference import lsq
from trainable_torch import ops
from trainable_torch.quantizers.rounding import RoundingQuantizer
from trainable_torch.quantizers.ste import METHODS
from trainable_torch.ranks import has_group, world_size


class LsqQuantizer(RoundingQuantizer):
    """Thresholds and ranges learn with the weights; see `trainable_core.reference.lsq`.

    Notes
    -----
    An activation's scale is shared by the batches of all ranks, so N counts them all, taking every rank's batch to be
    as large as this one's: a job of many processes learns the thresholds that one process learns from the whole batch.
    """

    declaration = lsq.METHOD

    ranks: int | None = None
    """Number of ranks that share a batch; by default all of the process group. Set it where some see the same data."""

    def rule(self, sharing: int, quant_max: int) -> ops.Lsq | None:
        """Return LSQ for as many elements as share a scale, where rounding is straight-through."""
        if not self.rounding.is_straight_through:
            return None
        if torch.compiler.is_compiling():  # which would trace through the cache
            return ops.Lsq(self.gradient_constant(sharing, quant_max))
        return _rule(self._counted(sharing), quant_max)

    def gradient_constant(self, sharing: int, quant_max: int) -> float:
        """Return LSQ's gradient scale."""
        return lsq.gradient_scale(self._counted(sharing), quant_max)

    def is_inside(self, steps: Tensor, low: Tensor | int, high: Tensor | int) -> Tensor:
        """Return where the gradient passes: strictly inside the range."""
        return (steps > low) & (steps < high)

    def _counted(self, sharing: int) -> int:
        """Return how many elements share a scale over all ranks."""
        if self.quantization_config.target is enums.QuantizationTarget.Activation:
            if self.ranks is not None:
                sharing *= self.ranks
            elif has_group():
                sharing *= world_size()
        return sharing


@functools.lru_cache(maxsize=4096)
def _rule(sharing: int, quant_max: int) -> ops.Lsq:
    return ops.Lsq(lsq.gradient_scale(sharing, quant_max))


@mark_quantizer(QuantizationTarget.Weights, METHODS, TrainingMethod.LSQ)
class LsqWeightsQuantizer(LsqQuantizer):
    """LSQ for weights."""


@mark_quantizer(QuantizationTarget.Activation, METHODS, TrainingMethod.LSQ)
class LsqActivationQuantizer(LsqQuantizer):
    """LSQ for activations."""
