"""What is inside a Keras model: its layers, and the calls of a functional model as a graph.

Each Keras keeps a model's nodes in other private attributes and reads them into `Call`s; what is asked of the graph is
asked here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PASSING = frozenset(
    {"Dropout", "SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D", "GaussianDropout", "Identity"}
)
"""Layer types that pass their input on in inference."""


_ACCOUNTS = ("_self_", "_obj_reference", "_trainable_")
"""Beginnings of the attributes that Keras, TensorFlow and we keep an account in."""

ADDED = ("weights_quantizers", "input_holders", "output_holder", "quantizing_layers")
"""Attributes that a quantized layer has more; the last one on Keras 2."""

_OWN = frozenset(
    {
        "_layers", "_modules", "_torch_params", "_tracker", "_inbound_nodes", "_outbound_nodes", "_functional",
        "_operations", "_nodes", "_nodes_by_depth", "_operations_by_depth", "_input_layers", "_output_layers",
        "_layer_call_argspecs", "_layers_by_depth", *ADDED,
    }
)  # fmt: skip
"""Names of such attributes."""


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a layer or functional operation.

    Parameters
    ----------
    operation : layer or operation
        What is called.
    inputs, outputs : sequence of tensor
        Symbolic tensors, in order.
    args, kwargs : tuple, dict
        What it is called with; symbolic tensors and plain values.
    """

    operation: Any
    inputs: Sequence[Any]
    outputs: Sequence[Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] | None = None


class Graph:
    """The calls of a model.

    Parameters
    ----------
    calls : sequence of Call
        In an order they can be run in, without the model's inputs.
    outputs : sequence of tensor
        What leaves the model.
    inputs : sequence of tensor
        What it is given.
    """

    def __init__(self, calls: Sequence[Call], outputs: Sequence[Any], inputs: Sequence[Any] = ()) -> None:
        self.nodes = list(calls)
        self.inputs, self.outputs = list(inputs), list(outputs)
        self._outputs = {id(tensor) for tensor in outputs}
        self._makers = {id(tensor): call for call in self.nodes for tensor in call.outputs}
        self._users: dict[int, list[Call]] = {}
        for call in self.nodes:
            for tensor in call.inputs:
                self._users.setdefault(id(tensor), []).append(call)

    @property
    def operations(self) -> list[Any]:
        """Layers and functional operations, each once, inputs before outputs."""
        return list({id(call.operation): call.operation for call in self.nodes}.values())

    def calls(self, operation: Any) -> list[Call]:
        """Return the calls of one operation."""
        return [call for call in self.nodes if call.operation is operation]

    def source(self, call: Call) -> Call | None:
        """Return the call that a call's first input comes from, None when it is an input of the model."""
        return self._makers.get(id(call.inputs[0])) if call.inputs else None

    def only_user(self, call: Call) -> Call | None:
        """Return the only call that uses a call's output, None when there are several or it leaves the model."""
        if len(call.outputs) != 1 or id(call.outputs[0]) in self._outputs:
            return None
        users = self._users.get(id(call.outputs[0]), [])
        return users[0] if len(users) == 1 else None

    def activation_after(
        self, call: Call, op_of: Callable[[Any], str | None], gone: Collection[int] = ()
    ) -> Call | None:
        """Return the call of an activation that alone uses a call's output: hardware fuses the two.

        Parameters
        ----------
        call : Call
            The call.
        op_of : callable
            The op kind of a layer or operation, None where it is unknown.
        gone : collection of int
            ``id`` of layers that do not count, as those of `PASSING` do not.
        """
        user = self.only_user(call)
        while user is not None and (id(user.operation) in gone or type(user.operation).__name__ in PASSING):
            user = self.only_user(user)
        return user if user is not None and op_of(user.operation) == "activation" else None


def layers_within(layer: Any) -> list[Any]:
    """Return a layer and all layers inside it, each once."""
    found = layer._flatten_layers(include_self=True, recursive=True)  # noqa: SLF001 - both Kerases have it, and no public one
    return list({id(each): each for each in found}.values())


def direct_layers(layer: Any) -> list[Any]:
    """Return the layers that a layer holds itself."""
    return list(layer._flatten_layers(include_self=False, recursive=False))  # noqa: SLF001 - as above


def held_by(layer: Any) -> dict[str, Any]:
    """Return all attributes that are on a layer itself.

    On PyTorch a layer keeps the layers in its attributes among its modules.
    """
    return {**vars(layer), **vars(layer).get("_modules", {})}


def attributes(layer: Any) -> list[tuple[str, Any]]:
    """Return a layer's attributes without those of Keras's, TensorFlow's and our own account."""
    return [
        (name, value) for name, value in held_by(layer).items() if name not in _OWN and not name.startswith(_ACCOUNTS)
    ]


def structure(layer: Any, graph_of: Callable[[Any], Graph | None]) -> Iterator[tuple[str, Any]]:
    """Yield (place, layer) of every layer inside a layer, each once.

    Places don't depend on names that Keras gave: they are attributes, and in a graph the order of its layers.

    Parameters
    ----------
    layer : layer
        The outer layer.
    graph_of : callable
        Returns the graph of a model, None of what has none.
    """
    yield from _structure(layer, "", graph_of, {id(layer)})


def _structure(
    layer: Any, prefix: str, graph_of: Callable[[Any], Graph | None], done: set[int]
) -> Iterator[tuple[str, Any]]:
    graph = graph_of(layer)
    inside = [] if graph is None else [(str(index), each) for index, each in enumerate(layer.layers)]
    for name, each in [*inside, *children(layer, numbered=True)]:
        if id(each) not in done:
            done.add(id(each))
            place = f"{prefix}.{name}" if prefix else name
            yield place, each
            yield from _structure(each, place, graph_of, done)


def layers_in(value: Any, name: str, held: Collection[int]) -> Iterator[tuple[str, Any]]:
    """Yield (name, layer) of the layers in an attribute's value; names lead into lists and dictionaries.

    Parameters
    ----------
    value : object
        The attribute's value.
    name : str
        The attribute's name.
    held : collection of int
        ``id`` of each layer that counts.
    """
    if id(value) in held:
        yield name, value
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from layers_in(item, f"{name}.{index}", held)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from layers_in(item, f"{name}.{key}", held)


def _anything_in(value: Any) -> list[tuple[Any, Any]]:
    """Return the items of a dictionary, or a value by itself."""
    return list(value.items()) if isinstance(value, Mapping) else [(None, value)]


def children(layer: Any, *, numbered: bool = False) -> Iterator[tuple[str, Any]]:
    """Yield (name, layer) of the layers that a layer holds, each once.

    Parameters
    ----------
    layer : layer
        The outer layer.
    numbered : bool
        Whether layers that no attribute leads to are called by their place, which no other model's layers change,
        instead of by their name.
    """
    ours = {id(each) for name in ADDED for _, each in _anything_in(held_by(layer).get(name))}
    direct = [each for each in direct_layers(layer) if id(each) not in ours]
    held = {id(each) for each in direct}
    done: set[int] = set()
    for attribute, value in attributes(layer):
        for name, each in layers_in(value, attribute, held):
            if id(each) not in done:
                done.add(id(each))
                yield name, each
    for index, each in enumerate(direct):
        if id(each) not in done:
            done.add(id(each))
            yield (f"layers.{index}" if numbered else each.name), each
