"""Quantization-aware training for Keras: the verbs are wrap, calibrate, train, finalize."""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    """Load a public name when it is used."""
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(import_module("trainable_keras.keras3"), name)
