"""Look-up tables with fixed levels and a learned threshold; defined by `trainable_core.reference.table`."""

from __future__ import annotations

import torch
from mct_quantizers import QuantizationMethod
from torch import Tensor

from trainable_core.reference import table
from trainable_torch import ops
from trainable_torch.grid import Grid
from trainable_torch.quantizers.base import BasePytorchTrainableQuantizer

METHODS = [QuantizationMethod.LUT_POT_QUANTIZER, QuantizationMethod.LUT_SYM_QUANTIZER]
OF_ACTIVATIONS = [QuantizationMethod.LUT_POT_QUANTIZER]


class TableQuantizer(BasePytorchTrainableQuantizer):
    """Base of the methods whose levels are fixed: a subclass says which they are, by `levels`."""

    def fake_quantize(self, x: Tensor, grid: Grid, training: bool) -> Tensor:  # noqa: ARG002, FBT001 - the base's signature
        """Return `x` on the levels."""
        scale, levels, signed = grid.scale.detach(), self.levels, self.signed
        values = ops.snap_to_levels(x.detach(), scale, levels, signed=signed)
        steps, (first, last) = x.detach() / scale, table.edges(levels)
        inside = (steps > first) & (steps < last)
        codes = torch.where(inside, values / scale, 0.0).round()
        end = torch.where(steps >= last, float(levels[-1]), torch.where(steps <= first, float(levels[0]), 0.0))
        sharing = x.numel() // max(scale.numel(), 1)
        constant = table.gradient_scale(sharing, self.quantization_config.n_bits, signed=signed)
        d_scale = torch.where(inside, codes - steps, end) * constant
        return ops.by_slopes(x, grid, inside.to(x.dtype), d_scale, values=values)
