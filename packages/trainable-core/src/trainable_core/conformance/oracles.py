"""Where expected gradients come from: the oracle that a method declares, or the surrogate that a class declares.

Tolerances are those of single float32 operations, derived where they are used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainable_core import qparams
from trainable_core.conformance.case import Case, Subject, ends, grid, rows, tensor
from trainable_core.conformance.declared import Surrogate, allowed_through_parameters, through_parameters
from trainable_core.constants import RANGE_MAX, RANGE_MIN, THRESHOLD
from trainable_core.enums import QuantizationMethod
from trainable_core.qparams import Float32, Float64, QParams
from trainable_core.reference import table
from trainable_core.reference.oracle import EPSILON, GridGradients, is_exact, middles, near_tie, steps

POWERS_OF_TWO = {QuantizationMethod.POWER_OF_TWO, QuantizationMethod.LUT_POT_QUANTIZER}
SMALLEST_NORMAL = np.finfo(np.float32).tiny


@dataclass(frozen=True)
class Expected:
    """Gradients that are right, and how far a float32 computation may be from them.

    Parameters
    ----------
    x, x_allowed : float64 array, shape of the input
        Gradient of the input.
    variables, variables_allowed : dict of str to float64 array
        Gradients of the variables, those of the grid included.
    """

    x: Float64
    x_allowed: Float64
    variables: dict[str, Float64]
    variables_allowed: dict[str, Float64]


def decided(subject: Subject, quantizer: Any, case: Case, *, ends: bool) -> Float32:
    """Return the case's upstream with zeros where a gradient is undecided on any of the quantizer's grids.

    It is undecided where rounding errors decide, and without `ends` exactly at the ends of the range too. Zero may be
    an end: a backend that treats subnormal numbers as zero can't tell on which side of it an input or quotient is.
    """
    x = rows(case.config, case.x)
    unsure = np.zeros(x.shape, bool)
    for at in subject.grids(quantizer, case).values():
        quotient, error = steps(x, at)
        at_end = _to_kink(quotient, at) <= error
        unsure |= near_tie(x, at) | (at_end & (not (ends and is_exact(at))))
        subnormal = (x != 0) & (np.minimum(np.abs(x), np.abs(quotient)) < SMALLEST_NORMAL)
        unsure |= subnormal & (not subject.adapter.subnormals)
    return np.where(tensor(case.config, unsure, case.x.shape), np.float32(0), case.upstream)


def step_at_ties(x: NDArray[Any], at: QParams) -> Float64:
    """Return one step of the grid where rounding errors decide a tie, by which a value may differ, and else zero."""
    return np.where(near_tie(x, at), at.along(x.ndim).scale.astype(np.float64), 0.0)


def _to_kink(quotient: Float64, at: QParams) -> Float64:
    """Return how far quotients are from where the gradient of the input ends, in steps: a table's may end beyond it."""
    places = [*ends(at, quotient.ndim), *(table.edges(at.levels) if at.levels else ())]
    with np.errstate(invalid="ignore"):  # an infinity is far from each
        return np.asarray(np.min([np.abs(quotient - place) for place in places], axis=0))


def by_oracle(subject: Subject, quantizer: Any, case: Case, upstream: Float32) -> Expected:
    """Return the gradients that the method's oracle expects."""
    oracle = subject.method.oracle
    if oracle is None:
        message = f"{subject} declares no oracle"
        raise TypeError(message)
    config = case.config
    found = oracle.gradients(rows(config, case.x), rows(config, upstream), subject.state(quantizer, case))
    learned, allowed = ({}, {}) if found.grid is None else through_variables(quantizer, case, found.grid)
    x, x_allowed = (tensor(config, each, case.x.shape) for each in (found.x, found.x_allowed))
    return Expected(x, x_allowed, {**learned, **found.variables}, {**allowed, **found.variables_allowed})


def through_variables(
    quantizer: Any, case: Case, learned: GridGradients
) -> tuple[dict[str, Float64], dict[str, Float64]]:
    """Return the gradients of the grid's variables from those of scale and zero point, and the distances allowed.

    A float32 sum of N terms, each with a few roundings, is within ``(N + 16) * EPSILON`` of the exact one, relative to
    the sum of the terms' magnitudes.
    """
    config, width = quantizer.quantization_config, quantizer.selected_width
    values = quantizer.grid_numbers(width)
    fixed: dict[str, Any] = {"signed": quantizer.signed, "min_threshold": config.min_threshold}
    found = qparams.variable_gradients(
        values, config.quantization_method, width, learned.scale, learned.zero_point, **fixed
    )
    size, size_zero = learned.scale_size, learned.zero_point_size
    relative = (case.x.size + 16) * EPSILON
    at = grid(quantizer, width)
    if config.quantization_method is QuantizationMethod.UNIFORM:
        width_size = (size + size_zero * at.zero_point / at.scale) / at.quant_max
        allowed = {
            RANGE_MIN: (width_size + size_zero / at.scale) * relative,
            RANGE_MAX: width_size * relative,
        }
        return through_parameters(quantizer, values, found), allowed_through_parameters(quantizer, values, allowed)
    # A threshold below its bound counts as the bound, which is what the ratio p / t of POWER_OF_TWO is taken of.
    factor = (2.0 if config.quantization_method in POWERS_OF_TWO else 1.0) / at.threshold_steps
    allowed = {THRESHOLD: size * factor * relative}
    return through_parameters(quantizer, values, found), allowed_through_parameters(quantizer, values, allowed)


STEP = 2.0**-20
"""Distance of the finite differences, in steps of the grid; float64 leaves 2**-32 of a step's derivative."""

DIFFERENCE = 2.0**-50 / STEP
"""Error of a difference by the roundings in float64 of values as large as a step; the range has many."""

MARGIN = 2.0**-10
"""Distance from ties and ends, in steps of the grid, that a difference in the scale or the zero point does not move.

The quotient of an input and a scale, at most ``2**n_bits``, comes to it: float32 may be off by two roundings of it.
"""

CURVATURE = 2.0**-12
"""Largest relative error of a central difference, and of the float32 gradient that is compared with it.

A surrogate whose second derivative jumps, as where two pieces of it meet, leaves ``h / 4 * f''/f'``: with h = 2**-20,
and one up to 100 times as steep as a straight line, below 2**-15.
"""


def by_surrogate(
    subject: Subject, quantizer: Any, case: Case, upstream: Float32, values: NDArray[Any] | None = None
) -> Expected:
    """Return the gradients of ``sum(upstream * surrogate)`` as finite differences in float64.

    Parameters
    ----------
    subject, quantizer, case, upstream
        What is differentiated, and where.
    values : array, optional
        What the training forward gave; needed where these are random.
    """
    single = grid(quantizer)
    at = _double(single)
    x, upstream = rows(case.config, case.x).astype(np.float64), rows(case.config, upstream)
    values = None if values is None else rows(case.config, values)
    surrogate = Surrogate(quantizer, x, at, upstream.astype(np.float64), values)

    def value(x: Float64, at: QParams) -> Float64:
        return np.asarray(surrogate(x, at) * upstream)

    h = STEP * at.along(x.ndim).scale
    here, there, back = value(x, at), value(x + h, at), value(x - h, at)
    d_x, kink = (there - back) / (2 * h), np.abs(there - 2 * here + back) / (2 * h)
    d_scale, scale_kink = _difference(value, x, at, "scale", STEP * at.scale / (single.quant_max - single.quant_min))
    d_zero, _ = _difference(value, x, at, "zero_point", np.full(at.scale.shape, STEP))
    # A float32 quotient is off by up to ``2**n_bits * 2**-24`` step, and the slope of a surrogate that looks at the
    # place between two codes is taken to change by no more than four over a step.
    curvature = CURVATURE + 4 * (single.quant_max - single.quant_min + 1) * 2.0**-24
    allowed = np.abs(upstream) * curvature * np.maximum(1.0, np.abs(d_x / np.where(upstream == 0, 1, upstream)))
    allowed = allowed + kink  # at a kink of the surrogate's own, each slope between those on both sides is right
    trained = set(subject.adapter.trained(quantizer))
    gradients = surrogate.own_gradients(x, at, upstream.astype(np.float64), trained)
    own = {name: gradient.value for name, gradient in gradients.items()}
    # Terms may cancel in one element: each is rounded relative to an output of up to the whole range.
    outputs = np.abs(upstream) * at.along(x.ndim).scale * float(single.quant_max - single.quant_min)
    own_allowed = {
        name: size * (curvature + (x.size + 16) * EPSILON)
        + kink
        + 64 * EPSILON * (at.reduce(outputs) if size.shape == at.scale.shape else outputs.sum())
        for name, (_, size, kink) in gradients.items()
    }
    d_x, x_allowed = (tensor(case.config, each, case.x.shape) for each in (d_x, allowed))
    if not quantizer.learns_grid:
        return Expected(d_x, x_allowed, own, own_allowed)
    reach = float(single.quant_max - single.quant_min)
    # Float32's quotient is off by up to ``reach * 2**-24`` steps, by which the slope may change as above, and the
    # gradient of the scale has that slope times the quotient in it. Beside this it is as exact as that of the input,
    # but for the rounding of its terms, each of up to the whole range, in float32, and in float64 over the distance of
    # the differences.
    relative = (case.x.size + 16) * EPSILON
    absolute = reach * 4 * (reach + 1) * 2.0**-24 + reach**2 * DIFFERENCE
    errors = CURVATURE * (np.abs(d_scale) + np.abs(upstream)) + np.abs(upstream) * absolute + scale_kink
    sizes = at.reduce(np.abs(upstream) * np.float64(reach) + errors / relative)
    zero_errors = curvature / relative + 1
    sizes_zero = at.reduce(np.abs(upstream) * at.along(x.ndim).scale * zero_errors)
    learned = GridGradients(at.reduce(d_scale), at.reduce(d_zero), sizes, sizes_zero)
    expected, variables_allowed = through_variables(quantizer, case, learned)
    return Expected(d_x, x_allowed, {**expected, **own}, {**variables_allowed, **own_allowed})


def _double(at: QParams) -> QParams:
    double: dict[str, Any] = {"scale": at.scale.astype(np.float64), "zero_point": at.zero_point.astype(np.float64)}
    return replace(at, **double)


def _difference(
    value: Callable[[Float64, QParams], Float64], x: Float64, at: QParams, field: str, h: Float64
) -> tuple[Float64, Float64]:
    """Return the slope of each element's value in one of the grid's numbers, and half the distance of both sides'."""
    number = getattr(at, field)
    here = value(x, at)
    there, back = (value(x, replace(at, **{field: number + sign * h})) for sign in (1, -1))
    distance: dict[str, Any] = {"scale": h}
    along = replace(at, **distance).along(x.ndim).scale
    return np.asarray((there - back) / (2 * along)), np.asarray(np.abs(there - 2 * here + back) / (2 * along))


def away_from_kinks(quantizer: Any, case: Case) -> Float32:
    """Return the case's upstream with zeros where a difference would step over a tie or an end of the range."""
    at, x = grid(quantizer), rows(case.config, case.x)
    with np.errstate(invalid="ignore", over="ignore"):
        quotient = x.astype(np.float64) / at.along(x.ndim).scale
        to_tie = np.abs(np.abs(quotient - np.rint(quotient)) - 0.5)
        if at.levels:
            to_tie = np.abs(quotient[..., None] - middles(at)).min(axis=-1)
    to_end = _to_kink(quotient, at)
    margin = MARGIN + 2 * (at.quant_max - at.quant_min + 1) * 2.0**-24
    away = tensor(case.config, np.minimum(to_tie, to_end) > margin, case.x.shape)
    return np.where(away, case.upstream, np.float32(0))
