"""DoReFa-Net's weights; defined by `trainable_core.reference.dorefa`."""

from __future__ import annotations

import torch
from mct_quantizers import QuantizationMethod, QuantizationTarget, mark_quantizer
from torch import Tensor

from trainable_core.enums import TrainingMethod
from trainable_core.reference import dorefa
from trainable_torch import ops
from trainable_torch.grid import Grid
from trainable_torch.quantizers.base import BasePytorchTrainableQuantizer

METHODS = [QuantizationMethod.SYMMETRIC, QuantizationMethod.POWER_OF_TWO]


class DorefaQuantizer(BasePytorchTrainableQuantizer):
    """Weights are squashed into the range before they are rounded; see `trainable_core.reference.dorefa`."""

    declaration = dorefa.METHOD

    def fake_quantize(self, x: Tensor, grid: Grid, training: bool) -> Tensor:  # noqa: ARG002, FBT001 - the base's signature
        """Return the squashed weights on the grid."""
        scale, steps = grid.scale.detach(), float(-grid.quant_min)
        tangent = x.detach().tanh()
        axis = self.quantization_config.channels_axis
        others = [each for each in range(x.dim()) if axis is None or each != axis % x.dim()]
        if not x.numel():
            return ops.by_slopes(x, grid, tangent)  # there is no maximum
        largest = tangent.abs().amax(others, keepdim=True) if others else tangent.abs()
        largest = torch.where(largest == 0, 1.0, largest.clamp_min(dorefa.LEAST))
        low, high = grid.ends
        snapped = ops.snap(tangent / largest * steps * scale, scale, low, high)
        return ops.straight_through(snapped, x * (scale * steps * (1 - tangent.square()) / largest))


@mark_quantizer(QuantizationTarget.Weights, METHODS, TrainingMethod.DOREFA)
class DorefaWeightsQuantizer(DorefaQuantizer):
    """DoReFa for weights."""
