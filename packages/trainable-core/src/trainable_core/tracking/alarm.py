"""When a training is warned of: thresholds without a gradient or collapsed, statistics that run away, lost records."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from trainable_core.errors import (
    GradientMissingWarning,
    RecordsLostWarning,
    StatisticsRunAwayWarning,
    ThresholdCollapsedWarning,
    TrainableWarning,
)
from trainable_core.tracking.measure import Numbers

PATIENCE = 3
"""Records in a row without a gradient, or without a change, from which on thresholds are said to get none."""

COLLAPSED = 0.01
"""Part of its first value below which a step has collapsed."""

RUN_AWAY = 1e4
"""Factor beyond the first value, or beyond 1 where that is less, from which on a statistic runs away."""


class Alarm:
    """Keeps what went wrong, and warns of each kind once.

    Notes
    -----
    What happens after the warning is in `problems` too: by the kind of warning, a reason for each name.
    """

    def __init__(self) -> None:
        self.problems: dict[str, dict[str, str]] = {}
        self._still: dict[str, int] = {}
        self._first: dict[str, float] = {}
        self._found: dict[type[TrainableWarning], dict[str, str]] = {}

    def learning(self, name: str, gradient: float | None, *, known: bool, moved: bool) -> None:
        """Look at thresholds that should learn.

        Parameters
        ----------
        name : str
            The tensor's.
        gradient : float or None
            Norm of the gradient of the last step; None where there is none.
        known : bool
            Whether the framework shows gradients; else what counts is whether the thresholds moved.
        moved : bool
            Whether they have other values than at the last record.
        """
        learns = moved if not known else gradient is not None and gradient != 0
        self._still[name] = 0 if learns else self._still.get(name, 0) + 1
        if self._still[name] >= PATIENCE:
            what = "no gradient" if gradient is None else "a gradient of 0"
            seen = (
                f"{what} at {PATIENCE} records in a row"
                if known
                else f"no change from record to record, {PATIENCE} times"
            )
            self._note(GradientMissingWarning, name, seen)

    def grid(self, name: str, scale: NDArray[np.floating], first: NDArray[np.floating], bound: float) -> None:
        """Look at the steps of a grid, in the beginning and now; `bound` is the smallest there can be."""
        bad = ~np.isfinite(scale) | (scale < COLLAPSED * first) | ((scale <= bound) & (first > bound))
        if bad.any():
            count, least = int(bad.sum()), float(np.min(scale))
            share = "its step" if scale.size == 1 else f"{count} of the {scale.size} steps"
            was = float(np.asarray(first).reshape(-1)[int(np.argmax(bad.reshape(-1)))])
            self._note(ThresholdCollapsedWarning, name, f"{share} fell from {was:.3g}, down to {least:.3g}")

    def statistic(self, name: str, what: str, value: float) -> None:
        """Look at a number that stays within bounds in a healthy training."""
        first = self._first.setdefault(f"{name} {what}", value)
        if not math.isfinite(value) or value > RUN_AWAY * max(abs(first), 1.0):
            self._note(StatisticsRunAwayWarning, name, f"{what} went from {first:.3g} to {value:.3g}")

    def lost(self, path: str, reason: str) -> None:
        """Note that a record could not be written, or that the earlier ones are gone."""
        self._note(RecordsLostWarning, path, reason)

    def sound(self) -> None:
        """Warn of what was found since the last time, of each kind if it was never warned of."""
        found, self._found = self._found, {}
        for kind, reasons in found.items():
            warned = kind.__name__ in self.problems
            self.problems.setdefault(kind.__name__, {}).update(reasons)
            if not warned:
                make: Callable[[Mapping[str, str]], TrainableWarning] = kind
                warnings.warn(make(reasons), stacklevel=4)

    def _note(self, kind: type[TrainableWarning], name: str, reason: str) -> None:
        if name not in self.problems.get(kind.__name__, {}):
            self._found.setdefault(kind, {})[name] = reason


def batch_norm_numbers(mean: NDArray[np.floating], variance: NDArray[np.floating]) -> Numbers:
    """Return what is told of the statistics of a batch norm; NaN where any of them is."""
    return {"mean": float(np.max(np.abs(mean), initial=0.0)), "variance": float(np.max(variance, initial=0.0))}
