"""Keras tests only where Keras 3 and this backend are installed."""

from __future__ import annotations

import pytest

pytest.importorskip("keras", reason="needs Keras 3")
pytest.importorskip("trainable_keras", reason="needs trainable-keras")
