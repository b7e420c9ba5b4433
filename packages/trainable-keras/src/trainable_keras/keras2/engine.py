"""TensorFlow's Keras, which must be Keras 2, and what both lack: bits of floats, gradients of one's own.

Also the two guards that keep a graph compiler from replacing a division by the multiplication with a rounded
reciprocal. Measured on 100,000 random numbers in a TensorFlow graph: ``x / 15`` is another float32 in 63 per cent of
the cases, ``1 / x`` in 33 per cent.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from trainable_core.errors import FrameworkError

Tensor = Any
"""A TensorFlow tensor."""

_INSTALL = "pip install tf-keras, and set TF_USE_LEGACY_KERAS=1 before TensorFlow is imported"


def _keras_2() -> Any:
    """Return TensorFlow's Keras; FrameworkError unless it is Keras 2.

    What counts is the Keras in this process, not a version of TensorFlow: the switch TF_USE_LEGACY_KERAS decides.
    """
    try:
        layer = tf.keras.layers.Layer
    except (ImportError, AttributeError) as error:
        problem = f"TensorFlow {tf.__version__} has no Keras: {error}"
        hint = f"{_INSTALL}; with TensorFlow 2.15, whose own Keras is Keras 2, leave TF_USE_LEGACY_KERAS unset."
        raise FrameworkError("tf_keras", problem, hint) from error
    root = importlib.import_module(layer.__module__.partition(".")[0])
    version = str(getattr(root, "__version__", ""))
    if not version.startswith("2."):
        raise FrameworkError(
            "tf_keras",
            f"tf.keras is Keras {version} in this process, and this backend needs Keras 2",
            f"{_INSTALL}; or build the model with Keras 3, which needs neither.",
        )
    return tf.keras


keras: Any = _keras_2()


F = TypeVar("F", bound=Callable[..., Any])


def unconverted(function: F) -> F:
    """Return a method that AutoGraph runs as it is; not for a layer's own `call`, whose signature Keras reads."""
    made: F = tf.autograph.experimental.do_not_convert(function)
    return made


def read(variable: Any) -> Tensor:
    """Return a variable's value as a tensor: TensorFlow's own gradients take no variables."""
    return tf.convert_to_tensor(variable)


def float_bits(x: Tensor) -> Tensor:
    """Return the bits of a float32 tensor as int32."""
    return tf.bitcast(x, tf.int32)


def bits_float(x: Tensor) -> Tensor:
    """Return the float32 tensor that int32 bits stand for."""
    return tf.bitcast(x, tf.float32)


def divide_by(x: Tensor, number: float) -> Tensor:
    """Return ``x / number`` correctly rounded, for `x` >= 0, in every compiler.

    The divisor looks as if it depended on `x`, so no compiler takes it for a constant.
    """
    return x / tf.where(x >= 0, tf.cast(number, x.dtype), tf.cast(number + 1, x.dtype))


def reciprocal(x: Tensor) -> Tensor:
    """Return ``1 / x`` correctly rounded, for `x` > 0, in every compiler; see `divide_by`."""
    return tf.where(x > 0, tf.cast(1, x.dtype), tf.cast(2, x.dtype)) / x


def with_gradient(forward: Callable[..., Tensor], backward: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Tensor]:
    """Return `forward` with a gradient of its own.

    Parameters
    ----------
    forward : callable
        Of tensors; returns one tensor.
    backward : callable
        ``backward(upstream, output, *arguments)`` returns the gradient of each argument.
    """

    @tf.custom_gradient  # type: ignore[untyped-decorator] # TensorFlow is untyped
    def function(*arguments: Tensor) -> tuple[Tensor, Callable[..., tuple[Tensor, ...]]]:
        output = forward(*arguments)

        def gradient(upstream: Tensor) -> tuple[Tensor, ...]:
            # an embedding's lookup gives the gradient of a few rows
            return backward(tf.convert_to_tensor(upstream), output, *arguments)

        return output, gradient

    return function  # type: ignore[no-any-return] # as above


def choose(training: Any, function: Callable[[bool], Tensor]) -> Tensor:
    """Return ``function(training)``; `training` may be None, a number, or a tensor known only when the graph runs."""
    if training is None or not tf.is_tensor(training):
        return function(bool(training))
    known = tf.get_static_value(training)
    if known is not None:
        return function(bool(known))
    return tf.cond(tf.cast(training, tf.bool), *(functools.partial(function, trains) for trains in (True, False)))


def replicas() -> int:
    """Return how many replicas of the model a strategy runs at once; each has its own part of a batch."""
    context = tf.distribute.get_replica_context()
    return 1 if context is None else int(context.num_replicas_in_sync)


def to_numpy(value: Any) -> NDArray[Any]:
    """Return the value of a tensor or variable, also while a graph is traced."""
    with tf.init_scope():
        array: NDArray[Any] = np.array(tf.convert_to_tensor(value).numpy())
    return array


def short_name(variable: Any) -> str:
    """Return a variable's name without its layer's."""
    return str(variable.name).rpartition("/")[2].partition(":")[0]


def plainly(error: Exception) -> Exception:
    """Return an error that Keras and AutoGraph will pass on as it is, instead of making another type of it."""
    vars(error)["_keras_call_info_injected"] = True
    vars(error)["ag_pass_through"] = True
    return error


@contextmanager
def untracked(layer: Any) -> Iterator[None]:
    """Set attributes of a layer as they are: Keras would make tracked containers of dictionaries and lists."""
    before = getattr(layer, "_self_setattr_tracking", True)
    layer._self_setattr_tracking = False  # noqa: SLF001 - there is no public way
    try:
        yield
    finally:
        layer._self_setattr_tracking = before  # noqa: SLF001 - as above
