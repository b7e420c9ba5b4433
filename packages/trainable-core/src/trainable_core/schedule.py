"""Annealing: from a training step to a number.

Steps are numbered from 0. A training step is counted when a forward in training mode begins, before its values are
computed: with k steps counted, the current one has the number k - 1. A backend says which forwards count: in PyTorch
those of the wrapped model, in Keras those of each quantized layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Real
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainable_core.errors import InvalidArgumentError, nearest
from trainable_core.validation import plain


def _number(subject: str, field: str, value: object) -> float:
    """Return `value` as a plain number: an int stays an int, everything else real becomes a float."""
    if isinstance(value, np.generic):
        value = value.item()
    try:
        fits = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond float64
        fits = False
    if not fits:
        raise InvalidArgumentError(subject, f"{field} must be a finite number, got {value!r}")
    return value if isinstance(value, int) else float(value)  # type: ignore[arg-type]


@dataclass(frozen=True)
class LinearAnnealingScheduler:
    """A value that goes from one number to another along a straight line, and is constant before and after.

    Parameters
    ----------
    t_start, t_end : float
        Numbers of the line's first and last step, ``0 <= t_start < t_end``.
    initial_val, target_val : float
        Value at `t_start` and before, and value at `t_end` and from then on.

    Raises
    ------
    InvalidArgumentError
        When a field is not a finite number, when the steps are not in order, or when the distance between the two
        values is beyond float64.

    Notes
    -----
    ``initial_val + (target_val - initial_val) * ((t - t_start) / (t_end - t_start))`` in float64, held between the two
    values. The order of operations and these bounds make it monotone and exact at both ends; without them, rounding may
    lead past the target by an ulp.

    Examples
    --------
    >>> temperature = LinearAnnealingScheduler(t_start=10, t_end=20, initial_val=1.0, target_val=0.0)
    >>> temperature(0), temperature(10), temperature(15), temperature(20), temperature(1000)
    (1.0, 1.0, 0.5, 0.0, 0.0)
    >>> temperature([0, 12.5, 99])
    array([1.  , 0.75, 0.  ])
    >>> temperature.finished(19), temperature.finished(20)
    (False, True)
    """

    t_start: float
    t_end: float
    initial_val: float
    target_val: float

    def __post_init__(self) -> None:
        subject = type(self).__name__
        for field in fields(self):
            object.__setattr__(self, field.name, _number(subject, field.name, getattr(self, field.name)))
        if self.t_start < 0:
            raise InvalidArgumentError(subject, f"t_start must not be negative, got {self.t_start!r}")
        if not float(self.t_start) < float(self.t_end):
            problem = f"t_end must be greater than t_start, got t_start={self.t_start!r}, t_end={self.t_end!r}"
            raise InvalidArgumentError(subject, problem)
        if not math.isfinite(float(self.target_val) - float(self.initial_val)):
            problem = f"target_val - initial_val is not finite, got {self.target_val!r} and {self.initial_val!r}"
            raise InvalidArgumentError(subject, problem)

    @overload
    def __call__(self, t: float) -> float: ...

    @overload
    def __call__(self, t: ArrayLike) -> float | NDArray[np.float64]: ...

    def __call__(self, t: ArrayLike) -> float | NDArray[np.float64]:
        """Return the value at step `t`.

        Parameters
        ----------
        t : number or array
            Steps; any real number, infinities included.

        Returns
        -------
        float, or float64 array with the shape of `t`

        Raises
        ------
        InvalidArgumentError
            When a step is NaN or not a real number.
        """
        steps = self._steps(t)
        start, end = float(self.t_start), float(self.t_end)
        initial, target = float(self.initial_val), float(self.target_val)
        fraction = (np.clip(steps, start, end) - start) / (end - start)
        line = np.clip(initial + (target - initial) * fraction, min(initial, target), max(initial, target))
        values = np.where(steps >= end, target, np.where(steps <= start, initial, line))
        return float(values) if values.ndim == 0 else values

    def finished(self, t: float) -> bool:
        """Return whether the value has reached its target: at step `t_end`, and at every later one."""
        return bool(np.all(self._steps(t) >= float(self.t_end)))

    def to_dict(self) -> dict[str, float]:
        """Return the four fields as plain numbers, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> LinearAnnealingScheduler:
        """Return the scheduler that `to_dict` wrote.

        Raises
        ------
        InvalidArgumentError
            When a field is missing, unknown or wrong; the message names it.

        Examples
        --------
        >>> scheduler = LinearAnnealingScheduler(0, 4, 1.0, 0.5)
        >>> LinearAnnealingScheduler.from_dict(scheduler.to_dict()) == scheduler
        True
        """
        try:
            plain(document)
        except ValueError as error:
            raise InvalidArgumentError(cls.__name__, str(error)) from None
        known = [field.name for field in fields(cls)]
        for name in document:
            if name not in known:
                problem = f"unknown field {name!r}; the fields are {', '.join(known)}{nearest(name, known)}"
                raise InvalidArgumentError(cls.__name__, problem)
        missing = [name for name in known if name not in document]
        if missing:
            raise InvalidArgumentError(cls.__name__, f"missing: {', '.join(missing)}")
        return cls(**document)

    def _steps(self, t: ArrayLike) -> NDArray[np.float64]:
        given = np.asarray(t)
        if given.dtype.kind not in "iuf":
            raise InvalidArgumentError(type(self).__name__, f"t must be a real number or an array of them, got {t!r}")
        steps = given.astype(np.float64)
        if np.isnan(steps).any():
            raise InvalidArgumentError(type(self).__name__, f"t must not be NaN, got {t!r}")
        return steps
