"""Keras 3 as the shared code sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from trainable_core.errors import ModelError
from trainable_keras.copying import own_variables
from trainable_keras.framework import Framework, functions_run_eagerly
from trainable_keras.graph import layers_within
from trainable_keras.keras3.copying import Copier, remade, rerun, track_parameters
from trainable_keras.keras3.engine import ENGINE
from trainable_keras.keras3.folding import FoldedBatchNormalization
from trainable_keras.keras3.functions import FUNCTIONS
from trainable_keras.keras3.holder import ActivationQuantizationHolder
from trainable_keras.keras3.layers import TYPES, is_layer
from trainable_keras.keras3.pullback import pull_back
from trainable_keras.keras3.quantizers import BaseKerasTrainableQuantizer
from trainable_keras.keras3.tracing import function_of, graph_of, op_of
from trainable_keras.keras3.wrapper import KIT, QuantizationWrapper

if ENGINE == "tensorflow":
    import tensorflow as tf


class Keras3(Framework):
    """Keras 3, on whatever engine it runs."""

    backend = "keras"
    file_format = "trainable-keras"
    module = keras
    functions = FUNCTIONS
    types = TYPES
    quantizer = BaseKerasTrainableQuantizer
    wrapper = QuantizationWrapper
    holder = ActivationQuantizationHolder
    passing = FoldedBatchNormalization
    copier = Copier
    kit = KIT
    can_freeze_in_fit = ENGINE != "jax"
    applies = "" if ENGINE == "jax" else "apply"  # JAX compiles the step as a function without side effects

    graph = staticmethod(graph_of)
    is_layer = staticmethod(is_layer)
    op = staticmethod(op_of)
    function = staticmethod(function_of)
    remade = staticmethod(remade)
    rerun = staticmethod(rerun)
    created_variables = staticmethod(own_variables)

    @staticmethod
    def track_parameters(model: Any) -> None:
        """Let PyTorch know the variables of a model that has new ones, where it is the engine."""
        for layer in layers_within(model) if ENGINE == "torch" else ():
            track_parameters(layer)

    @staticmethod
    def forget_gradients(model: Any) -> None:
        """Take the gradients from a model's variables, where PyTorch keeps them."""
        if ENGINE == "torch":
            model.zero_grad()

    @staticmethod
    def dtype_policy(layer: Any) -> Any:
        """Return a layer's dtype policy, as a constructor takes it."""
        return layer.dtype_policy

    @staticmethod
    def variables(model: Any) -> list[keras.Variable]:
        """Return a model's variables in its order."""
        return list(model.variables)

    @staticmethod
    def variable_name(variable: keras.Variable) -> str:
        """Return a variable's name without its layer's."""
        return str(variable.name)

    @staticmethod
    def assign(variable: keras.Variable, value: NDArray[Any]) -> None:
        """Set a variable to values, which are copied and cast to its dtype."""
        dtype = keras.backend.standardize_dtype(variable.dtype)
        # always a copy: JAX would share the buffer, and training gives it away
        variable.assign(value.astype("float32" if dtype in {"float16", "bfloat16"} else dtype))

    @staticmethod
    def note_of(size: int) -> keras.Variable:
        """Return a float32 variable for some numbers that a training step notes, which no model knows of."""
        return keras.Variable(np.full(size, np.nan), dtype="float32", trainable=False, autocast=False, name="note")

    @staticmethod
    def pull_back(call: Callable[[], Any], variables: Mapping[str, Any], upstream: NDArray[Any]) -> list[Any | None]:
        """Return the gradients of ``sum(upstream * call())`` by variables; None where none arrives."""
        _, _, *found = pull_back(lambda _: call(), keras.ops.zeros(()), variables, upstream)
        return found

    def check_layers(self, model: Any) -> None:
        """Raise ModelError for a model with a Lambda layer."""
        for layer in layers_within(model):
            if isinstance(layer, keras.layers.Lambda):
                raise ModelError(
                    f"layer {layer.name!r} is a Lambda: what it computes, and with which variables, can't be seen",
                    "write it with keras.ops in a functional model, or as a layer class of your own with a get_config.",
                )

    @staticmethod
    def eagerly() -> AbstractContextManager[None]:
        """Return a context in which calls run eagerly, so that values are seen."""
        return functions_run_eagerly(tf) if ENGINE == "tensorflow" else nullcontext()

    @staticmethod
    def flat(values: Any) -> list[Any]:
        """Return nested values in a list."""
        return list(keras.tree.flatten(values))

    @staticmethod
    def map_symbolic(function: Callable[[Any], Any], values: Any) -> Any:
        """Return nested values with `function` of each symbolic tensor in its place."""

        def symbolic(value: Any) -> Any:
            return function(value) if isinstance(value, keras.KerasTensor) else value

        return keras.tree.map_structure(symbolic, values)


FRAMEWORK = Keras3()
