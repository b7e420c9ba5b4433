"""Annealing: from a training step to a number.

A schedule goes from one number to another while steps pass from `t_start` to `t_end`, along a line, half a cosine, a
staircase or an exponential. Each is a line whose share of the way another function replaces, so that the ends are exact
and everything that holds for the line holds for all.

Steps are numbered from 0. A training step is counted when a forward in training mode begins, before its values are
computed: with k steps counted, the current one has the number k - 1. A backend says which forwards count: in PyTorch
those of the wrapped model, in Keras those of each quantized layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from numbers import Real
from typing import Any, ClassVar, TypeVar, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainable_core.errors import InvalidArgumentError, nearest
from trainable_core.validation import plain

A = TypeVar("A", bound="AnnealingScheduler")

STEPS_LIMIT = 2**16
"""Largest number of jumps of a staircase."""


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
class AnnealingScheduler:
    """A value that goes from one number to another, and is constant before and after; what all schedules share.

    Parameters
    ----------
    t_start, t_end : float
        Numbers of the first and the last step of the way, ``0 <= t_start < t_end``.
    initial_val, target_val : float
        Value at `t_start` and before, and value at `t_end` and from then on.

    Raises
    ------
    InvalidArgumentError
        When a field is not a finite number, when the steps are not in order, or when the distance between the two
        values is beyond float64.

    Notes
    -----
    ``initial_val + (target_val - initial_val) * progress((t - t_start) / (t_end - t_start))`` in float64, held between
    the two values. The order of operations and these bounds make it exact at both ends; without them, rounding may lead
    past the target by an ulp.
    """

    kind: ClassVar[str] = ""
    """What a document calls the schedule."""

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

    def progress(self, fraction: Any, functions: Any) -> Any:
        """Return the share of the way between the values, from the share of the way between the steps.

        Parameters
        ----------
        fraction : array or tensor
            From 0 to 1.
        functions : module
            Whose `cos`, `exp` and `floor` take it: NumPy, or a framework's.

        Returns
        -------
        array or tensor, shape of `fraction`
            0 at 0 and 1 at 1, up to rounding.
        """
        raise NotImplementedError

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
        way = initial + (target - initial) * self.progress(fraction, np)
        way = np.clip(way, min(initial, target), max(initial, target))
        values = np.where(steps >= end, target, np.where(steps <= start, initial, way))
        return float(values) if values.ndim == 0 else values

    def finished(self, t: float) -> bool:
        """Return whether the value has reached its target: at step `t_end`, and at every later one."""
        return bool(np.all(self._steps(t) >= float(self.t_end)))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain numbers and the kind of schedule, ready for JSON; see `schedule_from_dict`."""
        return {"kind": self.kind, **asdict(self)}

    @classmethod
    def from_dict(cls: type[A], document: Mapping[str, Any]) -> A:  # noqa: PYI019 - Self is not in Python 3.10
        """Return the scheduler that `to_dict` wrote.

        Raises
        ------
        InvalidArgumentError
            When a field is missing, unknown or wrong, or the kind is another; the message names it.

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
        given = {name: value for name, value in document.items() if name != "kind"}
        if document.get("kind", cls.kind) != cls.kind:
            raise InvalidArgumentError(cls.__name__, f"kind is {document['kind']!r}, not {cls.kind!r}")
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                problem = f"unknown field {name!r}; the fields are {', '.join(known)}{nearest(name, known)}"
                raise InvalidArgumentError(cls.__name__, problem)
        missing = [field.name for field in fields(cls) if field.name not in given and field.default is MISSING]
        if missing:
            raise InvalidArgumentError(cls.__name__, f"missing: {', '.join(missing)}")
        return cls(**given)

    def _steps(self, t: ArrayLike) -> NDArray[np.float64]:
        given = np.asarray(t)
        if given.dtype.kind not in "iuf":
            raise InvalidArgumentError(type(self).__name__, f"t must be a real number or an array of them, got {t!r}")
        steps = given.astype(np.float64)
        if np.isnan(steps).any():
            raise InvalidArgumentError(type(self).__name__, f"t must not be NaN, got {t!r}")
        return steps


@dataclass(frozen=True)
class LinearAnnealingScheduler(AnnealingScheduler):
    """A value that goes from one number to another along a straight line, and is constant before and after.

    Parameters
    ----------
    t_start, t_end, initial_val, target_val : float
        As for every `AnnealingScheduler`.

    Notes
    -----
    It is monotone, and its document has no kind.

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

    kind: ClassVar[str] = "linear"

    def progress(self, fraction: Any, functions: Any) -> Any:  # noqa: ARG002 - others need it
        """Return the fraction."""
        return fraction

    def to_dict(self) -> dict[str, Any]:
        """Return the four fields as plain numbers, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class CosineAnnealingScheduler(AnnealingScheduler):
    """A value that goes along half a cosine: slowly near both ends.

    Parameters
    ----------
    t_start, t_end, initial_val, target_val : float
        As for every `AnnealingScheduler`.

    Notes
    -----
    ``progress(f) = (1 - cos(pi f)) / 2`` (Loshchilov and Hutter, "SGDR", ICLR 2017, arXiv:1608.03983, equation 5).

    Examples
    --------
    >>> schedule = CosineAnnealingScheduler(t_start=0, t_end=100, initial_val=0.0, target_val=1.0)
    >>> [round(schedule(t), 4) for t in (0, 25, 50, 100)]
    [0.0, 0.1464, 0.5, 1.0]
    """

    kind: ClassVar[str] = "cosine"

    def progress(self, fraction: Any, functions: Any) -> Any:
        """Return ``(1 - cos(pi f)) / 2``."""
        return (1.0 - functions.cos(fraction * math.pi)) * 0.5


@dataclass(frozen=True)
class ExponentialAnnealingScheduler(AnnealingScheduler):
    """A value that is multiplied by the same factor at each step.

    Parameters
    ----------
    t_start, t_end : float
        As for every `AnnealingScheduler`.
    initial_val, target_val : float
        Both positive, or both negative.

    Raises
    ------
    InvalidArgumentError
        Also when the two values have no ratio that is positive and finite.

    Notes
    -----
    ``initial_val * r**f`` with ``r = target_val / initial_val``, so ``progress(f) = (r**f - 1) / (r - 1)``.

    Examples
    --------
    >>> schedule = ExponentialAnnealingScheduler(t_start=0, t_end=2, initial_val=1.0, target_val=0.01)
    >>> round(schedule(1), 12)
    0.1
    """

    kind: ClassVar[str] = "exponential"

    def __post_init__(self) -> None:
        super().__post_init__()
        initial, target = float(self.initial_val), float(self.target_val)
        ratio = target / initial if initial else 0.0
        if not 0 < ratio < math.inf:
            problem = f"initial_val and target_val need a positive ratio, got {self.initial_val!r}, {self.target_val!r}"
            raise InvalidArgumentError(type(self).__name__, problem)

    def progress(self, fraction: Any, functions: Any) -> Any:
        """Return ``(r**f - 1) / (r - 1)``."""
        ratio = float(self.target_val) / float(self.initial_val)
        if ratio == 1:
            return fraction
        return (functions.exp(fraction * math.log(ratio)) - 1.0) / (ratio - 1.0)


@dataclass(frozen=True)
class StepAnnealingScheduler(AnnealingScheduler):
    """A value that goes down, or up, a staircase of equal stairs.

    Parameters
    ----------
    t_start, t_end, initial_val, target_val : float
        As for every `AnnealingScheduler`.
    n_steps : int
        Number of jumps; the last one is at `t_end`. With 1 the value changes once.

    Raises
    ------
    InvalidArgumentError
        Also when `n_steps` is not a whole number from 1 to 65536.

    Examples
    --------
    >>> schedule = StepAnnealingScheduler(t_start=0, t_end=4, initial_val=1.0, target_val=0.0, n_steps=2)
    >>> schedule([0, 1, 2, 3, 4])
    array([1. , 1. , 0.5, 0.5, 0. ])
    """

    kind: ClassVar[str] = "step"

    n_steps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.n_steps, int) or not 1 <= self.n_steps <= STEPS_LIMIT:
            problem = f"n_steps must be a whole number from 1 to {STEPS_LIMIT}, got {self.n_steps!r}"
            raise InvalidArgumentError(type(self).__name__, problem)

    def progress(self, fraction: Any, functions: Any) -> Any:
        """Return the fraction rounded down to a multiple of ``1 / n_steps``.

        What float32 can't tell from a jump is taken for one, so that all frameworks jump at the same step.
        """
        return functions.floor(fraction * float(self.n_steps) + 2.0**-20) * (1.0 / self.n_steps)


SCHEDULES: dict[str, type[AnnealingScheduler]] = {
    each.kind: each
    for each in (
        LinearAnnealingScheduler,
        CosineAnnealingScheduler,
        ExponentialAnnealingScheduler,
        StepAnnealingScheduler,
    )
}
"""The schedules by the names that documents give them."""


def schedule_from_dict(document: Mapping[str, Any], subject: str = "schedule") -> AnnealingScheduler:
    """Return the scheduler of a document: what `to_dict` of any of them wrote; without a kind it is linear.

    Raises
    ------
    InvalidArgumentError
        When the kind is unknown, or a field is missing, unknown or wrong.

    Examples
    --------
    >>> schedule_from_dict({"kind": "cosine", "t_start": 0, "t_end": 9, "initial_val": 0.0, "target_val": 0.1})
    CosineAnnealingScheduler(t_start=0, t_end=9, initial_val=0.0, target_val=0.1)
    """
    if not isinstance(document, Mapping):
        raise InvalidArgumentError(subject, f"a schedule is a mapping, got {document!r}")
    kind = document.get("kind", LinearAnnealingScheduler.kind)
    if not isinstance(kind, str) or kind not in SCHEDULES:
        problem = f"kind {kind!r} is not one of {', '.join(SCHEDULES)}{nearest(kind, SCHEDULES)}"
        raise InvalidArgumentError(subject, problem)
    try:
        return SCHEDULES[kind].from_dict(document)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(subject, error.problem) from error
