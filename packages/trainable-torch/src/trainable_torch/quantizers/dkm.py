"""Differentiable k-means; defined by `trainable_core.reference.dkm`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from mct_quantizers import QuantizationTarget, mark_quantizer
from numpy.typing import NDArray
from torch import Tensor

from trainable_core.config import TrainableQuantizerConfig
from trainable_core.enums import TrainingMethod, VariableGroup
from trainable_core.qparams import TABLE_STEPS
from trainable_core.reference import dkm, dqa
from trainable_torch import ops
from trainable_torch.quantizers.base import BasePytorchTrainableQuantizer
from trainable_torch.quantizers.table import METHODS


class DkmQuantizer(BasePytorchTrainableQuantizer):
    """The levels of a table learn, by soft assignments; see `trainable_core.reference.dkm`.

    Parameters
    ----------
    quantization_config, freeze_quant_params
        As in the base class.
    temperature : mapping, optional
        Arguments of `LinearAnnealingScheduler`, in squared mean gaps between levels; all positive.

    Notes
    -----
    In the first ``floor(t_end)`` training steps the output is soft. In every later one, and in eval mode, it is the
    nearest level's, which `convert2inferable` deploys; gradients are those of the soft values at the last temperature.
    """

    declaration = dkm.METHOD
    learns_levels = True

    centroids: Tensor

    def __init__(
        self,
        quantization_config: TrainableQuantizerConfig,
        freeze_quant_params: bool = False,  # noqa: FBT001, FBT002 - the seed's signature
        temperature: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(quantization_config, freeze_quant_params)
        name = type(self).__name__
        dkm.count_of(quantization_config.n_bits, name)  # refuses the width
        self.temperature = dkm.temperature_schedule(temperature, name, self.scheduler)

    def get_arguments(self) -> dict[str, Any]:
        """Return the schedule."""
        return {"temperature": self.temperature.to_dict()}

    def add_variables(self) -> None:
        """Add the levels, with equal gaps."""
        initial = dkm.initial_centroids(self.quantization_config.n_bits)
        self.add_quantizer_variable("centroids", initial, VariableGroup.QPARAMS, trained=True)

    @property
    def levels(self) -> tuple[int, ...]:
        """The table as it would be deployed now."""
        return dkm.levels_of(self.to_numpy(self.centroids))

    def levels_as_variables(self, levels: tuple[int, ...]) -> list[tuple[Any, NDArray[Any]]]:
        """Return the centroids with the values that make these levels."""
        return [(self.centroids, dkm.centroids_of(levels, self.quantization_config.n_bits))]

    def quantize(self, x: Tensor, training: bool) -> Tensor:  # noqa: FBT001 - the base's signature
        """Return the soft values, or those of the nearest levels."""
        scale = self.grid(x.dim()).scale.detach()
        clipped = self.centroids.clamp(-TABLE_STEPS, TABLE_STEPS - 1)
        levels = clipped + (clipped.round() - clipped).detach()
        hard = ops.snap_to_levels(x.detach(), scale, list(levels.detach().sort().values))
        if not training:
            return torch.where(x.isnan(), x, hard)  # in the graph, as every quantizer's output
        steps = (torch.where(x.isnan(), 0.0, x) / scale).clamp(-2 * TABLE_STEPS, 2 * TABLE_STEPS).unsqueeze(-1)
        unit = self.temperature(self.current_step) * (2 * TABLE_STEPS / len(levels)) ** 2
        weights = torch.softmax(-(steps - levels).square() / torch.as_tensor(unit).to(torch.float32), -1)
        soft = (weights * levels).sum(-1) * scale
        soft = torch.where(x.isnan(), x.detach(), soft)
        return self.until(dqa.schedule_end(self.temperature), soft, ops.straight_through(hard, soft))


@mark_quantizer(QuantizationTarget.Weights, METHODS, TrainingMethod.DKM)
class DkmWeightsQuantizer(DkmQuantizer):
    """DKM for weights."""
