"""Copies a Keras model layer by layer, with other layers in the place of some; the given model is left untouched.

Graphs (functional and Sequential models) are run through anew; every other layer is made again from its own config, and
the layers it holds as attributes are put in. Values of all variables are copied.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from trainable_core.errors import ModelError, TrainableError
from trainable_keras.framework import Framework
from trainable_keras.graph import children, direct_layers

Replace = Callable[[Any, str], Any | None]
"""Given a layer and its name, returns what comes in its place, or None for a plain copy."""

CallOperation = Callable[[Any, str, tuple[Any, ...], dict[str, Any]], Any]
"""``call(operation, name, args, kwargs)`` calls a functional operation at its place in a copied graph."""


def join(prefix: str, name: str) -> str:
    """Return a layer's full name.

    Examples
    --------
    >>> join("", "stem"), join("stem", "conv")
    ('stem', 'stem.conv')
    """
    return f"{prefix}.{name}" if prefix else name


def own_variables(layer: Any) -> list[Any]:
    """Return a layer's variables without those of the layers it holds itself."""
    inside = {id(variable) for each in direct_layers(layer) for variable in each.variables}
    return [variable for variable in layer.variables if id(variable) not in inside]


def check_same_shapes(old: Sequence[Any], new: Sequence[Any], name: str, layer: Any) -> None:
    """Raise ModelError when a layer that was made again has other variables than the one it was made from."""
    shapes = [[tuple(variable.shape) for variable in variables] for variables in (old, new)]
    if shapes[0] != shapes[1]:
        raise ModelError(
            f"layer {name or layer.name!r} ({type(layer).__name__}) can't be copied: made again from its config it "
            f"has variables of shapes {shapes[1]}, not {shapes[0]}",
            "create its variables and layers in __init__ or build, from what get_config returns.",
        )


@contextmanager
def made_again(layer: Any, name: str) -> Iterator[None]:
    """Raise ModelError, which names the layer, for whatever Keras raises while it makes a layer from its config."""
    try:
        yield
    except TrainableError:
        raise
    except Exception as error:
        raise ModelError(
            f"layer {name or layer.name!r} ({type(layer).__name__}) can't be copied: {error}",
            "give its class a get_config that from_config can read.",
        ) from error


def copy_model(
    framework: Framework, model: Any, replace: Replace | None = None, call_operation: CallOperation | None = None
) -> Any:
    """Return a copy of a model; see `ModelCopier`."""
    return framework.copier(framework, replace or _plainly, call_operation).copy(model)


def _plainly(layer: Any, name: str) -> None:
    """Replace nothing."""


class ModelCopier(ABC):
    """Copies one model: graphs are run through anew, every other layer is made again, with the layers it holds put in.

    Parameters
    ----------
    framework : Framework
        The model's Keras.
    replace : callable
        What comes in the place of which layer.
    call_operation : callable, optional
        How functional operations are called; by default as they are.
    """

    def __init__(self, framework: Framework, replace: Replace, call_operation: CallOperation | None = None) -> None:
        self.framework = framework
        self.replace = replace
        self.call_operation = call_operation
        self._copies: dict[int, Any] = {}

    @abstractmethod
    def copy_graph(self, model: Any, prefix: str) -> Any:
        """Return a copy of a graph, its layers copied by `copy`."""

    @abstractmethod
    def copy_holding(self, layer: Any, prefix: str) -> Any:
        """Return a copy of a layer with copies of the layers it holds."""

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
        replaced = self.replace(layer, name)
        if replaced is not None:
            return replaced
        if self.framework.graph(layer) is not None:
            try:
                return self.copy_graph(layer, name)
            except TrainableError:
                raise
            except Exception as error:
                raise ModelError(f"model {name or layer.name!r} can't be copied: {error}") from error
        holds_layers = self.framework.kind(layer) is None and any(True for _ in children(layer))
        return self.copy_holding(layer, name) if holds_layers else self.framework.remade(layer, name)

    def copied_value(self, value: Any, name: str, held: Collection[int]) -> Any:
        """Return an attribute's value with copies of the layers in it.

        Parameters
        ----------
        value : object
            A layer, or lists, tuples and dictionaries of them and of anything else.
        name : str
            Full name of the attribute.
        held : collection of int
            ``id`` of each layer that is copied; others stay.
        """
        if id(value) in held:
            return self.copy(value, name)
        if isinstance(value, dict):
            return {key: self.copied_value(item, f"{name}.{key}", held) for key, item in value.items()}
        if isinstance(value, list | tuple):
            items = [self.copied_value(item, f"{name}.{index}", held) for index, item in enumerate(value)]
            return tuple(items) if isinstance(value, tuple) else items
        return value
