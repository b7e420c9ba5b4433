"""Laws on what stands on top of a method: see `trainable_core.modifier`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from trainable_core.conformance.adapter import Run
from trainable_core.conformance.case import Case, Subject, move, rows
from trainable_core.conformance.law import close, law, repeatable, require, same_bits, same_sums
from trainable_core.conformance.strategies import Kind
from trainable_core.modifier import Modifier
from trainable_core.reference.oracle import EPSILON

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


class _Draws(Modifier):
    """Adds a term for the loss, and changes no values: as dampening does."""

    name: ClassVar[str] = "draws"

    calls: Any

    def term(self, quantizer: Any, x: Any) -> Any:
        """Return `TERM`, as a number that is made of the tensor."""
        self.calls.append((quantizer, tuple(x.shape)))
        return x[(0,) * len(x.shape)] * 0.0 + TERM


TERM = 3.0
"""What `_Draws` adds to the loss."""


@law(
    "A modifier of a recipe stands on any method: dampening that a quantizer passes over trains oscillating weights.",
    kind=MODERATE,
    about=lambda subject: subject.adapter.modifiers and repeatable(subject),
    most=6,
)
def modifiers(subject: Subject, case: Case) -> None:
    """A modifier decides what is quantized and what becomes of it, forward and backward, and adds its term once."""
    _adds_its_term(subject, case)
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
        beside = _at_a_layer(subject, case, training=training)
        if beside is not None:  # a sum with products of zero: zeros have no sign
            same = np.array_equal(beside.values, got.values)
            require(f"values {where}, at a layer", same, got.values, beside.values)


def _adds_its_term(subject: Subject, case: Case) -> None:
    """Require that a term of the tensor is the method's own and the modifier's."""
    if not case.x.size:
        return
    x = np.clip(case.x, -1, 1)  # beside a term of huge numbers, any other is rounded away
    probe = _Draws(calls=[])
    quantizer = _with(subject, case, probe)
    own, got = (subject.adapter.regularization_of(each, x) for each in (subject.quantizer(case), quantizer))
    alone, gradients = (0.0, {}) if own is None else own
    require("term of a modifier", got is not None, TERM, got)
    if got is None:
        return
    what = "term for the loss with a modifier's"
    close(what, np.asarray(got[0]), np.asarray(alone + TERM), 4 * EPSILON * (abs(alone) + TERM))
    for name, gradient in gradients.items():
        # to a negative zero, the modifier adds a positive one
        close(f"gradient by {name or 'the tensor'} of the {what}", got[1][name], gradient, 0.0)
    seen = quantizer, rows(case.config, x).shape
    right = all(given[0] is seen[0] and given[1] == seen[1] for given in probe.calls)
    require("whether the modifier gets the quantizer and its tensor", right, seen, probe.calls)


def _at_a_layer(subject: Subject, case: Case, *, training: bool) -> Run | None:
    """Return a run of a modified quantizer that a layer calls; None where there is no such layer."""
    adapter, upstream = subject.adapter, case.upstream if training else None
    if not case.x.size or case.x.ndim != 2:  # noqa: PLR2004 - rows and features
        return None
    probe = _Halved(calls=_Calls())
    if not subject.weights:
        modified = _with(subject, case, probe)
        return adapter.before_a_layer(modified, case.x, training=training, upstream=upstream, way=subject.way)
    fresh = _with(subject, replace(case, factors=(1.0,) * len(case.factors), steps=0), probe)
    layer = adapter.in_a_layer(fresh, case.x)
    if layer is None:
        return None
    move(fresh, case.factors)
    for _ in range(case.steps):
        fresh.advance()
    if training and layer.counts_steps:
        return None  # it would be a step ahead
    return layer(training=training, upstream=upstream)


STATE = "remembered"


class _Remembers(Modifier):
    """Keeps a number in its quantizer, and looks at weights."""

    name: ClassVar[str] = "remembers"

    seen: Any

    def observe(self, quantizer: Any, x: Any) -> None:
        """Note the quantizer and the tensor's size."""
        self.seen.append((quantizer, x.shape))

    def add_state(self, quantizer: Any) -> None:
        """Keep a zero."""
        quantizer.add_state(STATE, np.zeros((), np.float32))


@law(
    "A count of oscillations that is lost with a checkpoint freezes other weights, or none.",
    kind=Kind(moderate=True, finite=True, tensor=False),
    about=lambda subject: subject.adapter.modifiers,
    most=3,
)
def modifier_state(subject: Subject, case: Case) -> None:
    """What a modifier keeps in a quantizer is set, copied, saved and loaded with it."""
    adapter = subject.adapter
    seen: list[Any] = []
    source, target = (_with(subject, case, _Remembers(seen=seen)) for _ in range(2))
    if subject.weights and case.x.size:
        adapter.shown(source, case.x)
        told = [each for each, _ in seen]
        require("whether a modifier sees the weights", told == [source], "once", len(told))
    source.set_state(STATE, getattr(source, STATE) * 0.0 + 3.0)
    require("what a modifier keeps", _remembered(source) == 3.0, 3.0, _remembered(source))  # noqa: PLR2004 - as set
    if adapter.copies_modifiers:
        there = _remembered(adapter.copy(source))
        require("what a modifier keeps, in a copy", there == 3.0, 3.0, there)  # noqa: PLR2004 - as set
    adapter.restore(target, adapter.save(source))
    require("what a modifier keeps, loaded", _remembered(target) == 3.0, 3.0, _remembered(target))  # noqa: PLR2004


def _remembered(quantizer: Any) -> float:
    return float(quantizer.to_numpy(getattr(quantizer, STATE)))


def _with(subject: Subject, case: Case, modifier: Modifier) -> Any:
    """Return the case's quantizer with a modifier on top."""

    def made(config: Any, **arguments: Any) -> Any:
        quantizer = subject.cls(config, **arguments)
        quantizer.modify([modifier])
        return quantizer

    cls: Any = made  # what is called as the class is
    return replace(subject, cls=cls).quantizer(case)
