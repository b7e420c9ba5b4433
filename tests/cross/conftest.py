"""Cross-framework tests only where both frameworks and both backends are installed."""

from __future__ import annotations

import os

import pytest

KERAS = "trainable_keras.keras2" if os.environ.get("TF_USE_LEGACY_KERAS") == "1" else "trainable_keras"
for name in ("torch", "tensorflow", "trainable_torch", KERAS):
    pytest.importorskip(name, reason="needs both frameworks and both backends")
