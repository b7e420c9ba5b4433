"""Broken PyTorch quantizers with a variable of their own, and without a surrogate that would say what is right."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.planted.torch_defects import broken
from trainable_core.enums import VariableGroup
from trainable_core.reference.method import OwnVariable
from trainable_torch import BasePytorchTrainableQuantizer, ops


class Sound(BasePytorchTrainableQuantizer):
    """Part of each rounding error stays in the values while they train; how much is trained, for each channel."""

    own_variables = (OwnVariable("share", per_channel=True, initial=0.5),)
    training_forward = "soft"

    def share_for(self, x: Tensor) -> Tensor:
        return self.read_variable("share", x.dim())

    def fake_quantize(self, x, grid, training):
        low, high = grid.ends
        steps = grid.steps(x).clamp(low, high)
        codes = steps.detach().round() + 0.0
        mixed = codes + self.share_for(x) * (steps - codes) if training else ops.straight_through(codes, steps)
        return mixed * grid.scale


@broken("declared_variables")
class InAnotherGroup(Sound):
    """A variable is declared for the weights' group, and added to that of the thresholds."""

    own_variables = (OwnVariable("share", group=VariableGroup.WEIGHTS),)

    def add_variables(self):
        self.add_quantizer_variable("share", torch.tensor(0.5), trained=True)


@broken("gradients_arrive")
class DetachedVariable(Sound):
    """The method's own variable is detached, and never learns."""

    def share_for(self, x):
        return super().share_for(x).detach()


class SumOfChannels(torch.autograd.Function):
    """The identity, with one gradient for all channels."""

    @staticmethod
    def forward(ctx, share):
        return share.clone()

    @staticmethod
    def backward(ctx, upstream):
        return upstream.sum().expand_as(upstream)


@broken("per_channel_gradients")
class SummedOverChannels(Sound):
    """The gradient of a variable per channel is summed over all channels."""

    def share_for(self, x):
        return SumOfChannels.apply(super().share_for(x))


@broken("gradient_direction")
class NegatedVariable(Sound):
    """The gradient of the method's own variable has the wrong sign."""

    def share_for(self, x):
        share = super().share_for(x)
        return ops.straight_through(share.detach(), -share)
