"""Laws on the term that a method adds to the loss."""

from __future__ import annotations

from typing import Any

import numpy as np

from trainable_core.conformance.case import Case, Subject, variables
from trainable_core.conformance.law import close, law, repeatable, require, same_bits
from trainable_core.conformance.strategies import Kind
from trainable_core.quantizer import BaseTrainableQuantizer
from trainable_core.reference.oracle import EPSILON

SMALL = Kind(bits=(1, 8), moderate=True, finite=True, tensor=False)
STEP = 2.0**-5
"""Distance of the finite differences."""


def _at(subject: Subject, case: Case, values: dict[str, Any]) -> float | None:
    """Return the term of a quantizer with these numbers, after a call in training."""
    quantizer = subject.quantizer(case)
    for name, value in values.items():
        quantizer.assign(quantizer.get_quantizer_variable(name), np.asarray(value, np.float32))
    subject.values(quantizer, case.x, training=True)
    term = subject.adapter.regularization(quantizer)
    return None if term is None else term[0]


@law(
    "A term whose gradient is cut off, or has the wrong sign, pulls nothing where it should.",
    kind=SMALL,
    about=repeatable,
)
def regularization_gradient(subject: Subject, case: Case) -> None:
    """The term for the loss is a finite number, the reference's if there is one, and its gradients are its own."""
    quantizer = subject.quantizer(case)
    subject.values(quantizer, case.x, training=True)
    term = subject.adapter.regularization(quantizer)
    if term is None:
        return
    require("regularization", np.isfinite(term[0]), "a finite number", term[0])
    oracle = subject.method.oracle
    if oracle is not None and oracle.regularization is not None:
        steps = subject.state(quantizer, case)
        expected, distance = oracle.regularization(steps)
        close("regularization", np.asarray(term[0]), np.asarray(expected), distance)
    own = variables(quantizer)
    for name, gradient in term[1].items():
        for place in np.ndindex(own[name].shape):
            got = float(gradient[place])
            wide, narrow = (_difference(subject, case, own, name, place, step) for step in (STEP, STEP / 2))
            # The two differences differ by three quarters of the curvature's error of the first; each has the
            # rounding of two float32 terms, of which a sum of K numbers has K roundings: 32 are allowed.
            rounding = 64 * EPSILON * (abs(term[0]) + 1) / STEP
            allowed = 2 * abs(wide - narrow) + 2 * rounding
            require(f"gradient of the regularization by {name}", abs(got - narrow) <= allowed, narrow, got)


def _difference(
    subject: Subject, case: Case, own: dict[str, Any], name: str, place: tuple[int, ...], step: float
) -> float:
    terms = []
    for sign in (1, -1):
        moved = {each: value.copy() for each, value in own.items()}
        moved[name][place] += np.float32(sign * step)
        terms.append(_at(subject, case, moved))
    return float((terms[0] or 0.0) - (terms[1] or 0.0)) / (2 * step)


def _is_known(subject: Subject) -> bool:
    """Return whether the term follows from the variables alone: that of a tensor is not the adapter's to tell."""
    own = getattr(subject.cls, "regularization_of", BaseTrainableQuantizer.regularization_of)
    return repeatable(subject) and own is BaseTrainableQuantizer.regularization_of


@law("A term that is added twice doubles the pull; one that is never added has none.", kind=SMALL, about=_is_known)
def regularization_once(subject: Subject, case: Case) -> None:
    """One call in training adds the term to the loss once; evaluating adds nothing and changes nothing about it."""
    quantizer = subject.quantizer(case)
    subject.values(quantizer, case.x)
    collected = subject.adapter.collected(quantizer, case.x)
    term = subject.adapter.regularization(quantizer)
    expected = [] if term is None else [term[0]]
    require("number of terms", len(collected) == len(expected), len(expected), len(collected))
    adds = "terms that one call in training adds"
    same_bits(adds, np.asarray(collected, np.float32), np.asarray(expected, np.float32))
