"""The calls of a model that has a graph, with those of the models inside it in their places."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from trainable_keras.graph import Call, Graph


@dataclass(frozen=True, eq=False)
class FlatCall:
    """One call of a layer or functional operation.

    Parameters
    ----------
    call : Call
        What its own graph has of it.
    prefix : str
        Name of the model whose graph it is in; empty for the outer one.
    inputs, outputs : tuple of int
        Numbers that tell its tensors from all others; the same tensor has the same number.
    """

    call: Call
    prefix: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def operation(self) -> Any:
        """What is called."""
        return self.call.operation


@dataclass
class Flow:
    """A model's calls.

    Parameters
    ----------
    calls : list of FlatCall
        In an order they can be run in.
    inputs, outputs : list of int
        Tensors of the model.
    shapes : dict of int to tuple
        Shape of each tensor; a dimension that is not known is None.
    inside : set of int
        ``id`` of each model whose calls are among these.
    """

    calls: list[FlatCall] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    shapes: dict[int, tuple[int | None, ...]] = field(default_factory=dict)
    inside: set[int] = field(default_factory=set)


GraphOf = Callable[[Any], Graph | None]
"""Returns the graph of a model whose calls take the place of its own; None of everything else."""


def flow_of(graph: Graph, graph_of: GraphOf, prefix: str = "") -> Flow:
    """Return the calls of a graph, those of the models in it included.

    Parameters
    ----------
    graph : Graph
        Of the outer model.
    graph_of : callable
        Returns the graph of a model inside, None of a layer.
    prefix : str
        Name of the outer model.
    """
    found = Flow()
    numbers = itertools.count()

    def new(tensor: Any) -> int:
        number = next(numbers)
        found.shapes[number] = tuple(tensor.shape)
        return number

    def walk(inner: Graph, known: dict[int, int], name: str) -> None:
        for call in inner.nodes:
            given = tuple(known[id(tensor)] for tensor in call.inputs)
            within = graph_of(call.operation)
            if within is None:
                made = {id(tensor): new(tensor) for tensor in call.outputs}
                found.calls.append(FlatCall(call, name, given, tuple(made.values())))
                known.update(made)
                continue
            found.inside.add(id(call.operation))
            of_inner = {id(tensor): number for tensor, number in zip(within.inputs, given, strict=True)}
            place = call.operation.name
            walk(within, of_inner, f"{name}.{place}" if name else place)
            known.update({id(o): of_inner[id(i)] for o, i in zip(call.outputs, within.outputs, strict=True)})

    known = {id(tensor): new(tensor) for tensor in graph.inputs}
    found.inputs = list(known.values())
    walk(graph, known, prefix)
    found.outputs = [known[id(tensor)] for tensor in graph.outputs]
    return found
