"""Parameterized clipping activation; defined by `trainable_core.reference.pact`."""

from __future__ import annotations

import torch
from mct_quantizers import QuantizationTarget, mark_quantizer
from torch import Tensor

from trainable_core.backend.options import PactOptions
from trainable_core.enums import TrainingMethod
from trainable_core.reference import pact
from trainable_torch import ops
from trainable_torch.grid import Grid
from trainable_torch.quantizers.base import BasePytorchTrainableQuantizer
from trainable_torch.quantizers.ste import METHODS


class PactQuantizer(PactOptions, BasePytorchTrainableQuantizer):
    """The clipping bound learns from what is beyond it; see `trainable_core.reference.pact`.

    Its arguments are those of `trainable_core.backend.options.PactOptions`.
    """

    declaration = pact.METHOD

    def fake_quantize(self, x: Tensor, grid: Grid, training: bool) -> Tensor:  # noqa: ARG002, FBT001 - the base's signature
        """Return `x` on the grid."""
        steps, (low, high) = grid.steps(x).detach(), grid.ends
        below, above, inside = steps < low, steps >= high, (steps >= low) & (steps < high)
        slope = torch.where(above, high, torch.where(below, low, 0.0)).to(steps.dtype)
        if self.calibrated_gradient:
            slope = torch.where(inside, steps.round() - steps, slope)
        d_zero = torch.where(below | above, -grid.scale.detach(), 0.0)
        return ops.by_slopes(x, grid, inside.to(steps.dtype), slope, d_zero)


@mark_quantizer(QuantizationTarget.Activation, METHODS, TrainingMethod.PACT)
class PactActivationQuantizer(PactQuantizer):
    """PACT for activations."""
