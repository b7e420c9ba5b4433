"""Large tensors are quantized by functions that XLA compiles."""

from __future__ import annotations

from tests.fusion_laws import FusionLaws
from trainable_tfkeras import ops
from trainable_tfkeras.fusion import fusion
from trainable_tfkeras.grid import Grid


class TestFusion(FusionLaws):
    fusion, ops, grid = fusion, ops, Grid
