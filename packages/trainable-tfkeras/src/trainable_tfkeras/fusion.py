"""Fake quantization in one pass over memory; see `trainable_core.tensorflow_fusion`."""

from __future__ import annotations

import tensorflow as tf

from trainable_core.tensorflow_fusion import Fusion

fusion = Fusion(tf)
fused = fusion.fused
