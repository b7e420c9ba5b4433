"""Keras tests run only where a Keras and this backend are installed; warnings of third parties are ignored."""

from __future__ import annotations

import warnings

import pytest

pytest.importorskip("trainable_keras", reason="needs trainable-keras")
try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TensorFlow 2.15 imports what is deprecated
        from tests.keras.framework import KERAS_VERSION
except ImportError as missing:
    pytest.skip(f"needs Keras 3, or Keras 2 and TensorFlow: {missing}", allow_module_level=True)

OF_KERAS_2 = (
    "ignore:You are saving your model as an HDF5 file:UserWarning",
    # TensorFlow 2.15's own flatbuffers, distutils and protobuf
    "ignore:.*distutils.*:DeprecationWarning",
    "ignore:.*imp module.*:DeprecationWarning",
    "ignore:Type google._upb.*:DeprecationWarning",
    "ignore:`tf.keras.*:DeprecationWarning",
    "ignore:.*np.* is a deprecated alias.*:DeprecationWarning",
    "ignore:non-integer arguments to randrange:DeprecationWarning",  # Keras 2.15's set_random_seed, on Python 3.11
    "ignore:unclosed:ResourceWarning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ignore the warnings of Keras 2 in the tests of this folder."""
    if KERAS_VERSION == 2:
        for item in items:
            if "/tests/keras/" in str(item.path):
                for warning in OF_KERAS_2:
                    item.add_marker(pytest.mark.filterwarnings(warning))
