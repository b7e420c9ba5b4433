"""Fake quantization in one pass over memory on the TensorFlow engine; see `trainable_keras.fusion`.

The other engines run the plain expression: PyTorch and JAX have compilers of their own, which users switch on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trainable_keras.fusion import Fusion
from trainable_keras.keras3.engine import ENGINE

if ENGINE == "tensorflow":
    import tensorflow as tf

    fusion = Fusion(tf)


def fused(plain: Callable[..., Any], compiled: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """Return a function that gives what `plain` gives, in one pass where that pays."""
    return fusion.fused(plain, compiled) if ENGINE == "tensorflow" else plain
