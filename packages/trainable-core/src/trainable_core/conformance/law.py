"""What a law is: a named check with a reason, the cases that it is tried on, and the quantizers that it applies to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis.strategies import SearchStrategy
from numpy.typing import ArrayLike, NDArray

from trainable_core.conformance import strategies
from trainable_core.conformance.adapter import Run
from trainable_core.conformance.case import Case, Subject, Violation
from trainable_core.conformance.strategies import Corner, Kind
from trainable_core.errors import InvalidArgumentError, nearest
from trainable_core.reference.oracle import EPSILON

Check = Callable[[Subject, Case], None]


def everywhere(_: Subject) -> bool:
    """Apply a law to every quantizer."""
    return True


def repeatable(subject: Subject) -> bool:
    """Apply a law where the same training forward gives the same values again."""
    return not subject.random


def elementwise(subject: Subject) -> bool:
    """Apply a law where an element's values are its own, in training too, and the same each time."""
    return not subject.random and subject.element_by_element


@dataclass(frozen=True)
class Law:
    """Something that holds for every trainable quantizer.

    Parameters
    ----------
    name : str
        Its name on the command line and in expected failures.
    reason : str
        What goes wrong for a user where it does not hold, in one line.
    check : callable
        Takes a subject and a case; raises `Violation`.
    kind : Kind
        Which cases it is tried on.
    about : callable
        Whether it applies to a subject.
    once : bool
        Whether one case is enough, because the law is about the class.
    most : int or None
        Most cases that it is tried on where nobody asked to be thorough, because each takes long.
    """

    name: str
    reason: str
    check: Check
    kind: Kind
    about: Callable[[Subject], bool] = everywhere
    once: bool = False
    most: int | None = None

    @property
    def statement(self) -> str:
        """What holds, in one sentence: the first line of the check's docstring."""
        return (self.check.__doc__ or "").partition("\n")[0].replace("``", "`")

    def cases(self, subject: Subject) -> SearchStrategy[Case]:
        """Return the cases that the law is tried on."""
        return strategies.cases(subject, self.kind)

    def corners(self, subject: Subject) -> list[Corner]:
        """Return the conditions that the law is tried under besides, those that cost least first."""
        return [] if self.once else strategies.corners(subject, self.kind)


LAWS: dict[str, Law] = {}
"""Every law by its name, in the order in which they are tried."""


def law(
    reason: str,
    *,
    kind: Kind | None = None,
    about: Callable[[Subject], bool] = everywhere,
    once: bool = False,
    most: int | None = None,
    of_grid: bool = False,
) -> Callable[[Check], Check]:
    """Register a function as a law under its own name.

    With `of_grid` it is about the numbers of a grid that a quantizer keeps, and does not apply to a method that
    computes its grid from the tensor itself.
    """

    def keeps_grid(subject: Subject) -> bool:
        return about(subject) and not subject.method.computes_grid

    def register(check: Check) -> Check:
        whom = keeps_grid if of_grid else about
        LAWS[check.__name__] = Law(check.__name__, reason, check, kind or Kind(), whom, once, most)
        return check

    return register


def named_laws(names: list[str] | None) -> list[Law]:
    """Return the laws of these names, or all laws when no name is given.

    Raises
    ------
    InvalidArgumentError
        When there is no law of a name.
    """
    for name in names or []:
        if name not in LAWS:
            hint = nearest(name, LAWS).strip().removeprefix("Hint: ")
            raise InvalidArgumentError(f"law {name!r}", f"there is no such law; laws: {', '.join(LAWS)}", hint)
    return [LAWS[name] for name in names] if names else list(LAWS.values())


def same_bits(what: str, got: NDArray[np.generic], expected: NDArray[np.generic]) -> None:
    """Require equal shapes and equal bits, the sign of zeros included; all NaN count as equal."""
    got, expected = np.asarray(got), np.asarray(expected)
    if got.shape != expected.shape:
        raise Violation(f"{what}: shape", expected.shape, got.shape)
    same = (got == expected) & (np.signbit(got) == np.signbit(expected))
    if not (same | (np.isnan(got) & np.isnan(expected))).all():
        raise Violation(what, expected, got)


def require(what: str, holds: object, expected: object, got: object) -> None:
    """Require that a condition holds, in every element when it is an array."""
    if not bool(np.asarray(holds).all()):
        raise Violation(what, expected, got)


def close(what: str, got: NDArray[np.generic], expected: NDArray[np.generic], allowed: ArrayLike) -> None:
    """Require equal shapes, and values within the distance allowed; NaN only where NaN is expected."""
    got, expected = np.asarray(got), np.asarray(expected)
    require(f"{what}: shape", got.shape == expected.shape, expected.shape, got.shape)
    wide, other = expected.astype(np.float64), got.astype(np.float64)
    with np.errstate(invalid="ignore"):
        near = (np.abs(other - wide) <= allowed) | (other == wide) | (np.isnan(other) & np.isnan(wide))
    require(what, near, expected, got)


def same_mode(subject: Subject, case: Case, what: str, got: Any, expected: Any) -> None:
    """Require that two quantizers give the same values in a call that does not say whether the model trains."""
    values = [subject.adapter.unsaid(quantizer, case.x) for quantizer in (got, expected)]
    same_bits(f"values of {what}, in a call that does not say whether the model trains", *values)


def same_training(subject: Subject, case: Case, what: str, got: Run, expected: Run) -> None:
    """Require equal values, and equal gradients of the input, of a quantizer that learns and one where less learns.

    A framework that compiles a function together with the derivatives that are asked for may round it otherwise where
    fewer are. A soft value is then off by a few roundings of numbers as large as the largest value, which has up to
    ``2 ** width`` steps; so the argument of a derivative is off by a few times ``2 ** width * EPSILON`` steps.
    """
    if got.x is None or expected.x is None:
        raise Violation(f"gradient of the input {what}", "an array", got.x)
    if subject.adapter.rounds_alike or subject.method.training_forward == "deployed":
        same_bits(f"values {what}", got.values, expected.values)
        same_bits(f"gradient of the input {what}", got.x, expected.x)
        return
    width = max([case.config.n_bits, *(each.n_bits for each in case.config.candidates or [])])
    for name, one, other, roundings in (
        ("values", got.values, expected.values, ROUNDINGS),
        ("gradient of the input", got.x, expected.x, ROUNDINGS * 2**width),
    ):
        largest = np.abs(other[np.isfinite(other)]).max(initial=0.0)
        close(f"{name} {what}", one, other, roundings * EPSILON * float(largest))


ROUNDINGS = 16
"""Operations on a value that may be rounded otherwise, those included that a steep derivative makes larger."""


def same_sums(
    what: str, got: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]], run: Run, upstream: NDArray[Any]
) -> None:
    """Require equal gradients of variables, but for the order in which float32 terms are added up.

    A term is an upstream gradient times a derivative of a value by a variable. For what a grid is made of, the
    derivative is at most 2; for weights of a mixture it is at most twice the largest value. A float32 sum of N terms is
    within ``(N + 16) * EPSILON`` of the exact one, relative to the sum of their magnitudes.
    """
    require(f"{what}: variables", sorted(got) == sorted(expected), sorted(expected), sorted(got))
    values = np.abs(run.values[np.isfinite(run.values)])
    size = 2 * max(1.0, float(values.max(initial=0.0))) * float(np.abs(upstream).sum(dtype=np.float64))
    for name, value in expected.items():
        close(f"{what} of {name}", got[name], value, 2 * size * (upstream.size + 16) * EPSILON)
