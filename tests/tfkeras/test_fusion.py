"""Large tensors are quantized by functions that XLA compiles."""

from __future__ import annotations

from tests.fusion_laws import FusionLaws
from trainable_keras.keras2.fusion import fusion

from trainable_keras.keras2 import ops
from trainable_keras.keras2.grid import Grid


class TestFusion(FusionLaws):
    fusion, ops, grid = fusion, ops, Grid
