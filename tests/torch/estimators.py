"""Sound training methods of other papers, as an author of a plugin writes them from the documentation."""

from __future__ import annotations

import numpy as np
import torch
from mct_quantizers import QuantizationMethod, QuantizationTarget, mark_quantizer
from torch import Tensor

from trainable_core.reference.method import OwnVariable
from trainable_torch import BasePytorchTrainableQuantizer, Grid, ops

WEIGHTS = QuantizationTarget.Weights
SYMMETRIC, UNIFORM = QuantizationMethod.SYMMETRIC, QuantizationMethod.UNIFORM


def inside(steps: Tensor, grid: Grid) -> Tensor:
    """Return steps clipped to the grid's ends; gradients reach the zero point."""
    return steps.clamp(grid.quant_min - grid.zero_point, grid.quant_max - grid.zero_point)


def clipped(x, grid):
    """Return what `inside` gives, in NumPy."""
    return np.clip(x / grid.scale, grid.quant_min - grid.zero_point, grid.quant_max - grid.zero_point)


@mark_quantizer(WEIGHTS, [UNIFORM], "LSQ+")
class LsqPlus(BasePytorchTrainableQuantizer):
    """LSQ+ (Bhalgat et al., 2020): a step and an offset per channel are trained in the place of the range's ends."""

    learns_grid = True
    grid_parameters = ("step_size", "offset")

    def steps_between_the_ends(self) -> int:
        return 2**self.selected_width - 1

    def encode_grid(self, numbers):
        width = numbers["range_max"] - numbers["range_min"]
        return {"step_size": width / self.steps_between_the_ends(), "offset": numbers["range_min"]}

    def decode_grid(self, variables):
        step, offset = variables["step_size"], variables["offset"]
        return {"range_min": offset, "range_max": offset + step * self.steps_between_the_ends()}

    def fake_quantize(self, x, grid, training):
        steps = inside(grid.steps(x), grid)
        return ops.straight_through(steps.detach().round() + 0.0, steps) * grid.scale

    def surrogate(self, x, grid, upstream):
        error = np.rint(clipped(x, grid)) - clipped(x, grid)
        return lambda x, grid: (clipped(x, grid) + error) * grid.scale


@mark_quantizer(WEIGHTS, [SYMMETRIC, UNIFORM], "STOCHASTIC")
class Stochastic(BasePytorchTrainableQuantizer):
    """Stochastic rounding in training, for good; the nearest code is deployed."""

    learns_grid = True
    training_forward = "random"

    def fake_quantize(self, x, grid, training):
        steps = inside(grid.steps(x), grid)
        here = steps.detach()
        codes = (here + torch.rand_like(here)).floor() if training else here.round()
        low, high = grid.ends
        return ops.straight_through(codes.clamp(low, high) + 0.0, steps) * grid.scale

    def surrogate(self, x, grid, upstream, values):
        error = values / grid.scale - clipped(x, grid)
        return lambda x, grid: (clipped(x, grid) + error) * grid.scale


@mark_quantizer(WEIGHTS, [SYMMETRIC], "SQUASHED")
class DoReFa(BasePytorchTrainableQuantizer):
    """DoReFa (Zhou et al., 2016) on a symmetric grid: weights go through tanh, and the largest one to the threshold."""

    depends_on = "tensor"
    deploys_values = True

    def fake_quantize(self, x, grid, training):
        if not x.numel():
            return x.clone()
        bent = x.tanh()
        largest = bent.detach().abs().nan_to_num().max().clamp_min(torch.finfo(torch.float32).tiny)
        return ops.ste_fake_quantize(bent / largest * (-grid.quant_min * grid.scale.detach()), grid)


@mark_quantizer(WEIGHTS, [SYMMETRIC], "BLEND")
class Blend(BasePytorchTrainableQuantizer):
    """Part of each value stays float while it trains; how much is trained, for each channel."""

    own_variables = (OwnVariable("share", per_channel=True, initial=0.5),)
    training_forward = "soft"

    def share_for(self, x: Tensor) -> Tensor:
        return self.read_variable("share", x.dim())

    def fake_quantize(self, x, grid, training):
        steps = inside(grid.steps(x), grid)
        codes = steps.detach().round() + 0.0
        if not training:
            return ops.straight_through(codes, steps) * grid.scale
        return (codes + self.share_for(x) * (steps - codes)) * grid.scale

    def surrogate(self, x, grid, upstream):
        codes = np.rint(clipped(x, grid))
        return lambda x, grid, variables: (codes + variables["share"] * (clipped(x, grid) - codes)) * grid.scale


@mark_quantizer(WEIGHTS, [SYMMETRIC], "LOGARITHM")
class Logarithm(BasePytorchTrainableQuantizer):
    """The natural logarithm of the threshold is trained."""

    learns_grid = True
    grid_parameters = ("log_threshold",)

    def encode_grid(self, numbers):
        return {"log_threshold": np.log(numbers["threshold"])}

    def decode_grid(self, variables):
        return {"threshold": variables["log_threshold"].exp()}

    def fake_quantize(self, x, grid, training):
        steps = inside(grid.steps(x), grid)
        return ops.straight_through(steps.detach().round() + 0.0, steps) * grid.scale


@mark_quantizer(QuantizationTarget.Activation, [SYMMETRIC], "FOLLOWS")
class Follows(BasePytorchTrainableQuantizer):
    """The threshold follows the batches' largest magnitudes (Jacob et al., 2018), until it is frozen."""

    training_forward = "soft"
    depends_on = "tensor"

    def fake_quantize(self, x, grid, training):
        return ops.ste_fake_quantize(x, grid)

    def quantize(self, x, training):
        if training and not self.freeze_quant_params and x.numel():
            threshold = self.get_quantizer_variable("threshold")
            with torch.no_grad():
                largest = x.detach().float().abs().nan_to_num(posinf=0.0).max()
                threshold.copy_(torch.where(largest > 0, 0.9 * threshold + 0.1 * largest, threshold))
        return super().quantize(x, training)


SOUND = (LsqPlus, Stochastic, DoReFa, Blend, Logarithm, Follows)
