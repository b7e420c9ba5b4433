"""Keras 2 tests only where this backend and TensorFlow are installed; third parties' warnings no one here can mend.

TensorFlow 2.16 and newer has Keras 3 unless the switch is set before it is imported; 2.15 has Keras 2 unless it is set.
"""

from __future__ import annotations

import importlib.util
import os
import sys

import pytest

pytest.importorskip("trainable_keras.keras2", reason="needs trainable-tfkeras")
if importlib.util.find_spec("tensorflow") is None:
    pytest.skip("needs TensorFlow", allow_module_level=True)
if "tensorflow" not in sys.modules:
    if importlib.util.find_spec("tf_keras"):
        os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
    # two virtual CPUs, for the distribution strategies; must be said before TensorFlow starts
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)

FOREIGN = (
    # TensorFlow 2.21's tensors have an __array__ without the argument that NumPy 2 asks for; Keras calls it.
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning",
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
    for item in items:
        if "/tests/tfkeras/" in str(item.path):
            for warning in FOREIGN:
                item.add_marker(pytest.mark.filterwarnings(warning))
