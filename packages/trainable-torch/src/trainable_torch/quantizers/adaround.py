"""Adaptive rounding; defined by `trainable_core.reference.adaround`."""

from __future__ import annotations

from typing import Any

import torch
from mct_quantizers import QuantizationTarget, mark_quantizer
from torch import Tensor

from trainable_core.backend.options import AdaroundOptions
from trainable_core.enums import TrainingMethod
from trainable_core.reference import adaround
from trainable_core.reference.adaround import GAMMA, ZETA
from trainable_torch import ops
from trainable_torch.quantizers.base import BasePytorchTrainableQuantizer
from trainable_torch.quantizers.ste import METHODS


class AdaroundQuantizer(AdaroundOptions, BasePytorchTrainableQuantizer):
    """Whether each weight is rounded up or down learns; see `trainable_core.reference.adaround`.

    Its arguments are those of `trainable_core.backend.options.AdaroundOptions`.

    Notes
    -----
    Weights and grid get no gradient. When a model is finalized, the rounded weights take the place of the float ones.
    """

    declaration = adaround.METHOD

    rounding: Tensor

    def roundings(self, steps: Tensor) -> Tensor:
        """Return how far each weight is rounded up, from its quotient by the scale."""
        fraction = torch.where(steps.isfinite(), steps - steps.floor(), 0.0)
        start = -torch.log((ZETA - GAMMA) / (fraction - GAMMA) - 1.0)
        h = (torch.sigmoid(self.rounding + start) * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)
        return torch.where(fraction > 0, h, 0.0)

    def quantize(self, x: Tensor, training: bool) -> Tensor:  # noqa: FBT001 - the base's signature
        """Return the soft values, or the rounded ones."""
        grid = self.grid(x.dim())
        scale = grid.scale.detach()
        steps = x.detach() / scale
        h = self.roundings(steps)
        up = (h.detach() >= 0.5).to(x.dtype)  # noqa: PLR2004 - half
        hard = ops.ste_fake_quantize((steps.floor() + up) * scale, grid).detach()
        hard = torch.where(x.isnan(), x, hard)  # in the graph, as every quantizer's output; with a gradient of zero
        if not training:
            return hard
        low, high = (end - grid.zero_point for end in (grid.quant_min, grid.quant_max))
        soft = torch.minimum(torch.maximum(steps.floor() + h, low), high) * scale
        return self.until(adaround.schedule_end(self.beta), torch.where(x.isnan(), x, soft), hard)

    def regularization_of(self, x: Tensor) -> Any:
        """Return the regularizer, while its schedule lasts."""
        other = super().regularization_of(x)
        x = self.laid_out(x)
        if not self.regularization_weight or not self.calibrated or self.is_switched_off:
            return other
        h = self.roundings(x.detach() / self.grid(x.dim()).scale.detach())
        beta: Any = self.annealed(self.beta)
        term = (1.0 - (2.0 * h - 1.0).abs() ** beta.to(torch.float32)).sum()
        step = self.current_step
        lasts = (step >= self.beta.t_start) & (step < self.beta.t_end)
        term = term * torch.where(lasts, self.regularization_weight, 0.0).to(torch.float32)
        return term if other is None else term + other


@mark_quantizer(QuantizationTarget.Weights, METHODS, TrainingMethod.ADAROUND)
class AdaroundWeightsQuantizer(AdaroundQuantizer):
    """Adaptive rounding for weights."""
