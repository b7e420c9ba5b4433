"""Laws on trained variables that need no reference: shapes, arrival, channels and direction of their gradients."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trainable_core.conformance.case import Case, Subject, Violation, ends, grid, grid_names, variables, with_fields
from trainable_core.conformance.declared import channel_by_channel, declares_surrogate
from trainable_core.conformance.law import law, require
from trainable_core.conformance.laws.channels import axis_of, one_of, take_over
from trainable_core.conformance.oracles import POWERS_OF_TWO
from trainable_core.conformance.strategies import Kind
from trainable_core.conformance.sweep import on_sweep
from trainable_core.constants import RANGE_MAX, RANGE_MIN, THRESHOLD
from trainable_core.enums import VariableGroup
from trainable_core.qparams import lower_bound, variables_from_params

PLACES: tuple[Literal["over", "beyond"], ...] = ("over", "over", "over", "over", "beyond")
"""Where the tensors are that a gradient may arrive from.

Where a channel is one element, some of several are inside the range; and of a wide range, few are beyond it.
"""

CLOSE = 2.0**-12
"""Relative distance allowed between two float32 computations of one term: vectorized and not, or with another shape."""

MODERATE = Kind(bits=(3, 8), moderate=True, finite=True, blocks=False)


@law(
    "A variable of another shape than declared shares one value among all channels, or has one for each element.",
    kind=Kind(moderate=True),
)
def declared_variables(subject: Subject, case: Case) -> None:
    """Each variable that the method declares is there, trained, in its group, and has the declared shape and value."""
    quantizer = subject.fresh(case)
    if subject.method.grid_parameters:
        given = variables_from_params(case.config.quantization_params, subject.key.method)
        _comes_back(quantizer, given)
        largest = np.max([np.abs(each) for each in given.values()], axis=0)
        smallest, width = np.log2(lower_bound(case.config.min_threshold)), quantizer.selected_width
        power_of_two = case.config.quantization_method in POWERS_OF_TWO
        for exponent in (*np.arange(smallest, LARGEST, 1 if power_of_two else STRIDE), LARGEST):
            by = np.exp2(exponent) / largest.astype(np.float64)
            scaled = {key: np.asarray(each * by, np.float32) for key, each in given.items()}
            shape = tuple(quantizer.structure.shape)
            values = quantizer.encoded({key: np.broadcast_to(each, shape) for key, each in scaled.items()})
            for key, value in values.items():
                quantizer.assign(quantizer.grid_variables(width)[key], value)
            _comes_back(quantizer, scaled)
            if power_of_two and (scaled[THRESHOLD] == np.exp2(exponent)).all():
                above = quantizer.grid_numbers(width)[THRESHOLD] > np.exp2(exponent)
                what = f"threshold 2**{exponent:g}, encoded and decoded, which a larger one doubles"
                require(what, not np.any(above), scaled[THRESHOLD], quantizer.grid_numbers(width)[THRESHOLD])
        quantizer = subject.fresh(case)
    trained = subject.adapter.trained(quantizer)
    values = variables(quantizer)
    for own in subject.method.own:
        require(f"variable {own.name}, which the class declares", own.name in values, own.name, sorted(values))
        require(f"{own.name} is trained", own.name in trained, own.name, sorted(trained))
        listed = [id(variable) for variable in quantizer.get_trainable_variables(own.group)]
        in_group = id(quantizer.get_quantizer_variable(own.name)) in listed
        require(f"{own.name} is in group {own.group.name}", in_group, own.group.name, _group_of(quantizer, own.name))
        shape = values[own.name].shape
        if own.per_channel:
            threshold = tuple(quantizer.structure.shape)
            require(f"shape of {own.name}, which is declared per channel", shape == threshold, threshold, shape)
        if own.initial is not None:
            expected = np.full(
                own.shape(tuple(quantizer.structure.shape), quantizer.values_shape or ()), own.initial, np.float32
            )
            equal = shape == expected.shape and (values[own.name] == expected).all()
            require(f"initial value of {own.name}", equal, expected, values[own.name])


LARGEST, STRIDE = 60.0, 4.0
"""Exponent of the largest threshold that is encoded and decoded, and distance of the exponents.

A logarithm of thresholds up to ``2**60`` is below 64, where float32 numbers are ``2**-18`` apart: it is off by
``2**-19``, and what is decoded by as much, relative to it. A base above e has smaller logarithms, and the product of
both is the same; a root is nearer. `CLOSE` leaves room for other parameters, and for an exponential's own error.
"""


def _comes_back(quantizer: Any, given: dict[str, Any]) -> None:
    """Require that the quantizer's threshold or range is what its variables were encoded from."""
    for key, value in quantizer.grid_numbers(quantizer.selected_width).items():
        there = np.broadcast_to(given[key], value.shape)
        near = np.abs(value - there) <= CLOSE * np.max([np.abs(each) for each in given.values()], axis=0)
        require(f"{key} after calibration, encoded and decoded", near, there, value)


def _group_of(quantizer: Any, name: str) -> str:
    variable = quantizer.get_quantizer_variable(name)
    found = [g.name for g in VariableGroup if any(each is variable for each in quantizer.get_trainable_variables(g))]
    return ", ".join(found) or "no group"


def has_no_oracle(subject: Subject) -> bool:
    """Return whether the method's gradients are not defined by a reference, which would say when they are zero."""
    return subject.method.oracle is None and (subject.method.learns_grid or bool(subject.method.own))


@law(
    "A variable that gets no gradient keeps its initial value, and the method trains as if it did not exist.",
    kind=MODERATE,
    about=has_no_oracle,
)
def gradients_arrive(subject: Subject, case: Case) -> None:
    """Each variable that learns gets a gradient from inputs inside and beyond the range."""
    waiting = _without_gradient(subject, case)
    if waiting and subject.method.own:  # a choice among one width needs no gradient
        widths = [{"n_bits": width} for width in (2, 4, 8)]
        several = with_fields(case.config, **{f"{case.config.prefix}_quantization_candidates": widths})
        waiting &= _without_gradient(subject, Case(several, case.x, case.upstream, (1.0,), 0, case.arguments))
    require("variables without any gradient", not waiting, [], sorted(waiting))


def _without_gradient(subject: Subject, case: Case) -> set[str]:
    found: set[str] = set()
    for turn, where in enumerate(PLACES):
        quantizer, x = on_sweep(subject, case, where, turn=turn)
        upstream = np.resize(np.array([1, -2, 0.5, 3, -1], np.float32), x.shape)
        run = subject.run(quantizer, x, training=True, upstream=upstream)
        found |= {name for name, gradient in run.variables.items() if np.any(gradient)}
    return set(subject.adapter.trained(quantizer)) - found


def comparable_by_channel(subject: Subject) -> bool:
    """Return whether a law is about weights whose training forward gives the same again, channel by channel."""
    return channel_by_channel(subject) and not subject.random


@law(
    "A sum over the wrong axis, or over all channels, trains each threshold with the errors of the others.",
    kind=Kind(bits=(2, 8), moderate=True, finite=True, per_channel=True, least=1),
    about=comparable_by_channel,
)
def per_channel_gradients(subject: Subject, case: Case) -> None:
    """Gradients per channel are those of a quantizer for each channel."""
    axis = axis_of(case.config, case.x.ndim)
    x = np.moveaxis(case.x, axis, 0)
    count = x[0].size if len(x) else 0
    if not count:
        return
    # One element of each channel has an upstream gradient: then no order of summation can matter.
    upstream = np.zeros((len(x), count), np.float32)
    upstream[np.arange(len(x)), (np.arange(len(x)) * 5 + case.steps) % count] = 1 + np.arange(len(x)) / 4
    upstream = upstream.reshape(x.shape)
    together = subject.quantizer(case)
    run = subject.run(together, case.x, training=True, upstream=np.moveaxis(upstream, 0, axis))
    shapes = {name: value.shape for name, value in variables(together).items()}
    shared = grid_names(together) | {own.name for own in subject.method.own if own.per_channel}
    names = [name for name in run.variables if name in shared and shapes.get(name) == (len(x),)]
    for channel, part in enumerate(x):
        alone = subject.fresh(case, one_of(case.config, channel), part.shape)
        take_over(subject, alone, case, channel)
        one = subject.run(alone, part, training=True, upstream=upstream[channel])
        if run.x is not None and one.x is not None:
            _close(f"gradient of the input in channel {channel}", np.moveaxis(run.x, axis, 0)[channel], one.x)
        for name in names:
            got = run.variables[name]
            require(f"shape of the gradient of {name}", got.shape == (len(x),), (len(x),), got.shape)
            _close(f"gradient of {name} in channel {channel}", got[channel], one.variables[name])


def _close(what: str, got: NDArray[Any], expected: NDArray[Any]) -> None:
    distance = np.abs(got.astype(np.float64) - expected)
    require(what, distance <= CLOSE * np.maximum(np.abs(got), np.abs(expected)), expected, got)


def _ends_at_zero(quantizer: Any, name: str, ndim: int) -> bool:
    """Return whether a variable is an end of a range that rounds to zero, where only the other end gives a scale."""
    if name not in {RANGE_MIN, RANGE_MAX}:
        return False
    low, high = ends(grid(quantizer), ndim)
    return not np.any(low if name == RANGE_MIN else high)


@law(
    "A gradient of the wrong sign drives its variable away from where the loss is small.",
    kind=Kind(bits=(4, 8), moderate=True, finite=True, blocks=False),
    about=has_no_oracle,
)
def gradient_direction(subject: Subject, case: Case) -> None:
    """Values that grow with a variable give it a positive gradient; a threshold gets one from values beyond it."""
    shared, soft = grid_names(subject.fresh(case)), subject.method.training_forward == "soft"
    for name in sorted(subject.adapter.trained(subject.fresh(case))):
        quantizer, x = on_sweep(subject, case, "beyond" if name in shared else "over")
        if name not in quantizer.variable_names:
            continue  # the law `variable_groups` reports it
        variable = quantizer.get_quantizer_variable(name)
        value = np.array(quantizer.to_numpy(variable), np.float32)
        share = 0.25 if name in shared else 0.05  # through a power of two, or little enough for a curve
        if name not in shared:
            by = np.maximum(np.abs(value), 1) * share
        else:  # an end of a range at zero stays there
            by = np.abs(value) * share if not subject.method.grid_parameters else np.full(value.shape, share)
        by = by.astype(np.float32)
        found = []
        for moved in (value + by, value - by):
            quantizer.assign(variable, moved)
            found.append(subject.values(quantizer, x, training=soft).astype(np.float64))
        quantizer.assign(variable, value)
        change = found[0] - found[1]
        if not np.isfinite(change).all() or np.abs(change).sum() < np.abs(found[0]).sum() * CLOSE:
            continue  # rounded away, as within one power of two
        run = subject.run(quantizer, x, training=True, upstream=np.sign(change).astype(np.float32))
        gradient, largest = run.variables[name], max(np.abs(each).max() for each in run.variables.values())
        at_zero = _ends_at_zero(quantizer, name, x.ndim)
        if name in shared and not np.any(gradient) and not declares_surrogate(subject) and not at_zero:
            raise Violation(
                f"gradient of {name} from values beyond the range, which grow with it", "a number", gradient
            )
        if name in shared and subject.deploys_values:
            continue  # what it clips, and where, is not said
        if np.abs(gradient).max() > CLOSE * largest and np.sum(gradient * by) < 0:  # more than what rounding leaves
            raise Violation(f"gradient of {name} where values grow with it", "a positive sum", gradient)
