"""How values of TensorFlow that a layer may hold are copied: variables, lookup tables, functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

_RUNTIME = ("tensorflow.core", "tensorflow.python.eager", "tensorflow.python.saved_model")
"""Beginnings of the names of modules whose objects belong to the process, or were read from a SavedModel."""

_CONTAINERS = frozenset({"ListWrapper", "_DictWrapper", "_TupleWrapper"})


def is_shared(value: Any) -> bool:
    """Return whether a value can't change, so that a copied layer shares it."""
    unchanging = (
        tf.Tensor,
        tf.DType,
        tf.TensorShape,
        tf.TypeSpec,
        tf.lookup.StaticHashTable,
        tf.data.Dataset,
        tf.distribute.Strategy,
        tf.Graph,
    )
    if isinstance(value, unchanging):
        return True
    of_functions = hasattr(value, "python_function") and hasattr(value, "_clone")
    return type(value).__module__.startswith(_RUNTIME) and not of_functions


def copied(value: Any) -> Any:
    """Return a copy of a variable, a mutable table or a function that was traced; None of anything else."""
    if isinstance(value, tf.Variable):
        return _variable(value)
    if isinstance(value, tf.lookup.experimental.MutableHashTable):
        table = tf.lookup.experimental.MutableHashTable(value.key_dtype, value.value_dtype, value._default_value)  # noqa: SLF001 - kept nowhere else
        table.insert(*value.export())
        return table
    return None


def is_container(value: Any) -> bool:
    """Return whether a value is something of TensorFlow's that only holds others: a reference, a list, a dictionary."""
    if type(value).__name__ == "TrackableReference":
        return True
    return type(value).__name__ in _CONTAINERS and isinstance(value, tf.__internal__.tracking.Trackable)


def container(value: Any, copied: Callable[[Any], Any], later: Callable[[Callable[[], None]], None]) -> Any:
    """Return a copy of such a value.

    Parameters
    ----------
    value : reference, list, dict or tuple
        The value.
    copied : callable
        Returns the copy of what is in it.
    later : callable
        Has a function called when everything is copied.
    """
    if type(value).__name__ == "TrackableReference":
        return type(value)(value.name, copied(value.ref))
    if type(value).__name__ == "_TupleWrapper":
        return type(value)(copied(value.__wrapped__))
    made = type(value)([] if isinstance(value, list) else {})

    def fill() -> None:
        if isinstance(value, list):
            made.extend([copied(each) for each in value])
        else:
            made.update({copied(key): copied(each) for key, each in value.items()})

    later(fill)
    return made


def _variable(value: Any) -> Any:
    with tf.init_scope():
        return tf.Variable(
            value.numpy(),
            trainable=value.trainable,
            name=value.name.partition(":")[0],
            dtype=value.dtype,
            constraint=value.constraint,
            synchronization=value.synchronization,
            aggregation=value.aggregation,
            shape=value.shape,
        )
