"""Broken PyTorch quantizers to the levels of a look-up table: the docstring says what."""

from __future__ import annotations

import torch
from mct_quantizers import QuantizationMethod, QuantizationTarget, mark_quantizer

from tests.planted.defect import planted
from trainable_core.reference import table
from trainable_torch import ops
from trainable_torch.quantizers.apot import ApotQuantizer

SYMMETRIC_TABLE = QuantizationMethod.LUT_SYM_QUANTIZER


def broken(caught_by: str, method: QuantizationMethod = SYMMETRIC_TABLE, target=QuantizationTarget.Weights):
    """Mark a class and plant it."""

    def mark(cls):
        made = mark_quantizer(target, [method], "APOT")(cls)
        return planted("torch", caught_by, 2)(made)

    return mark


class Table(ApotQuantizer):
    """APoT as the library has it, in parts that can be broken."""

    def nearest(self, x, grid):
        return ops.snap_to_levels(x, grid.scale.detach(), self.levels)

    def edges(self):
        return table.edges(self.levels)

    def error(self, codes, steps):
        return codes - steps

    def fake_quantize(self, x, grid, training):
        scale, levels = grid.scale.detach(), self.levels
        values = self.nearest(x.detach(), grid)
        steps, (first, last) = x.detach() / scale, self.edges()
        inside = (steps > first) & (steps < last)
        codes = torch.where(inside, values / scale, 0.0).round()
        end = torch.where(steps >= last, float(levels[-1]), torch.where(steps <= first, float(levels[0]), 0.0))
        constant = table.gradient_scale(x.numel() // max(scale.numel(), 1), self.quantization_config.n_bits)
        slope = torch.where(inside, self.error(codes, steps), end) * constant
        return ops.by_slopes(x, grid, inside.to(x.dtype), slope, values=values)


@mark_quantizer(QuantizationTarget.Weights, [SYMMETRIC_TABLE], "APOT")
class SoundTable(Table):
    """No mistake."""


@broken("on_grid")
class EveryCodeExists(Table):
    """Values are rounded to whole codes, as on a grid without holes."""

    def nearest(self, x, grid):
        scale = grid.scale.detach()
        return torch.clamp((x / scale).round(), self.levels[0], self.levels[-1]) * scale + 0.0


@broken("level_count")
class OutermostLevelsUnused(Table):
    """The two outermost levels are never used."""

    def nearest(self, x, grid):
        return ops.snap_to_levels(x, grid.scale.detach(), self.levels[1:-1])


@broken("level_count", QuantizationMethod.LUT_POT_QUANTIZER, QuantizationTarget.Activation)
class SignForgotten(Table):
    """Activations without a sign are clipped to the codes of a table that has one."""


@broken("tie_rule")
class HigherOfTwoLevels(Table):
    """Half way between two levels the higher one is taken, where mctq takes the lower one."""

    def nearest(self, x, grid):
        return -ops.snap_to_levels(-x, grid.scale.detach(), self.levels) + 0.0


@broken("tie_rule")
class NearestPowerOfTwo(Table):
    """Levels are compared by the logarithm of their magnitudes, and the deployed kernel compares distances."""

    def nearest(self, x, grid):
        scale = grid.scale.detach()
        at = x / scale
        levels = torch.tensor(self.levels, dtype=x.dtype)
        distance = (at.abs().clamp_min(1.0).log2()[..., None] - levels.abs().clamp_min(1.0).log2()).abs()
        distance = torch.where(levels * at.sign()[..., None] < 0, torch.inf, distance)
        found = levels[distance.argmin(dim=-1)] * scale
        return torch.where(x.isnan(), x, found)


@broken("input_gradient")
class PassesEverywhere(Table):
    """The gradient passes beyond the edges of the table."""

    def edges(self):
        return -1000.0, 1000.0


@broken("gradient_at_ends")
class EdgesIncluded(Table):
    """Exactly at an edge of the table the gradient passes."""

    def edges(self):
        first, last = super().edges()
        return first - 2.0**-16, last + 2.0**-16


@broken("variable_gradients")
class InsideOnly(Table):
    """Inside, the threshold gets the gradient of the level alone, without the input that is subtracted."""

    def error(self, codes, steps):
        return codes


@broken("channels_axis")
class LevelsOfTheFirstAxis(Table):
    """Each channel's scale is looked up along the first axis."""

    def nearest(self, x, grid):
        scale = grid.scale.detach().reshape(-1)
        axis = self.quantization_config.channels_axis
        if axis is None or x.dim() == 0 or x.shape[0] != scale.numel():
            return super().nearest(x, grid)
        return ops.snap_to_levels(x, scale.reshape(-1, *[1] * (x.dim() - 1)), self.levels)
