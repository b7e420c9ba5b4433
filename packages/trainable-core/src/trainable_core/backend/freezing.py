"""Which quantizer's threshold freezes next, where they freeze one after another.

A threshold that learns through a power of two oscillates across the border between two powers once it has arrived
there: each step's gradient leads back to the other side. Quantizers then freeze one at a time, those that have settled
first, each on the side on which it is most of the time, so that the others can adapt to what is fixed.

References
----------
Jain, Gural, Wu and Dick, "Trained Quantization Thresholds for Accurate and Efficient Fixed-Point Inference of Deep
Neural Networks", MLSys 2020, arXiv:1903.08066 (thresholds are frozen incrementally, in increasing order of absolute
gradients, when a moving average says that they are in the right bin).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainable_core.constants import THRESHOLD
from trainable_core.enums import QuantizationMethod, VariableGroup
from trainable_core.errors import InvalidArgumentError
from trainable_core.qparams import Float64, bound_threshold
from trainable_core.quantizer import BaseTrainableQuantizer

POWERS_OF_TWO = (QuantizationMethod.POWER_OF_TWO, QuantizationMethod.LUT_POT_QUANTIZER)


def learning(quantizer: BaseTrainableQuantizer) -> bool:
    """Return whether a quantizer has variables that still learn, and numbers that can be looked at."""
    ready = quantizer.calibrated and quantizer.quantization_config.enabled and bool(quantizer.variable_names)
    return ready and bool(list(quantizer.get_trainable_variables(VariableGroup.QPARAMS)))


def places_of(quantizer: BaseTrainableQuantizer) -> Float64:
    """Return where a quantizer's learned numbers are: logarithms of thresholds to base 2, or ends of ranges.

    Ends count in widths of their range, so that movements can be compared. Of a quantizer that learns no grid, they are
    its own variables.

    Returns
    -------
    float64 array, shape (n,)
    """
    if not quantizer.learns_grid:
        own = [quantizer.to_numpy(quantizer.get_quantizer_variable(name)) for name in quantizer.variable_names]
        return np.concatenate([np.asarray(each, np.float64).ravel() for each in own])
    found: list[NDArray[Any]] = []
    for width in quantizer.structure.widths:
        numbers = quantizer.grid_numbers(width)
        if THRESHOLD in numbers:
            bounded = bound_threshold(numbers[THRESHOLD], quantizer.quantization_config.min_threshold)
            found.append(np.log2(bounded.astype(np.float64)).ravel())
        else:
            low, high = (np.nan_to_num(np.asarray(each, np.float64)).ravel() for each in numbers.values())
            found += [low, high]
    return np.concatenate(found)


def has_bins(quantizer: BaseTrainableQuantizer) -> bool:
    """Return whether thresholds are rounded up to powers of two."""
    return quantizer.learns_grid and quantizer.quantization_config.quantization_method in POWERS_OF_TWO


class _Average:
    """What is remembered of one quantizer.

    Parameters
    ----------
    place : float64 array, shape (n,)
        Moving average of the places.
    movement : float
        Moving average of how far they move in a step: the mean distance.
    last : float64 array, shape (n,)
        The places after the last step.
    """

    def __init__(self, place: ArrayLike, movement: float, last: ArrayLike) -> None:
        self.place, self.movement = np.asarray(place, np.float64), float(movement)
        self.last = np.asarray(last, np.float64)

    def update(self, places: Float64, share: float) -> None:
        """Take in the places after a step, which count as much as `share` says."""
        moved = float(np.abs(places - self.last).mean()) if places.size else 0.0
        self.place = self.place + share * (places - self.place)
        self.movement += share * (moved - self.movement)
        self.last = places

    def document(self) -> dict[str, Any]:
        """Return the numbers JSON-clean, without a loss."""
        return {"place": self.place.tolist(), "movement": self.movement, "last": self.last.tolist()}


class IncrementalFreezing:
    """Chooses the quantizer that freezes next.

    Parameters
    ----------
    at : int
        Number of optimizer steps after which the first one freezes.
    every : int
        Number of steps between two of them.

    Notes
    -----
    From `every` steps before `at` on, two moving averages are kept of each quantizer that learns: of its places
    (`places_of`), and of how far they move in a step. The newest step counts ``2 / (every + 1)``, so an average looks
    back about as far as from one freezing to the next. When one is due, the quantizer that moves least freezes, among
    those whose thresholds are all in the bins of their averages, ``ceil(log2 t) == ceil(average)``; where none is, the
    first step afterwards in which one is. Grids without powers of two have no bins, and are always ready.

    *Deviations:* the paper orders by the magnitude of the gradients. Trainers such as Keras's `fit` don't show any, so
    movements stand for them: with plain gradient descent the order is the same, and with Adam a threshold that has
    settled moves less than one that is on its way, which its gradient need not show. The numbers of the moving averages
    are ours. A quantizer with a threshold for each channel freezes as a whole.
    """

    def __init__(self, at: int, every: int) -> None:
        self.at, self.every = at, every
        self.averages: dict[str, _Average] = {}
        self.frozen: list[str] = []
        self._before = 0

    def go_on(self, step: int) -> None:
        """Begin after `step` optimizer steps without a state: what was due until then counts as done."""
        self.averages, self.frozen = {}, []
        self._before = self._due(step) if step else 0

    def _due(self, step: int) -> int:
        """Return how many quantizers are to be frozen after so many steps."""
        return 0 if step < self.at else 1 + (step - self.at) // self.every

    def after_step(self, step: int, quantizers: Mapping[str, BaseTrainableQuantizer]) -> str | None:
        """Look at a model's quantizers after an optimizer step; return the name of the one that freezes, or None.

        Parameters
        ----------
        step : int
            Number of optimizer steps so far.
        quantizers : mapping of str to BaseTrainableQuantizer
            Those of the model, by name.
        """
        if step < self.at - self.every:
            return None
        learn = {name: each for name, each in quantizers.items() if learning(each)}
        for name, quantizer in learn.items():
            places = places_of(quantizer)
            average = self.averages.get(name)
            if average is None or average.last.shape != places.shape:
                self.averages[name] = _Average(places, 0.0, places)
            else:
                average.update(places, 2 / (self.every + 1))
        if self._before + len(self.frozen) >= self._due(step):
            return None
        ready = [name for name, quantizer in learn.items() if self._settled(name, quantizer)]
        chosen = min(ready, key=lambda name: self.averages[name].movement, default=None)
        if chosen is not None:
            self.frozen.append(chosen)
            del self.averages[chosen]
        return chosen

    def _settled(self, name: str, quantizer: BaseTrainableQuantizer) -> bool:
        average = self.averages[name]
        return not has_bins(quantizer) or bool((np.ceil(average.last) == np.ceil(average.place)).all())

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the choice depends on beside the model, JSON-clean."""
        averages = {name: average.document() for name, average in self.averages.items()}
        return {"frozen": list(self.frozen), "before": self._before, "averages": averages}

    def load_state_dict(self, state: Mapping[str, Any], subject: str) -> None:
        """Go on with what `state_dict` returned.

        Raises
        ------
        InvalidArgumentError
            When it is no such state.
        """
        try:
            frozen = [str(name) for name in state["frozen"]]
            averages = {
                str(name): _Average(each["place"], each["movement"], each["last"])
                for name, each in state["averages"].items()
            }
            before = int(state["before"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidArgumentError(subject, f"not a state of its freezing: {error!r}") from error
        self.frozen, self.averages, self._before = frozen, averages, before
