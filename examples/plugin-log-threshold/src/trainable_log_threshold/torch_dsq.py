# ruff: noqa: D101, D102, FBT001 - signatures and meaning are those of the base class
"""DSQ for PyTorch."""

import torch
from mct_quantizers import QuantizationTarget, mark_quantizer
from torch import Tensor

from trainable_log_threshold import dsq
from trainable_torch import BasePytorchTrainableQuantizer, Grid, ops


class DsqQuantizer(dsq.Dsq, BasePytorchTrainableQuantizer):
    def alpha_for(self, ndim: int | None = None) -> Tensor:
        return self.read_variable("alpha", ndim).clamp(dsq.LOWEST, dsq.HIGHEST)

    def fake_quantize(self, x: Tensor, grid: Grid, training: bool) -> Tensor:
        alpha = self.alpha_for(x.dim())
        low, high = grid.quant_min - grid.zero_point, grid.quant_max - grid.zero_point
        steps = grid.steps(x).clamp(low, high)
        middle = steps.detach().floor() + 0.5
        soft = middle + ((2 / alpha - 1).log() * (steps - middle)).tanh() / (1 - alpha) / 2
        soft = torch.where((steps > low) & (steps < high), soft, steps)  # the ends of the range are its ends
        codes = steps.detach().round() + 0.0  # the deployed kernels have no negative zero
        values = self.until(self.schedule_end, soft.detach(), codes) if training else codes
        return ops.straight_through(values, soft) * grid.scale

    def regularization(self) -> Tensor:
        return self.weight_at(self.current_step).float() * self.alpha_for().mean()


@mark_quantizer(QuantizationTarget.Weights, dsq.METHODS, "DSQ")
class DsqWeightsQuantizer(DsqQuantizer): ...


@mark_quantizer(QuantizationTarget.Activation, dsq.METHODS, "DSQ")
class DsqActivationQuantizer(DsqQuantizer): ...
