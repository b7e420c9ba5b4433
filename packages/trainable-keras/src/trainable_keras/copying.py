"""Copies a model layer by layer, with other layers in the place of some; the given model is left untouched.

Graphs (functional and Sequential models) are run through anew; every other layer is made again from its own config, and
the layers it holds as attributes are put in. Values of all variables are copied.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from trainable_core.errors import ModelError, TrainableError
from trainable_keras.engine import to_numpy
from trainable_keras.layers import kind_of
from trainable_keras.tracing import direct_layers, is_graph

Replace = Callable[[Any, str], Any | None]
"""Given a layer and its name, returns what comes in its place, or None for a plain copy."""

_GIVEN_AFTER = {"dtype", "name", "trainable"}
"""What Keras adds to every layer's config, whether the constructor takes it or not."""

CallOperation = Callable[..., Any]
"""``call(operation, name, *args, **kwargs)`` calls a functional operation at its place in a copied graph."""


def children(layer: Any) -> Iterator[tuple[str, Any]]:
    """Yield (name, layer) of the layers that a layer holds in attributes; names lead into lists and dictionaries."""
    held = {id(each) for each in direct_layers(layer)}
    for attribute, value in _attributes(layer):
        yield from _layers_in(value, attribute, held)


def _attributes(layer: Any) -> list[tuple[str, Any]]:
    """Return a layer's attributes without those that Keras and TensorFlow keep their own account in."""
    return [(name, value) for name, value in vars(layer).items() if name != "_layers" and not name.startswith("_self_")]


def _layers_in(value: Any, name: str, held: set[int]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, keras.layers.Layer):
        if id(value) in held:
            yield name, value
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _layers_in(item, f"{name}.{index}", held)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _layers_in(item, f"{name}.{key}", held)


def join(prefix: str, name: str) -> str:
    """Return a layer's full name."""
    return f"{prefix}.{name}" if prefix else name


class Copier:
    """Copies one model.

    Parameters
    ----------
    replace : callable
        What comes in the place of which layer.
    call_operation : callable, optional
        How functional operations are called; by default as they are.
    """

    def __init__(self, replace: Replace, call_operation: CallOperation | None = None) -> None:
        self._replace = replace
        self._call_operation = call_operation
        self._copies: dict[int, Any] = {}
        self._names: dict[int, str] = {}

    def copy(self, layer: Any, name: str = "") -> Any:
        """Return the copy of a layer; the same one each time it is met.

        Raises
        ------
        ModelError
            When Keras can't make the layer again from its config; names the layer.
        """
        if id(layer) not in self._copies:
            self._copies[id(layer)] = self._copy(layer, name)
        return self._copies[id(layer)]

    def _copy(self, layer: Any, name: str) -> Any:
        replaced = self._replace(layer, name)
        if replaced is not None:
            return replaced
        if is_graph(layer):
            return self._copy_graph(layer, name)
        if kind_of(layer) is None and any(True for _ in children(layer)):
            return self._copy_holding(layer, name)
        return plain_copy(layer, name)

    def _copy_graph(self, model: Any, prefix: str) -> Any:
        def clone(operation: Any) -> Any:
            if isinstance(operation, keras.layers.Layer):
                return self.copy(operation, join(prefix, operation.name))
            made = type(operation).from_config(operation.get_config())
            self._names[id(made)] = join(prefix, operation.name)
            return made

        def call(operation: Any, *args: Any, **kwargs: Any) -> Any:
            if self._call_operation is None or isinstance(operation, keras.layers.Layer):
                return operation(*args, **kwargs)
            return self._call_operation(operation, self._names[id(operation)], *args, **kwargs)

        compiled, model.compiled = model.compiled, False  # a copy is compiled by whoever trains it
        try:
            functional = {} if isinstance(model, keras.Sequential) else {"call_function": call}
            copied = keras.models.clone_model(model, clone_function=clone, **functional)
        except TrainableError:
            raise
        except Exception as error:
            raise ModelError(f"model {prefix or model.name!r} can't be copied: {error}") from error
        finally:
            model.compiled = compiled
        copied.trainable = copied.trainable and model.trainable
        return copied

    def _copy_holding(self, layer: Any, prefix: str) -> Any:
        copied = _made_again(layer, prefix)
        tracker = copied._tracker  # noqa: SLF001 - there is no public way to replace a layer of a built one
        locked = tracker.locked
        tracker.unlock()
        for old in direct_layers(copied):
            tracker.untrack(old)
        held = {id(each) for each in direct_layers(layer)}
        for attribute, value in _attributes(layer):
            if any(True for _ in _layers_in(value, attribute, held)):
                setattr(copied, attribute, self._copy_value(value, join(prefix, attribute), held))
        copied.built = layer.built
        if locked:
            tracker.lock()
        _copy_values(own_variables(layer), own_variables(copied), prefix, layer)
        return copied

    def _copy_value(self, value: Any, name: str, held: set[int]) -> Any:
        if isinstance(value, keras.layers.Layer):
            return self.copy(value, name) if id(value) in held else value
        if isinstance(value, dict):
            return {key: self._copy_value(item, f"{name}.{key}", held) for key, item in value.items()}
        if isinstance(value, list | tuple):
            items = [self._copy_value(item, f"{name}.{index}", held) for index, item in enumerate(value)]
            return tuple(items) if isinstance(value, tuple) else items
        return value


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
    try:
        if hasattr(type(layer), "around"):  # a wrapper; its layer's class need not be one that Keras can look up
            copied = layer.around(_made_again(layer.layer, name))
        else:
            copied = _from_config(layer, {**layer.get_config(), **changes})
        build_config = layer.get_build_config() if layer.built else None
        if build_config and not copied.built:
            copied.build_from_config(build_config)
            copied.built = True
    except TrainableError:
        raise
    except Exception as error:
        raise ModelError(
            f"layer {name or layer.name!r} ({type(layer).__name__}) can't be copied: {error}",
            "give its class a get_config that from_config can read.",
        ) from error
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


def own_variables(layer: Any) -> list[Any]:
    """Return a layer's variables without those of the layers it holds."""
    inside = {id(variable) for each in direct_layers(layer) for variable in each.variables}
    return [variable for variable in layer.variables if id(variable) not in inside]


def _copy_values(old: list[Any], new: list[Any], name: str, layer: Any) -> None:
    shapes = [[tuple(variable.shape) for variable in variables] for variables in (old, new)]
    if shapes[0] != shapes[1]:
        raise ModelError(
            f"layer {name or layer.name!r} ({type(layer).__name__}) can't be copied: made again from its config it "
            f"has variables of shapes {shapes[1]}, not {shapes[0]}",
            "create its variables and layers in __init__ or build, from what get_config returns.",
        )
    for source, target in zip(old, new, strict=True):
        target.assign(np.array(to_numpy(source)))  # a copy: JAX would share the buffer, and training gives it away
        target.trainable = source.trainable
