"""Straight-through estimator; defined by `trainable_core.reference.ste`."""

from __future__ import annotations

from mct_quantizers import QuantizationMethod, QuantizationTarget, mark_quantizer
from torch import Tensor

from trainable_core.enums import TrainingMethod
from trainable_core.reference import ste
from trainable_torch import ops
from trainable_torch.grid import Grid
from trainable_torch.quantizers.base import BasePytorchTrainableQuantizer

METHODS = [QuantizationMethod.SYMMETRIC, QuantizationMethod.POWER_OF_TWO, QuantizationMethod.UNIFORM]


class SteQuantizer(BasePytorchTrainableQuantizer):
    """Fixed grid, identity gradient inside the range; see `trainable_core.reference.ste`."""

    declaration = ste.METHOD

    def rule(self, x: Tensor, grid: Grid) -> ops.Ste:  # noqa: ARG002 - the base's signature
        """Return the straight-through estimator on the grid."""
        return ops.Ste(grid)

    def fake_quantize(self, x: Tensor, grid: Grid, training: bool) -> Tensor:  # noqa: ARG002, FBT001 - the base's signature
        """Return `x` on the grid."""
        return ops.fake_quantize(x, self.rule(x, grid))


@mark_quantizer(QuantizationTarget.Weights, METHODS, TrainingMethod.STE)
class SteWeightsQuantizer(SteQuantizer):
    """STE for weights."""


@mark_quantizer(QuantizationTarget.Activation, METHODS, TrainingMethod.STE)
class SteActivationQuantizer(SteQuantizer):
    """STE for activations."""
