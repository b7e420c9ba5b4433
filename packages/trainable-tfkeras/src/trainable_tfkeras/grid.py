"""From a quantizer's variables to the grid, on tensors: the same float32 operations as `trainable_core.qparams`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import tensorflow as tf

from trainable_core import qparams
from trainable_core.checks import MAX_THRESHOLD
from trainable_tfkeras.engine import Tensor, bits_float, divide_by, float_bits, with_gradient

End = Tensor | float
"""A grid's end: a number or a tensor."""


@dataclass(frozen=True)
class Grid:
    """The numbers a tensor is fake-quantized with.

    Parameters
    ----------
    scale : Tensor, float32, broadcastable to the tensor
        Step between grid points; gradients flow from it to the quantizer's variables.
    zero_point : Tensor, float32, shape of `scale`
        Code of real 0.0, an integer value; gradients flow too.
    quant_min, quant_max : int
        First and last code.
    centered : bool
        Whether every zero point is 0 (SYMMETRIC, POWER_OF_TWO).
    """

    scale: Tensor
    zero_point: Tensor
    quant_min: int
    quant_max: int
    centered: bool

    @property
    def ends(self) -> tuple[End, End]:
        """First and last code counted from zero: plain numbers on a centered grid, else tensors."""
        zero_point = tf.stop_gradient(self.zero_point)
        return ends(zero_point, self.quant_min, self.quant_max, centered=self.centered)


def ends(zero_point: Tensor, quant_min: int, quant_max: int, *, centered: bool) -> tuple[End, End]:
    """Return a grid's first and last code counted from zero."""
    if centered:
        return float(quant_min), float(quant_max)
    return quant_min - zero_point, quant_max - zero_point


def _held(variable: Tensor, gradient: Tensor, low: float, high: float) -> Tensor:
    """Return the gradient where the variable is in bounds or a descent step leads back in; see the core's module."""
    inside = tf.logical_and(variable >= low, variable <= high)
    back_in = tf.logical_or(tf.logical_and(variable < low, gradient < 0), tf.logical_and(variable > high, gradient > 0))
    passes = tf.logical_and(tf.logical_or(inside, back_in), tf.math.is_finite(gradient))
    return tf.where(passes, gradient, tf.zeros_like(gradient))


def _clip(x: Tensor, low: float, high: float, for_nan: float) -> Tensor:
    held = tf.minimum(tf.maximum(x, tf.cast(low, "float32")), tf.cast(high, "float32"))
    return tf.where(tf.math.is_nan(x), tf.cast(for_nan, "float32"), held)


@functools.cache
def _symmetric_scale(low: float, steps: float, power_of_two: bool) -> Callable[[Tensor], Tensor]:  # noqa: FBT001
    """Return the function from threshold to scale; see `trainable_core.qparams`."""

    def bounded(threshold: Tensor) -> Tensor:
        return _clip(threshold, low, MAX_THRESHOLD, low)

    def forward(threshold: Tensor) -> Tensor:
        value = bounded(threshold)
        if power_of_two:
            bits = float_bits(value)
            value = bits_float(tf.bitwise.bitwise_and(bits + 0x007FFFFF, tf.fill(tf.shape(bits), 0x7F800000)))
        return value * (1.0 / steps)  # a power of two: exact

    def backward(upstream: Tensor, scale: Tensor, threshold: Tensor) -> tuple[Tensor, ...]:
        gradient = upstream * (1.0 / steps)
        if power_of_two:
            gradient = gradient * (scale * steps / bounded(threshold))
        return (_held(threshold, gradient, low, MAX_THRESHOLD),)

    return with_gradient(forward, backward)


@functools.cache
def _uniform_grid(low: float, n_bits: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the function from range ends to scale and zero point, stacked; see `trainable_core.qparams`."""
    quant_max = 2**n_bits - 1
    limit = MAX_THRESHOLD / 2

    def forward(range_min: Tensor, range_max: Tensor) -> Tensor:
        first, last = _clip(range_min, -limit, 0.0, 0.0), _clip(range_max, 0.0, limit, 0.0)
        bits = float_bits(divide_by(_clip(last - first, low, MAX_THRESHOLD, low), quant_max))
        scale = bits_float(tf.bitwise.bitwise_and(bits + quant_max, tf.fill(tf.shape(bits), ~quant_max)))
        zero_point = tf.minimum(tf.maximum(tf.round(-first / scale), 0.0), float(quant_max))
        return tf.stack([scale, zero_point])

    def backward(upstream: Tensor, output: Tensor, range_min: Tensor, range_max: Tensor) -> tuple[Tensor, ...]:
        d_scale, d_zero = upstream[0], upstream[1]
        scale, zero_point = output[0], output[1]
        width = _clip(range_max, 0.0, limit, 0.0) - _clip(range_min, -limit, 0.0, 0.0)
        through_width = _held(width, (d_scale - d_zero * zero_point / scale) / quant_max, low, MAX_THRESHOLD)
        d_min = _held(range_min, -through_width - d_zero / scale, -limit, 0.0)
        return d_min, _held(range_max, through_width, 0.0, limit)

    return with_gradient(forward, backward)


def symmetric(threshold: Tensor, n_bits: int, *, signed: bool, power_of_two: bool, min_threshold: float) -> Grid:
    """Return the SYMMETRIC or POWER_OF_TWO grid of a threshold."""
    low = float(qparams.lower_bound(min_threshold))
    scale = _symmetric_scale(low, 2.0 ** (n_bits - int(signed)), power_of_two)(threshold)
    quant_min, quant_max = (-(2 ** (n_bits - 1)), 2 ** (n_bits - 1) - 1) if signed else (0, 2**n_bits - 1)
    return Grid(scale, tf.zeros_like(scale), quant_min, quant_max, centered=True)


def uniform(range_min: Tensor, range_max: Tensor, n_bits: int, *, min_threshold: float) -> Grid:
    """Return the UNIFORM grid of a range."""
    stacked = _uniform_grid(float(qparams.lower_bound(min_threshold)), n_bits)(range_min, range_max)
    return Grid(stacked[0], stacked[1], 0, 2**n_bits - 1, centered=False)
