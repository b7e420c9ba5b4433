"""Copies a Keras 2 model, under the strategy it was made under; see `trainable_keras.copying`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import tensorflow as tf

from trainable_keras.copying import (
    ModelCopier,
    check_same_shapes,
    join,
    made_again,
    own_variables,
)
from trainable_keras.graph import attributes, direct_layers, layers_in
from trainable_keras.keras2.engine import keras, to_numpy
from trainable_keras.keras2.layers import is_operation
from trainable_keras.keras2.tracing import graph_of


def strategy_of(model: Any) -> AbstractContextManager[Any]:
    """Return the scope of the distribution strategy that a model was made under."""
    strategy = getattr(model, "distribute_strategy", None)
    if strategy is None or tf.distribute.has_strategy():
        return nullcontext()
    scope: AbstractContextManager[Any] = strategy.scope()
    return scope


class Copier(ModelCopier):
    """Copies one Keras 2 model."""

    def copy(self, layer: Any, name: str = "") -> Any:
        """Return the copy of a layer; the same one each time it is met."""
        with strategy_of(layer):
            return super().copy(layer, name)

    def copy_graph(self, model: Any, prefix: str) -> Any:
        """Return a copy of a graph, its layers copied by `copy`."""
        graph = graph_of(model)
        assert graph is not None  # noqa: S101 - `copy` asked
        inputs = [_input_like(tensor) for tensor in model.inputs]
        made: dict[int, Any] = {id(old): new for old, new in zip(model.inputs, inputs, strict=True)}
        sequential = isinstance(model, keras.Sequential)
        copied: list[Any] = [inputs[0]._keras_history.layer] if sequential else []  # noqa: SLF001 - its input layer
        for call in [] if sequential else graph.nodes:
            name = join(prefix, call.operation.name)
            args, kwargs = tf.nest.map_structure(lambda value: made.get(id(value), value), (call.args, call.kwargs))
            outputs = self.call(call.operation, name, args, kwargs)
            made.update({id(old): new for old, new in zip(call.outputs, tf.nest.flatten(outputs), strict=True)})
        if sequential:
            copied += [new for each in model.layers for new in self.in_sequence(each, join(prefix, each.name))]
            result = _remade(type(model), keras.Sequential)(copied, name=model.name)
        else:
            # as they were given: one tensor, a list or a dictionary
            given = (model._nested_inputs, model._nested_outputs)  # noqa: SLF001 - nowhere else
            new = tf.nest.map_structure(lambda tensor: made[id(tensor)], given)
            result = _remade(type(model), keras.Model)(*new, name=model.name)
        if not model.trainable:
            result._trainable = False  # noqa: SLF001 - the setter would freeze every layer inside too
        return result

    def call(self, operation: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the copy of a layer or operation at its place in a copied graph."""
        layer = self.copy(operation, name)
        if is_operation(layer) and self.call_operation is not None:
            return self.call_operation(layer, name, args, kwargs)
        return layer(*args, **kwargs)

    def in_sequence(self, layer: Any, name: str) -> list[Any]:
        """Return what comes in the place of a layer of a Sequential model: its copy."""
        return [self.copy(layer, name)]

    def copy_holding(self, layer: Any, prefix: str) -> Any:
        """Return a copy of a layer with copies of the layers it holds."""
        copied = _made_again(layer, prefix, deep=False)
        if len(listed(copied)) < len(listed(layer)):  # it makes variables of its own in `build`
            build_by(copied, build_configs(layer)[:1])
        held = {id(each) for each in direct_layers(layer)}
        done: dict[int, Any] = {}
        for attribute, value in attributes(layer):
            if any(True for _ in layers_in(value, attribute, held)):
                if id(value) not in done:
                    done[id(value)] = self.copied_value(value, join(prefix, attribute), held)
                setattr(copied, attribute, done[id(value)])
        copied.built = layer.built
        _copy_values(own_variables(layer), own_variables(copied), prefix, layer)
        return copied


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
    with made_again(layer, name):
        if type(layer) is keras.layers.Lambda:
            copied = _lambda(layer)  # Keras itself refuses to load a Python lambda
        elif hasattr(type(layer), "around"):  # a wrapper; its layer's class need not be one that Keras can look up
            copied = layer.around(_made_again(layer.layer, name))
            if not layer.trainable:
                copied.trainable = False
        else:
            copied = type(layer).from_config({**layer.get_config(), **changes})
        if deep:
            build_by(copied, build_configs(layer))
            copied.built = layer.built
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


def listed(layer: Any) -> list[Any]:
    """Return the variables a layer created itself, in the order it did, whether trainable or not."""
    return [*layer._trainable_weights, *layer._non_trainable_weights]  # noqa: SLF001 - the order without the state


def _variables(layer: Any) -> list[Any]:
    return [each for inside in [layer, *layers_inside(layer)] for each in listed(inside)]


def _copy_values(old: list[Any], new: list[Any], name: str, layer: Any) -> None:
    check_same_shapes(old, new, name, layer)
    for source, target in zip(old, new, strict=True):
        target.assign(np.asarray(to_numpy(source)))
