"""From a quantizer's variables to the grid, on tensors: what core defines, on TensorFlow's functions."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from trainable_core.backend.grid import ends
from trainable_keras import grid as tensor_grid
from trainable_keras.keras2.engine import Tensor, bits_float, divide_by, float_bits, with_gradient

__all__ = ["FUNCTIONS", "End", "Grid", "ends", "symmetric", "uniform"]

End = Tensor | float
"""A grid's end: a number or a tensor."""


class Grid(tensor_grid.GridNumbers):
    """The numbers a tensor is fake-quantized with; see `trainable_keras.grid.GridNumbers`."""

    @property
    def ends(self) -> tuple[End, End]:
        """First and last code counted from zero: plain numbers on a centered grid, else tensors."""
        return ends(tf.stop_gradient(self.zero_point), self.quant_min, self.quant_max, centered=self.centered)


def _bits_and(bits: Tensor, mask: int) -> Tensor:
    return tf.bitwise.bitwise_and(bits, tf.fill(tf.shape(bits), mask))


def _number(value: float) -> Any:
    return tf.cast(value, "float32")


FUNCTIONS = tensor_grid.Functions(
    maximum=tf.maximum,
    minimum=tf.minimum,
    where=tf.where,
    isnan=tf.math.is_nan,
    isfinite=tf.math.is_finite,
    round=tf.round,
    zeros_like=tf.zeros_like,
    stack=tf.stack,
    all_of=tf.logical_and,
    any_of=tf.logical_or,
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
