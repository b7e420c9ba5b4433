"""Laws on how a tensor lies in memory, and on how large it is: neither changes what a quantizer gives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from trainable_core.conformance.adapter import PLAIN
from trainable_core.conformance.case import Case, Subject, free_axes, rows, tensor
from trainable_core.conformance.law import close, elementwise, law, same_bits, same_sums
from trainable_core.conformance.oracles import by_oracle, decided
from trainable_core.conformance.strategies import Kind

MODERATE = Kind(moderate=True, finite=True)


@law(
    "Transposed weights, slices and channels-last images are the same tensors; a loss's sum has a gradient of one "
    "number for all.",
    kind=MODERATE,
    about=elementwise,
)
def memory_layout(subject: Subject, case: Case) -> None:
    """Values and gradients do not depend on how the input and the upstream gradient lie in memory."""
    plain = replace(subject, way=replace(PLAIN, input_gradient=subject.way.input_gradient))
    x = subject.normal(case.x)
    for training in (False, True):
        expected, got = (
            each.run(each.quantizer(case), x, training=training, upstream=case.upstream) for each in (plain, subject)
        )
        same_bits(f"values of {subject.way.layout} input", got.values, expected.values)
        if got.x is not None and expected.x is not None:
            what = f"input's gradient, {subject.way.layout} input, {subject.way.upstream} upstream"
            same_bits(what, got.x, expected.x)
        what = f"gradient, {subject.way.layout} input, {subject.way.upstream} upstream,"
        same_sums(what, got.variables, expected.variables, expected, case.upstream)


@law(
    "Fast paths begin at a number of elements; a weight of a large layer must be quantized as that of a small one.",
    kind=MODERATE,
    about=elementwise,
)
def tensor_size(subject: Subject, case: Case) -> None:
    """A tensor that repeats a smaller one has its values and its input gradients, repeated.

    An exponential can have other last bits in a larger tensor, whose elements a vector of the processor takes together:
    the values and gradients of soft methods are equal up to that. Where every shape is compiled anew, the larger
    tensor's soft values are compared with the reference.
    """
    if not case.x.size or not case.x.ndim:
        return
    case = replace(case, x=subject.normal(case.x))
    axis, times = case.repeats
    if times == 1:
        free = free_axes(case)
        if not free:
            return
        axis, times = free[0], 2
    whole = case.repeated(axis, times)
    small, upstream = whole.part
    for training in (False, True):
        if training and subject.method.training_forward == "soft" and subject.adapter.compiles_shapes:
            _as_reference(subject, whole)
            continue
        one, large = (subject.quantizer(case, shape) for shape in (small.shape, whole.x.shape))
        _repeat_variables(subject, case, one, large, (axis, times))
        expected = subject.run(one, small, training=training, upstream=upstream)
        got = subject.run(large, whole.x, training=training, upstream=whole.upstream)
        soft = training and subject.method.training_forward == "soft"
        pairs = {"values": (got.values, expected.values), "input's gradient": (got.x, expected.x)}
        for what, (found, wanted) in pairs.items():
            if found is None or wanted is None:
                continue
            repeated = np.concatenate([wanted] * times, axis)
            if soft:
                largest = np.abs(wanted[np.isfinite(wanted)]).max(initial=0.0)
                close(f"{what} of {whole.x.size} elements", found, repeated, LAST_BITS * largest)
            else:
                same_bits(f"{what} of {whole.x.size} elements", found, repeated)


LAST_BITS = 2.0**-18
"""What differences in the last bits of exponentials come to, relative to the largest number.

An exponential is off by two units of 2**-24 or fewer; a soft value is a quotient of sums of them, and its derivative
has a difference of two such quotients, each up to sixteen times as large as what is left.
"""


def _repeat_variables(subject: Subject, case: Case, one: Any, large: Any, repeats: tuple[int, int]) -> None:
    """Give a quantizer of a larger tensor the numbers that one of a smaller tensor has for each element, repeated."""
    axis, times = repeats
    for own in subject.method.own:
        if own.per_element:
            value = one.to_numpy(one.get_quantizer_variable(own.name))
            repeated = np.concatenate([tensor(case.config, value, one.tensor_shape)] * times, axis)
            large.assign(large.get_quantizer_variable(own.name), rows(case.config, repeated))


def _as_reference(subject: Subject, case: Case) -> None:
    """Require the reference's values and input gradients in training, where a method has a reference."""
    oracle = subject.method.oracle
    if oracle is None:
        return
    quantizer, what = subject.quantizer(case), f"of {case.x.size} elements"
    values = oracle.values(rows(case.config, case.x), subject.state(quantizer, case), True)  # noqa: FBT003 - training
    upstream = decided(subject, quantizer, case, ends=False)
    gradients = by_oracle(subject, quantizer, case, upstream)
    got = subject.run(quantizer, case.x, training=True, upstream=upstream)
    close(f"values {what}", rows(case.config, got.values), values.values, values.allowed)
    if got.x is not None:
        close(f"input's gradient {what}", got.x, gradients.x, gradients.x_allowed)
