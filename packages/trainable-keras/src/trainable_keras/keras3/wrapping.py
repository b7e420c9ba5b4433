"""From a float model and a recipe to a model that trains quantized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from trainable_core.errors import ModelError
from trainable_keras.keras3.copying import Copier, children, plain_copy
from trainable_keras.keras3.folding import folded_copy, passing, plan_folding
from trainable_keras.keras3.holder import ActivationQuantizationHolder
from trainable_keras.keras3.layers import is_layer, kind_of, layer_info
from trainable_keras.keras3.quantizers.base import BaseKerasTrainableQuantizer
from trainable_keras.keras3.tracing import graph_of, layers_within, op_of
from trainable_keras.keras3.wrapper import QuantizationWrapper
from trainable_keras.wrapping import STATE, Framework, Recipe

__all__ = ["STATE", "Recipe", "check_keras", "note", "parts_of", "state_of", "trainable_quantizers", "wrap"]


def check_keras(model: Any, what: str) -> None:
    """Raise ModelError, with what to do, for an object that is not Keras 3's."""
    if isinstance(model, keras.layers.Layer):
        return
    layers = {cls.__module__.partition(".")[0] for cls in type(model).__mro__ if cls.__name__ == "Layer"}
    if layers & {"keras", "tf_keras"}:
        raise ModelError(
            f"{what} is a Keras 2 object ({type(model).__module__}.{type(model).__name__}), and this is Keras "
            f"{keras.__version__}",
            "use trainable_keras.wrap, which asks the model; or build the model with keras instead of tf_keras.",
        )
    raise ModelError(f"{what} must be a keras.Model, got {type(model).__module__}.{type(model).__name__}")


def _check_lambdas(model: Any) -> None:
    for layer in layers_within(model):
        if isinstance(layer, keras.layers.Lambda):
            raise ModelError(
                f"layer {layer.name!r} is a Lambda: what it computes, and with which variables, can't be seen",
                "write it with keras.ops in a functional model, or as a layer class of your own with a get_config.",
            )


def _map_symbolic(function: Callable[[Any], Any], values: Any) -> Any:
    def symbolic(value: Any) -> Any:
        return function(value) if isinstance(value, keras.KerasTensor) else value

    return keras.tree.map_structure(symbolic, values)


_FRAMEWORK = Framework(
    backend="keras",
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
    check_layers=_check_lambdas,
)

parts_of, state_of, note = _FRAMEWORK.parts_of, _FRAMEWORK.state_of, _FRAMEWORK.note
trainable_quantizers = _FRAMEWORK.quantizers_in


def wrap(model: Any, recipe: Recipe) -> Any:
    """Return a new model whose weights and activations are quantized while it trains.

    Parameters
    ----------
    model : keras.Model
        The float model, built; left untouched.
    recipe : QuantizationRecipe, mapping, or path
        Which tensors, on which grid, trained how.

    Returns
    -------
    keras.Model
        A copy of the model, not compiled, in which layers sit in quantization wrappers and activation quantizers in
        holders. It needs `calibrate` before its first call.

    Raises
    ------
    ModelError
        When `model` is no Keras 3 model, is not built, has a Lambda layer, or can't be copied.
    QuantizerStateError
        When it is wrapped already.
    TrainableError, pydantic.ValidationError
        When the recipe doesn't fit; the message names field or layer.
    """
    return _FRAMEWORK.wrap(model, recipe)
