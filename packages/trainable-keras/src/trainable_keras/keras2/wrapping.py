"""From a float model and a recipe to a model that trains quantized."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from trainable_core.errors import ModelError
from trainable_keras.keras2.copying import Copier, children, plain_copy
from trainable_keras.keras2.engine import keras, untracked
from trainable_keras.keras2.folding import folded_copy, passing, plan_folding
from trainable_keras.keras2.holder import ActivationQuantizationHolder
from trainable_keras.keras2.layers import is_layer, kind_of, layer_info
from trainable_keras.keras2.quantizers.base import BaseKerasTrainableQuantizer
from trainable_keras.keras2.tracing import graph_of, layers_within, op_of
from trainable_keras.keras2.wrapper import QuantizationWrapper
from trainable_keras.wrapping import STATE, Framework, Recipe

__all__ = ["STATE", "Recipe", "check_keras", "note", "parts_of", "state_of", "trainable_quantizers", "wrap"]


def check_keras(model: Any, what: str) -> None:
    """Raise ModelError, with what to do, for an object that is not of this process's Keras 2."""
    if isinstance(model, keras.layers.Layer):
        return
    found = f"{type(model).__module__}.{type(model).__name__}"
    home = keras.layers.Layer.__module__.partition(".")[0]
    for name in ("tf_keras", "keras"):
        if any(cls.__module__.partition(".")[0] == name for cls in type(model).__mro__):
            version = str(getattr(sys.modules.get(name), "__version__", ""))
            if version.startswith("3."):
                raise ModelError(
                    f"{what} is a Keras 3 object ({found}), and tf.keras is Keras 2 in this process",
                    "pip install trainable-keras and use trainable_keras, without TF_USE_LEGACY_KERAS in the "
                    "environment; or build the model with tf.keras.",
                )
            raise ModelError(
                f"{what} is an object of {name} ({found}), and tf.keras is {home} in this process",
                "build the model with tf.keras.",
            )
    raise ModelError(f"{what} must be a tf.keras.Model, got {found}")


def _map_symbolic(function: Callable[[Any], Any], values: Any) -> Any:
    def symbolic(value: Any) -> Any:  # what is_keras_tensor asks, but of tensors only
        return function(value) if hasattr(value, "_keras_history") else value

    return tf.nest.map_structure(symbolic, values)


def _keep(model: Any, name: str, value: Any) -> None:
    with untracked(model):
        setattr(model, name, value)


_FRAMEWORK = Framework(
    backend="tf_keras",
    package="trainable_keras",
    layer=keras.layers.Layer,
    quantizer=BaseKerasTrainableQuantizer,
    wrapper=QuantizationWrapper,
    holder=ActivationQuantizationHolder,
    copier=Copier,
    check=check_keras,
    layers_within=layers_within,
    children=children,
    graph=graph_of,
    is_layer=is_layer,
    kind=kind_of,
    op=op_of,
    info=layer_info,
    folding=plan_folding,
    plain_copy=plain_copy,
    folded_copy=folded_copy,
    passing=passing,
    map_symbolic=_map_symbolic,
    keep=_keep,
)

parts_of, state_of, note = _FRAMEWORK.parts_of, _FRAMEWORK.state_of, _FRAMEWORK.note
trainable_quantizers = _FRAMEWORK.quantizers_in


def wrap(model: Any, recipe: Recipe) -> Any:
    """Return a new model whose weights and activations are quantized while it trains.

    Parameters
    ----------
    model : tf.keras.Model
        The float model, built; left untouched.
    recipe : QuantizationRecipe, mapping, or path
        Which tensors, on which grid, trained how.

    Returns
    -------
    tf.keras.Model
        A copy of the model, not compiled, in which layers sit in quantization wrappers and activation quantizers in
        holders. It needs `calibrate` before its first call.

    Raises
    ------
    ModelError
        When `model` is no Keras 2 model, is not built, or can't be copied.
    QuantizerStateError
        When it is wrapped already.
    TrainableError, pydantic.ValidationError
        When the recipe doesn't fit; the message names field or layer.
    """
    return _FRAMEWORK.wrap(model, recipe)
