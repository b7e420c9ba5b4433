"""Differentiable k-means; defined by `trainable_core.reference.dkm`."""

from __future__ import annotations

import functools
from typing import Any

from trainable_core.backend.options import DkmOptions
from trainable_core.qparams import table_ends
from trainable_core.reference import dkm, dqa
from trainable_keras.functions import Tensor
from trainable_keras.quantizers.base import KerasQuantizer


class DkmQuantizer(DkmOptions, KerasQuantizer):
    """The levels of a table learn, by soft assignments; see `trainable_core.reference.dkm`.

    Its arguments are those of `trainable_core.backend.options.DkmOptions`.

    Notes
    -----
    In the first ``floor(t_end)`` training steps the output is soft. In every later one, and in inference, it is the
    nearest level's, which `convert2inferable` deploys; gradients are those of the soft values at the last temperature.
    """

    declaration = dkm.METHOD
    learns_levels = True

    centroids: Any

    def quantized(self, x: Tensor, training: bool) -> Tensor:  # noqa: FBT001 - the base's signature
        """Return the soft values, or those of the nearest levels."""
        f, count = self.functions, dkm.count_of(self.quantization_config.n_bits, self.subject)
        scale = f.stop_gradient(self.grid(f.rank(x)).scale)
        signed = self.signed
        low, high = (f.number(float(end)) for end in table_ends(signed=signed))
        free = self._value_of(self.centroids)
        free = f.where(f.isnan(free), f.zeros_like(free), free)
        clipped = f.stop_gradient(f.minimum(f.maximum(free, low), high))
        clipped = f.where(f.all_of(free >= low, free <= high), free, clipped)
        levels = clipped + f.stop_gradient(f.round(clipped) - clipped)
        ascending = f.sort(f.stop_gradient(levels))
        table = [ascending[index] for index in range(count)]
        hard = self.ops.snap_to_levels(f.stop_gradient(x), f.hide_shape(scale), table, signed=signed)
        if not training:  # as `snap_to_levels_passing` has it, whose levels are numbers
            at = f.stop_gradient(x) / scale
            ones = f.zeros_like(x) + 1.0
            passes = f.where(f.all_of(at >= low, at <= high), ones, f.zeros_like(x))
            return self.ops.straight_through(f.show_shape(hard, x), x * passes)
        steps = f.where(f.isnan(x), f.zeros_like(x), x) / scale
        first, last = (f.number(bound) for bound in dkm.bounds_of_steps(signed=signed))
        steps = f.minimum(f.maximum(steps, first), last)
        steps = steps[..., None]
        unit = self.annealed(self.temperature) * (dkm.CODES / count) ** 2
        distances = (steps - levels) * (steps - levels) / f.cast(unit, "float32")
        # pairwise: Keras takes no maximum of a tensor without elements
        least = functools.reduce(f.minimum, [distances[..., place : place + 1] for place in range(count)])
        exponents = f.exp(f.stop_gradient(least) - distances)
        soft = f.sum(exponents * levels, axis=-1) / f.sum(exponents, axis=-1) * scale
        soft = f.where(f.isnan(x), f.stop_gradient(x), soft)
        return self.until(
            dqa.schedule_end(self.temperature), soft, self.ops.straight_through(f.show_shape(hard, x), soft)
        )
