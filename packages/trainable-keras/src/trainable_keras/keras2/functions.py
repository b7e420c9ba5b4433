"""The functions that fake quantization is made of, on TensorFlow's.

They run in one pass over memory where that pays; see `trainable_keras.fusion`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from trainable_keras import grappler
from trainable_keras.functions import Functions, Tensor
from trainable_keras.fusion import Fusion
from trainable_keras.keras2 import engine

fusion = Fusion(tf)


def steps_of(x: Tensor, scale: Tensor, quant_min: int, quant_max: int, *, centered: bool) -> Tensor:
    """Return ``x / scale`` for comparisons with the grid's ends counted from zero.

    TensorFlow takes subnormal numbers for zeros, so a tiny negative `x` would seem to lie on an end at zero, where the
    gradient is another one than below it. Where an end may be zero, what is subnormal comes out as the smallest normal
    number of its sign instead, and what IEEE 754 rounds to zero as zero.
    """
    inverse = engine.reciprocal(scale)
    steps = x * inverse
    if centered and quant_min < 0 < quant_max:
        return steps
    bits = engine.float_bits(x)
    magnitude = tf.cast(tf.bitwise.bitwise_and(bits, 0x7FFFFFFF), tf.float32)  # of a subnormal x: |x| * 2**149, exact
    raised = tf.where(bits < 0, -magnitude, magnitude) * 2.0**-89
    subnormal = tf.bitwise.bitwise_and(bits, 0x7F800000) == 0
    product = tf.where(subnormal, raised, x * 2.0**60) * inverse  # steps * 2**60
    smallest = tf.where(product > 0, 2.0**-126, -(2.0**-126))
    tiny = tf.where(tf.abs(product) > 2.0**-90, smallest, tf.zeros_like(product))  # 2**-150 rounds to zero
    return tf.where(tf.abs(steps) < 2.0**-126, tiny, steps)


def _hide_shape(x: Tensor) -> Tensor:
    return grappler.hide_shape(tf, x)


def _show_shape(x: Tensor, like: Tensor) -> Tensor:
    return grappler.show_shape(tf, x, like.shape)


def _size(x: Tensor) -> Any:
    known = x.shape.num_elements()
    return tf.cast(tf.size(x, out_type=tf.int64), "float32") if known is None else known


def _positions(x: Tensor) -> Tensor:
    return tf.reshape(tf.range(tf.size(x)), tf.shape(x))


def _bits_and(bits: Tensor, mask: int) -> Tensor:
    return tf.bitwise.bitwise_and(bits, tf.fill(tf.shape(bits), mask))


def _number(value: float) -> Tensor:
    return tf.cast(value, "float32")


def _floats(values: Any) -> Tensor:
    return tf.constant(np.asarray(values, np.float32))


def _largest(x: Tensor, axis: int | None = None, keepdims: bool = False) -> Tensor:  # noqa: FBT001, FBT002 - NumPy's
    return tf.maximum(tf.reduce_max(x, axis=axis, keepdims=keepdims), 0.0)


def _total(terms: list[Tensor]) -> Tensor:
    return tf.add_n([tf.zeros(()), *terms])


def _rank(x: Tensor) -> int | None:
    shape = x.shape  # of an array, which Keras takes too, it is a tuple
    rank: int | None = shape.rank if isinstance(shape, tf.TensorShape) else len(shape)
    return rank


def _dtype_of(x: Tensor) -> Any:
    return x.dtype


FUNCTIONS = Functions(
    maximum=tf.maximum,
    minimum=tf.minimum,
    where=tf.where,
    isnan=tf.math.is_nan,
    isfinite=tf.math.is_finite,
    abs=tf.abs,
    floor=tf.floor,
    round=tf.round,
    exp=tf.exp,
    log=tf.math.log,
    tanh=tf.tanh,
    cos=tf.cos,
    zeros_like=tf.zeros_like,
    stack=tf.stack,
    sort=tf.sort,
    argmax=tf.argmax,
    reshape=tf.reshape,
    transpose=tf.transpose,
    sum=tf.reduce_sum,
    max=tf.reduce_max,
    largest=_largest,
    all_of=tf.logical_and,
    any_of=tf.logical_or,
    bits_and=_bits_and,
    number=_number,
    floats=_floats,
    float_bits=engine.float_bits,
    bits_float=engine.bits_float,
    cast=tf.cast,
    stop_gradient=tf.stop_gradient,
    rsqrt=tf.math.rsqrt,
    sqrt=tf.math.sqrt,
    softmax=tf.nn.softmax,
    total=_total,
    divide_by=engine.divide_by,
    reciprocal=engine.reciprocal,
    hide_shape=_hide_shape,
    show_shape=_show_shape,
    steps_of=steps_of,
    positions=_positions,
    size=_size,
    rank=_rank,
    dtype_of=_dtype_of,
    is_tensor=tf.is_tensor,
    to_numpy=engine.to_numpy,
    read=engine.read,
    replicas=engine.replicas,
    with_gradient=engine.with_gradient,
    fused=fusion.fused,
)
