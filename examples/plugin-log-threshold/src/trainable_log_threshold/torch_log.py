# ruff: noqa: ARG002, D101, D102, FBT001 - signatures and meaning are those of the base class
"""LOG_THRESHOLD for PyTorch."""

from typing import Any

import torch
from mct_quantizers import QuantizationTarget, mark_quantizer
from torch import Tensor

from trainable_log_threshold.log import METHODS, Array, encode, surrogate
from trainable_torch import BasePytorchTrainableQuantizer, Grid, ops


class LogQuantizer(BasePytorchTrainableQuantizer):
    learns_grid = True
    grid_parameters = ("log2_threshold",)

    def encode_grid(self, numbers: dict[str, Array]) -> dict[str, Array]:
        return encode(numbers)

    def decode_grid(self, variables: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"threshold": ops.exp2(variables["log2_threshold"])}

    def fake_quantize(self, x: Tensor, grid: Grid, training: bool) -> Tensor:
        steps, (low, high) = grid.steps(x), grid.ends
        codes = steps.detach().round()
        snapped = codes.clamp(low, high) + 0.0  # the deployed kernels have no negative zero
        inside = (codes >= low) & (codes <= high)
        return ops.straight_through(snapped, torch.where(inside, steps, snapped)) * grid.scale

    def surrogate(self, x: Array, grid: Any, upstream: Array) -> Any:
        return surrogate(x, grid)


@mark_quantizer(QuantizationTarget.Weights, METHODS, "LOG_THRESHOLD")
class LogWeightsQuantizer(LogQuantizer): ...


@mark_quantizer(QuantizationTarget.Activation, METHODS, "LOG_THRESHOLD")
class LogActivationQuantizer(LogQuantizer): ...
