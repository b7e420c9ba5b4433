"""What a class declares of itself, as the laws read it: its surrogate, its own variables, its grid's parameters.

A surrogate is differentiated numerically in float64. Derivatives with respect to `grid_parameters` are those with
respect to threshold or range, times the inverse of the derivative of `encode_grid`, which is NumPy too; so a wrong
`decode_grid` can't hide behind itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainable_core.conformance.case import Subject, grid_names, variables
from trainable_core.qparams import Float64, QParams

RELATIVE_STEP = 1e-6
"""Relative distance of the differences of `encode_grid`: in float64, their error is about its square."""

VARIABLE_STEP = 2.0**-18
"""Distance of the differences in a method's own variable, relative to it where it is larger than 1."""

FLOAT64 = 2.0**-50
"""Relative rounding error of a term in float64: a few operations."""

Function = Callable[..., Any]


def declares_surrogate(subject: Subject) -> bool:
    """Return whether the class declares the function that its backward pass differentiates."""
    return callable(getattr(subject.cls, "surrogate", None))


class OwnGradient(NamedTuple):
    """The gradient of a method's own variable.

    Parameters
    ----------
    value : float64 array
        The gradient.
    size : float64 array
        Sum of the magnitudes of the terms that it is added up from.
    kink : float64 array
        Half of the distance between the gradients on both sides, which is next to nothing except at a kink, such as the
        end of a clip, where every gradient between them is right.
    """

    value: Float64
    size: Float64
    kink: Float64


def declares_penalty(subject: Subject) -> bool:
    """Return whether the class declares the term that it adds to the loss."""
    return callable(getattr(subject.cls, "penalty", None))


class Penalty:
    """The term that a class declares, as a function of its variables, in float64.

    Parameters
    ----------
    quantizer : object
        The quantizer, whose method `penalty` is asked.
    steps : int
        How many training steps its schedule has counted.
    """

    def __init__(self, quantizer: Any, steps: int) -> None:
        self.variables = {name: value.astype(np.float64) for name, value in variables(quantizer).items()}
        self._declared, self._steps = quantizer.penalty, steps

    def __call__(self, values: Mapping[str, Float64] | None = None) -> float:
        """Return the term for some values of the variables; by default for those that the quantizer has."""
        return float(self._declared(self.variables if values is None else values, self._steps))

    def slope(self, name: str) -> OwnGradient:
        """Return the derivative by one of the variables."""
        value, kink = (np.zeros(self.variables[name].shape) for _ in range(2))
        here = self()
        for place in np.ndindex(value.shape):
            h = VARIABLE_STEP * max(1.0, abs(float(self.variables[name][place])))
            there, back = (self._moved(name, place, sign * h) for sign in (1, -1))
            value[place] = (there - back) / (2 * h)
            kink[place] = abs(there - 2 * here + back) / (2 * h) + abs(here) * FLOAT64 / h
        return OwnGradient(value, np.abs(value), kink)

    def _moved(self, name: str, place: tuple[int, ...], by: float) -> float:
        moved = self.variables[name].copy()
        moved[place] += by
        return self({**self.variables, name: moved})


class Surrogate:
    """The function that a quantizer's backward pass differentiates at a case's input.

    Parameters
    ----------
    quantizer : object
        The quantizer, whose method `surrogate` is asked once.
    x : float64 array
        The input.
    at : QParams
        The deployed grid.
    upstream : float64 array
        The upstream gradient.
    values : float32 array, optional
        What the training forward gave, for a method whose `surrogate` takes ``values``; one that takes ``variables``
        gets the method's own variables.
    """

    def __init__(
        self, quantizer: Any, x: Float64, at: QParams, upstream: Float64, values: NDArray[Any] | None = None
    ) -> None:
        self.ndim = x.ndim
        shared = grid_names(quantizer)
        self.own = {
            name: value.astype(np.float64) for name, value in variables(quantizer).items() if name not in shared
        }
        self._axis = quantizer.quantization_config.channels_axis
        self._threshold = tuple(quantizer.structure.shape)
        asked = inspect.signature(quantizer.surrogate).parameters
        known = {"values": values, "variables": {name: self._along(value) for name, value in self.own.items()}}
        further = {name: value for name, value in known.items() if name in asked}
        self._function: Function = quantizer.surrogate(x, at.along(self.ndim), upstream, **further)
        self._takes_variables = len(inspect.signature(self._function).parameters) > 2  # noqa: PLR2004 - input and grid

    def __call__(self, x: Float64, at: QParams, own: Mapping[str, Float64] | None = None) -> Float64:
        """Return the function's values for an input, a grid and the method's own variables."""
        if not self._takes_variables:
            return np.asarray(self._function(x, at.along(self.ndim)))
        shaped = {name: self._along(value) for name, value in (self.own if own is None else own).items()}
        return np.asarray(self._function(x, at.along(self.ndim), shaped))

    def _along(self, value: Float64) -> Float64:
        """Return a value per channel shaped to broadcast against the input, as `QParams.along` does."""
        if self._axis is None or value.shape != self._threshold or not value.shape:
            return value
        shape = [1] * self.ndim
        shape[self._axis] = -1
        return value.reshape(shape)

    def own_gradients(self, x: Float64, at: QParams, upstream: Float64, trained: set[str]) -> dict[str, OwnGradient]:
        """Return the gradients of the method's own variables; none where the function does not take them."""
        found: dict[str, OwnGradient] = {}
        for name in sorted(trained & set(self.own)) if self._takes_variables else ():
            value, size, kink = (np.zeros(self.own[name].shape) for _ in range(3))
            here = self(x, at)
            for place in np.ndindex(self.own[name].shape):
                h = VARIABLE_STEP * max(1.0, abs(float(self.own[name][place])))
                there, back = (self(x, at, self._moved(name, place, sign * h)) for sign in (1, -1))
                right, left = upstream * (there - here) / h, upstream * (here - back) / h
                value[place], size[place] = (right + left).sum() / 2, np.abs(right + left).sum() / 2
                kink[place] = np.abs(right - left).sum() / 2
            found[name] = OwnGradient(value, size, kink)
        return found

    def _moved(self, name: str, place: tuple[int, ...], by: float) -> dict[str, Float64]:
        value = self.own[name].copy()
        value[place] += by
        return {**self.own, name: value}


def through_parameters(
    quantizer: Any, numbers: Mapping[str, NDArray[Any]], gradients: Mapping[str, Float64]
) -> dict[str, Float64]:
    """Return the gradients of the grid's variables from those of threshold or range; the same without parameters.

    Parameters
    ----------
    quantizer : object
        The quantizer, whose `encode_grid` is differentiated.
    numbers : mapping of str to array
        Threshold or range ends that its variables stand for.
    gradients : mapping of str to float64 array
        Gradients of these.
    """
    names = tuple(quantizer.grid_parameters)
    if not names:
        return dict(gradients)
    inverse = np.linalg.inv(_encoding(quantizer, numbers))  # [..., number, parameter]
    stacked = np.stack([np.asarray(gradients[key], np.float64) for key in numbers], axis=-1)
    found = np.einsum("...n,...np->...p", stacked, inverse)
    return {name: np.asarray(found[..., index]) for index, name in enumerate(names)}


def allowed_through_parameters(
    quantizer: Any, numbers: Mapping[str, NDArray[Any]], allowed: Mapping[str, Float64]
) -> dict[str, Float64]:
    """Return the distances allowed from the gradients of the grid's variables; see `through_parameters`.

    They are doubled: `decode_grid` and its derivative are single float32 operations, off by a few units in the last
    place, where `allowed` counts at least sixteen.
    """
    names = tuple(quantizer.grid_parameters)
    if not names:
        return dict(allowed)
    inverse = np.abs(np.linalg.inv(_encoding(quantizer, numbers)))
    stacked = np.stack([np.asarray(allowed[key], np.float64) for key in numbers], axis=-1)
    found = 2 * np.einsum("...n,...np->...p", stacked, inverse)
    return {name: np.asarray(found[..., index]) for index, name in enumerate(names)}


def _encoding(quantizer: Any, numbers: Mapping[str, NDArray[Any]]) -> Float64:
    """Return the derivative of `encode_grid`, as ``[..., parameter, number]``."""
    at = {key: np.asarray(value, np.float64) for key, value in numbers.items()}
    size = np.max([np.abs(value) for value in at.values()], axis=0)
    columns = []
    h = RELATIVE_STEP * size
    for key, value in at.items():
        there, back = (quantizer.encode_grid({**at, key: value + by}) for by in (h, -h))
        columns.append(np.stack([(there[name] - back[name]) / (2 * h) for name in quantizer.grid_parameters], axis=-1))
    return np.stack(columns, axis=-1)


def snaps_its_input(subject: Subject) -> bool:
    """Return whether values are the input snapped to the grid, and not that of something made of it first."""
    return not subject.deploys_values


def treats_elements_alike(subject: Subject) -> bool:
    """Return whether equal elements of a channel get equal values: the method has no variable with one for each."""
    return not any(each.per_element for each in subject.method.own)


def element_by_element(subject: Subject) -> bool:
    """Return whether an element's value follows from the element alone."""
    return subject.method.depends_on == "element"


def channel_by_channel(subject: Subject) -> bool:
    """Return whether a law is about weights whose values follow from the elements of their channel."""
    return subject.weights and subject.method.depends_on != "tensor"
