"""Differentiable k-means; defined by `trainable_core.reference.dkm`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from trainable_core.config import TrainableQuantizerConfig
from trainable_core.enums import VariableGroup
from trainable_core.qparams import TABLE_STEPS
from trainable_core.reference import dkm, dqa
from trainable_keras.functions import Tensor
from trainable_keras.quantizers.base import KerasQuantizer


class DkmQuantizer(KerasQuantizer):
    """The levels of a table learn, by soft assignments; see `trainable_core.reference.dkm`.

    Parameters
    ----------
    quantization_config, freeze_quant_params
        As in the base class.
    temperature : mapping, optional
        Arguments of `LinearAnnealingScheduler`, in squared mean gaps between levels; all positive.

    Notes
    -----
    In the first ``floor(t_end)`` training steps the output is soft. In every later one, and in inference, it is the
    nearest level's, which `convert2inferable` deploys; gradients are those of the soft values at the last temperature.
    """

    declaration = dkm.METHOD
    learns_levels = True

    centroids: Any

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

    def quantized(self, x: Tensor, training: bool) -> Tensor:  # noqa: FBT001 - the base's signature
        """Return the soft values, or those of the nearest levels."""
        f, count = self.functions, dkm.count_of(self.quantization_config.n_bits, self.subject)
        scale = f.stop_gradient(self.grid(f.rank(x)).scale)
        low, high = f.number(-float(TABLE_STEPS)), f.number(TABLE_STEPS - 1.0)
        free = f.read(self.centroids)
        clipped = f.stop_gradient(f.minimum(f.maximum(free, low), high))
        clipped = f.where(f.all_of(free >= low, free <= high), free, clipped)
        levels = clipped + f.stop_gradient(f.round(clipped) - clipped)
        ascending = f.sort(f.stop_gradient(levels))
        table = [ascending[index] for index in range(count)]
        hard = self.ops.snap_to_levels(f.stop_gradient(x), f.hide_shape(scale), table)
        if not training:
            return f.show_shape(f.where(f.isnan(x), x, hard), x)  # in the graph, as every quantizer's output
        steps = f.where(f.isnan(x), f.zeros_like(x), x) / scale
        steps = f.minimum(f.maximum(steps, 2.0 * low), f.number(2.0 * TABLE_STEPS))
        steps = f.reshape(steps, (*(int(size) for size in x.shape), 1))
        unit = self.annealed(self.temperature) * (2 * TABLE_STEPS / count) ** 2
        distances = (steps - levels) * (steps - levels) / f.cast(unit, "float32")
        exponents = f.exp(f.stop_gradient(-f.max(-distances, axis=-1, keepdims=True)) - distances)
        soft = f.sum(exponents * levels, axis=-1) / f.sum(exponents, axis=-1) * scale
        soft = f.where(f.isnan(x), f.stop_gradient(x), soft)
        return self.until(
            dqa.schedule_end(self.temperature), soft, self.ops.straight_through(f.show_shape(hard, x), soft)
        )
