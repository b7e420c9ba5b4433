"""Large tensors are quantized by functions that XLA compiles."""

from __future__ import annotations

import pytest

from tests.fusion_laws import FusionLaws
from trainable_keras.keras3 import ops
from trainable_keras.keras3.engine import ENGINE
from trainable_keras.keras3.grid import Grid

if ENGINE != "tensorflow":
    pytest.skip("compiles on the TensorFlow engine only", allow_module_level=True)

from trainable_keras.keras3.fusion import fusion


class TestFusion(FusionLaws):
    fusion, ops, grid = fusion, ops, Grid
