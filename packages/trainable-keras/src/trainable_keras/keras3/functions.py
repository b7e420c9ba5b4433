"""The functions that fake quantization is made of, on `keras.ops`.

On the TensorFlow engine they run in one pass over memory where that pays; see `trainable_keras.fusion`. PyTorch and JAX
have compilers of their own, which users switch on.
"""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops

from trainable_keras import grappler
from trainable_keras.functions import Function, Functions, Tensor
from trainable_keras.fusion import Fusion
from trainable_keras.keras3 import engine
from trainable_keras.keras3.engine import ENGINE

if ENGINE == "tensorflow":
    import tensorflow as tf

    fusion = Fusion(tf)


def _fused(plain: Function, compiled: Function | None = None) -> Function:
    return fusion.fused(plain, compiled) if ENGINE == "tensorflow" else plain


def _hide_shape(x: Tensor) -> Tensor:
    return grappler.hide_shape(tf, x) if ENGINE == "tensorflow" else x


def _show_shape(x: Tensor, like: Tensor) -> Tensor:
    return grappler.show_shape(tf, x, like.shape) if ENGINE == "tensorflow" else x


def _size(x: Tensor) -> Any:
    shape = ops.shape(x)
    known = math.prod(size for size in shape if isinstance(size, int))
    unknown = [ops.cast(size, "float32") for size in shape if not isinstance(size, int)]
    return math.prod(unknown, start=known) if unknown else known


def _positions(x: Tensor) -> Tensor:
    shape = ops.shape(x)
    return ops.reshape(ops.arange(math.prod(shape), dtype="int32"), shape)


def _steps_of(x: Tensor, scale: Tensor, quant_min: int, quant_max: int, *, centered: bool) -> Tensor:  # noqa: ARG001 - Keras 2 needs them
    return x * engine.reciprocal(scale)


def _bits_and(bits: Tensor, mask: int) -> Tensor:
    return ops.bitwise_and(bits, ops.full_like(bits, mask))


def _number(value: float) -> Tensor:
    return ops.cast(value, "float32")


def _softmax(x: Tensor) -> Tensor:
    """Return the softmax of a vector; `keras.ops.softmax` warns of one with a single element."""
    weights = ops.exp(x - ops.stop_gradient(ops.max(x)))
    return weights / ops.sum(weights)


def _largest(x: Tensor, axis: int | None = None, keepdims: bool = False) -> Tensor:  # noqa: FBT001, FBT002 - NumPy's
    return ops.max(x, axis=axis, keepdims=keepdims, initial=0.0)


def _total(terms: list[Tensor]) -> Tensor:
    return sum(terms, start=ops.zeros((), "float32"))


def _rank(x: Tensor) -> int:
    return len(x.shape)


def _dtype_of(x: Tensor) -> str:
    return str(keras.backend.standardize_dtype(x.dtype))


FUNCTIONS = Functions(
    maximum=ops.maximum,
    minimum=ops.minimum,
    where=ops.where,
    isnan=ops.isnan,
    isfinite=ops.isfinite,
    abs=ops.abs,
    floor=ops.floor,
    round=ops.round,
    exp=ops.exp,
    log=ops.log,
    tanh=ops.tanh,
    cos=ops.cos,
    zeros_like=ops.zeros_like,
    stack=ops.stack,
    sort=ops.sort,
    argmax=ops.argmax,
    reshape=ops.reshape,
    transpose=ops.transpose,
    sum=ops.sum,
    max=ops.max,
    largest=_largest,
    all_of=ops.logical_and,
    any_of=ops.logical_or,
    bits_and=_bits_and,
    number=_number,
    floats=engine.float_tensor,
    float_bits=engine.float_bits,
    bits_float=engine.bits_float,
    cast=ops.cast,
    stop_gradient=ops.stop_gradient,
    rsqrt=ops.rsqrt,
    sqrt=ops.sqrt,
    softmax=_softmax,
    total=_total,
    divide_by=engine.divide_by,
    reciprocal=engine.reciprocal,
    hide_shape=_hide_shape,
    show_shape=_show_shape,
    steps_of=_steps_of,
    positions=_positions,
    size=_size,
    rank=_rank,
    dtype_of=_dtype_of,
    is_tensor=ops.is_tensor,
    to_numpy=engine.to_numpy,
    read=engine.read,
    replicas=engine.replicas,
    with_gradient=engine.with_gradient,
    fused=_fused,
)
