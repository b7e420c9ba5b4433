"""Laws on the conditions of a call: gradients switched off, mixed precision, modes, sizes, devices, neighbours."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np

from trainable_core.conformance.adapter import settings
from trainable_core.conformance.case import Case, Subject, Violation, free_axes, move
from trainable_core.conformance.law import close, law, repeatable, require, same_bits, same_sums
from trainable_core.conformance.laws.sequences import doubled
from trainable_core.conformance.strategies import Kind
from trainable_core.errors import TrainableError

SMALL = Kind(moderate=True, finite=True, tensor=False)
TERM = 2.0**-14
"""Relative distance of two terms: sums of up to a thousand float32 numbers, where half precision is off by 2**-11."""


@law(
    "Models are evaluated without gradients, and trained under mixed precision: what is kept there must not be stale.",
    kind=SMALL,
    about=lambda subject: bool(subject.adapter.contexts),
    most=10,
)
def contexts(subject: Subject, case: Case) -> None:
    """Without gradients and under mixed precision, values are the same, new numbers count at once, and both stay on."""
    for name, enter in subject.adapter.contexts.items():
        with enter():
            before = settings(subject.adapter)
            subject.values(subject.quantizer(case), case.x, training=True)
            after = settings(subject.adapter)
        require(f"settings of the process under {name}", after == before, before, after)
        for training in (False,) if subject.random else (False, True):
            expected = subject.values(subject.quantizer(case), case.x, training=training)
            quantizer = subject.quantizer(case)
            with enter():
                got = subject.values(quantizer, case.x, training=training)
            same_bits(f"values under {name}, training={training}", got, expected)
            if training:
                expected = np.asarray(subject.adapter.collected(subject.quantizer(case), case.x))
                quantizer = subject.quantizer(case)
                with enter():
                    got = np.asarray(subject.adapter.collected(quantizer, case.x))
                # in float32 as outside, where kernels may add in another order
                close(f"terms for the loss under {name}", got, expected, TERM * np.abs(expected))
        quantizer, source = subject.quantizer(case), subject.quantizer(case)
        move(source, (2.0,))
        with enter():
            subject.values(quantizer, case.x)
        subject.adapter.restore(quantizer, subject.adapter.save(source))
        with enter():
            got = subject.values(quantizer, case.x)
        same_bits(f"values under {name} after loading", got, subject.values(source, case.x))
        if not subject.method.computes_grid:
            params = doubled(case.config.quantization_params)
            quantizer.set_quantization_params(dict.fromkeys(quantizer.widths, params))
            with enter():
                got = subject.values(quantizer, case.x)
            same_bits(f"values under {name} after another calibration", got, subject.deployed(quantizer, case.x))
        subject.run(quantizer, case.x, training=True, upstream=case.upstream)  # what is kept doesn't stop a training


@law(
    "A method that asks the module instead of the call trains what is evaluated, and the other way round.",
    kind=SMALL,
    about=lambda subject: repeatable(subject) and len(subject.adapter.default_training) > 1,
    most=20,
)
def mode_of_the_call(subject: Subject, case: Case) -> None:
    """A call that says whether the model trains is what it says, whatever the framework's own mode is."""
    opposed = replace(subject, way=replace(subject.way, opposed=True))
    for training in (False, True):
        expected = subject.values(subject.quantizer(case), case.x, training=training)
        got = opposed.values(subject.quantizer(case), case.x, training=training)
        same_bits(f"values of a call with training={training}, in the other mode", got, expected)


def _sized(subject: Subject) -> bool:
    return not subject.weights and repeatable(subject)


@law(
    "The last batch of an epoch is smaller, and images come in several sizes.",
    kind=Kind(moderate=True, finite=True, tensor=False, least=1),
    about=_sized,
)
def several_sizes(subject: Subject, case: Case) -> None:
    """After a call with another size, a call gives what it gives without, values and gradients."""
    axis = next(iter(free_axes(case)), None)
    if axis is None:
        return
    larger, after, alone = case.repeated(axis, 3), subject.quantizer(case), subject.quantizer(case)
    subject.run(after, larger.x, training=True, upstream=larger.upstream)
    subject.run(alone, case.x, training=True, upstream=case.upstream)
    states = [subject.adapter.entries(each) for each in (after, alone)]
    if any(not np.array_equal(value, states[1][name], equal_nan=True) for name, value in states[0].items()):
        return  # it keeps statistics of what it has seen
    got, expected = (subject.run(each, case.x, training=True, upstream=case.upstream) for each in (after, alone))
    same_bits("values after a call with another size", got.values, expected.values)
    if got.x is None or expected.x is None:
        raise Violation("gradient of the input after a call with another size", "an array", got.x)
    same_bits("gradient of the input after a call with another size", got.x, expected.x)
    what = "gradient, after a call with another size,"
    same_sums(what, got.variables, expected.variables, expected, case.upstream)


@law("A model holds many quantizers of one class, each with options of its own.", kind=SMALL, about=repeatable)
def several_quantizers(subject: Subject, case: Case) -> None:
    """Another quantizer of the class, with other options or for a layer of the same name, changes nothing about one."""
    _of_one_name(subject, case)
    for arguments in subject.argument_sets:
        if arguments == case.arguments:
            continue
        expected = _both(subject, subject.quantizer(case), case)
        quantizer = subject.quantizer(case)
        try:
            other = subject.quantizer(replace(case, arguments=arguments))
        except TrainableError:
            continue  # there is no such table
        subject.run(other, case.x, training=True, upstream=case.upstream)
        for (what, got), (_, wanted) in zip(_both(subject, quantizer, case), expected, strict=True):
            same_bits(f"{what} beside a quantizer with {arguments}", got, wanted)


def _of_one_name(subject: Subject, case: Case) -> None:
    """Require that a layer of another model that had the same name changes nothing."""
    axis = next(iter(free_axes(case)), None)
    if axis is None:
        return
    first, second, third = (replace(subject, layer=f"layer_{next(NAMES)}") for _ in range(3))
    alone, expected = (_both(each, each.quantizer(case), case) for each in (first, second))
    if any(
        not np.array_equal(value, other, equal_nan=True) for (_, value), (_, other) in zip(alone, expected, strict=True)
    ):
        return  # it depends on the name
    larger = case.repeated(axis, 3)
    third.run(third.quantizer(larger), larger.x, training=True, upstream=larger.upstream)
    for (what, got), (_, wanted) in zip(_both(third, third.quantizer(case), case), expected, strict=True):
        same_bits(f"{what} after a larger layer of the same name", got, wanted)


NAMES = itertools.count()
"""Of layers, each used for one model alone."""


def _both(subject: Subject, quantizer: Any, case: Case) -> list[tuple[str, Any]]:
    run = subject.run(quantizer, case.x, training=True, upstream=case.upstream)
    return [
        ("values", run.values),
        ("gradient of the input", run.x),
        *((f"gradient of {name}", value) for name, value in sorted(run.variables.items())),
    ]


@law("A tensor that is made where the model is not stops the first call on a GPU.", kind=SMALL, most=2)
def other_device(subject: Subject, case: Case) -> None:
    """Moved to another device, a quantizer computes there."""
    for training in (False, True):
        problem = subject.adapter.misplaced(subject.quantizer(case), case.x, training=training)
        require(f"a call on another device, training={training}", not problem, "no error", problem)
