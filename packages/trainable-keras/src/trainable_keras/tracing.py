"""What a model's graph tells: which layers and operations follow which.

Keras keeps the graph of a functional or Sequential model in private attributes; only this module reads them.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import keras

from trainable_core.keras_layers import FUNCTIONS
from trainable_keras.layers import kind_of

_PASSING = ("Dropout", "SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D", "GaussianDropout", "Identity")


def is_graph(layer: Any) -> bool:
    """Return whether a layer is a model that Keras can run through as a graph: functional, or Sequential and built."""
    if isinstance(layer, keras.Sequential):
        return bool(layer.built)
    return isinstance(layer, keras.Model) and hasattr(layer, "_run_through_graph")


def function_op(operation: Any) -> str | None:
    """Return the op kind of a functional operation, None when it is a layer or not one we quantize."""
    if isinstance(operation, keras.layers.Layer):
        return None
    return FUNCTIONS.get(type(operation).__name__)


def layers_within(layer: Any) -> list[Any]:
    """Return a layer and all layers inside it, each once."""
    found = {id(each): each for each in layer._flatten_layers(include_self=True, recursive=True)}  # noqa: SLF001 - as above
    return list(found.values())


def direct_layers(layer: Any) -> list[Any]:
    """Return the layers that a layer holds itself."""
    return list(layer._flatten_layers(include_self=False, recursive=False))  # noqa: SLF001 - as above


class Graph:
    """The calls of a functional or Sequential model.

    Parameters
    ----------
    model : keras.Model
        One that `is_graph` accepts.
    """

    def __init__(self, model: Any) -> None:
        functional = model._functional if isinstance(model, keras.Sequential) else model  # noqa: SLF001 - as above
        by_depth = functional._nodes_by_depth  # noqa: SLF001 - as above
        self.nodes = [
            node
            for depth in sorted(by_depth, reverse=True)
            for node in by_depth[depth]
            if node.operation is not None and not node.is_input
        ]
        self._users: dict[int, list[Any]] = {}
        self._makers = {id(tensor): node for node in self.nodes for tensor in node.outputs}
        for node in self.nodes:
            for tensor in node.input_tensors:
                self._users.setdefault(id(tensor), []).append(node)
        self._outputs = {id(tensor) for tensor in functional.outputs}

    @property
    def operations(self) -> list[Any]:
        """Layers and functional operations, each once, inputs before outputs."""
        return list({id(node.operation): node.operation for node in self.nodes}.values())

    def calls(self, operation: Any) -> list[Any]:
        """Return the nodes at which an operation is called."""
        return [node for node in self.nodes if node.operation is operation]

    def source(self, node: Any) -> Any | None:
        """Return the node that a node's first input comes from, None when it is an input of the model."""
        return self._makers.get(id(node.input_tensors[0])) if node.input_tensors else None

    def only_user(self, node: Any) -> Any | None:
        """Return the only node that uses a node's output, None when there are several or it leaves the model."""
        if len(node.outputs) != 1 or id(node.outputs[0]) in self._outputs:
            return None
        users = self._users.get(id(node.outputs[0]), [])
        return users[0] if len(users) == 1 else None

    def activation_after(self, node: Any, gone: Collection[int] = ()) -> bool:
        """Return whether a node's only user is an activation: hardware fuses the two.

        Dropout does not count, nor do the layers whose ``id`` is among `gone`.
        """
        user = self.only_user(node)
        while user is not None and (id(user.operation) in gone or type(user.operation).__name__ in _PASSING):
            user = self.only_user(user)
        if user is None:
            return False
        kind = kind_of(user.operation)
        return (function_op(user.operation) if kind is None else kind.op) == "activation"
