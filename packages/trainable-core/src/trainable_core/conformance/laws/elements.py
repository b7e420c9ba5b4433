"""Laws on single elements: their values are independent of the others, and those of the reference."""

from __future__ import annotations

import numpy as np

from trainable_core.conformance.case import Case, Subject, rows
from trainable_core.conformance.declared import element_by_element
from trainable_core.conformance.law import law, require, same_bits
from trainable_core.conformance.strategies import Kind


@law(
    "If it did, the value of an element would change with the batch that it is in.",
    kind=Kind(least=1),
    about=element_by_element,
)
def locality(subject: Subject, case: Case) -> None:
    """An element's value does not depend on the other elements, even where these are NaN."""
    quantizer = subject.quantizer(case)
    alone = case.x.copy()
    spoilt = np.arange(alone.size).reshape(alone.shape) % 2 == 1
    alone[spoilt] = np.nan
    expected, got = (subject.values(quantizer, x)[~spoilt] for x in (case.x, alone))
    same_bits("the same elements beside NaN", got, expected)


@law("A value that is missing must not look like one that was measured.", kind=Kind(least=1))
def nan_inputs(subject: Subject, case: Case) -> None:
    """NaN raises nothing and stays NaN, in training, in eval mode and deployed; no other value becomes NaN."""
    if not subject.element_by_element:
        return
    quantizer = subject.quantizer(case)
    x = case.x.copy()
    missing = np.arange(x.size).reshape(x.shape) % 3 == 0
    x[missing] = np.nan
    for what, values in (
        ("values in eval mode", subject.values(quantizer, x)),
        ("values in training", subject.values(quantizer, x, training=True)),
        ("deployed values", subject.deployed(quantizer, x)),
    ):
        require(f"NaN in {what}", np.isnan(values) == missing, missing, np.isnan(values))


def _has_oracle(subject: Subject) -> bool:
    return subject.method.oracle is not None


@law("The name of a method promises the numbers of its paper, in every framework.", about=_has_oracle)
def reference_values(subject: Subject, case: Case) -> None:
    """Values equal the reference's; a code may differ by one only where rounding errors decide a tie."""
    oracle = subject.method.oracle
    if oracle is None:
        return
    quantizer = subject.quantizer(case)
    for training in (False,) if subject.random else (False, True):
        if not case.x.size and subject.method.computes_grid:
            return  # without an element there is no grid
        expected = oracle.values(rows(case.config, case.x), subject.state(quantizer, case), training)
        got = rows(case.config, subject.values(quantizer, case.x, training=training))
        require(
            "values in training" if training else "values",
            np.abs(got.astype(np.float64) - expected.values.astype(np.float64)) <= expected.allowed,
            expected.values,
            got,
        )
