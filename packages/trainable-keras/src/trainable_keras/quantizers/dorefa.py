"""DoReFa-Net's weights; defined by `trainable_core.reference.dorefa`."""

from __future__ import annotations

from trainable_core.reference import dorefa
from trainable_keras.functions import Tensor
from trainable_keras.grid import Grid
from trainable_keras.quantizers.base import KerasQuantizer


class DorefaQuantizer(KerasQuantizer):
    """Weights are squashed into the range before they are rounded; see `trainable_core.reference.dorefa`."""

    declaration = dorefa.METHOD

    def fake_quantize(self, x: Tensor, grid: Grid, training: bool) -> Tensor:  # noqa: ARG002, FBT001 - the base's signature
        """Return the squashed weights on the grid."""
        f, axis = self.functions, self.quantization_config.channels_axis
        scale, steps = f.stop_gradient(grid.scale), float(-grid.quant_min)
        tangent = f.tanh(f.stop_gradient(x))
        if 0 in tuple(x.shape):
            return self.ops.by_slopes(x, grid, tangent)  # there is no maximum
        rank = len(x.shape)
        others = tuple(each for each in range(rank) if axis is None or each != axis % rank)
        largest = f.max(f.abs(tangent), axis=others, keepdims=True) if others else f.abs(tangent)
        largest = f.where(largest == 0.0, f.zeros_like(largest) + 1.0, f.maximum(largest, f.number(dorefa.LEAST)))
        snapped = self.ops.snapped(tangent / largest * steps * scale, grid)
        slope = scale * steps * (1.0 - tangent * tangent) / largest
        return self.ops.straight_through(snapped, x * f.stop_gradient(slope))
