"""Straight-through estimator; defined by `trainable_core.reference.ste`."""

from __future__ import annotations

from mct_quantizers import QuantizationMethod, QuantizationTarget, mark_quantizer

from trainable_core.enums import TrainingMethod
from trainable_core.reference import ste
from trainable_keras.keras2 import ops
from trainable_keras.keras2.engine import Tensor
from trainable_keras.keras2.grid import Grid
from trainable_keras.keras2.quantizers.base import BaseKerasTrainableQuantizer

METHODS = [QuantizationMethod.SYMMETRIC, QuantizationMethod.POWER_OF_TWO, QuantizationMethod.UNIFORM]


class SteQuantizer(BaseKerasTrainableQuantizer):
    """Fixed grid, identity gradient inside the range; see `trainable_core.reference.ste`."""

    declaration = ste.METHOD

    def fake_quantize(self, x: Tensor, grid: Grid, training: bool) -> Tensor:  # noqa: ARG002, FBT001 - the base's signature
        """Return `x` on the grid."""
        return ops.ste_fake_quantize(x, grid)


@mark_quantizer(QuantizationTarget.Weights, METHODS, TrainingMethod.STE)
class SteWeightsQuantizer(SteQuantizer):
    """STE for weights."""


@mark_quantizer(QuantizationTarget.Activation, METHODS, TrainingMethod.STE)
class SteActivationQuantizer(SteQuantizer):
    """STE for activations."""
