"""Fake quantization on tensors: one forward formula, which training and deployment share, and two ways back.

The formula is that of `trainable_core.reference.affine` with ties up: ``clip(floor(v) + (v - floor(v) >= 0.5), low,
high) * scale`` with ``v = x * (1 / scale)`` and the grid's ends counted from zero. TensorFlow's ``fake_quant`` kernels
add 0.5 to a shifted value instead, so next to a tie they may give the neighbouring code: measured on 2,100,000 values,
at most ``0.95 * 2**n_bits * 2**-24`` steps from it. Infinities saturate to their own side, and NaN stays NaN.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from trainable_core.reference import lsq
from trainable_tfkeras.engine import Tensor, float_bits, reciprocal, with_gradient
from trainable_tfkeras.fusion import fused
from trainable_tfkeras.grid import Grid, ends

HALF = 0.5
"""Distance of a tie from the codes on either side."""


def round_half_up(v: Tensor) -> Tensor:
    """Return `v` rounded to integers, ties towards plus infinity; a zero is +0.0."""
    down = tf.floor(v)
    return down + tf.cast(v - down >= HALF, "float32")


def snap(x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int) -> Tensor:
    """Return `x` snapped to the grid; float32 in, float32 out.

    Parameters
    ----------
    x : Tensor, float32
        Real values.
    scale : Tensor, float32, broadcastable to `x`
        Step between grid points.
    zero_point : Tensor, float32, shape of `scale`, or None
        Code of real 0.0; None for zeros.
    quant_min, quant_max : int
        First and last code.
    """
    codes = round_half_up(x * reciprocal(scale))
    if zero_point is None:
        return _clip(codes, quant_min, quant_max) * scale
    # Rounded before the zero point is added, as the reference does. Clipped between numbers, not between the ends
    # counted from zero: TensorFlow makes -z of 0 - z, and with it zeros negative.
    return (_clip(codes + zero_point, quant_min, quant_max) - zero_point) * scale


def _clip(codes: Tensor, quant_min: int, quant_max: int) -> Tensor:
    return tf.minimum(tf.maximum(codes, float(quant_min)), float(quant_max))


def steps_of(x: Tensor, scale: Tensor, quant_min: int, quant_max: int, *, centered: bool) -> Tensor:
    """Return ``x / scale`` for comparisons with the grid's ends counted from zero.

    TensorFlow takes subnormal numbers for zeros, so a tiny negative `x` would seem to lie on an end at zero, where the
    gradient is another one than below it. Where an end may be zero, what is subnormal comes out as the smallest normal
    number of its sign instead, and what IEEE 754 rounds to zero as zero.
    """
    inverse = reciprocal(scale)
    steps = x * inverse
    if centered and quant_min < 0 < quant_max:
        return steps
    bits = float_bits(x)
    magnitude = tf.cast(tf.bitwise.bitwise_and(bits, 0x7FFFFFFF), tf.float32)  # of a subnormal x: |x| * 2**149, exact
    raised = tf.where(bits < 0, -magnitude, magnitude) * 2.0**-89
    subnormal = tf.bitwise.bitwise_and(bits, 0x7F800000) == 0
    product = tf.where(subnormal, raised, x * 2.0**60) * inverse  # steps * 2**60
    smallest = tf.where(product > 0, 2.0**-126, -(2.0**-126))
    tiny = tf.where(tf.abs(product) > 2.0**-90, smallest, tf.zeros_like(product))  # 2**-150 rounds to zero
    return tf.where(tf.abs(steps) < 2.0**-126, tiny, steps)


@functools.cache
def _forward(quant_min: int, quant_max: int) -> Callable[..., Tensor]:
    """Return fake quantization: of an input, a scale and, unless the grid is centered, a zero point."""

    def values(x: Tensor, scale: Tensor, zero_point: Tensor = None) -> Tensor:
        return snap(x, scale, zero_point, quant_min, quant_max)

    def keeps_nan(x: Tensor, *grid: Tensor) -> Tensor:  # TensorFlow 2.15's XLA makes numbers of NaN in minimum
        return tf.where(tf.math.is_nan(x), x, values(x, *grid))

    return fused(values, keeps_nan)


@functools.cache
def _ste(quant_min: int, quant_max: int, centered: bool) -> Callable[..., Tensor]:  # noqa: FBT001
    """Return fake quantization with the gradient of `trainable_core.reference.ste`."""
    values = _forward(quant_min, quant_max)

    @fused
    def masked(x: Tensor, upstream: Tensor, scale: Tensor, zero_point: Tensor = None) -> Tensor:
        low, high = ends(zero_point, quant_min, quant_max, centered=centered)
        steps = steps_of(x, scale, quant_min, quant_max, centered=centered)
        inside = tf.logical_and(steps >= low, steps <= high)
        return tf.where(inside, upstream, tf.zeros_like(upstream))

    def backward(upstream: Tensor, _: Tensor, x: Tensor, *grid: Tensor) -> tuple[Tensor, ...]:
        return masked(x, upstream, *grid), *(tf.zeros_like(each) for each in grid)

    return with_gradient(values, backward)


@functools.cache
def _lsq(quant_min: int, quant_max: int, centered: bool) -> Callable[..., Tensor]:  # noqa: FBT001
    """Return fake quantization with the gradients of `trainable_core.reference.lsq`."""
    values = _forward(quant_min, quant_max)

    @fused
    def terms(x: Tensor, upstream: Tensor, scale: Tensor, zero_point: Tensor = None) -> tuple[Tensor, ...]:
        low, high = ends(zero_point, quant_min, quant_max, centered=centered)
        steps = steps_of(x, scale, quant_min, quant_max, centered=centered)
        below, above = steps <= low, steps >= high
        between = tf.logical_and(steps > low, steps < high)
        zeros = tf.zeros_like(upstream)
        d_x = tf.where(between, upstream, zeros)
        outside = tf.where(above, zeros + high, tf.where(below, zeros + low, zeros))
        slope = tf.where(between, round_half_up(steps) - steps, outside)
        if centered:
            return d_x, upstream * slope
        return d_x, upstream * slope, tf.where(tf.logical_or(below, above), upstream, zeros)

    def backward(upstream: Tensor, _: Tensor, x: Tensor, scale: Tensor, *zero_point: Tensor) -> tuple[Tensor, ...]:
        d_x, by_scale, *beyond = terms(x, upstream, scale, *zero_point)
        g = gradient_scale(x, scale, quant_max)
        return d_x, _sum_to(by_scale, scale) * g, *(-(_sum_to(each, scale) * scale) * g for each in beyond)

    return with_gradient(values, backward)


def _sum_to(values: Tensor, like: Tensor) -> Tensor:
    """Return `values` summed over the elements that share one entry of `like`."""
    shape = tuple(like.shape)
    if not shape:
        return tf.reduce_sum(values)
    return tf.reduce_sum(values, axis=[axis for axis, size in enumerate(shape) if size == 1], keepdims=True)


def gradient_scale(x: Tensor, scale: Tensor, quant_max: int) -> Any:
    """Return `trainable_core.reference.lsq.gradient_scale`; a tensor where a dimension of `x` is not known yet."""
    scales = max(scale.shape.num_elements(), 1)
    size = x.shape.num_elements()
    if size is not None:
        return lsq.gradient_scale(size // scales, quant_max)
    sharing = tf.maximum(tf.cast(tf.size(x, out_type=tf.int64) // scales, tf.float32), 1.0)
    return tf.math.rsqrt(sharing * max(quant_max, 1))


def ste_fake_quantize(x: Tensor, grid: Grid) -> Tensor:
    """Return `x` snapped to the grid, gradient by `trainable_core.reference.ste`; float32."""
    function = _ste(grid.quant_min, grid.quant_max, grid.centered)
    return function(x, *(tf.stop_gradient(each) for each in _numbers(grid)))


def lsq_fake_quantize(x: Tensor, grid: Grid) -> Tensor:
    """Return `x` snapped to the grid, gradients by `trainable_core.reference.lsq`; float32."""
    return _lsq(grid.quant_min, grid.quant_max, grid.centered)(x, *_numbers(grid))


def _numbers(grid: Grid) -> tuple[Tensor, ...]:
    return (grid.scale,) if grid.centered else (grid.scale, grid.zero_point)
