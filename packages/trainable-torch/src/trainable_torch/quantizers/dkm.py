"""Differentiable k-means; defined by `trainable_core.reference.dkm`."""

from __future__ import annotations

import torch
from mct_quantizers import QuantizationTarget, mark_quantizer
from torch import Tensor

from trainable_core.backend.options import DkmOptions
from trainable_core.enums import TrainingMethod
from trainable_core.qparams import table_ends
from trainable_core.reference import dkm, dqa
from trainable_torch import ops
from trainable_torch.quantizers.base import BasePytorchTrainableQuantizer
from trainable_torch.quantizers.table import METHODS, OF_ACTIVATIONS


class DkmQuantizer(DkmOptions, BasePytorchTrainableQuantizer):
    """The levels of a table learn, by soft assignments; see `trainable_core.reference.dkm`.

    Its arguments are those of `trainable_core.backend.options.DkmOptions`.

    Notes
    -----
    In the first ``floor(t_end)`` training steps the output is soft. In every later one, and in eval mode, it is the
    nearest level's, which `convert2inferable` deploys; gradients are those of the soft values at the last temperature.
    """

    declaration = dkm.METHOD
    learns_levels = True

    centroids: Tensor

    def quantize(self, x: Tensor, training: bool) -> Tensor:  # noqa: FBT001 - the base's signature
        """Return the soft values, or those of the nearest levels."""
        scale = self.grid(x.dim()).scale.detach()
        signed = self.signed
        clipped = torch.where(self.centroids.isnan(), 0.0, self.centroids).clamp(*table_ends(signed=signed))
        levels = clipped + (clipped.round() - clipped).detach()
        ascending = list(levels.detach().sort().values)
        if not training:
            return ops.snap_to_levels_passing(x, scale, ascending, signed=signed)
        hard = ops.snap_to_levels(x.detach(), scale, ascending, signed=signed)
        steps = (torch.where(x.isnan(), 0.0, x) / scale).clamp(*dkm.bounds_of_steps(signed=signed)).unsqueeze(-1)
        unit = self.temperature(self.current_step) * (dkm.CODES / len(levels)) ** 2
        weights = torch.softmax(-(steps - levels).square() / torch.as_tensor(unit).to(torch.float32), -1)
        soft = (weights * levels).sum(-1) * scale
        soft = torch.where(x.isnan(), x.detach(), soft)
        return self.until(dqa.schedule_end(self.temperature), soft, ops.straight_through(hard, soft))


@mark_quantizer(QuantizationTarget.Weights, METHODS, TrainingMethod.DKM)
class DkmWeightsQuantizer(DkmQuantizer):
    """DKM for weights."""


@mark_quantizer(QuantizationTarget.Activation, OF_ACTIVATIONS, TrainingMethod.DKM)
class DkmActivationQuantizer(DkmQuantizer):
    """DKM for activations."""
