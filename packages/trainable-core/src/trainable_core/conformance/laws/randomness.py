"""Laws on methods that declare that their values in training are random."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainable_core.conformance.adapter import nothing_random, random_states
from trainable_core.conformance.case import Case, Subject, Violation, grid, with_fields
from trainable_core.conformance.declared import channel_by_channel
from trainable_core.conformance.law import law, require, same_bits
from trainable_core.conformance.laws.channels import axis_of, one_of
from trainable_core.conformance.strategies import Kind
from trainable_core.conformance.sweep import on_sweep

SEED = 7
CALLS, FEWEST = 4, 16
"""Calls of which one at least differs from the first, and elements that each has, drawn one by one."""
SPREAD = np.array([1.0, 2.0**10, 2.0**-5])
"""What thresholds of neighbouring channels are multiplied by."""
FARTHER = 8.0
"""How much farther from the input a channel's values may be by chance."""


def _is_random(subject: Subject) -> bool:
    return subject.random


@law(
    "Noise that is the same at each call, or in each layer, is a bias that the model learns.",
    kind=Kind(bits=(2, 8), moderate=True, finite=True, blocks=False),
    about=_is_random,
    of_grid=True,
)
def random_values(subject: Subject, case: Case) -> None:
    """Calls in training give other values each time, and two quantizers other values than each other.

    Noise that grows or fades with a schedule may be none at a step: it is looked for at its beginning and middle too.
    """
    quantizer, x = on_sweep(subject, case, "inside")
    end = subject.schedule_end(quantizer)
    equal: Violation | None = None
    for steps in dict.fromkeys((case.steps, 0, (end or 0) // 2)):
        if x.size >= FEWEST and (end is None or steps < end):  # few are equal by chance; what is deployed isn't random
            equal = _equal_values(subject, replace(case, steps=steps))
            if equal is None:
                return
    if equal is not None:
        raise equal


def _equal_values(subject: Subject, case: Case) -> Violation | None:
    quantizer, x = on_sweep(subject, case, "inside")
    other, _ = on_sweep(subject, case, "inside")
    first = subject.values(quantizer, x, training=True)
    of_other = [subject.values(other, x, training=True) for _ in range(CALLS)]
    again = [subject.values(quantizer, x, training=True) for _ in range(CALLS)]
    if all(np.array_equal(each, first) for each in again):
        return Violation("values of several calls in training", "values that differ", again)
    if all(np.array_equal(one, two) for one, two in zip([first, *again], of_other, strict=False)):
        return Violation("values of two quantizers, call by call", "values that differ", of_other)
    return None


def _has_random_channels(subject: Subject) -> bool:
    return subject.random and channel_by_channel(subject)


@law(
    "Noise as wide as another channel's step drowns a channel of small weights.",
    kind=Kind(bits=(2, 8), moderate=True, finite=True, per_channel=True, least=1, blocks=False),
    about=_has_random_channels,
    of_grid=True,
)
def random_channels(subject: Subject, case: Case) -> None:
    """In each channel, values in training are as far from the input as in a quantizer of that channel alone."""
    axis = axis_of(case.config, case.x.ndim)
    params = {
        key: (np.asarray(value) * np.resize(SPREAD, len(value))).tolist() if isinstance(value, list) else value
        for key, value in case.config.quantization_params.items()
    }
    config = with_fields(case.config, weights_quantization_params=params)
    together, x = on_sweep(subject, replace(case, config=config, factors=(1.0,), steps=0), "inside")
    steps = np.ravel(grid(together).scale)
    distances = _farthest(subject, together, x, axis)
    for channel, (distance, step) in enumerate(zip(distances, steps, strict=True)):
        part = np.take(x, channel, axis)
        alone = subject.fresh(case, one_of(config, channel), part.shape)
        expected = max(float(_farthest(subject, alone, part, None)), float(step))
        require(f"distance from the input in channel {channel}", distance <= FARTHER * expected, expected, distance)


def _farthest(subject: Subject, quantizer: Any, x: NDArray[np.float32], axis: int | None) -> NDArray[Any]:
    """Return the largest distance of a value in training from its input, over several calls: of each channel."""
    others = tuple(each for each in range(x.ndim) if each != axis)
    found = [np.abs(subject.values(quantizer, x, training=True) - x).max(others) for _ in range(CALLS)]
    return np.asarray(np.max(found, axis=0))


@law(
    "A seed that a call sets makes every dropout and shuffle after it the same in each step.",
    kind=Kind(moderate=True, finite=True, tensor=False),
    about=_is_random,
    most=10,
)
def seeds(subject: Subject, case: Case) -> None:
    """A call in training goes on from the global random states that it finds, sets none, and has no others.

    Evaluating draws nothing.
    """
    quantizer, after = subject.quantizer(case), []
    for _ in range(2):
        with nothing_random(subject.adapter):
            subject.values(quantizer, case.x, training=True)
            after.append(random_states(subject.adapter))
    same = [name for name, digest in after[0].items() if after[1][name] == digest]
    require("random states that are the same after two calls from different ones", not same, [], same)
    if not subject.adapter.random_states():
        return  # a framework that shows none can't be given one
    repeated = []
    for _ in range(2):
        with nothing_random(subject.adapter, SEED):
            repeated.append(subject.values(subject.quantizer(case), case.x, training=True))
    same_bits("values in training of two quantizers that were made and called after one seed was set", *repeated)
    with nothing_random(subject.adapter, SEED):
        quantizer = subject.quantizer(case)
        subject.values(quantizer, case.x)
        after_evaluation = subject.values(quantizer, case.x, training=True)
    same_bits("values in training after an evaluation", after_evaluation, repeated[0])
    resumed = subject.fresh(case)
    subject.adapter.restore(resumed, subject.adapter.save(quantizer))
    drawn = []
    for each in (quantizer, resumed):
        with nothing_random(subject.adapter, SEED):
            drawn.append(subject.values(each, case.x, training=True))
    same_bits("values in training of a quantizer that was saved and loaded", drawn[1], drawn[0])
