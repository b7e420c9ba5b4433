"""Gradients of a quantizer on whatever engine Keras runs on, as NumPy arrays."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from trainable_keras.keras3.engine import ENGINE, to_numpy


def tensor(values: Any, dtype: str = "float32") -> Any:
    """Return NumPy values as a tensor of the engine; bfloat16 is rounded on the way."""
    return ops.cast(ops.convert_to_tensor(np.asarray(values, np.float32 if dtype != "float64" else np.float64)), dtype)


def numpy(value: Any) -> np.ndarray:
    """Return a tensor or variable as a NumPy array."""
    return to_numpy(value)


def call(layer: Any, values: np.ndarray, dtype: str = "float32", **arguments: Any) -> np.ndarray:
    """Return what a layer makes of NumPy values given in a dtype."""
    return numpy(layer(tensor(values, dtype), **arguments))


def gradients(
    layer: Any, values: np.ndarray, upstream: np.ndarray, dtype: str = "float32", **arguments: Any
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the gradients of a layer's input and, by name, of its trainable variables."""
    x, up = tensor(values, dtype), tensor(upstream, dtype)
    variables = list(layer.trainable_variables)
    names = [variable.name for variable in variables]
    if ENGINE == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, **arguments)
        found = tape.gradient(y, [x, *[variable.value for variable in variables]], output_gradients=up)
    elif ENGINE == "jax":
        import jax

        def function(x: Any, given: list[Any]) -> Any:
            fixed = [(variable, variable.value) for variable in layer.non_trainable_variables]
            with keras.StatelessScope([*zip(variables, given, strict=True), *fixed]):
                return layer(x, **arguments)

        _, pull = jax.vjp(function, x, [variable.value for variable in variables])
        d_x, given = pull(up)
        found = [d_x, *given]
    else:
        x.requires_grad_()
        y = layer(x, **arguments)
        found = [x, *[variable.value for variable in variables]]
        for each in found:
            each.grad = None
        y.backward(up)
        found = [each.grad for each in found]
    arrays = [np.zeros(()) if each is None else numpy(ops.cast(each, "float32")) for each in found]
    return arrays[0], dict(zip(names, arrays[1:], strict=True))
