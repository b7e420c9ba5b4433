"""Fake quantization in one pass over memory; see `trainable_keras.fusion`."""

from __future__ import annotations

import tensorflow as tf

from trainable_keras.fusion import Fusion

fusion = Fusion(tf)
fused = fusion.fused
