"""Parameterized clipping activation; defined by `trainable_core.reference.pact`."""

from __future__ import annotations

from typing import Any

import torch
from mct_quantizers import QuantizationTarget, mark_quantizer
from torch import Tensor

from trainable_core.config import TrainableQuantizerConfig
from trainable_core.enums import TrainingMethod
from trainable_core.reference import pact
from trainable_torch import ops
from trainable_torch.grid import Grid
from trainable_torch.quantizers.base import BasePytorchTrainableQuantizer
from trainable_torch.quantizers.ste import METHODS


class PactQuantizer(BasePytorchTrainableQuantizer):
    """The clipping bound learns from what is beyond it; see `trainable_core.reference.pact`.

    Parameters
    ----------
    quantization_config, freeze_quant_params
        As in the base class.
    calibrated_gradient : bool
        Whether the rounding error inside the range counts too.
    """

    declaration = pact.METHOD

    def __init__(
        self,
        quantization_config: TrainableQuantizerConfig,
        freeze_quant_params: bool = False,  # noqa: FBT001, FBT002 - the seed's signature
        calibrated_gradient: bool = False,  # noqa: FBT001, FBT002 - a recipe gives it by name
    ) -> None:
        super().__init__(quantization_config, freeze_quant_params)
        self.calibrated_gradient = pact.checked_option(calibrated_gradient, type(self).__name__)

    def get_arguments(self) -> dict[str, Any]:
        """Return the option."""
        return {"calibrated_gradient": self.calibrated_gradient}

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
