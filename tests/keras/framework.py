"""The Keras that a run tests, and what its versions and engines spell differently.

Keras 2 is tested where TensorFlow takes it: with TF_USE_LEGACY_KERAS=1, or with TensorFlow 2.15, whose own Keras it is.
Otherwise Keras 3 is, on the engine that KERAS_BACKEND names.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest


def _version() -> int:
    """Return which version of Keras the environment asks for; nothing is imported."""
    if os.environ.get("TF_USE_LEGACY_KERAS", "").lower() in {"1", "true"}:
        return 2
    return int(importlib.metadata.version("keras").partition(".")[0])


KERAS_VERSION: int = _version()
"""2 or 3."""

BACKEND: str = {2: "tf_keras", 3: "keras"}[KERAS_VERSION]
"""The name under which the registry knows this Keras."""


def _start_tensorflow() -> Any:
    """Return TensorFlow, started with two virtual CPUs for its distribution strategies unless it runs already."""
    started = "tensorflow" in sys.modules
    tensorflow = importlib.import_module("tensorflow")
    if not started:
        cpu = tensorflow.config.list_physical_devices("CPU")[0]
        tensorflow.config.set_logical_device_configuration(cpu, [tensorflow.config.LogicalDeviceConfiguration()] * 2)
    return tensorflow


_ON_TENSORFLOW = KERAS_VERSION == 2 or os.environ.get("KERAS_BACKEND", "tensorflow") == "tensorflow"
tf: Any = _start_tensorflow() if _ON_TENSORFLOW else None
if KERAS_VERSION == 2:
    keras: Any = tf.keras
    ENGINE = "tensorflow"
    functions: Any = SimpleNamespace(
        cast=tf.cast,
        clip=tf.clip_by_value,
        matmul=tf.matmul,
        mean=tf.reduce_mean,
        relu=tf.nn.relu,
        round=tf.round,
        transpose=tf.transpose,
    )
    nested: Any = tf.nest
else:
    keras = importlib.import_module("keras")
    ENGINE = keras.backend.backend()
    functions = keras.ops
    nested = keras.tree
# `ENGINE` is tensorflow, jax or torch; `functions` are those of tensors; `nested` has `flatten` and `map_structure`.
kl: Any = keras.layers


def internal(name: str) -> Any:
    """Return a module that trainable-keras has once for each version of Keras, such as ``engine``."""
    return importlib.import_module(f"trainable_keras.keras{KERAS_VERSION}.{name}")


def only_keras(version: int, reason: str) -> pytest.MarkDecorator:
    """Mark a test of what one version of Keras alone has."""
    return pytest.mark.skipif(version != KERAS_VERSION, reason=f"on Keras {version} only: {reason}")


def only_tensorflow(reason: str) -> pytest.MarkDecorator:
    """Mark a test of what only the TensorFlow engine has."""
    return pytest.mark.skipif(ENGINE != "tensorflow", reason=f"on TensorFlow only: {reason}")


needs_mctq = only_tensorflow("the Keras quantizers of mctq need it")
needs_two_devices = pytest.mark.skipif(
    ENGINE != "tensorflow" or len(tf.config.list_logical_devices("CPU")) < 2,
    reason="needs TensorFlow, started by this suite with two virtual CPUs",
)

FRAMEWORK: Any = internal("framework").FRAMEWORK
"""What the shared modules of trainable-keras are told of this Keras."""

to_numpy: Callable[[Any], np.ndarray] = FRAMEWORK.functions.to_numpy


# ---- tensors and variables ------------------------------------------------------------------------------------------


def tensor(values: Any, dtype: str = "float32") -> Any:
    """Return NumPy values as a tensor of the engine; bfloat16 is rounded on the way."""
    array = np.asarray(values, np.float32 if dtype != "float64" else np.float64)
    return functions.cast(tf.constant(array) if KERAS_VERSION == 2 else keras.ops.convert_to_tensor(array), dtype)


def numpy(value: Any) -> np.ndarray:
    """Return a tensor or variable as a NumPy array; bfloat16, which NumPy lacks, as float32."""
    return to_numpy(functions.cast(value, "float32") if dtype_name(value) == "bfloat16" else value)


def integers(values: Any, dtype: str = "int32") -> Any:
    """Return whole numbers or truth values as a tensor of a dtype without fractions."""
    array = np.asarray(values).astype(dtype)
    return tf.constant(array) if KERAS_VERSION == 2 else keras.ops.convert_to_tensor(array)


def new_variable(value: Any, dtype: str = "float32") -> Any:
    """Return a variable that does not train."""
    if KERAS_VERSION == 2:
        return tf.Variable(value, dtype=dtype, trainable=False)
    return keras.Variable(value, dtype=dtype, trainable=False)


def symbolic(shape: tuple[int | None, ...], dtype: str = "float32") -> Any:
    """Return what stands for a tensor while Keras finds out shapes; `shape` begins with the batch."""
    if KERAS_VERSION == 2:
        return keras.Input(shape[1:], batch_size=shape[0], dtype=dtype)
    return keras.KerasTensor(shape, dtype=dtype)


def value_of(variable: Any) -> Any:
    """Return what TensorFlow's gradient tape knows a variable as."""
    return variable if KERAS_VERSION == 2 else variable.value


def apply_gradients(optimizer: Any, gradients: Sequence[Any], variables: Sequence[Any]) -> None:
    """Let an optimizer take a step with these gradients."""
    if KERAS_VERSION == 2:
        optimizer.apply_gradients(zip(gradients, variables, strict=True))
    else:
        optimizer.apply(gradients, variables)


def dtype_name(value: Any) -> str:
    """Return the name of the dtype of a tensor or variable."""
    dtype = getattr(value, "dtype", None) or np.asarray(value).dtype
    return str(getattr(dtype, "name", None) or keras.backend.standardize_dtype(dtype))


def name_of(variable: Any) -> str:
    """Return a variable's name without those of the layers that it is in."""
    return str(variable.name).rpartition("/")[2].partition(":")[0]


def path_of(variable: Any) -> str:
    """Return a variable's name with those of the layers that it is in."""
    return str(getattr(variable, "path", variable.name)).partition(":")[0]


@contextmanager
def dtype_policy(name: str) -> Iterator[None]:
    """Let layers that are made meanwhile have a dtype policy."""
    choose = keras.config.set_dtype_policy if KERAS_VERSION == 3 else keras.mixed_precision.set_global_policy
    choose(name)
    try:
        yield
    finally:
        choose("float32")


# ---- calls and gradients --------------------------------------------------------------------------------------------


def call(layer: Any, values: np.ndarray, dtype: str = "float32", **arguments: Any) -> np.ndarray:
    """Return what a layer makes of NumPy values that it is given in a dtype."""
    return numpy(layer(tensor(values, dtype), **arguments))


def pull_back(
    function: Callable[..., Any], given: Sequence[Any], upstream: Any, variables: Sequence[Any] = ()
) -> list[np.ndarray]:
    """Return the gradients of a function's arguments, and of variables that it uses; zero where none arrives.

    Parameters
    ----------
    function : callable
        Of tensors; returns one tensor, or several in a list.
    given : sequence of tensor
        Its arguments.
    upstream : tensor or list of tensor
        The gradient of what it returns.
    variables : sequence of variable
        Variables whose gradients are wanted too.
    """
    values = [value_of(each) for each in variables]
    if ENGINE == "tensorflow":
        with tf.GradientTape() as tape:
            tape.watch(list(given))
            output = function(*given)
        found = tape.gradient(output, [*given, *values], output_gradients=upstream)
    elif ENGINE == "jax":
        import jax

        def pure(given: Any, values: Any) -> Any:
            with keras.StatelessScope(list(zip(variables, values, strict=True))):
                return function(*given)

        of_given, of_variables = jax.vjp(pure, list(given), values)[1](upstream)
        found = [*of_given, *of_variables]
    else:
        import torch

        for each in given:
            each.requires_grad_()
        found = torch.autograd.grad(function(*given), [*given, *values], upstream, allow_unused=True)
    return [np.zeros(()) if each is None else numpy(functions.cast(each, "float32")) for each in found]


def gradients(
    layer: Any, values: np.ndarray, upstream: np.ndarray, dtype: str = "float32", **arguments: Any
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the gradients of a layer's input and, by name, of its trainable variables."""
    variables = list(layer.trainable_variables)
    of_input, *of_variables = pull_back(
        lambda x: layer(x, **arguments), [tensor(values, dtype)], tensor(upstream, dtype), variables
    )
    return of_input, dict(zip(map(name_of, variables), of_variables, strict=True))
