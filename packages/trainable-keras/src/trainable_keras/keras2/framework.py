"""Keras 2 as the shared code sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from trainable_core.errors import ModelError
from trainable_keras.framework import Framework, functions_run_eagerly
from trainable_keras.keras2.copying import Copier, listed, remade, rerun, strategy_of
from trainable_keras.keras2.engine import keras, short_name, untracked
from trainable_keras.keras2.folding import FoldedBatchNormalization
from trainable_keras.keras2.functions import FUNCTIONS
from trainable_keras.keras2.holder import ActivationQuantizationHolder
from trainable_keras.keras2.layers import TYPES, is_layer
from trainable_keras.keras2.mctq import stock_copy
from trainable_keras.keras2.quantizers import BaseKerasTrainableQuantizer
from trainable_keras.keras2.tracing import function_of, graph_of, op_of
from trainable_keras.keras2.wrapper import KIT, QuantizationWrapper


class Keras2(Framework):
    """TensorFlow's Keras, where that is Keras 2."""

    backend = "tf_keras"
    file_format = "trainable-keras2"
    module = keras
    functions = FUNCTIONS
    types = TYPES
    quantizer = BaseKerasTrainableQuantizer
    wrapper = QuantizationWrapper
    holder = ActivationQuantizationHolder
    passing = FoldedBatchNormalization
    copier = Copier
    stock_copy = staticmethod(stock_copy)
    kit = KIT
    applies = "apply_gradients"
    restarts_random = True  # their state is in the kernels of a graph

    graph = staticmethod(graph_of)
    is_layer = staticmethod(is_layer)
    op = staticmethod(op_of)
    function = staticmethod(function_of)
    remade = staticmethod(remade)
    rerun = staticmethod(rerun)
    strategy_of = staticmethod(strategy_of)
    created_variables = staticmethod(listed)
    variable_name = staticmethod(short_name)

    @staticmethod
    def dtype_policy(layer: Any) -> Any:
        """Return a layer's dtype policy, as a constructor takes it."""
        return layer._dtype_policy  # noqa: SLF001 - not public in TensorFlow 2.15

    @staticmethod
    def variables(model: Any) -> list[Any]:
        """Return a model's variables in its order."""
        return list(model.weights)

    @staticmethod
    def assign(variable: Any, value: NDArray[Any]) -> None:
        """Set a variable to values, which are copied and cast to its dtype."""
        variable.assign(value.astype(variable.dtype.as_numpy_dtype))

    @staticmethod
    def note_of(size: int) -> Any:
        """Return a float32 variable for some numbers that a training step notes, which no model knows of."""
        return tf.Variable(np.full(size, np.nan, np.float32), trainable=False, name="note")

    @staticmethod
    def pull_back(call: Callable[[], Any], variables: Mapping[str, Any], upstream: NDArray[Any]) -> list[Any | None]:
        """Return the gradients of ``sum(upstream * call())`` by variables; None where none arrives."""
        with tf.GradientTape() as tape:
            output = call()
        return list(tape.gradient(output, list(variables.values()), tf.cast(tf.constant(upstream), output.dtype)))

    def check(self, model: Any, what: str) -> None:
        """Raise ModelError for a model of another Keras 2 than TensorFlow's: both of its packages may be installed."""
        if not isinstance(model, keras.layers.Layer):
            home = keras.layers.Layer.__module__.partition(".")[0]
            raise ModelError(
                f"{what} is a {type(model).__module__}.{type(model).__name__}, and tf.keras is {home} in this process",
                "build the model with tf.keras.",
            )

    @staticmethod
    def keep(model: Any, name: str, value: Any) -> None:
        """Set an attribute of a model as it is."""
        with untracked(model):
            setattr(model, name, value)

    @staticmethod
    def eagerly() -> AbstractContextManager[None]:
        """Return a context in which calls run eagerly, so that values are seen."""
        return functions_run_eagerly(tf)

    @staticmethod
    def flat(values: Any) -> list[Any]:
        """Return nested values in a list."""
        return list(tf.nest.flatten(values))

    @staticmethod
    def map_symbolic(function: Callable[[Any], Any], values: Any) -> Any:
        """Return nested values with `function` of each symbolic tensor in its place."""

        def symbolic(value: Any) -> Any:  # what is_keras_tensor asks, but of tensors only
            return function(value) if hasattr(value, "_keras_history") else value

        return tf.nest.map_structure(symbolic, values)


FRAMEWORK = Keras2()
