"""Laws on gradients: they are those of the method's oracle or of the class's surrogate, or at least finite."""

from __future__ import annotations

from typing import Any

import numpy as np

from trainable_core.conformance.adapter import Run
from trainable_core.conformance.case import Case, Subject, Violation, variables
from trainable_core.conformance.declared import declares_surrogate
from trainable_core.conformance.law import law, require
from trainable_core.conformance.oracles import (
    Expected,
    away_from_kinks,
    by_oracle,
    by_surrogate,
    decided,
)
from trainable_core.conformance.strategies import Kind
from trainable_core.qparams import Float32

# With moderate thresholds and up to 8 bits no term of a gradient leaves the normal float32 numbers.
MODERATE = Kind(bits=(1, 8), moderate=True, finite=True)
EXACT = Kind(bits=(1, 8), exact=True, finite=True)


def _run(subject: Subject, quantizer: Any, case: Case, *, ends: bool = False) -> tuple[Run, Float32, Expected | None]:
    """Return a training run, its upstream (zero where rounding or a kink decides), and the gradients to expect."""
    oracle, surrogate = subject.method.oracle is not None, declares_surrogate(subject)
    upstream = case.upstream
    if oracle:
        upstream = decided(subject, quantizer, case, ends=ends)
    elif surrogate:
        upstream = away_from_kinks(quantizer, case)
    expected = by_oracle(subject, quantizer, case, upstream) if oracle else None
    run = subject.run(quantizer, case.x, training=True, upstream=upstream)
    if surrogate and not oracle:
        expected = by_surrogate(subject, quantizer, case, upstream, run.values)
    return run, upstream, expected


def _input_gradient(subject: Subject, case: Case, *, ends: bool = False) -> None:
    quantizer = subject.quantizer(case)
    run, upstream, expected = _run(subject, quantizer, case, ends=ends)
    got = run.x
    if got is None:
        raise Violation("gradient of the input", "an array", None)
    require("shape of the input's gradient", got.shape == case.x.shape, case.x.shape, got.shape)
    require("gradient of the input is finite", np.isfinite(got).all(), "finite numbers", got)
    if expected is not None:
        close = np.abs(got - expected.x) <= expected.x_allowed
        require(f"gradient of the input for upstream {upstream.tolist()}", close, expected.x, got)


@law("With a wrong gradient a method trains another model than its paper describes.", kind=MODERATE)
def input_gradient(subject: Subject, case: Case) -> None:
    """The input's gradient is the reference's or the declared surrogate's; without either it is finite."""
    _input_gradient(subject, case)


@law(
    "The largest value of a calibrated tensor often lies exactly at an end of the range: its gradient matters.",
    kind=EXACT,
)
def gradient_at_ends(subject: Subject, case: Case) -> None:
    """On grids without rounding errors, the input's gradient is the reference's everywhere, at ends and ties too."""
    if subject.method.oracle is not None:
        _input_gradient(subject, case, ends=True)


@law("A threshold whose gradient has a wrong sign or size drifts to its bound.", kind=MODERATE)
def variable_gradients(subject: Subject, case: Case) -> None:
    """The variables' gradients are the reference's or the declared surrogate's; without either they are finite."""
    quantizer = subject.quantizer(case)
    run, upstream, expected = _run(subject, quantizer, case)
    got = run.variables
    shapes = {name: value.shape for name, value in variables(quantizer).items()}
    for name, gradient in got.items():
        if name not in shapes:
            continue  # the law `variable_groups` reports it
        require(f"shape of the gradient of {name}", gradient.shape == shapes[name], shapes[name], gradient.shape)
        require(f"gradient of {name} is finite", np.isfinite(gradient).all(), "finite numbers", gradient)
    if expected is None:
        return
    require("variables with a gradient", set(expected.variables) <= set(got), sorted(expected.variables), sorted(got))
    for name, wanted in expected.variables.items():
        close = np.abs(got[name] - wanted) <= expected.variables_allowed[name]
        require(f"gradient of {name} for upstream {upstream.tolist()}", close, wanted, got[name])
