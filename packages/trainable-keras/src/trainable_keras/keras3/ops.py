"""Fake quantization on tensors of any engine, with ties up: what `trainable_keras.ops` defines, on `keras.ops`.

TensorFlow's ``fake_quant`` kernels add 0.5 to a shifted value instead, so next to a tie they may give the neighbouring
code: measured on 2,100,000 values, at most ``0.95 * 2**n_bits * 2**-24`` steps from it.
"""

from __future__ import annotations

import math
from typing import Any

from keras import ops

from trainable_keras.keras3.engine import Tensor, reciprocal
from trainable_keras.keras3.fusion import fused
from trainable_keras.keras3.grid import FUNCTIONS
from trainable_keras.ops import Functions, HalfUp


def _size(x: Tensor) -> Any:
    shape = ops.shape(x)
    known = math.prod(size for size in shape if isinstance(size, int))
    unknown = [ops.cast(size, "float32") for size in shape if not isinstance(size, int)]
    return math.prod(unknown, start=known) if unknown else known


def _steps_of(x: Tensor, scale: Tensor, quant_min: int, quant_max: int, *, centered: bool) -> Tensor:  # noqa: ARG001 - Keras 2 needs them
    return x * reciprocal(scale)


_HALF_UP = HalfUp(
    Functions(
        **vars(FUNCTIONS),
        floor=ops.floor,
        cast=ops.cast,
        stop_gradient=ops.stop_gradient,
        sum=ops.sum,
        rsqrt=ops.rsqrt,
        size=_size,
        reciprocal=reciprocal,
        steps_of=_steps_of,
        fused=fused,
    )
)
round_half_up, snap, gradient_scale = _HALF_UP.round_half_up, _HALF_UP.snap, _HALF_UP.gradient_scale
ste_fake_quantize, lsq_fake_quantize = _HALF_UP.ste_fake_quantize, _HALF_UP.lsq_fake_quantize
