"""Copies a model layer by layer, with other layers in the place of some; the given model is left untouched.

Graphs (functional and Sequential models) are run through anew; every other layer is made again from its own config, and
the layers it holds as attributes are put in. Values of all variables are copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import tensorflow as tf

from trainable_core.errors import ModelError, TrainableError
from trainable_tfkeras.engine import keras, to_numpy
from trainable_tfkeras.layers import is_operation, kind_of
from trainable_tfkeras.tracing import direct_layers, graph_of, is_graph

Replace = Callable[[Any, str], Any | None]
"""Given a layer and its name, returns what comes in its place, or None for a plain copy."""

CallOperation = Callable[..., Any]
"""``call(operation, name, args, kwargs)`` calls a functional operation at its place in a copied graph."""


def children(layer: Any) -> Iterator[tuple[str, Any]]:
    """Yield (name, layer) of the layers that a layer holds in attributes; names lead into lists and dictionaries."""
    held = {id(each) for each in direct_layers(layer)}
    done: set[int] = set()
    for attribute, value in _attributes(layer):
        for name, each in _layers_in(value, attribute, held):
            if id(each) not in done:
                done.add(id(each))
                yield name, each


def _attributes(layer: Any) -> list[tuple[str, Any]]:
    """Return a layer's attributes without those that Keras and TensorFlow keep their own account in."""
    return [(name, value) for name, value in vars(layer).items() if not name.startswith(("_self_", "_obj_reference"))]


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


def strategy_of(model: Any) -> AbstractContextManager[Any]:
    """Return the scope of the distribution strategy that a model was made under."""
    strategy = getattr(model, "distribute_strategy", None)
    if strategy is None or tf.distribute.has_strategy():
        return nullcontext()
    scope: AbstractContextManager[Any] = strategy.scope()
    return scope


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

    def copy(self, layer: Any, name: str = "") -> Any:
        """Return the copy of a layer; the same one each time it is met.

        Raises
        ------
        ModelError
            When Keras can't make the layer again from its config; names the layer.
        """
        if id(layer) not in self._copies:
            with strategy_of(layer):
                self._copies[id(layer)] = self._copy(layer, name)
        return self._copies[id(layer)]

    def _copy(self, layer: Any, name: str) -> Any:
        replaced = self._replace(layer, name)
        if replaced is not None:
            return replaced
        if is_graph(layer):
            try:
                return self._copy_graph(layer, name)
            except TrainableError:
                raise
            except Exception as error:
                raise ModelError(f"model {name or layer.name!r} can't be copied: {error}") from error
        if kind_of(layer) is None and any(True for _ in children(layer)):
            return self._copy_holding(layer, name)
        return plain_copy(layer, name)

    def _copy_graph(self, model: Any, prefix: str) -> Any:
        made: dict[int, Any] = {}
        graph = graph_of(model)
        inputs = [_input_like(tensor) for tensor in model.inputs]
        made.update({id(old): new for old, new in zip(model.inputs, inputs, strict=True)})
        sequential = isinstance(model, keras.Sequential)
        copied: list[Any] = [inputs[0]._keras_history.layer] if sequential else []  # noqa: SLF001 - its input layer
        for call in [] if sequential else graph.nodes:
            name = join(prefix, call.operation.name)
            args, kwargs = tf.nest.map_structure(lambda value: made.get(id(value), value), (call.args, call.kwargs))
            layer = self.copy(call.operation, name)
            if is_operation(layer) and self._call_operation is not None:
                outputs = self._call_operation(layer, name, args, kwargs)
            else:
                outputs = layer(*args, **kwargs)
            made.update({id(old): new for old, new in zip(call.outputs, tf.nest.flatten(outputs), strict=True)})
        if sequential:
            copied += [self.copy(each, join(prefix, each.name)) for each in model.layers]
            result = _remade(type(model), keras.Sequential)(copied, name=model.name)
        else:
            # as they were given: one tensor, a list or a dictionary
            given = (model._nested_inputs, model._nested_outputs)  # noqa: SLF001 - nowhere else
            new = tf.nest.map_structure(lambda tensor: made[id(tensor)], given)
            result = _remade(type(model), keras.Model)(*new, name=model.name)
        if not model.trainable:
            result._trainable = False  # noqa: SLF001 - the setter would freeze every layer inside too
        return result

    def _copy_holding(self, layer: Any, prefix: str) -> Any:
        copied = _made_again(layer, prefix, deep=False)
        held = {id(each) for each in direct_layers(layer)}
        done: dict[int, Any] = {}
        for attribute, value in _attributes(layer):
            if any(True for _ in _layers_in(value, attribute, held)):
                if id(value) not in done:
                    done[id(value)] = self._copy_value(value, join(prefix, attribute), held)
                setattr(copied, attribute, done[id(value)])
        copied.built = layer.built
        _copy_values(_own_variables(layer), _own_variables(copied), prefix, layer)
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


def _input_like(tensor: Any) -> Any:
    """Return a symbolic input like a model's."""
    layer = tensor._keras_history.layer  # noqa: SLF001 - where its config is
    config = layer.get_config()
    made = type(layer).from_config(config)
    return made.output


def _remade(cls: type, base: Any) -> Any:
    """Return the class to make a copied graph of: the model's own if it takes what Keras's takes."""
    return cls if vars(cls).get("__init__") is None or cls is base else base


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
        _copy_values(_variables(layer), _variables(copied), name, layer)
        for old, new in zip(direct_layers(layer), direct_layers(copied), strict=False):
            new._trainable = old.trainable  # noqa: SLF001 - the setter would go through all layers inside
    return copied


def _made_again(layer: Any, name: str, *, deep: bool = True, **changes: Any) -> Any:
    try:
        if type(layer) is keras.layers.Lambda:
            copied = _lambda(layer)  # Keras itself refuses to load a Python lambda
        else:
            copied = type(layer).from_config({**layer.get_config(), **changes})
        if deep:
            build_by(copied, build_configs(layer))
            copied.built = layer.built
    except TrainableError:
        raise
    except Exception as error:
        raise ModelError(
            f"layer {name or layer.name!r} ({type(layer).__name__}) can't be copied: {error}",
            "give its class a get_config that from_config can read.",
        ) from error
    return copied


def build_configs(layer: Any) -> list[dict[str, Any] | None]:
    """Return how a layer, and each layer inside it, was built; JSON-clean."""
    configs = []
    for each in [layer, *layers_inside(layer)]:
        config = each.get_build_config() if each.built else None
        # a shape of unknown rank says nothing, and is no JSON
        configs.append(None if config is None or isinstance(config["input_shape"], tf.TensorShape) else config)
    return configs


def build_by(layer: Any, configs: list[dict[str, Any] | None]) -> None:
    """Build a layer, and each layer inside it, as `build_configs` says."""
    rest = list(configs)
    _build(layer, rest)


def _build(layer: Any, rest: list[dict[str, Any] | None]) -> None:
    config = rest.pop(0) if rest else None
    with tf.name_scope(layer.name):  # names like "conv/kernel", which a build outside of a call would not give
        if config and not layer.built:
            with tf.init_scope(), tf.name_scope(layer.name):
                layer.build_from_config(config)
            keras.layers.Layer.build(layer, config["input_shape"])  # a layer's own build may not note the shape
        for each in direct_layers(layer):
            _build(each, rest)


def _lambda(layer: Any) -> Any:
    return keras.layers.Lambda(
        layer.function,
        output_shape=layer._output_shape,  # noqa: SLF001 - the argument is kept nowhere else
        mask=layer.mask,
        arguments=layer.arguments,
        name=layer.name,
        dtype=layer.dtype_policy if hasattr(layer, "dtype_policy") else layer.dtype,
    )


def layers_inside(layer: Any) -> list[Any]:
    """Return all layers inside a layer, without itself, each before those inside it."""
    return [inner for each in direct_layers(layer) for inner in [each, *layers_inside(each)]]


def _variables(layer: Any) -> list[Any]:
    return [each for inside in [layer, *layers_inside(layer)] for each in _listed(inside)]


def _listed(layer: Any) -> list[Any]:
    """Return the variables a layer created itself, in the order it did, whether trainable or not."""
    return [*layer._trainable_weights, *layer._non_trainable_weights]  # noqa: SLF001 - the order without the state


def _own_variables(layer: Any) -> list[Any]:
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
        target.assign(np.asarray(to_numpy(source)))
