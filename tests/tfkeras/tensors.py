"""Between NumPy and TensorFlow: calls and gradients of a layer as arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf


def tensor(values: Any, dtype: str = "float32") -> Any:
    """Return NumPy values as a tensor; bfloat16 is rounded on the way."""
    return tf.cast(tf.constant(np.asarray(values, np.float32 if dtype != "float64" else np.float64)), dtype)


def numpy(value: Any) -> np.ndarray:
    """Return a tensor or variable as a NumPy array."""
    return np.array(tf.convert_to_tensor(value).numpy())


def call(layer: Any, values: np.ndarray, dtype: str = "float32", **arguments: Any) -> np.ndarray:
    """Return what a layer makes of NumPy values given in a dtype."""
    return numpy(layer(tensor(values, dtype), **arguments))


def short(variable: Any) -> str:
    """Return a variable's name without its layer's."""
    return variable.name.rpartition("/")[2].partition(":")[0]


def gradients(
    layer: Any, values: np.ndarray, upstream: np.ndarray, dtype: str = "float32", **arguments: Any
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the gradients of a layer's input and, by name, of its trainable variables."""
    x, up = tensor(values, dtype), tensor(upstream, dtype)
    variables = list(layer.trainable_variables)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, **arguments)
    found = tape.gradient(y, [x, *variables], output_gradients=up)
    arrays = [np.zeros(()) if each is None else numpy(tf.cast(each, tf.float32)) for each in found]
    return arrays[0], dict(zip(map(short, variables), arrays[1:], strict=True))
