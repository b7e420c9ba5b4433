"""Laws on what a framework does with a whole call: it differentiates it twice or forward, and maps it over inputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from trainable_core.conformance.adapter import FORWARD, INPUT, VECTORIZED, Run
from trainable_core.conformance.case import Case, Subject, Violation, grid, move, rows, tensor, variables
from trainable_core.conformance.law import close, elementwise, law, repeatable, require, same_bits
from trainable_core.conformance.oracles import by_oracle, step_at_ties
from trainable_core.conformance.strategies import Kind
from trainable_core.qparams import Float32
from trainable_core.reference.oracle import EPSILON

MODERATE = Kind(moderate=True, finite=True)
SMALL = Kind(moderate=True, finite=True, tensor=False)

STEP = 2.0**-3
"""Distance of the finite differences of upstream gradients, which are eighths."""


def signs(shape: tuple[int, ...]) -> Float32:
    """Return 1 and -1 in turn."""
    return np.resize(np.array([1, -1], np.float32), shape)


def alike(subject: Subject, case: Case, what: str, got: Run, expected: Run, upstream: Float32) -> None:
    """Require equal gradients, but for the order in which float32 terms are added up, and how they cancel."""
    if got.x is None or expected.x is None:
        raise Violation(f"gradient of the input, {what}", "an array", got.x)
    of_x, of_variables = np.abs(expected.x) * 64 * EPSILON, sum_errors(expected, upstream)
    if subject.method.oracle is not None:  # the reference says how far off a gradient may be whose terms cancel
        reference = by_oracle(subject, subject.quantizer(case), case, upstream)
        of_x = of_x + 2 * reference.x_allowed
        of_variables = {
            name: allowed + 2 * reference.variables_allowed.get(name, np.float64(0))
            for name, allowed in of_variables.items()
        }
    close(f"gradient of the input, {what}", got.x, expected.x, of_x)
    names = sorted(got.variables), sorted(expected.variables)
    require(f"variables that have a gradient, {what}", names[0] == names[1], names[1], names[0])
    for name, value in expected.variables.items():
        close(f"gradient of {name}, {what}", got.variables[name], value, of_variables[name])


def sum_errors(run: Run, upstream: Float32) -> dict[str, Any]:
    """Return how far sums of gradients may be apart, by the name of the variable; see `law.same_sums`."""
    values = np.abs(run.values[np.isfinite(run.values)])
    size = 2 * max(1.0, float(values.max(initial=0.0))) * float(np.abs(upstream).sum(dtype=np.float64))
    return dict.fromkeys(run.variables, np.float64(2 * size * (upstream.size + 16) * EPSILON))


@law(
    "Gradient penalties and Hessians differentiate twice; a wrong second derivative is worse than a refusal.",
    kind=MODERATE,
    about=repeatable,
)
def second_derivatives(subject: Subject, case: Case) -> None:
    """Gradients, differentiated by the upstream gradient, are their own slopes; or the call is refused."""
    direction = signs(case.x.shape)
    # away from zero, where a method may change with the gradient's sign
    upstream = np.where(np.abs(case.upstream) <= STEP, np.float32(1), case.upstream).astype(np.float32)
    got = subject.adapter.second_derivative(subject.quantizer(case), case.x, upstream, {INPUT: direction})
    if got is None:
        return
    first, second = got
    runs, slopes = [], []
    for sign in (0, 1, -1):
        moved = (upstream + np.float32(sign * STEP) * direction).astype(np.float32)
        run = subject.run(subject.quantizer(case), case.x, training=True, upstream=moved)
        if run.x is None:
            raise Violation("gradient of the input", "an array", None)
        runs.append(run)
        slopes.append(run.x.astype(np.float64))
    allowed: Any = (np.abs(slopes[1]) + np.abs(slopes[2]) + np.abs(second)) * 64 * EPSILON
    if subject.method.oracle is not None:  # terms of a gradient may cancel: its reference says how far off it may be
        allowed = allowed + 2 * by_oracle(subject, subject.quantizer(case), case, upstream).x_allowed
    alike(subject, case, "taken to be differentiated", first, runs[0], upstream)
    # A gradient is linear in the upstream one, or in each of its signs: the difference is exact but for the roundings
    # of both gradients, each relative to a gradient of up to 5 times the slope.
    expected = (slopes[1] - slopes[2]) / (2 * STEP)
    close("second derivative of the input's gradient by the upstream one", second, expected * 1.0, allowed / STEP)
    _of_variables(subject, case, upstream, runs)


def _of_variables(subject: Subject, case: Case, upstream: Float32, runs: list[Run]) -> None:
    """Require the same of the gradients of the variables, along a direction of the upstream gradient."""
    directions = {name: signs(value.shape) for name, value in runs[0].variables.items()}
    if not directions or not case.x.size:
        return
    found = subject.adapter.second_derivative(subject.quantizer(case), case.x, upstream, directions)
    if found is None:
        return
    got = float(np.sum(found[1] * signs(case.x.shape), dtype=np.float64))
    there, back = (
        sum(float(np.sum(run.variables[name] * d, dtype=np.float64)) for name, d in directions.items())
        for run in runs[1:]
    )
    # Each gradient is off by what is allowed for a sum, once for each number that a variable has.
    reach = (np.abs(upstream) + np.float32(STEP)).astype(np.float32)
    errors = sum_errors(runs[0], reach)
    if subject.method.oracle is not None:
        reference = by_oracle(subject, subject.quantizer(case), case, reach).variables_allowed
        errors = {name: each + 2 * reference.get(name, np.float64(0)) for name, each in errors.items()}
    sizes = [np.sum(np.broadcast_to(each, directions[name].shape)) for name, each in errors.items()]
    what = "second derivative of the variables' gradients by the upstream one"
    close(what, np.array(got), np.array((there - back) / (2 * STEP)), 2 * float(np.sum(sizes)) / STEP)


def refused(subject: Subject, quantizer: Any, what: str, found: object) -> bool:
    """Return whether a quantizer refuses what frameworks do with a call, which it may where nobody promised it."""
    if found is None and what in subject.adapter.promised(quantizer):
        raise Violation(f"a call that is {SAID[what]}", "a result", "a refusal")
    return found is None


SAID = {FORWARD: "differentiated in forward mode", VECTORIZED: "mapped over inputs or variables"}


@law(
    "Tangents, Jacobians and linearizations are computed forward, by `jvp`; a wrong one is worse than a refusal.",
    kind=SMALL,
    about=repeatable,
    most=20,
)
def forward_derivatives(subject: Subject, case: Case) -> None:
    """The derivative in forward mode is that of the gradients, of input and variables; or the call is refused."""
    upstream = np.where(case.upstream == 0, np.float32(1), case.upstream).astype(np.float32)
    run = subject.run(subject.quantizer(case), case.x, training=True, upstream=upstream)
    if run.x is None:
        raise Violation("gradient of the input", "an array", None)
    quantizer = subject.quantizer(case)
    own = variables(quantizer)
    values = np.abs(run.values[np.isfinite(run.values)])
    size = 2 * max(1.0, float(values.max(initial=0.0))) * float(np.abs(upstream).sum(dtype=np.float64))
    for name, gradient in ((INPUT, run.x), *run.variables.items()):
        direction = signs(case.x.shape) if name == INPUT else np.asarray(np.sign(own[name]) + 0.5, np.float32)
        found = subject.adapter.forward_derivative(subject.quantizer(case), case.x, {name: direction})
        if found is None:
            if name == INPUT:
                refused(subject, quantizer, FORWARD, found)
            continue
        got = np.asarray(found * upstream.astype(np.float64))
        expected = np.asarray(gradient * direction.astype(np.float64))
        # Both are sums of the same float32 terms, each with a few roundings; a variable's are as in `same_sums`.
        terms = float(np.abs(got).sum() + np.abs(expected).sum()) + (0.0 if name == INPUT else 2 * size)
        allowed = terms * (case.x.size + 16) * EPSILON * 2
        what = f"derivative in forward mode along {name or 'the input'}, times the upstream gradient"
        close(what, np.array(got.sum()), np.array(expected.sum()), allowed)


@law(
    "Per-example gradients and ensembles call one quantizer through `vmap`.",
    kind=SMALL,
    about=elementwise,
    most=12,
)
def vectorized_calls(subject: Subject, case: Case) -> None:
    """Mapped over inputs, or over variables, a call gives what a loop of calls gives; or it is refused."""
    adapter = subject.adapter
    inputs = [np.asarray(case.x * np.float32(factor), np.float32) for factor in (1.0, 0.5, -1.0)]
    calls = [(subject.normal(x), np.roll(case.upstream, place)) for place, x in enumerate(inputs)]
    quantizer = subject.quantizer(case)
    found = adapter.vectorized(quantizer, calls)
    if refused(subject, quantizer, VECTORIZED, found):
        return
    for (x, upstream), got in zip(calls, found or [], strict=True):
        expected = subject.run(subject.quantizer(case), x, training=True, upstream=upstream)
        same_bits("values of a call that is mapped over inputs", got.values, expected.values)
        alike(subject, replace(case, x=x), "mapped over inputs", got, expected, upstream)
    moved = [subject.quantizer(case) for _ in range(3)]
    for place, each in enumerate(moved):
        move(each, (1.0 + place / 2, 1.0))
    trained = list(adapter.trained(moved[0]))
    numbers = [{name: variables(each)[name] for name in trained} for each in moved]
    if not trained or any(len(each) < len(variables(moved[0])) for each in numbers):
        return  # a variable that does not learn is not mapped over
    mapped = adapter.vectorized_variables(subject.quantizer(case), calls[0][0], numbers)
    if refused(subject, quantizer, VECTORIZED, mapped):
        return
    for each, values in zip(moved, mapped or [], strict=True):
        what, given = "values of a call that is mapped over variables", calls[0][0]
        alone = subject.values(each, given)
        if not subject.method.grid_parameters:
            same_bits(what, values, alone)
            continue
        # an exponential's last bits depend on how many there are: see `channels.differ_by_last_bits`
        steps = tensor(case.config, step_at_ties(rows(case.config, given), grid(each)), given.shape)
        close(what, values, alone, steps + 4 * EPSILON * np.abs(alone))


@law(
    "Jacobians and Hessians send many upstream gradients back through one call at once.",
    kind=SMALL,
    about=repeatable,
    most=12,
)
def batched_gradients(subject: Subject, case: Case) -> None:
    """Many upstream gradients at once come back as each does alone, differentiated too; or the call is refused."""
    upstream = np.where(case.upstream == 0, np.float32(1), case.upstream).astype(np.float32)
    upstreams = [upstream, -upstream, np.ones_like(upstream)]
    quantizer = subject.quantizer(case)
    found = subject.adapter.batched_gradients(quantizer, case.x, upstreams)
    if found is None:
        refused(subject, quantizer, VECTORIZED, found)
        return
    slope = np.zeros(case.x.shape)
    for each, got in zip(upstreams, found[0], strict=True):
        expected = subject.run(subject.quantizer(case), case.x, training=True, upstream=each)
        alike(subject, case, "of many upstream gradients at once", got, expected, each)
        slope = slope if expected.x is None else expected.x.astype(np.float64)  # in the end that of ones
    if not subject.element_by_element:
        return
    # The input's gradient is a slope times the upstream one, element by element, and the slope is that at ones.
    for each, second in zip(upstreams, found[1], strict=True):
        allowed = np.abs(slope * each) * 64 * EPSILON
        if subject.method.oracle is not None:
            allowed = allowed + 2 * by_oracle(subject, subject.quantizer(case), case, each).x_allowed
        close("second derivative, of many directions at once", second, slope * each, allowed)
