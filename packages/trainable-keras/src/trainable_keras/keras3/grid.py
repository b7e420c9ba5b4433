"""From a quantizer's variables to the grid, on tensors: what core defines, on `keras.ops`."""

from __future__ import annotations

from typing import Any

from keras import ops

from trainable_core.backend.grid import ends
from trainable_keras import grid as tensor_grid
from trainable_keras.keras3.engine import Tensor, bits_float, divide_by, float_bits, with_gradient

__all__ = ["FUNCTIONS", "End", "Grid", "ends", "symmetric", "uniform"]

End = Tensor | float
"""A grid's end: a number or a tensor."""


class Grid(tensor_grid.GridNumbers):
    """The numbers a tensor is fake-quantized with; see `trainable_keras.grid.GridNumbers`."""

    @property
    def ends(self) -> tuple[End, End]:
        """First and last code counted from zero: plain numbers on a centered grid, else tensors."""
        zero_point = ops.stop_gradient(self.zero_point)
        return ends(zero_point, self.quant_min, self.quant_max, centered=self.centered)


def _bits_and(bits: Tensor, mask: int) -> Tensor:
    return ops.bitwise_and(bits, ops.full_like(bits, mask))


def _number(value: float) -> Any:
    return ops.cast(value, "float32")


FUNCTIONS = tensor_grid.Functions(
    maximum=ops.maximum,
    minimum=ops.minimum,
    where=ops.where,
    isnan=ops.isnan,
    isfinite=ops.isfinite,
    round=ops.round,
    zeros_like=ops.zeros_like,
    stack=ops.stack,
    all_of=ops.logical_and,
    any_of=ops.logical_or,
    bits_and=_bits_and,
    number=_number,
    float_bits=float_bits,
    bits_float=bits_float,
    divide_by=divide_by,
    with_gradient=with_gradient,
)
"""What grids are made with; `ops` adds to it."""

_MAKER = tensor_grid.GridMaker(FUNCTIONS, Grid)
symmetric, uniform = _MAKER.symmetric, _MAKER.uniform
