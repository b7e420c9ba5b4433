"""What a law is: a named check with a reason, the cases that it is tried on, and the quantizers that it applies to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from hypothesis.strategies import SearchStrategy
from numpy.typing import NDArray

from trainable_core.conformance import strategies
from trainable_core.conformance.case import Case, Subject, Violation
from trainable_core.conformance.strategies import Kind
from trainable_core.errors import InvalidArgumentError, nearest

Check = Callable[[Subject, Case], None]


def everywhere(_: Subject) -> bool:
    """Apply a law to every quantizer."""
    return True


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
    """

    name: str
    reason: str
    check: Check
    kind: Kind
    about: Callable[[Subject], bool] = everywhere
    once: bool = False

    @property
    def statement(self) -> str:
        """What holds, in one sentence: the first line of the check's docstring."""
        return (self.check.__doc__ or "").partition("\n")[0].replace("``", "`")

    def cases(self, subject: Subject) -> SearchStrategy[Case]:
        """Return the cases that the law is tried on."""
        return strategies.cases(subject, self.kind)


LAWS: dict[str, Law] = {}
"""Every law by its name, in the order in which they are tried."""


def law(
    reason: str,
    *,
    kind: Kind | None = None,
    about: Callable[[Subject], bool] = everywhere,
    once: bool = False,
) -> Callable[[Check], Check]:
    """Register a function as a law under its own name."""

    def register(check: Check) -> Check:
        LAWS[check.__name__] = Law(check.__name__, reason, check, kind or Kind(), about, once)
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
