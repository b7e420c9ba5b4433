"""Copies a Keras 3 model; see `trainable_keras.copying`."""

from __future__ import annotations

import inspect
from typing import Any

import keras
import numpy as np

from trainable_keras.copying import (
    ModelCopier,
    check_same_shapes,
    join,
    made_again,
    own_variables,
)
from trainable_keras.graph import attributes, direct_layers, layers_in
from trainable_keras.keras3.engine import to_numpy
from trainable_keras.keras3.layers import is_layer

_GIVEN_AFTER = {"dtype", "name", "trainable"}
"""What Keras adds to every layer's config, whether the constructor takes it or not."""


class Copier(ModelCopier):
    """Copies one Keras 3 model."""

    def copy_graph(self, model: Any, prefix: str) -> Any:
        """Return a copy of a graph, its layers copied by `copy`."""
        names: dict[int, str] = {}

        def clone(operation: Any) -> Any:
            if is_layer(operation):
                return self.copy(operation, join(prefix, operation.name))
            made = type(operation).from_config(operation.get_config())
            names[id(made)] = join(prefix, operation.name)
            return made

        def call(operation: Any, *args: Any, **kwargs: Any) -> Any:
            if self.call_operation is None or is_layer(operation):
                return operation(*args, **kwargs)
            return self.call_operation(operation, names[id(operation)], args, kwargs)

        compiled, model.compiled = model.compiled, False  # a copy is compiled by whoever trains it
        try:
            functional = {} if isinstance(model, keras.Sequential) else {"call_function": call}
            copied = keras.models.clone_model(model, clone_function=clone, **functional)
        finally:
            model.compiled = compiled
        if not model.trainable:  # True would be passed on to every layer inside, frozen ones too
            copied.trainable = False
        return copied

    def copy_holding(self, layer: Any, prefix: str) -> Any:
        """Return a copy of a layer with copies of the layers it holds."""
        copied = _made_again(layer, prefix)
        tracker = copied._tracker  # noqa: SLF001 - there is no public way to replace a layer of a built one
        locked = tracker.locked
        tracker.unlock()
        for old in direct_layers(copied):
            tracker.untrack(old)
        held = {id(each) for each in direct_layers(layer)}
        for attribute, value in attributes(layer):
            if any(True for _ in layers_in(value, attribute, held)):
                setattr(copied, attribute, self.copied_value(value, join(prefix, attribute), held))
        copied.built = layer.built
        if locked:
            tracker.lock()
        _copy_values(own_variables(layer), own_variables(copied), prefix, layer)
        return copied


def plain_copy(layer: Any, name: str, **changes: Any) -> Any:
    """Return a layer made again from its config, with other values for some of it, built, with the same weights.

    Weights are copied when nothing is changed.

    Raises
    ------
    ModelError
        When Keras can't; names the layer.
    """
    copied = _made_again(layer, name, **changes)
    if not changes:
        _copy_values(layer.variables, copied.variables, name, layer)
    return copied


def _made_again(layer: Any, name: str, **changes: Any) -> Any:
    with made_again(layer, name):
        if hasattr(type(layer), "around"):  # a wrapper; its layer's class need not be one that Keras can look up
            copied = layer.around(_made_again(layer.layer, name))
        else:
            copied = _from_config(layer, {**layer.get_config(), **changes})
        build_config = layer.get_build_config() if layer.built else None
        if build_config and not copied.built:
            copied.build_from_config(build_config)
            copied.built = True
    return copied


def _from_config(layer: Any, config: dict[str, Any]) -> Any:
    """Return a layer of the same class; one whose constructor takes no name, dtype or trainable is given them after."""
    parameters = inspect.signature(type(layer).__init__).parameters
    variadic = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    foreign = set(config) - set(parameters)
    if variadic or not foreign or foreign - _GIVEN_AFTER:
        return type(layer).from_config(config)
    made = type(layer).from_config({key: value for key, value in config.items() if key not in foreign})
    made.name, made.trainable = layer.name, layer.trainable
    if "dtype" in foreign:
        made.dtype_policy = layer.dtype_policy
    return made


def _copy_values(old: list[Any], new: list[Any], name: str, layer: Any) -> None:
    check_same_shapes(old, new, name, layer)
    for source, target in zip(old, new, strict=True):
        target.assign(np.array(to_numpy(source)))  # a copy: JAX would share the buffer, and training gives it away
        target.trainable = source.trainable
