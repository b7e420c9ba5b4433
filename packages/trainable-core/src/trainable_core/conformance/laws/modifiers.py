"""Laws on what stands on top of a method: see `trainable_core.modifier`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from trainable_core.conformance.case import Case, Subject
from trainable_core.conformance.law import law, repeatable, require, same_bits, same_sums
from trainable_core.conformance.strategies import Kind
from trainable_core.modifier import Modifier

MODERATE = Kind(moderate=True, finite=True)


@dataclass
class _Calls:
    """What a modifier was given: the quantizer, the tensor and the mode, of each `enter` and of each `leave`."""

    enter: list[tuple[Any, Any, bool]] = field(default_factory=list)
    leave: list[tuple[Any, Any, bool]] = field(default_factory=list)


class _Halved(Modifier):
    """Quantizes half of a tensor and returns twice of that: powers of two change no bits of a normal number."""

    name: ClassVar[str] = "halved"
    changes_values: ClassVar[bool] = True

    calls: Any

    def enter(self, quantizer: Any, x: Any, training: bool) -> Any:  # noqa: FBT001 - the base's signature
        """Return half of the tensor."""
        self.calls.enter.append((quantizer, x, training))
        return x * 0.5

    def leave(self, quantizer: Any, x: Any, quantized: Any, training: bool) -> Any:  # noqa: FBT001 - as above
        """Return twice what was quantized."""
        self.calls.leave.append((quantizer, x, training))
        return quantized * 2.0


@law(
    "A modifier of a recipe stands on any method: dampening that a quantizer passes over trains oscillating weights.",
    kind=MODERATE,
    about=repeatable,
    most=6,
)
def modifiers(subject: Subject, case: Case) -> None:
    """A modifier decides what is quantized and what becomes of it, forward and backward."""
    case = replace(case, x=subject.normal(case.x))
    half, twice = case.x * np.float32(0.5), case.upstream * np.float32(2)
    for training in (False, True):
        expected = subject.run(subject.quantizer(case), half, training=training, upstream=twice)
        calls = _Calls()
        quantizer = _with(subject, case, _Halved(calls=calls))
        got = subject.run(quantizer, case.x, training=training, upstream=case.upstream)
        where = f"with a modifier, training={training}"
        same_bits(f"values {where}", got.values, expected.values * np.float32(2))
        if got.x is not None and expected.x is not None:
            same_bits(f"input's gradient {where}", got.x, expected.x * np.float32(0.5))
        same_sums(f"gradient {where},", got.variables, expected.variables, expected, twice)
        counts = len(calls.enter), len(calls.leave)
        require(f"calls of `enter` and `leave` {where}", counts[0] == counts[1] > 0, "as many", counts)
        right = all(
            one[0] is other[0] is quantizer and one[1] is other[1] and one[2] == other[2] == training
            for one, other in zip(calls.enter, calls.leave, strict=True)
        )
        require(f"whether both get the quantizer, its tensor and its mode {where}", right, "all of them", calls)


def _with(subject: Subject, case: Case, modifier: Modifier) -> Any:
    """Return the case's quantizer with a modifier on top."""

    def made(config: Any, **arguments: Any) -> Any:
        quantizer = subject.cls(config, **arguments)
        quantizer.modify([modifier])
        return quantizer

    cls: Any = made  # what is called as the class is
    return replace(subject, cls=cls).quantizer(case)
