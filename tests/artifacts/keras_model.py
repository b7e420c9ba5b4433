"""The artifacts' float model in Keras 3 or Keras 2, whichever the environment variables ask for."""

from __future__ import annotations

import importlib
import os
from typing import Any

import numpy as np

from tests.artifacts.model import CONV, HEAD, IMAGES, Array

keras: Any = importlib.import_module("tf_keras" if os.environ.get("TF_USE_LEGACY_KERAS") == "1" else "keras")
BACKEND = "tf_keras" if keras.__version__.startswith("2.") else "keras"
"""The name in the registry."""


def network(*, filled: bool = True) -> Any:
    """Return the float model; without its numbers if they are to come from a file."""
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((6, 6, 3)),
            layers.Conv2D(4, 3, use_bias=False, name="conv"),
            layers.ReLU(name="relu"),
            layers.Flatten(name="flatten"),
            layers.Dense(5, use_bias=False, name="head"),
        ]
    )
    if filled:
        model.get_layer("conv").kernel.assign(CONV.transpose(2, 3, 1, 0))
        # flattened in Keras's order of axes: rows, columns, channels
        head = HEAD.reshape(5, 4, 4, 4).transpose(2, 3, 1, 0).reshape(64, 5)
        model.get_layer("head").kernel.assign(head)
    return model


def images() -> Array:
    """Return what the model is run on."""
    return np.ascontiguousarray(IMAGES.transpose(0, 2, 3, 1))
