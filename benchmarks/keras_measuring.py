"""What is Keras's own about measuring: which Keras it is, one thread, how functions are compiled, the conditions."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
from collections.abc import Callable, Collection
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import measuring
import tensorflow as tf

MODES = ("eager", "graph", "XLA")
VERSION: str = importlib.import_module(tf.keras.layers.Layer.__module__.partition(".")[0]).__version__
BACKEND = "tf_keras" if VERSION.startswith("2.") else "keras"
"""The name in the registry."""
PART = f"Keras {VERSION[0]}, TensorFlow {'.'.join(tf.__version__.split('.')[:2])}"
"""The heading of what is measured in this environment."""


def arguments(description: str, rounds: int, peers: Collection[str] = ()) -> argparse.Namespace:
    """Return the command line's options, and set TensorFlow to one thread."""
    options = measuring.arguments(description, rounds, peers)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.keras.utils.set_random_seed(0)
    return options


def compiled(function: Callable[..., Any], mode: str) -> Callable[..., Any]:
    """Return a function as it is, as a TensorFlow graph, or as a graph that XLA compiles."""
    return function if mode == "eager" else tf.function(function, jit_compile=mode == "XLA")


def conditions() -> str:
    """Return what the numbers were measured on, in one line."""
    threads = tf.config.threading.get_intra_op_parallelism_threads()
    return (
        f"Keras {VERSION}, TensorFlow {tf.__version__}, {threads} thread, {platform.machine()} "
        f"{platform.system()}, Python {platform.python_version()}"
    )
