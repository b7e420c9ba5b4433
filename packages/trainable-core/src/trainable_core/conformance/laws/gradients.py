"""Laws on gradients: they are those of the method's oracle or of the class's surrogate, or at least finite."""

from __future__ import annotations

from typing import Any

import numpy as np

from trainable_core.conformance.adapter import Run
from trainable_core.conformance.case import Case, Subject, Violation, variables
from trainable_core.conformance.declared import declares_surrogate, treats_elements_alike
from trainable_core.conformance.law import close, elementwise, law, repeatable, require, same_bits, same_sums
from trainable_core.conformance.oracles import (
    SMALLEST_NORMAL,
    Expected,
    away_from_kinks,
    by_oracle,
    by_surrogate,
    decided,
)
from trainable_core.conformance.strategies import Kind
from trainable_core.conformance.sweep import on_sweep
from trainable_core.qparams import Float32

# With moderate thresholds no term of a gradient leaves the normal float32 numbers.
MODERATE = Kind(moderate=True, finite=True, bound=True)
EXACT = Kind(exact=True, finite=True)
FIXED = Kind(moderate=True, finite=True, bound=True, fixed_input=True)


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


def _require_input(run: Run, upstream: Float32, expected: Expected | None, case: Case) -> None:
    got = run.x
    if got is None:
        raise Violation("gradient of the input", "an array", None)
    require("shape of the input's gradient", got.shape == case.x.shape, case.x.shape, got.shape)
    require("gradient of the input is finite", np.isfinite(got).all(), "finite numbers", got)
    if expected is not None:
        close = np.abs(got - expected.x) <= expected.x_allowed
        require(f"gradient of the input for upstream {upstream.tolist()}", close, expected.x, got)


def _require_variables(run: Run, upstream: Float32, expected: Expected) -> None:
    got = run.variables
    require("variables with a gradient", set(expected.variables) <= set(got), sorted(expected.variables), sorted(got))
    for name, wanted in expected.variables.items():
        close = np.abs(got[name] - wanted) <= expected.variables_allowed[name]
        require(f"gradient of {name} for upstream {upstream.tolist()}", close, wanted, got[name])


@law("With a wrong gradient a method trains another model than its paper describes.", kind=MODERATE)
def input_gradient(subject: Subject, case: Case) -> None:
    """The input's gradient is the reference's or the declared surrogate's; without either it is finite."""
    run, upstream, expected = _run(subject, subject.quantizer(case), case)
    _require_input(run, upstream, expected, case)


@law("A threshold whose gradient has a wrong sign or size drifts to its bound.", kind=FIXED)
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
    if expected is not None:
        _require_variables(run, upstream, expected)


@law(
    "The largest value of a calibrated tensor often lies exactly at an end of the range: its gradient matters.",
    kind=EXACT,
)
def gradient_at_ends(subject: Subject, case: Case) -> None:
    """On grids without rounding errors, all gradients are the reference's everywhere, at ends and ties too."""
    if subject.method.oracle is not None:
        run, upstream, expected = _run(subject, subject.quantizer(case), case, ends=True)
        _require_input(run, upstream, expected, case)
        if expected is not None:
            _require_variables(run, upstream, expected)


@law("A layer in eval mode is trained too, where its batch norm is frozen or its input is optimized.", kind=MODERATE)
def evaluation_gradients(subject: Subject, case: Case) -> None:
    """In eval mode, gradients arrive and are finite, and those of training where the reference knows no difference."""
    quantizer = subject.quantizer(case)
    defined = subject.method.oracle is not None
    upstream = decided(subject, quantizer, case, ends=False) if defined else case.upstream
    got = subject.run(quantizer, case.x, training=False, upstream=upstream)
    require("gradient of the input in eval mode is finite", np.isfinite(_given(got.x)).all(), "finite numbers", got.x)
    for name, gradient in got.variables.items():
        require(f"gradient of {name} in eval mode is finite", np.isfinite(gradient), "finite numbers", gradient)
    if subject.method.training_forward != "deployed":
        return
    if not defined:
        trained = subject.run(subject.quantizer(case), case.x, training=True, upstream=upstream)
        arrives = np.any(_given(got.x)) or not np.any(_given(trained.x))
        require("gradient of the input in eval mode", arrives, trained.x, got.x)
        return
    expected = by_oracle(subject, quantizer, case, upstream)
    close("gradient of the input in eval mode", _given(got.x), expected.x, expected.x_allowed)
    for name, wanted in expected.variables.items():
        close(f"gradient of {name} in eval mode", got.variables[name], wanted, expected.variables_allowed[name])


def _given(gradient: Any) -> Any:
    if gradient is None:
        raise Violation("gradient of the input", "an array", None)
    return gradient


@law(
    "One infinite or missing value in a batch must not spoil the gradients of all the others.",
    kind=Kind(moderate=True, finite=True, least=1),
    about=elementwise,
)
def nonfinite_inputs(subject: Subject, case: Case) -> None:
    """Infinities and NaN change no other element's gradient; an infinity counts as a large number.

    Beyond the ends, one number is as another.
    """
    spoilt = np.arange(case.x.size).reshape(case.x.shape) % 3 == 1
    far = np.where(spoilt, np.resize(FAR, case.x.shape), case.x).astype(np.float32)
    expected = subject.run(subject.quantizer(case), far, training=True, upstream=case.upstream)
    for what, extreme in (("infinities", FAR * np.float32(np.inf)), ("NaN", np.full(1, np.nan, np.float32))):
        x = np.where(spoilt, np.resize(extreme, case.x.shape), case.x)
        quantizer = subject.quantizer(case)
        got = subject.run(quantizer, x, training=True, upstream=case.upstream)
        same_bits(f"gradient of elements beside {what}", _given(got.x)[~spoilt], _given(expected.x)[~spoilt])
        if what == "NaN":
            continue  # a product with it is NaN, as that of a float layer
        require("gradient of infinities is finite", np.isfinite(_given(got.x)), "finite numbers", got.x)
        if subject.method.oracle is None:
            continue  # automatic differentiation multiplies an infinity by a zero, as it does in a float layer
        as_far = "gradient beside infinities, and beside numbers that are far beyond the ends,"
        same_sums(as_far, got.variables, expected.variables, expected, case.upstream)


def _says_nothing_of_the_input(subject: Subject) -> bool:
    """Return whether only the direction of the input's gradient can be known, of a method that lets inputs learn."""
    return subject.method.oracle is None and not declares_surrogate(subject) and treats_elements_alike(subject)


@law(
    "Without a gradient inside the range weights never learn, and with one of the wrong sign the loss grows.",
    kind=Kind(bits=(2, 8), moderate=True, finite=True, blocks=False),
    about=_says_nothing_of_the_input,
    of_grid=True,
)
def gradient_reaches_the_input(subject: Subject, case: Case) -> None:
    """Inside the range, the input gets a gradient that is positive on average, before a schedule's end and after it."""
    quantizer, x = on_sweep(subject, case, "inside")
    end, axis = subject.schedule_end(quantizer), case.config.channels_axis
    if not subject.element_by_element and x.size == (1 if axis is None else x.shape[axis]):
        return  # of one element, what it is divided by may be itself
    for when, count in (("", case.steps), (" after the schedule", end)):
        if count is None:
            continue
        if when:
            quantizer.counted_steps = max(count, case.steps)
        # where those of other elements come in, the sum may be anything
        several = [1.0] if subject.element_by_element else [1.0, -2.0, 0.5, 3.0, -1.0]
        upstream = np.resize(np.array(several, np.float32), x.shape)
        got = _given(subject.run(quantizer, x, training=True, upstream=upstream).x)
        require(f"gradient of inputs inside the range{when}", np.any(got), "some number", got)
        if subject.element_by_element:
            total = float(got.sum(dtype=np.float64))
            require(f"sum of the gradients of inputs inside the range{when}", total > 0, "a positive number", total)


LOSS_SCALES = np.float32(2.0**16), np.float32(2.0**-24)
"""What automatic mixed precision begins with, and the share of one element in the mean over a large output.

Powers of two, so that each product is exact.
"""


@law(
    "Mixed precision multiplies the loss by a large number, and skips the step where a gradient is infinite then.",
    kind=Kind(moderate=True, finite=True, tensor=False),
    about=repeatable,
)
def loss_scale(subject: Subject, case: Case) -> None:
    """A loss that is multiplied by a number multiplies each gradient by it; an infinite one doesn't come out finite."""
    plain = subject.run(subject.quantizer(case), case.x, training=True, upstream=case.upstream)
    got = _given(plain.x)
    for factor in LOSS_SCALES:
        scaled = subject.run(subject.quantizer(case), case.x, training=True, upstream=case.upstream * factor)
        # A term below the normal numbers is off by up to the smallest of them, and may be multiplied by 2**20 later:
        # moderate thresholds and their gradients' scales are no larger.
        allowed = max(factor, 1) * max(got.size, 1) * SMALLEST_NORMAL * 2.0**20
        times = f"for a loss {factor:g} times as large"
        close(f"gradient of the input {times}", _given(scaled.x), got * factor, allowed)
        for name, gradient in plain.variables.items():
            close(f"gradient of {name} {times}", scaled.variables[name], gradient * factor, allowed)
    if not subject.element_by_element or not np.any(got):
        return
    there = np.abs(got) == np.abs(got).max()
    upstream = np.where(there, np.float32(np.inf), case.upstream)
    spoilt = _given(subject.run(subject.quantizer(case), case.x, training=True, upstream=upstream).x)[there]
    what = "gradient of an input whose upstream gradient is infinite"
    require(what, not np.isfinite(spoilt).any(), "no finite number", spoilt)


FAR = np.array([1, -1, -1, 1, -1], np.float32) * np.float32(2.0**60)
"""Numbers far beyond every end of a moderate grid, whose squares are finite."""
