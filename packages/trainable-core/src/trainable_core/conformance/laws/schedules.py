"""Laws on schedules: what counts a step, and what does not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from trainable_core.conformance.case import Case, Subject, moves_in_a_call
from trainable_core.conformance.law import law, repeatable, same_bits, same_training
from trainable_core.conformance.strategies import Kind

SMALL = Kind(moderate=True, finite=True, tensor=False)


def compared(subject: Subject, what: str, case: Case, got: Any, expected: Any) -> None:
    """Require that two quantizers are at the same step: that they give the same in training, and the same term."""
    first, other = (subject.run(each, case.x, training=True, upstream=case.upstream) for each in (got, expected))
    if sorted(first.variables) == sorted(other.variables):
        same_bits(f"values in training {what}", first.values, other.values)
    else:
        same_training(subject, case, f"in training {what}", first, other)
    for name, gradient in other.variables.items():
        if name in first.variables:
            same_bits(f"gradient of {name} {what}", first.variables[name], gradient)
    terms = [subject.adapter.regularization(each) for each in (got, expected)]
    if terms[0] is not None and terms[1] is not None:
        same_bits(f"regularization {what}", np.asarray(terms[0][0]), np.asarray(terms[1][0]))


def _calibrated(case: Case) -> Case:
    return replace(case, factors=(1.0,))


@law(
    "A schedule that counts evaluations, or a call twice, ends before the training does.", kind=SMALL, about=repeatable
)
def schedule_count(subject: Subject, case: Case) -> None:
    """A step is counted once for a training call where the backend counts calls, else by `advance` alone.

    What a call makes of its values, such as a moving average, is no step: the quantizer of the same step gets it too.
    """
    case = _calibrated(case)
    counted = int(subject.adapter.counts_calls)
    evaluated = subject.quantizer(case)
    for _ in range(2):
        subject.values(evaluated, case.x)
    subject.deployed(evaluated, case.x)
    compared(subject, "after evaluations", case, evaluated, subject.quantizer(case))
    for calls in (1, 2):
        called = subject.quantizer(case)
        for _ in range(calls):
            subject.values(called, case.x, training=True)
        expected = subject.quantizer(replace(case, steps=case.steps + calls * counted))
        _take_over_averages(subject, case, calls, called, expected)
        compared(subject, f"after {calls} training calls", case, called, expected)


def _take_over_averages(subject: Subject, case: Case, calls: int, called: Any, expected: Any) -> None:
    """Give `expected` those of the entries of `called` that the values of its calls have decided."""
    entries, before = subject.adapter.entries(called), subject.adapter.entries(expected)
    moved = [name for name, value in entries.items() if not np.array_equal(value, before[name])]
    if not moved:
        return
    other = subject.quantizer(case)
    for _ in range(calls):
        subject.values(other, case.x / 2 + 1, training=True)
    others = subject.adapter.entries(other)
    decided = {name: entries[name] for name in moved if not np.array_equal(entries[name], others[name])}
    if decided:
        subject.adapter.restore_entries(expected, {**before, **decided})


@law(
    "Thresholds are frozen while a schedule runs; it must end where it was planned to end.",
    kind=SMALL,
    about=repeatable,
)
def schedule_of_a_frozen_quantizer(subject: Subject, case: Case) -> None:
    """A frozen quantizer's schedule goes on as that of one that learns."""
    case = _calibrated(case)
    if moves_in_a_call(subject, case, case.x):
        return  # what is frozen stays where it is, and the other goes on
    straight, frozen = subject.quantizer(case), subject.quantizer(case)
    frozen.freeze()
    for _ in range(2):
        compared(subject, "while frozen", case, frozen, straight)
        for each in (straight, frozen):
            each.advance()
    frozen.freeze(frozen=False)
    compared(subject, "after thawing", case, frozen, straight)


@law("Averaged weights are copies that are taken in the middle of a schedule.", kind=SMALL, about=repeatable)
def schedule_of_a_copy(subject: Subject, case: Case) -> None:
    """A copy goes on from the step of the original, and counts for itself."""
    case = _calibrated(case)
    original = subject.quantizer(case)
    original.advance()
    copied = subject.adapter.copy(original)
    for _ in range(3):
        copied.advance()
    compared(subject, "after a copy counted on", case, original, subject.quantizer(replace(case, steps=case.steps + 1)))
    compared(subject, "of a copy", case, copied, subject.quantizer(replace(case, steps=case.steps + 4)))
