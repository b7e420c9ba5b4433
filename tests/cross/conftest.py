"""Cross-framework tests only where both backends are installed; third parties' warnings that no one here can mend."""

from __future__ import annotations

import pytest

for name in ("torch", "keras", "trainable_torch", "trainable_keras"):
    pytest.importorskip(name, reason="needs both frameworks and both backends")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # TensorFlow 2.21's tensors have an __array__ without the argument that NumPy 2 asks for; Keras calls it.
    array = "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
    for item in items:
        if "/tests/cross/" in str(item.path):
            item.add_marker(pytest.mark.filterwarnings(array))
