"""Straight-through estimator; defined by `trainable_core.reference.ste`."""

from __future__ import annotations

from mct_quantizers import QuantizationMethod, QuantizationTarget, mark_quantizer

from trainable_core.enums import TrainingMethod
from trainable_core.reference import ste
from trainable_torch import ops
from trainable_torch.quantizers.rounding import RoundingQuantizer

METHODS = [QuantizationMethod.SYMMETRIC, QuantizationMethod.POWER_OF_TWO, QuantizationMethod.UNIFORM]

_STE = ops.Ste()


class SteQuantizer(RoundingQuantizer):
    """Fixed grid, identity gradient inside the range; see `trainable_core.reference.ste`."""

    declaration = ste.METHOD

    def rule(self, sharing: int, quant_max: int) -> ops.Ste | None:  # noqa: ARG002 - the base's signature
        """Return the straight-through estimator, where that is the rounding gradient."""
        return _STE if self.rounding.is_straight_through else None


@mark_quantizer(QuantizationTarget.Weights, METHODS, TrainingMethod.STE)
class SteWeightsQuantizer(SteQuantizer):
    """STE for weights."""


@mark_quantizer(QuantizationTarget.Activation, METHODS, TrainingMethod.STE)
class SteActivationQuantizer(SteQuantizer):
    """STE for activations."""
