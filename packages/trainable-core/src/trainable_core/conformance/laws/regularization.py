"""Laws on the term that a method adds to the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainable_core.conformance.case import Case, Subject, rows, variables
from trainable_core.conformance.declared import Penalty, declares_penalty
from trainable_core.conformance.law import close, law, repeatable, require, same_bits
from trainable_core.conformance.strategies import Kind
from trainable_core.quantizer import BaseTrainableQuantizer
from trainable_core.reference.oracle import EPSILON

SMALL = Kind(bits=(1, 8), moderate=True, finite=True, tensor=False)
STEP = 2.0**-5
"""Distance of the finite differences."""

FACTORS = (1.0, 0.75, 0.5)
"""What a tensor is multiplied by, to see whether a term changes with it."""

Moved = Callable[[float], float]


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
    before = subject.adapter.regularization(subject.quantizer(replace(case, steps=0)))
    if before is not None:
        require("regularization before the first call", np.isfinite(before[0]), "a finite number", before[0])
    quantizer = subject.quantizer(case)
    subject.values(quantizer, case.x, training=True)
    term, oracle = subject.adapter.regularization(quantizer), subject.method.oracle
    if oracle is not None and oracle.regularization is not None:
        expected, distance = oracle.regularization(subject.state(quantizer, case))
        close("regularization", np.asarray(0.0 if term is None else term[0]), np.asarray(expected), distance)
    if term is None:
        return
    require("regularization", np.isfinite(term[0]), "a finite number", term[0])
    own = variables(quantizer)
    for name, gradient in term[1].items():
        for place in np.ndindex(own[name].shape):
            got = float(gradient[place])
            moved = _moved(subject, case, own, name, place)
            (wide, wide_bend), (narrow, bend) = (_differences(moved, term[0], step) for step in (STEP, STEP / 2))
            # The two differences differ by three quarters of the curvature's error of the first; each has the
            # rounding of two float32 terms, of which a sum of K numbers has K roundings: 32 are allowed. Between the
            # slopes on both sides, curvature makes half the distance over half the step. What is left is a kink, as of
            # a clip, where every slope between the two is right.
            rounding = 64 * EPSILON * (abs(term[0]) + 1) / STEP
            kink = max(2 * bend - wide_bend, 0.0)
            allowed = 2 * abs(wide - narrow) + kink / 2 + 2 * rounding
            require(f"gradient of the regularization by {name}", abs(got - narrow) <= allowed, narrow, got)


def _moved(subject: Subject, case: Case, own: dict[str, Any], name: str, place: tuple[int, ...]) -> Moved:
    """Return the term as a function of how far one number of a variable is moved."""

    def term(by: float) -> float:
        moved = {each: value.copy() for each, value in own.items()}
        moved[name][place] += np.float32(by)
        return _at(subject, case, moved) or 0.0

    return term


def _differences(term: Moved, here: float, step: float) -> tuple[float, float]:
    """Return the slope of the term over both sides, and the distance between the slopes on each."""
    there, back = term(step), term(-step)
    return (there - back) / (2 * step), abs(there - 2 * here + back) / step


def _writes_tensor_term(subject: Subject) -> bool:
    """Return whether the class has a term of its own that depends on the tensor, and nobody defines its gradient."""
    return _writes(subject, "regularization_of") and not _has_tensor_term(subject)


def _writes(subject: Subject, name: str) -> bool:
    """Return whether the class has a method of that name which is not the base class's."""
    base = getattr(BaseTrainableQuantizer, name)
    return getattr(subject.cls, name, base) is not base


def _has_tensor_term(subject: Subject) -> bool:
    """Return whether a law is about the method: its reference says which term depends on the tensor."""
    return subject.method.oracle is not None and subject.method.oracle.regularization_of is not None


@law(
    "A term on the weights with another sign, factor or exponent pulls them to other values than the paper's.",
    kind=SMALL,
    about=_has_tensor_term,
)
def regularization_of_tensor(subject: Subject, case: Case) -> None:
    """The term for the loss that depends on the tensor is the reference's, and so are its gradients."""
    oracle = subject.method.oracle
    if oracle is None or oracle.regularization_of is None:
        return
    quantizer = subject.quantizer(case)
    state = replace(subject.state(quantizer, case), steps=case.steps)
    expected = oracle.regularization_of(rows(case.config, case.x), state)
    found = subject.adapter.regularization_of(quantizer, case.x)
    value, gradients = (0.0, {}) if found is None else found
    close("term for the loss", np.asarray(value), np.asarray(expected.value), expected.allowed)
    for name, wanted in expected.variables.items():
        got = gradients.get(name, np.zeros(wanted.shape))
        close(f"gradient of the term by {name}", got, wanted, expected.variables_allowed[name])


@law("A term that is added twice doubles the pull; one that is never added has none.", kind=SMALL, about=repeatable)
def regularization_once(subject: Subject, case: Case) -> None:
    """One call in training adds the term to the loss once; evaluating adds nothing and changes nothing about it."""
    quantizer = subject.quantizer(case)
    subject.values(quantizer, case.x)
    evaluated = subject.adapter.collected(quantizer, case.x, training=False)
    require("number of terms that evaluating adds", not evaluated, 0, len(evaluated))
    before = [term[0] for term in _terms(subject, quantizer, case.x)]
    collected = subject.adapter.collected(quantizer, case.x)
    after = [term[0] for term in _terms(subject, quantizer, case.x)]
    require("number of terms", len(collected) == len(after), len(after), len(collected))
    if collected != before:  # terms are made before the values or after them, which may move a state
        adds = "terms that one call in training adds"
        same_bits(adds, np.asarray(collected, np.float32), np.asarray(after, np.float32))


def _terms(subject: Subject, quantizer: Any, x: NDArray[Any]) -> list[tuple[float, Mapping[str, NDArray[Any]]]]:
    """Return the terms that the quantizer has now, each with its gradients."""
    terms = subject.adapter.regularization(quantizer), subject.adapter.regularization_of(quantizer, x)
    return [term for term in terms if term is not None]


def _may_add_a_term(subject: Subject) -> bool:
    """Return whether the class has a term of its own."""
    return repeatable(subject) and (_writes(subject, "regularization") or _writes(subject, "regularization_of"))


CONSTANTS = (0.0, 1.0, 0.1, -0.7)


@law(
    "Layers begin with zeros or ones, as those of residual branches: 0 / 0 in a term makes the first loss NaN.",
    kind=SMALL,
    about=_may_add_a_term,
    most=10,
)
def regularization_of_constants(subject: Subject, case: Case) -> None:
    """Where all elements are equal, or zero, a term and its gradients are finite numbers."""
    for constant in CONSTANTS:
        quantizer, x = subject.quantizer(case), np.full(case.x.shape, constant, np.float32)
        subject.values(quantizer, x, training=True)
        for value, gradients in _terms(subject, quantizer, x):
            what = f"where all elements are {constant}"
            require(f"term for the loss, {what}", np.isfinite(value), "a finite number", value)
            for name, gradient in gradients.items():
                finite = np.isfinite(gradient)
                require(f"gradient of the term by {name or 'the tensor'}, {what}", finite, "finite numbers", gradient)


@law(
    "A term on the weights that is cut off from them costs time and pulls nothing.",
    kind=SMALL,
    about=_writes_tensor_term,
)
def regularization_arrives(subject: Subject, case: Case) -> None:
    """A term that changes with the tensor gives a gradient to the tensor, or to a variable."""
    quantizer, found, gradients = subject.quantizer(case), [], []
    for factor in FACTORS:
        term = subject.adapter.regularization_of(quantizer, case.x * np.float32(factor))
        if term is not None:
            found.append(term[0])
            gradients += list(term[1].values())
    if len(set(found)) > 1:
        arrives = any(np.any(each) for each in gradients)
        require("gradients of a term that changes with the tensor", arrives, "some number", gradients)


@law(
    "With another factor, or at another step, a term pulls with a strength that nobody chose.",
    kind=SMALL,
    about=declares_penalty,
)
def declared_penalty(subject: Subject, case: Case) -> None:
    """What one call in training adds to the loss is the declared ``penalty``, and so are its gradients."""
    quantizer = subject.quantizer(case)
    collected = subject.adapter.collected(quantizer, case.x)
    penalty = Penalty(quantizer, subject.state(quantizer, case).steps)
    require("number of terms that one call in training adds", len(collected) == 1, 1, len(collected))
    expected = penalty()
    slopes = {name: penalty.slope(name) for name in penalty.variables}
    # A float32 sum of K numbers has K roundings, and what each is made of has a few: 32 are allowed. Each moves the
    # result by its own last bit, or by that of a variable.
    count = sum(value.size for value in penalty.variables.values())
    size = abs(expected) + sum(
        float(np.abs(penalty.variables[name] * each.value).sum()) for name, each in slopes.items()
    )
    rounding = (count + 32) * EPSILON
    close("term that one call in training adds", np.asarray(collected[0]), np.asarray(expected), rounding * size)
    term = subject.adapter.regularization(quantizer)
    for name, got in ({} if term is None else term[1]).items():
        wanted = slopes[name]
        # Where the variable is off by some of float32's last bits, the slope is off by less than it changes over the
        # distance of the differences; and at a kink every slope between those on both sides is right.
        allowed = 2 * wanted.kink + rounding * wanted.size
        close(f"gradient of the term by {name}", got, wanted.value, allowed)
