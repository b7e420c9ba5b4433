"""Laws on gradients: those of the reference, those of the surrogate a class declares, or at least finite ones."""

from __future__ import annotations

from typing import Any

import numpy as np

from trainable_core.conformance.case import Case, Subject, Violation, variables
from trainable_core.conformance.law import law, require
from trainable_core.conformance.oracles import (
    Expected,
    away_from_kinks,
    by_oracle,
    by_surrogate,
    decided,
    declares_surrogate,
)
from trainable_core.conformance.strategies import Kind
from trainable_core.qparams import Float32

# With moderate thresholds and up to 8 bits no term of a gradient leaves the normal float32 numbers.
MODERATE = Kind(bits=(1, 8), moderate=True, finite=True)
EXACT = Kind(bits=(1, 8), exact=True, finite=True)


def _expected(subject: Subject, quantizer: Any, case: Case, *, ends: bool = False) -> tuple[Float32, Expected | None]:
    """Return an upstream gradient that is zero where the gradient is not sure, and the gradients for it."""
    if subject.method.oracle is not None:
        upstream = decided(subject, quantizer, case, ends=ends)
        return upstream, by_oracle(subject, quantizer, case, upstream)
    if declares_surrogate(subject):
        upstream = away_from_kinks(quantizer, case)
        return upstream, by_surrogate(quantizer, case, upstream)
    return case.upstream, None


def _input_gradient(subject: Subject, case: Case, *, ends: bool = False) -> None:
    quantizer = subject.quantizer(case)
    upstream, expected = _expected(subject, quantizer, case, ends=ends)
    got = subject.run(quantizer, case.x, training=True, upstream=upstream).x
    if got is None:
        raise Violation("gradient of the input", "an array", None)
    require("shape of the input's gradient", got.shape == case.x.shape, case.x.shape, got.shape)
    require("gradient of the input is finite", np.isfinite(got).all(), "finite numbers", got)
    if expected is not None:
        close = np.abs(got - expected.x) <= expected.x_allowed
        require(f"gradient of the input for upstream {upstream.tolist()}", close, expected.x, got)


@law("a wrong input gradient trains another model than the paper's", kind=MODERATE)
def input_gradient(subject: Subject, case: Case) -> None:
    """Input gradients are the reference's, or those of the declared surrogate; else they are finite."""
    _input_gradient(subject, case)


@law("exactly at the ends of the range and on ties a method says what its gradient is", kind=EXACT)
def gradient_at_ends(subject: Subject, case: Case) -> None:
    """On grids without rounding errors the reference decides at every point, ends and ties too."""
    if subject.method.oracle is not None:
        _input_gradient(subject, case, ends=True)


@law("a threshold that learns by a wrong gradient, sign or scale ends at its bounds", kind=MODERATE)
def variable_gradients(subject: Subject, case: Case) -> None:
    """Variable gradients are the reference's, or those of the declared surrogate; else they are finite."""
    quantizer = subject.quantizer(case)
    upstream, expected = _expected(subject, quantizer, case)
    got = subject.run(quantizer, case.x, training=True, upstream=upstream).variables
    shapes = {name: value.shape for name, value in variables(quantizer).items()}
    for name, gradient in got.items():
        if name not in shapes:
            continue  # told by `variable_groups`
        require(f"shape of the gradient of {name}", gradient.shape == shapes[name], shapes[name], gradient.shape)
        require(f"gradient of {name} is finite", np.isfinite(gradient).all(), "finite numbers", gradient)
    if expected is None:
        return
    require("variables with a gradient", set(expected.variables) <= set(got), sorted(expected.variables), sorted(got))
    for name, wanted in expected.variables.items():
        close = np.abs(got[name] - wanted) <= expected.variables_allowed[name]
        require(f"gradient of {name} for upstream {upstream.tolist()}", close, wanted, got[name])
