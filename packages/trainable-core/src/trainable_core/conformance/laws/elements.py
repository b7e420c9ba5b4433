"""Laws on every element of any tensor: independent of the others, and the reference's."""

from __future__ import annotations

import numpy as np

from trainable_core.conformance.case import Case, Subject
from trainable_core.conformance.law import law, require, same_bits
from trainable_core.conformance.strategies import Kind


@law("a value that depends on its neighbours is not what runs on another batch", kind=Kind(least=1))
def locality(subject: Subject, case: Case) -> None:
    """No element's value depends on the other elements, NaN among them."""
    quantizer = subject.quantizer(case)
    alone = case.x.copy()
    spoilt = np.arange(alone.size).reshape(alone.shape) % 2 == 1
    alone[spoilt] = np.nan
    expected, got = (subject.values(quantizer, x)[~spoilt] for x in (case.x, alone))
    same_bits("the same elements among other ones", got, expected)


def _has_oracle(subject: Subject) -> bool:
    return subject.method.oracle is not None


@law("the paper's numbers are what the method's name promises, in every framework", about=_has_oracle)
def reference_values(subject: Subject, case: Case) -> None:
    """Values are the reference's: the same codes, except within rounding of a tie, and there at most one step."""
    oracle = subject.method.oracle
    if oracle is None:
        return
    quantizer = subject.quantizer(case)
    for training in (False,) if subject.random else (False, True):
        expected = oracle.values(case.x, subject.state(quantizer, case), training)
        got = subject.values(quantizer, case.x, training=training)
        require(
            "values in training" if training else "values",
            np.abs(got.astype(np.float64) - expected.values.astype(np.float64)) <= expected.allowed,
            expected.values,
            got,
        )
