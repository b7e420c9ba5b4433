"""What `keras.ops` does not have, written for each engine: bits of floats, and gradients of one's own.

Also what keeps Keras from rewriting the library's errors, and two guards that keep an engine's compiler from replacing
a division by the multiplication with a rounded reciprocal. Measured on 100,000 random numbers: ``x / 15`` is another
float32 in 63 per cent of the cases in a TensorFlow graph, under XLA, and in JAX; ``1 / x`` in 33 per cent of the cases
in a TensorFlow graph.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from trainable_core.errors import FrameworkError, TrainableError

# The extras ask for 3.10, but the distribution's own requirement has to admit Keras 2, and so it admits 3.0 to 3.9.
if tuple(map(int, keras.__version__.split(".")[:2])) < (3, 10):
    raise FrameworkError(
        "keras",
        f"keras is Keras {keras.__version__} in this process, and this backend needs Keras 3, version 3.10 or newer",
        "pip install 'keras>=3.10,<4'; for a model of Keras 2, trainable_keras.wrap needs no Keras 3.",
    )

from keras import ops
from keras.src.backend.common import global_state  # there are no public names for these
from keras.src.backend.common.symbolic_scope import in_symbolic_scope
from keras.src.backend.common.variables import AutocastScope

Tensor = Any
"""A tensor of the engine that Keras runs on."""

ENGINE: str = keras.backend.backend()
"""Name of the engine: ``tensorflow``, ``jax`` or ``torch``."""

if ENGINE == "tensorflow":
    import tensorflow as tf

    from trainable_keras import tensorflow_values

    def read(variable: keras.Variable) -> Tensor:
        """Return a variable's value as a tensor: TensorFlow's own gradients take no variables."""
        return tf.convert_to_tensor(variable.value)

    def replicas() -> int:
        """Return how many replicas of the model a strategy runs at once; each has its own part of a batch."""
        context = tf.distribute.get_replica_context()
        return 1 if context is None else int(context.num_replicas_in_sync)

    def is_shared(value: Any) -> bool:
        """Return whether a value of the engine can't change, so that a copied layer shares it."""
        return tensorflow_values.is_shared(value)

    def copied_tensor(value: Any) -> Any:
        """Return a copy of a value of the engine that can change, None of anything else."""
        return tensorflow_values.copied(value)

    is_container, copied_container = tensorflow_values.is_container, tensorflow_values.container

    def float_bits(x: Tensor) -> Tensor:
        """Return the bits of a float32 tensor as int32."""
        return tf.bitcast(x, tf.int32)

    def bits_float(x: Tensor) -> Tensor:
        """Return the float32 tensor that int32 bits stand for."""
        return tf.bitcast(x, tf.float32)

elif ENGINE == "jax":
    import jax

    def read(variable: keras.Variable) -> Tensor:
        """Return a variable's value as a tensor."""
        return variable.value

    def is_container(value: Any) -> bool:  # noqa: ARG001 - TensorFlow has some
        """Return False: the engine puts no containers of its own around lists and dictionaries."""
        return False

    def replicas() -> int:
        """Return 1: an array of JAX is the whole batch, on however many devices its parts are."""
        return 1

    def is_shared(value: Any) -> bool:  # noqa: ARG001 - the other engines ask
        """Return False: training gives the buffers of arrays away."""
        return False

    def copied_tensor(value: Any) -> Any:
        """Return a copy of an array, None of anything else."""
        return jax.numpy.array(value, copy=True) if isinstance(value, jax.Array) else None

    def float_bits(x: Tensor) -> Tensor:
        """Return the bits of a float32 tensor as int32."""
        return jax.lax.bitcast_convert_type(x, jax.numpy.int32)

    def bits_float(x: Tensor) -> Tensor:
        """Return the float32 tensor that int32 bits stand for."""
        return jax.lax.bitcast_convert_type(x, jax.numpy.float32)

else:
    import torch

    def read(variable: keras.Variable) -> Tensor:
        """Return a variable's value as a tensor."""
        return variable.value

    def is_container(value: Any) -> bool:  # noqa: ARG001 - TensorFlow has some
        """Return False: the engine puts no containers of its own around lists and dictionaries."""
        return False

    def replicas() -> int:
        """Return how many processes of a job train one model; each has its own part of a batch."""
        group = torch.distributed
        return group.get_world_size() if group.is_available() and group.is_initialized() else 1

    def is_shared(value: Any) -> bool:
        """Return whether a value of the engine can't change, so that a copied layer shares it."""
        return isinstance(value, torch.dtype | torch.device | torch.Size)

    def copied_tensor(value: Any) -> Any:
        """Return a copy of a tensor or parameter without its gradient, None of anything else."""
        if not isinstance(value, torch.Tensor):
            return None
        copied = value.detach().clone()
        if isinstance(value, torch.nn.Parameter):
            return torch.nn.Parameter(copied, requires_grad=value.requires_grad)
        return copied.requires_grad_(value.requires_grad)

    def float_bits(x: Tensor) -> Tensor:
        """Return the bits of a float32 tensor as int32."""
        return x.view(torch.int32)

    def bits_float(x: Tensor) -> Tensor:
        """Return the float32 tensor that int32 bits stand for."""
        return x.view(torch.float32)


def of_tensorflow(value: Any, question: str) -> Any:
    """Return what `trainable_keras.tensorflow_values` says of a value of TensorFlow, None of any other.

    Preprocessing layers keep some on every engine.
    """
    if type(value).__module__.partition(".")[0] != "tensorflow":
        return None
    return getattr(importlib.import_module("trainable_keras.tensorflow_values"), question)(value)


def divide_by(x: Tensor, number: float) -> Tensor:
    """Return ``x / number`` correctly rounded, for `x` >= 0, in every compiler.

    The divisor looks as if it depended on `x`, so no compiler takes it for a constant.
    """
    return x / ops.where(x >= 0, ops.cast(number, x.dtype), ops.cast(number + 1, x.dtype))


def reciprocal(x: Tensor) -> Tensor:
    """Return ``1 / x`` correctly rounded, for `x` > 0, in every compiler; see `divide_by`."""
    return ops.where(x > 0, ops.cast(1, x.dtype), ops.cast(2, x.dtype)) / x


def foreign_tensorflow(x: Any) -> Any | None:
    """Return TensorFlow's module where `x` stands for a tensor in a graph of it, and Keras runs on another engine."""
    tensorflow = None if ENGINE == "tensorflow" else sys.modules.get("tensorflow")
    return tensorflow if tensorflow is not None and tensorflow.is_symbolic_tensor(x) else None


def with_gradient(forward: Callable[..., Tensor], backward: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Tensor]:
    """Return `forward` with a gradient of its own.

    Parameters
    ----------
    forward : callable
        Of tensors; returns one tensor.
    backward : callable
        ``backward(upstream, output, *arguments)`` returns the gradient of each argument.
    """

    @ops.custom_gradient  # type: ignore[untyped-decorator] # keras.ops is untyped
    def function(*arguments: Tensor) -> tuple[Tensor, Callable[..., tuple[Tensor, ...]]]:
        output = forward(*arguments)

        def gradient(*given: Tensor, upstream: Tensor = None) -> tuple[Tensor, ...]:
            if upstream is None:  # torch passes the arguments again, and the upstream gradient by name
                (upstream,) = given
            return backward(upstream, output, *arguments)

        return output, gradient

    return function  # type: ignore[no-any-return] # keras.ops is untyped


def call_context() -> Any:
    """Return what Keras knows of the call that runs in this thread, None when no layer is being called."""
    return global_state.get_global_attribute("current_call_ctx")


def dtype_read(variable: keras.Variable) -> str:
    """Return the dtype in which a layer reads a variable: mixed precision casts it."""
    return str(keras.backend.standardize_dtype(variable.value.dtype))


def read_uncast(variable: keras.Variable) -> Tensor:
    """Return a variable's value as a tensor, also while mixed precision casts what layers read."""
    with AutocastScope(None):
        return read(variable)


def infers_shapes() -> bool:
    """Return whether Keras only asks for shapes and dtypes: it calls a layer without a spec of its own for that."""
    return bool(in_symbolic_scope())


@contextmanager
def errors_as_they_are() -> Iterator[None]:
    """Keep Keras and AutoGraph, which rewrite what a layer raises, from changing the type of the library's errors."""
    try:
        yield
    except TrainableError as error:
        vars(error)["_keras_call_info_injected"] = True
        vars(error)["ag_pass_through"] = True
        raise


def float_tensor(values: Any) -> Tensor:
    """Return NumPy values as a float32 tensor."""
    return ops.convert_to_tensor(np.asarray(values, np.float32))


def to_numpy(value: Any) -> NDArray[Any]:
    """Return the value of a tensor or variable.

    TensorFlow is asked itself: Keras goes through ``__array__``, of which NumPy 2 warns.
    """
    tensor = read(value) if isinstance(value, keras.Variable) else ops.convert_to_tensor(value)
    array: NDArray[Any] = np.array(tensor.numpy()) if ENGINE == "tensorflow" else ops.convert_to_numpy(tensor)
    return array
