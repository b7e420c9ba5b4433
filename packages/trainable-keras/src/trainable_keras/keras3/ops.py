"""Fake quantization on the tensors of Keras 3: what `trainable_keras.ops` defines."""

from __future__ import annotations

from trainable_keras.keras3.functions import FUNCTIONS
from trainable_keras.ops import HalfUp

OPS = HalfUp(FUNCTIONS)
round_half_up, snap, gradient_scale = OPS.round_half_up, OPS.snap, OPS.gradient_scale
ste_fake_quantize, lsq_fake_quantize = OPS.ste_fake_quantize, OPS.lsq_fake_quantize
