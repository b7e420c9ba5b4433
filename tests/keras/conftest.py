"""Keras tests only where Keras 3 and this backend are installed; third parties' warnings that no one here can mend."""

from __future__ import annotations

import pytest

pytest.importorskip("keras", reason="needs Keras 3")
pytest.importorskip("trainable_keras", reason="needs trainable-keras")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # TensorFlow 2.21's tensors have an __array__ without the argument that NumPy 2 asks for; Keras calls it.
    array = "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
    for item in items:
        if "/tests/keras/" in str(item.path):
            item.add_marker(pytest.mark.filterwarnings(array))
