"""Copies a Keras 3 model; see `trainable_keras.copying`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import keras
from keras.src.models.functional import Functional
from keras.src.ops.function import map_graph  # there is no public name for what follows
from keras.src.ops.node import KerasHistory, Node
from keras.src.utils.tracking import Tracker

from trainable_keras.copying import NOT_SPECIAL, ModelCopier, attributes_without, made_again
from trainable_keras.graph import layers_within
from trainable_keras.keras3.engine import ENGINE, copied_tensor, is_container, is_shared, of_tensorflow
from trainable_keras.keras3.layers import is_layer

if ENGINE == "tensorflow":
    from trainable_keras.keras3.engine import copied_container

_OF_NODES = frozenset({"_inbound_nodes", "_outbound_nodes"})
_OF_ONE_CALL = frozenset({"_loss_ids"})
_OF_TRAINING = frozenset(
    {
        "optimizer", "_optimizer", "_compile_loss", "_compile_metrics", "_loss_tracker", "_compile_config", "loss",
        "_compiled_trainable_state", "compiled", "train_function", "test_function", "predict_function",
        "_eval_epoch_iterator", "_jax_state", "_jax_state_synced", "stop_training", "stop_evaluating",
        "stop_predicting", "history", "_run_eagerly", "_jit_compile", "steps_per_execution",
        "unrolled_steps_per_execution", "_distribute_reduction_method",
    }
)  # fmt: skip
"""What compiling and training put on a model; a copy is compiled by whoever trains it."""


class Copier(ModelCopier):
    """Copies one Keras 3 model."""

    def start(self, model: Any) -> None:
        """Note the nodes of the model's graphs by their operation."""
        self._nodes: dict[int, list[Any]] = {}
        self._graphs: list[Any] = []
        self._layers: list[Any] = []
        layers = layers_within(model)
        graphs = [*layers, *(graph for layer in layers if (graph := getattr(layer, "_functional", None)) is not None)]
        nodes = [node for graph in graphs for level in getattr(graph, "_nodes_by_depth", {}).values() for node in level]
        self._stale: set[int] = set()
        self._models = {id(graph) for graph in graphs}
        kept = {id(node) for node in nodes}
        for operation in {id(node.operation): node.operation for node in nodes}.values():
            self._nodes[id(operation)] = [each for each in operation._inbound_nodes if id(each) in kept]  # noqa: SLF001 - where the graph is

    def special(self, value: Any) -> Any:
        """Return the copy of what belongs to a graph or to the engine, else `NOT_SPECIAL`."""
        if isinstance(value, KerasHistory):
            return self._history(value)
        if isinstance(value, keras.KerasTensor) and not self._is_in_graph(value):
            return value
        if isinstance(value, Functional) and id(value) not in self._models:
            self._stale.add(id(value))  # what a Sequential model was before it got its last layers
            return value
        if is_shared(value) or of_tensorflow(value, "is_shared"):
            return value
        if is_container(value):
            return self._container(value)
        made = copied_tensor(value)
        if made is None:
            made = of_tensorflow(value, "copied")
        return NOT_SPECIAL if made is None else made

    def _container(self, value: Any) -> Any:
        for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            self.copied(each)  # now, so that all is filled when the container takes it
        return copied_container(value, self.copied, self.later)

    def _kept(self, history: Any) -> int | None:
        """Return the place among the copied nodes of the one that made a tensor, None where it is not copied."""
        if history.operation is None:
            return None
        own = history.operation._inbound_nodes  # noqa: SLF001 - where the graph is
        node = own[history.node_index] if history.node_index < len(own) else None  # a copy has only nodes of its graphs
        nodes = self._nodes.get(id(history.operation), [])
        return next((index for index, each in enumerate(nodes) if each is node), None)

    def _is_in_graph(self, tensor: Any) -> bool:
        history = getattr(tensor, "_keras_history", None)
        return history is not None and self._kept(history) is not None

    def _history(self, value: Any) -> Any:
        index = self._kept(value)
        return value if index is None else KerasHistory(self.copied(value.operation), index, value.tensor_index)

    def attributes(self, value: Any) -> dict[str, Any]:
        """Return the attributes of an object that its copy gets too."""
        left_out = set(_OF_ONE_CALL)
        if isinstance(value, keras.Operation):
            left_out |= _OF_NODES
        if isinstance(value, keras.Model):
            left_out |= _OF_TRAINING
        return attributes_without(value, left_out)

    def fill(self, value: Any, made: Any) -> None:
        """Give an object's copy its attributes."""
        gone = self._gone(value)
        super().fill(value, made)
        if isinstance(value, keras.Operation):
            nodes = self._nodes.get(id(value), [])
            vars(made)["_inbound_nodes"] = [self.copied(node) for node in nodes]
            vars(made)["_outbound_nodes"] = []
        if isinstance(value, keras.layers.Layer):
            vars(made)["_loss_ids"] = set()
            self._layers.append(made)
        if isinstance(value, keras.Model):
            fresh = vars(keras.Model())
            vars(made).update({name: fresh[name] for name in _OF_TRAINING if name in fresh and name in vars(value)})
        if hasattr(value, "_nodes_by_depth"):
            self._graphs.append(made)
        if isinstance(value, Tracker):
            self.later(lambda: _mend_tracker(made, self._stale))
        if gone:
            self.later(lambda: _forget(made, [self.copied(each) for each in gone]))

    @staticmethod
    def _gone(value: Any) -> list[Any]:
        """Return what compiling put among a model's parts: metrics of its own."""
        if not isinstance(value, keras.Model):
            return []
        return [each for name in ("_compile_metrics", "_loss_tracker") if (each := vars(value).get(name)) is not None]

    def is_known(self, value: Any) -> bool:
        """Return whether an object is one of Keras's, which is copied attribute by attribute."""
        known = (keras.Operation, keras.Variable, keras.KerasTensor, keras.metrics.Metric, Node, Tracker)
        return isinstance(value, known) or type(value).__module__.partition(".")[0] == "keras"

    def belongs(self, value: Any) -> bool:
        """Return whether an object is a layer, a variable or the like."""
        return isinstance(value, keras.Operation | keras.Variable | keras.metrics.Metric)

    def finish(self) -> None:
        """Give graphs their nodes by the copies' own identity, and what the engine keeps of each layer."""
        for operation in {id(node.operation): node.operation for node in self._copied_nodes()}.values():
            for node in operation._inbound_nodes:  # noqa: SLF001 - where the graph is
                for parent in node.parent_nodes:
                    parent.operation._outbound_nodes.append(node)  # noqa: SLF001 - as above
        for graph in self._graphs:
            refresh_graph(graph)
        if ENGINE == "torch":
            for layer in self._layers:
                track_parameters(layer)

    def _copied_nodes(self) -> list[Any]:
        return [node for graph in self._graphs for nodes in graph._nodes_by_depth.values() for node in nodes]  # noqa: SLF001 - as above


def refresh_graph(model: Any) -> None:
    """Let a model read its graph anew, from its inputs and outputs."""
    nodes, by_depth, operations, operations_by_depth = map_graph(model._inputs, model._outputs)  # noqa: SLF001 - as above
    found = {"_nodes": nodes, "_nodes_by_depth": by_depth, "_operations": operations}
    vars(model).update(found, _operations_by_depth=operations_by_depth)


def track_parameters(layer: Any) -> None:
    """Let PyTorch know the variables of a layer again."""
    if layer._modules.pop("_torch_params", None) is not None:  # noqa: SLF001 - Keras's account for PyTorch
        layer._track_variables()  # noqa: SLF001 - as above


def _mend_tracker(tracker: Any, stale: Collection[int]) -> None:
    for _, store in tracker.config.values():
        store[:] = [each for each in store if id(each) not in stale]
    tracker.stored_ids = {name: {id(each) for each in store} for name, (_, store) in tracker.config.items()}


def _forget(model: Any, gone: list[Any]) -> None:
    for each in gone:
        model._tracker.untrack(each)  # noqa: SLF001 - there is no public way


def scopes(path: str) -> ExitStack:
    """Return an entered context in which new variables have paths that begin with `path`."""
    stack = ExitStack()
    for part in path.split("/"):
        if part:
            stack.enter_context(keras.name_scope(part))
    return stack


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
    with made_again(layer, name):
        *parents, _ = layer.path.split("/")
        with scopes("/".join(parents)):
            made = type(layer).from_config({**layer.get_config(), **changes})
            made.build_from_config(layer.get_build_config())
    with unlocked(layer):
        for attribute, value in vars(made).items():
            if attribute in changes or (isinstance(value, keras.Variable) and vars(layer).get(attribute) is None):
                setattr(layer, attribute, value)
    return layer


@contextmanager
def unlocked(layer: Any) -> Iterator[None]:
    """Let a built layer take variables and layers."""
    tracker = layer._tracker  # noqa: SLF001 - there is no public way
    locked = tracker.locked
    tracker.unlock()
    try:
        yield
    finally:
        if locked:
            tracker.lock()
        if ENGINE == "torch":
            track_parameters(layer)


def rerun(model: Any, call: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]) -> None:
    """Run through a model's graph anew, with other calls in it; the model and its layers stay the same objects.

    A layer that is not called any more is no longer among the model's.

    Parameters
    ----------
    model : keras.Model
        A functional model.
    call : callable
        ``call(operation, args, kwargs)`` returns what comes in the place of an operation's outputs.
    """
    by_depth = model._nodes_by_depth  # noqa: SLF001 - where the graph is
    nodes = [node for depth in sorted(by_depth, reverse=True) for node in by_depth[depth] if not node.is_input]
    made: dict[int, Any] = {}

    def new(value: Any) -> Any:
        return made.get(id(value), value)

    for node in nodes:
        args, kwargs = keras.tree.map_structure(new, (node.arguments.args, node.arguments.kwargs))
        outputs = keras.tree.flatten(call(node.operation, args, kwargs))
        made.update({id(old): each for old, each in zip(node.outputs, outputs, strict=True)})
    vars(model)["_outputs"] = [new(each) for each in model._outputs]  # noqa: SLF001 - as above
    vars(model)["_outputs_struct"] = keras.tree.map_structure(new, model._outputs_struct)  # noqa: SLF001 - as above
    _remove_nodes(nodes)
    refresh_graph(model)
    kept = {id(operation) for operation in model._operations}  # noqa: SLF001 - as above
    operations = {id(node.operation): node.operation for node in nodes}
    _forget(model, [each for key, each in operations.items() if key not in kept and is_layer(each)])
    for layer in model.layers:
        model._tracker.track(layer)  # noqa: SLF001 - as above


def _remove_nodes(nodes: Sequence[Any]) -> None:
    """Take calls from the accounts of their operations."""
    gone = {id(node) for node in nodes}
    parents = [parent.operation for node in nodes for parent in node.parent_nodes]
    for operation in {id(each): each for each in [*parents, *(node.operation for node in nodes)]}.values():
        kept = [each for each in operation._inbound_nodes if id(each) not in gone]  # noqa: SLF001 - as above
        operation._inbound_nodes[:] = kept  # noqa: SLF001 - as above
        operation._outbound_nodes[:] = [each for each in operation._outbound_nodes if id(each) not in gone]  # noqa: SLF001 - as above
        for index, node in enumerate(kept):
            for place, tensor in enumerate(node.outputs):
                tensor._keras_history = KerasHistory(operation, index, place)  # noqa: SLF001 - as above
