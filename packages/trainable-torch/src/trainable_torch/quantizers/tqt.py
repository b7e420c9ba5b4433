"""Trained quantization thresholds; defined by `trainable_core.reference.tqt`."""

from __future__ import annotations

from typing import Any

import torch
from mct_quantizers import QuantizationMethod, QuantizationTarget, mark_quantizer
from numpy.typing import NDArray
from torch import Tensor

from trainable_core.constants import THRESHOLD
from trainable_core.enums import TrainingMethod
from trainable_core.reference import tqt
from trainable_torch import ops
from trainable_torch.grid import Grid
from trainable_torch.quantizers.base import BasePytorchTrainableQuantizer

METHODS = [QuantizationMethod.POWER_OF_TWO, QuantizationMethod.SYMMETRIC]


class TqtQuantizer(BasePytorchTrainableQuantizer):
    """The logarithm of the threshold learns with the weights; see `trainable_core.reference.tqt`."""

    declaration = tqt.METHOD

    def encode_grid(self, numbers: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return the logarithm of the threshold."""
        return tqt.encode_grid(numbers)

    def decode_grid(self, variables: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the threshold."""
        return {THRESHOLD: ops.exp2(variables[tqt.LOG2_THRESHOLD])}

    def fake_quantize(self, x: Tensor, grid: Grid, training: bool) -> Tensor:  # noqa: ARG002, FBT001 - the base's signature
        """Return `x` on the grid; what is rounded to a code of it counts as inside."""
        steps, (low, high) = grid.steps(x).detach(), grid.ends
        codes = steps.round()
        inside = (codes >= low) & (codes <= high)
        edge = torch.where(codes > high, high, torch.where(codes < low, low, 0.0)).to(steps.dtype)
        return ops.by_slopes(x, grid, inside.to(steps.dtype), torch.where(inside, codes - steps, edge))


@mark_quantizer(QuantizationTarget.Weights, METHODS, TrainingMethod.TQT)
class TqtWeightsQuantizer(TqtQuantizer):
    """TQT for weights."""


@mark_quantizer(QuantizationTarget.Activation, METHODS, TrainingMethod.TQT)
class TqtActivationQuantizer(TqtQuantizer):
    """TQT for activations."""
