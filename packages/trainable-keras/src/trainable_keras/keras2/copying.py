"""Copies a Keras 2 model, under the strategy it was made under; see `trainable_keras.copying`."""

from __future__ import annotations

import contextlib
import importlib
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import tensorflow as tf

from trainable_keras import tensorflow_values
from trainable_keras.copying import NOT_SPECIAL, ModelCopier, attributes_without, made_again
from trainable_keras.graph import direct_layers, layers_within
from trainable_keras.keras2.engine import keras
from trainable_keras.two_classes import own_class

_ROOT = keras.layers.Layer.__module__.partition(".")[0]
_node: Any = importlib.import_module(f"{_ROOT}.src.engine.node")
_functional: Any = importlib.import_module(f"{_ROOT}.src.engine.functional")

_OF_NODES = frozenset({"_inbound_nodes_value", "_outbound_nodes_value"})
_OF_ONE_LAYER = frozenset({"_compiled_trainable_state"})
_REVIVED = frozenset({"RevivedLayer", "RevivedInputLayer", "RevivedNetwork"})
"""Layers that Keras reads from a SavedModel without their class: functions are all that they have."""

_OF_TRAINING = frozenset(
    {
        "optimizer", "compiled_loss", "compiled_metrics", "loss", "loss_weights", "_run_eagerly", "_is_compiled",
        "_compile_config", "train_function", "test_function", "predict_function", "train_tf_function",
        "_steps_per_execution", "_steps_per_execution_tuner", "_autotune_steps_per_execution", "_train_counter",
        "_test_counter", "_predict_counter", "_jit_compile", "history", "stop_training", "_training_state",
        "_pss_evaluation_shards", "_cluster_coordinator", "_distribute_reduction_method", "_shard_test_function",
        "_eval_data_handler", "_checkpoint", "_user_metrics",
    }
)  # fmt: skip
"""What compiling and training put on a model; a copy is compiled by whoever trains it."""


def strategy_of(model: Any) -> AbstractContextManager[Any]:
    """Return the scope of the distribution strategy that a model was made under."""
    strategy = getattr(model, "distribute_strategy", None)
    if strategy is None or tf.distribute.has_strategy():
        return nullcontext()
    scope: AbstractContextManager[Any] = strategy.scope()
    return scope


class Copier(ModelCopier):
    """Copies one Keras 2 model."""

    def copy(self, model: Any) -> Any:
        """Return the copy of a model."""
        with strategy_of(model):
            return super().copy(model)

    def start(self, model: Any) -> None:
        """Note the nodes of the model's graphs by their layer."""
        self._nodes: dict[int, list[Any]] = {}
        self._graphs: list[Any] = []
        self._former: list[Any] = []
        self._copied_nodes: list[Any] = []
        by_depth = [getattr(layer, "_nodes_by_depth", None) or {} for layer in layers_within(model)]
        nodes = [node for levels in by_depth for level in levels.values() for node in level]
        kept = {id(node) for node in nodes}
        for layer in {id(node.layer): node.layer for node in nodes}.values():
            self._nodes[id(layer)] = [each for each in layer._inbound_nodes if id(each) in kept]  # noqa: SLF001 - where the graph is
        # a Sequential model that was built twice leaves tensors whose index is no longer that of their node
        self._places = {
            id(tensor._keras_history): index  # noqa: SLF001 - as above
            for nodes in self._nodes.values()
            for index, node in enumerate(nodes)
            for tensor in tf.nest.flatten(node.outputs)
            if hasattr(tensor, "_keras_history")
        }

    def special(self, value: Any) -> Any:
        """Return the copy of what belongs to a graph or to TensorFlow, else `NOT_SPECIAL`."""
        if isinstance(value, _node.KerasHistory):
            index = self._kept(value)
            return value if index is None else _node.KerasHistory(self.copied(value.layer), index, value.tensor_index)
        history = getattr(value, "_keras_history", None) if type(value).__name__.endswith("KerasTensor") else None
        if history is not None and self._kept(history) is None:
            return value
        if tensorflow_values.is_shared(value):
            return value
        if tensorflow_values.is_container(value):
            for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
                self.copied(each)  # now, so that all is filled when the container takes it
            return tensorflow_values.container(value, self.copied, self.later)
        if type(value).__name__ == "ObjectIdentityDictionary":  # how often a layer's attributes lead to each object
            return self._by_identity(value)
        if hasattr(value, "true_dtype") and isinstance(value, tf.Variable):  # mixed precision casts it as it is read
            return self._object(value)
        made = tensorflow_values.copied(value)
        return NOT_SPECIAL if made is None else made

    def _by_identity(self, value: Any) -> Any:
        made = type(value)()

        def fill() -> None:
            for key, count in value.items():
                made[self.copied(key)] = count

        self._unfilled.append(fill)
        return made

    def _kept(self, history: Any) -> int | None:
        """Return the place among the copied nodes of the one that made a tensor, None where it is not copied."""
        if history.layer is None:
            return None
        if id(history) in self._places:
            return self._places[id(history)]
        own = history.layer._inbound_nodes  # noqa: SLF001 - where the graph is
        node = own[history.node_index] if history.node_index < len(own) else None  # a copy has only nodes of its graphs
        nodes = self._nodes.get(id(history.layer), [])
        return next((index for index, each in enumerate(nodes) if each is node), None)

    def attributes(self, value: Any) -> dict[str, Any]:
        """Return the attributes of an object that its copy gets too."""
        left_out: set[str] = set()
        if isinstance(value, keras.layers.Layer):
            left_out |= _OF_NODES | _OF_ONE_LAYER
            if type(value).__name__ not in _REVIVED:
                left_out.add("keras_api")  # functions of the SavedModel that it was read from
        if isinstance(value, keras.Model):
            left_out |= _OF_TRAINING
        return attributes_without(value, left_out)

    def fill(self, value: Any, made: Any) -> None:
        """Give an object's copy its attributes."""
        super().fill(value, made)
        if isinstance(value, keras.layers.Layer):
            nodes = self._nodes.get(id(value), [])
            vars(made).update(_inbound_nodes_value=[self.copied(node) for node in nodes], _outbound_nodes_value=[])
        if isinstance(value, keras.Model):
            fresh = vars(keras.Model())
            vars(made).update({name: fresh[name] for name in _OF_TRAINING if name in fresh})
            vars(made)["_checkpoint"] = tf.train.Checkpoint(root=weakref.ref(made))
            if getattr(value, "_is_graph_network", False):
                (self._graphs if _is_current(value) else self._former).append(made)
        if isinstance(value, _node.Node):
            self._copied_nodes.append(made)

    def is_known(self, value: Any) -> bool:
        """Return whether an object is one of Keras's or TensorFlow's, which is copied attribute by attribute."""
        root = type(value).__module__.partition(".")[0]
        return isinstance(value, keras.layers.Layer | tf.Module) or root in {_ROOT, "tensorflow"}

    def belongs(self, value: Any) -> bool:
        """Return whether an object is a layer, a variable or the like."""
        return isinstance(value, keras.layers.Layer | tf.Variable)

    def finish(self) -> None:
        """Give graphs their nodes by the copies' own identity."""
        for node in self._copied_nodes:
            _mend_node(node)
        for node in self._copied_nodes:
            for parent in node.parent_nodes:
                parent.layer._outbound_nodes.append(node)  # noqa: SLF001 - as above
        for graph in self._graphs:
            refresh_graph(graph)
        for graph in self._former:
            graph._compute_tensor_usage_count()  # noqa: SLF001 - as above


def _mend_node(node: Any) -> None:
    """Let a copied node know its tensors by their ``id``."""
    places = [place for _, place in node._keras_inputs_ids_and_indices]  # noqa: SLF001 - where the graph is
    ids = [str(id(tensor)) for tensor in node._keras_inputs]  # noqa: SLF001 - as above
    node._keras_inputs_ids_and_indices = list(zip(ids, places, strict=True))  # noqa: SLF001 - as above
    node.flat_input_ids = ids
    node.flat_output_ids = [str(id(tensor)) for tensor in tf.nest.flatten(node.outputs)]


def _is_current(model: Any) -> bool:
    """Return whether the layers of a graph have its nodes: a Sequential model that is built anew may lose them."""
    nodes = [node for level in model._nodes_by_depth.values() for node in level]  # noqa: SLF001 - as above
    return all(any(each is node for each in node.layer._inbound_nodes) for node in nodes)  # noqa: SLF001 - as above


def refresh_graph(model: Any) -> None:
    """Let a model read its graph anew, from its inputs and outputs."""
    nodes, by_depth, _, _ = _functional._map_graph_network(model.inputs, model.outputs)  # noqa: SLF001 - as above
    history = [[tuple(tensor._keras_history) for tensor in tensors] for tensors in (model.inputs, model.outputs)]  # noqa: SLF001 - as above
    vars(model).update(
        _network_nodes=nodes,
        _nodes_by_depth=by_depth,
        _input_coordinates=history[0],
        _output_coordinates=history[1],
        _output_mask_cache={},
        _output_tensor_cache={},
        _output_shape_cache={},
    )
    model._compute_tensor_usage_count()  # noqa: SLF001 - as above


def rerun(model: Any, call: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]) -> None:
    """Run through a model's graph anew, with other calls in it; the model and its layers stay the same objects.

    A layer that is not called any more is no longer among the model's.

    Parameters
    ----------
    model : keras.Model
        A functional model.
    call : callable
        ``call(layer, args, kwargs)`` returns what comes in the place of a layer's outputs.
    """
    by_depth = model._nodes_by_depth  # noqa: SLF001 - where the graph is
    nodes = [node for depth in sorted(by_depth, reverse=True) for node in by_depth[depth] if not node.is_input]
    made: dict[int, Any] = {}

    def new(value: Any) -> Any:
        return made.get(id(value), value)

    for node in nodes:
        args, kwargs = tf.nest.map_structure(new, (tuple(node.call_args), dict(node.call_kwargs)))
        outputs = tf.nest.flatten(call(node.layer, args, kwargs))
        made.update({id(old): each for old, each in zip(tf.nest.flatten(node.outputs), outputs, strict=True)})
    tracked = list(model._self_tracked_trackables)  # noqa: SLF001 - as above
    outputs = tf.nest.map_structure(new, model._nested_outputs)  # noqa: SLF001 - as above
    _remove_nodes(nodes)
    model._init_graph_network(model._nested_inputs, outputs)  # noqa: SLF001 - as above
    called = {id(node.layer) for each in model._nodes_by_depth.values() for node in each}  # noqa: SLF001 - as above
    known = {id(each) for each in model._self_tracked_trackables}  # noqa: SLF001 - as above
    known |= {id(node.layer) for node in nodes} - called
    model._self_tracked_trackables += [each for each in tracked if id(each) not in known]  # noqa: SLF001 - as above


def _remove_nodes(nodes: Sequence[Any]) -> None:
    """Take calls from the accounts of their layers."""
    gone = {id(node) for node in nodes}
    parents = [parent.layer for node in nodes for parent in node.parent_nodes]
    for layer in {id(each): each for each in [*parents, *(node.layer for node in nodes)]}.values():
        layer._inbound_nodes[:] = [each for each in layer._inbound_nodes if id(each) not in gone]  # noqa: SLF001 - as above
        layer._outbound_nodes[:] = [each for each in layer._outbound_nodes if id(each) not in gone]  # noqa: SLF001 - as above
        for index, node in enumerate(layer._inbound_nodes):  # noqa: SLF001 - as above
            for place, tensor in enumerate(tf.nest.flatten(node.outputs)):
                tensor._keras_history = _node.KerasHistory(layer, index, place)  # noqa: SLF001 - as above


def remade(layer: Any, name: str, **changes: Any) -> Any:
    """Give a layer other values for some of its config, and the variables that it then has more; return the layer.

    Raises
    ------
    ModelError
        When Keras can't make a layer of the class from its config; names the layer.
    """
    changes = {key: value for key, value in changes.items() if getattr(layer, key, None) != value}
    if not changes:
        return layer
    with made_again(layer, name), strategy_of(layer):
        made = type(layer).from_config({**layer.get_config(), **changes})
        build_by(made, build_configs(layer)[:1])
    for attribute, value in list(vars(made).items()):
        if attribute in changes or (isinstance(value, tf.Variable) and vars(layer).get(attribute) is None):
            setattr(layer, attribute, value)
    return layer


def build_configs(layer: Any) -> list[dict[str, Any] | None]:
    """Return how a layer, and each layer inside it, was built; JSON-clean."""
    configs = []
    for each in [layer, *layers_inside(layer)]:
        config = own_class(each).get_build_config(each) if each.built else None
        # a shape of unknown rank says nothing, and is no JSON
        shape = None if config is None else config["input_shape"]
        configs.append(None if shape is None or isinstance(shape, tf.TensorShape) else config)
    return configs


def build_by(layer: Any, configs: list[dict[str, Any] | None]) -> None:
    """Build a layer, and each layer inside it, as `build_configs` says."""
    rest = list(configs)
    _build(layer, rest)


def _build(layer: Any, rest: list[dict[str, Any] | None]) -> None:
    config = rest.pop(0) if rest else None
    with tf.name_scope(layer.name):  # names like "conv/kernel", which a build outside of a call would not give
        if config and not layer.built:
            with tf.init_scope(), tf.name_scope(layer.name), contextlib.suppress(ValueError):
                # TensorFlow 2.15 notes no shape for some recurrent layers; they are built as they are called. Of its
                # own class, because a layer becomes what it was once those inside it are built too.
                own_class(layer).build_from_config(layer, config)
            if not layer.built:
                return
            keras.layers.Layer.build(layer, config["input_shape"])  # a layer's own build may not note the shape
        for each in direct_layers(layer):
            _build(each, rest)


def layers_inside(layer: Any) -> list[Any]:
    """Return all layers inside a layer, without itself, each before those inside it."""
    return [inner for each in direct_layers(layer) for inner in [each, *layers_inside(each)]]


def listed(layer: Any) -> list[Any]:
    """Return the variables a layer created itself, in the order it did, whether trainable or not."""
    return [*layer._trainable_weights, *layer._non_trainable_weights]  # noqa: SLF001 - the order without the state
