"""Learned step size quantization; defined by `trainable_core.reference.lsq`."""

from __future__ import annotations

from mct_quantizers import QuantizationTarget, mark_quantizer

from trainable_core.enums import TrainingMethod
from trainable_tfkeras import ops
from trainable_tfkeras.engine import Tensor
from trainable_tfkeras.grid import Grid
from trainable_tfkeras.quantizers.base import BaseKerasTrainableQuantizer
from trainable_tfkeras.quantizers.ste import METHODS


class LsqQuantizer(BaseKerasTrainableQuantizer):
    """Thresholds and ranges learn with the weights; see `trainable_core.reference.lsq`."""

    learns_grid = True

    def fake_quantize(self, x: Tensor, grid: Grid, training: bool) -> Tensor:  # noqa: ARG002, FBT001 - the base's signature
        """Return `x` on the grid."""
        return ops.lsq_fake_quantize(x, grid)


@mark_quantizer(QuantizationTarget.Weights, METHODS, TrainingMethod.LSQ)
class LsqWeightsQuantizer(LsqQuantizer):
    """LSQ for weights."""


@mark_quantizer(QuantizationTarget.Activation, METHODS, TrainingMethod.LSQ)
class LsqActivationQuantizer(LsqQuantizer):
    """LSQ for activations."""
