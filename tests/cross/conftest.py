"""Cross-framework tests only where both frameworks and both backends are installed."""

from __future__ import annotations

import pytest

for name in ("torch", "tensorflow", "trainable_torch", "trainable_keras"):
    pytest.importorskip(name, reason="needs both frameworks and both backends")
