# ruff: noqa: ARG002, D102, FBT001, FBT002 - signatures and meaning are those of the base class
"""EWGS for PyTorch."""

from typing import Any

import torch
from mct_quantizers import QuantizationMethod, QuantizationTarget, mark_quantizer
from numpy.typing import NDArray
from torch import Tensor

from trainable_ewgs.surrogate import Surrogate, checked, ewgs
from trainable_torch import BasePytorchTrainableQuantizer, Grid

METHODS = [QuantizationMethod[name] for name in ("SYMMETRIC", "POWER_OF_TWO", "UNIFORM")]


class Round(torch.autograd.Function):
    """Rounding, with equation 4 as its gradient."""

    @staticmethod
    def forward(ctx: Any, steps: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward((steps - steps.round()) * factor)
        return steps.round() + 0.0  # the deployed kernels have no negative zero

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream * (1 + upstream.sign() * ctx.saved_tensors[0]), None


class EwgsQuantizer(BasePytorchTrainableQuantizer):
    """Element-wise gradient scaling; `delta` 0 is the straight-through estimator."""

    learns_grid = True
    conformance_arguments = ({"delta": 0.5},)

    def __init__(self, quantization_config: Any, freeze_quant_params: bool = False, delta: float = 1e-3) -> None:
        super().__init__(quantization_config, freeze_quant_params)
        self.delta = checked(delta)

    def get_arguments(self) -> dict[str, float]:
        return {"delta": self.delta}

    def fake_quantize(self, x: Tensor, grid: Grid, training: bool) -> Tensor:
        low, high = grid.quant_min - grid.zero_point, grid.quant_max - grid.zero_point
        steps = grid.steps(x).clamp(low, high)
        return Round.apply(steps, self.delta / (grid.quant_max - grid.quant_min)) * grid.scale

    def surrogate(self, x: NDArray[Any], grid: Any, upstream: NDArray[Any]) -> Surrogate:
        return ewgs(x, grid, upstream, self.delta)


@mark_quantizer(QuantizationTarget.Weights, METHODS, "EWGS")
class EwgsWeightsQuantizer(EwgsQuantizer):
    """EWGS for weights."""


@mark_quantizer(QuantizationTarget.Activation, METHODS, "EWGS")
class EwgsActivationQuantizer(EwgsQuantizer):
    """EWGS for activations."""
