"""The Keras that a run compares with PyTorch: Keras 2 where its switch is set, else Keras 3."""

from __future__ import annotations

import importlib
import os
from typing import Any

LEGACY = os.environ.get("TF_USE_LEGACY_KERAS") == "1"
BACKEND, DISTRIBUTION = ("tf_keras", "trainable_keras.keras2") if LEGACY else ("keras", "trainable_keras")
DEPTHWISE = "depthwise_kernel" if LEGACY else "kernel"
"""What a depthwise layer calls its kernel."""

plugin: Any = importlib.import_module(DISTRIBUTION)
engine: Any = importlib.import_module(f"{DISTRIBUTION}.engine")
keras: Any = engine.keras
to_numpy: Any = engine.to_numpy
layers_within: Any = importlib.import_module(f"{DISTRIBUTION}.tracing").layers_within
quantizers_of: Any = importlib.import_module(f"{DISTRIBUTION}.training").quantizers_of
