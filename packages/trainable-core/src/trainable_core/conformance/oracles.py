"""Where expected values and gradients come from: `trainable_core.reference`, or the surrogate a class declares.

Tolerances are those of single float32 operations, derived where they are used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trainable_core import qparams
from trainable_core.conformance.case import Case, Subject, grid, variables
from trainable_core.constants import RANGE_MAX, RANGE_MIN, THRESHOLD
from trainable_core.enums import QuantizationMethod
from trainable_core.qparams import Float32, Float64, QParams
from trainable_core.reference import affine, dqa, lsq, ste
from trainable_core.schedule import LinearAnnealingScheduler

EPSILON = 2.0**-23  # the distance from 1 to the next float32 number: twice the error of one operation


SMALLEST_NORMAL = np.finfo(np.float32).tiny


@dataclass(frozen=True)
class Expected:
    """Gradients that are right, and how far a float32 computation may be from them.

    Parameters
    ----------
    x, x_allowed : float64 array, shape of the input
        Gradient of the input.
    variables, variables_allowed : dict of str to float64 array
        Gradients of the variables.
    """

    x: Float64
    x_allowed: Float64
    variables: dict[str, Float64]
    variables_allowed: dict[str, Float64]


class Oracle(Protocol):
    """What is expected of one training method."""

    def values(
        self, subject: Subject, quantizer: Any, case: Case, *, training: bool
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return the expected values, and the distance allowed from each."""

    def gradients(self, subject: Subject, quantizer: Any, case: Case, upstream: Float32) -> Expected:
        """Return the expected gradients."""


def _exact(at: QParams) -> bool:
    return bool((np.frexp(at.scale)[0] == 0.5).all())  # noqa: PLR2004 - the mantissa of a power of two


def _steps(x: Float32, at: QParams) -> tuple[Float64, float]:
    """Return ``x / scale``, and how far rounding errors may lead from it; nowhere where scales are powers of two."""
    steps = x.astype(np.float64) / at.along(x.ndim).scale
    return np.asarray(steps), 0.0 if _exact(at) else (at.quant_max - at.quant_min + 1) * 2.0**-24


def near_tie(x: Float32, at: QParams) -> NDArray[np.bool_]:
    """Return where rounding errors may decide a code: within ``2**n_bits * 2**-24`` step of a tie."""
    steps, error = _steps(x, at)
    distance = np.abs(np.abs(steps - np.rint(steps)) - 0.5)  # NaN at an infinity, which is far from every tie
    return np.asarray((distance <= error) & (not _exact(at)))


def decided(subject: Subject, quantizer: Any, case: Case, *, ends: bool) -> Float32:
    """Return the case's upstream with zeros where a gradient is not sure, on any of the quantizer's grids.

    That is where rounding errors decide, and without `ends` exactly at the ends of the range too. Zero may be an end: a
    backend that takes subnormal numbers for zero does not say on which side of it an input or its quotient is.
    """
    unsure = np.zeros(case.x.shape, bool)
    for width in quantizer.widths:
        at = grid(quantizer, width)
        low, high = affine.ends(at, case.x.ndim)
        steps, error = _steps(case.x, at)
        at_end = np.minimum(np.abs(steps - low), np.abs(steps - high)) <= error
        unsure |= near_tie(case.x, at) | (at_end & (not (ends and _exact(at))))
        subnormal = (case.x != 0) & (np.minimum(np.abs(case.x), np.abs(steps)) < SMALLEST_NORMAL)
        unsure |= subnormal & (not subject.adapter.subnormals)
    return np.where(unsure, np.float32(0), case.upstream)


class _Hard:
    """What every method has in common whose values are those of its grid."""

    def values(self, subject: Subject, quantizer: Any, case: Case, *, training: bool) -> tuple[Any, Any]:  # noqa: ARG002 - see Oracle
        at = grid(quantizer)
        expected = affine.fake_quantize(case.x, at, tie_rule=subject.adapter.tie_rule)
        # Codes may differ by one step where rounding decides; the product of code and scale is rounded once.
        step = np.where(near_tie(case.x, at), at.along(case.x.ndim).scale.astype(np.float64), 0.0)
        return expected, step * (1 + EPSILON)


class _Ste(_Hard):
    def gradients(self, subject: Subject, quantizer: Any, case: Case, upstream: Float32) -> Expected:  # noqa: ARG002 - see Oracle
        found = ste.gradients(case.x, upstream, grid(quantizer)).x
        return Expected(found, np.zeros(found.shape), {}, {})


class _Lsq(_Hard):
    def gradients(self, subject: Subject, quantizer: Any, case: Case, upstream: Float32) -> Expected:
        at = grid(quantizer)
        found = lsq.gradients(case.x, upstream, at, tie_rule=subject.adapter.tie_rule)
        constant = lsq.gradient_scale(at.sharing(case.x.size), at.quant_max)
        low, high = affine.ends(at, case.x.ndim)
        # Terms are at most max(|low|, |high|) * upstream; inside, `steps` has two roundings of up to that size.
        terms = np.abs(upstream).astype(np.float64) * np.maximum(np.abs(low), np.abs(high))
        size = at.reduce(terms) * constant
        size_zero = at.reduce(np.abs(upstream) * at.along(case.x.ndim).scale.astype(np.float64)) * constant
        expected, allowed = through_variables(quantizer, case, found.scale, found.zero_point, size, size_zero)
        return Expected(found.x, np.zeros(found.x.shape), expected, allowed)


class _Dqa:
    """The mixture; its grids are not trained, its logits are."""

    @staticmethod
    def _mixture(subject: Subject, quantizer: Any, case: Case) -> tuple[list[QParams], NDArray[Any], float]:
        given = quantizer.get_arguments()["temperature"]
        schedule = LinearAnnealingScheduler(**given)
        counted = case.steps + int(subject.adapter.counts_calls)
        # the first training forward is step 0, and `advance` has counted it
        temperature = 0.0 if counted > schedule.t_end else float(schedule(max(counted - 1, 0)))
        return [grid(quantizer, width) for width in quantizer.widths], variables(quantizer)["logits"], temperature

    def values(self, subject: Subject, quantizer: Any, case: Case, *, training: bool) -> tuple[Any, Any]:
        grids, logits, temperature = self._mixture(subject, quantizer, case)
        tie_rule = subject.adapter.tie_rule
        expected = dqa.fake_quantize(case.x, grids, logits, temperature if training else 0.0, tie_rule=tie_rule)
        allowed = np.zeros(case.x.shape)
        for at in grids:
            scale = at.along(case.x.ndim).scale.astype(np.float64)
            allowed = allowed + np.where(near_tie(case.x, at), scale * (1 + EPSILON), 0.0)
            if training and temperature:
                # Weight and sum of each term are rounded. A softmax's argument a has an error of a * EPSILON / 2,
                # which is that of the weight's logarithm; below -104 the weight is zero in float32.
                reach = np.maximum(*np.abs(affine.ends(at, case.x.ndim))) * scale
                allowed = allowed + np.broadcast_to(reach * 108 * EPSILON, case.x.shape)
        return expected, allowed

    def gradients(self, subject: Subject, quantizer: Any, case: Case, upstream: Float32) -> Expected:
        grids, logits, temperature = self._mixture(subject, quantizer, case)
        tie_rule = subject.adapter.tie_rule
        found = dqa.gradients(case.x, upstream, grids, logits, temperature, tie_rule=tie_rule)
        if not temperature:
            return Expected(found.x, np.zeros(found.x.shape), {"logits": found.logits}, {"logits": 0 * found.logits})
        reach = sum(
            float(
                (
                    np.abs(upstream) * (np.maximum(*np.abs(affine.ends(at, case.x.ndim))) * at.along(case.x.ndim).scale)
                ).sum()
            )
            for at in grids
        )
        # As in `values`; the sum over the elements adds a rounding for each of them.
        operations = 108 + case.x.size + len(grids)
        x_allowed = np.abs(upstream).astype(np.float64) * operations * EPSILON
        logits_allowed = np.full(len(logits), 2 * reach / temperature * operations * EPSILON)
        return Expected(found.x, x_allowed, {"logits": found.logits}, {"logits": logits_allowed})


ORACLES: dict[str, Oracle] = {"STE": _Ste(), "LSQ": _Lsq(), "DQA": _Dqa()}
"""By training method."""


def through_variables(
    quantizer: Any, case: Case, d_scale: Float64, d_zero: Float64, size: Float64, size_zero: Float64
) -> tuple[dict[str, Float64], dict[str, Float64]]:
    """Return the gradients of the grid's variables from those of scale and zero point, and the distances allowed.

    `size` and `size_zero` are the sums of the terms' magnitudes: a float32 sum of N terms, each with a few roundings,
    is within ``(N + 16) * EPSILON`` of them.
    """
    config, width = quantizer.quantization_config, quantizer.selected_width
    names = quantizer.grid_variables(width)
    values = {name: np.asarray(quantizer.to_numpy(variable), np.float32) for name, variable in names.items()}
    fixed: dict[str, Any] = {"signed": quantizer.signed, "min_threshold": config.min_threshold}
    found = qparams.variable_gradients(values, config.quantization_method, width, d_scale, d_zero, **fixed)
    relative = (case.x.size + 16) * EPSILON
    at = grid(quantizer, width)
    if config.quantization_method is QuantizationMethod.UNIFORM:
        width_size = (size + size_zero * at.zero_point / at.scale) / at.quant_max
        return found, {
            RANGE_MIN: (width_size + size_zero / at.scale) * relative,
            RANGE_MAX: width_size * relative,
        }
    # A threshold below its bound counts as the bound, which is what the ratio p / t of POWER_OF_TWO is taken of.
    factor = 2.0 ** -(width - int(quantizer.signed)) * (2.0 if config.quantization_method.name == "POWER_OF_TWO" else 1)
    return found, {THRESHOLD: size * factor * relative}


STEP = 2.0**-12
"""Distance of the finite differences, in steps of the grid."""

CURVATURE = 2.0**-12
"""Largest relative error of a central difference.

``h**2 / 6 * f'''/f'`` with h = 2**-12 and a surrogate up to 100 times as steep as a straight line leaves
``100**2 / 6 * 2**-24 < 2**-13``; the other half is for float32.
"""


def declared(subject: Subject) -> bool:
    """Return whether the class declares the function that its backward pass differentiates."""
    return subject.key.quantizer_id not in ORACLES and callable(getattr(subject.cls, "surrogate", None))


class Surrogate:
    """Finite differences, in float64, of the function that a class declares."""

    def gradients(self, subject: Subject, quantizer: Any, case: Case, upstream: Float32) -> Expected:  # noqa: ARG002 - see Oracle
        """Return the gradients of ``sum(upstream * surrogate)``."""
        single = grid(quantizer)
        at = _double(single)
        x = case.x.astype(np.float64)
        surrogate = quantizer.surrogate(x, at.along(x.ndim), upstream.astype(np.float64))

        def value(x: Float64, at: QParams) -> Float64:
            return np.asarray(surrogate(x, at.along(x.ndim)) * upstream)

        h = STEP * at.along(x.ndim).scale
        d_x = (value(x + h, at) - value(x - h, at)) / (2 * h)
        d_scale = _difference(value, x, at, "scale", STEP * at.scale / (single.quant_max - single.quant_min))
        d_zero = _difference(value, x, at, "zero_point", np.full(at.scale.shape, STEP))
        allowed = np.abs(upstream) * CURVATURE * np.maximum(1.0, np.abs(d_x / np.where(upstream == 0, 1, upstream)))
        if not quantizer.learns_grid:
            return Expected(d_x, allowed, {}, {})
        reach = float(single.quant_max - single.quant_min)
        sizes = at.reduce(np.abs(upstream) * np.float64(reach))
        sizes_zero = at.reduce(np.abs(upstream) * at.along(x.ndim).scale)
        expected, variables_allowed = through_variables(
            quantizer, case, at.reduce(d_scale), at.reduce(d_zero), sizes, sizes_zero
        )
        factor = CURVATURE / ((case.x.size + 16) * EPSILON)  # the curvature's error instead of float32's
        return Expected(d_x, allowed, expected, {name: value * factor for name, value in variables_allowed.items()})


def _double(at: QParams) -> QParams:
    double: dict[str, Any] = {"scale": at.scale.astype(np.float64), "zero_point": at.zero_point.astype(np.float64)}
    return replace(at, **double)


def _difference(
    value: Callable[[Float64, QParams], Float64], x: Float64, at: QParams, field: str, h: Float64
) -> Float64:
    """Return the central difference of each element's value in one of the grid's numbers."""
    number = getattr(at, field)
    there, back = (replace(at, **{field: number + sign * h}) for sign in (1, -1))
    distance: dict[str, Any] = {"scale": h}
    along = replace(at, **distance).along(x.ndim).scale
    return np.asarray((value(x, there) - value(x, back)) / (2 * along))


def away_from_kinks(quantizer: Any, case: Case) -> Float32:
    """Return the case's upstream with zeros where a difference would step over a tie or an end of the range."""
    at = grid(quantizer)
    low, high = affine.ends(at, case.x.ndim)
    with np.errstate(invalid="ignore", over="ignore"):
        steps = case.x.astype(np.float64) / at.along(case.x.ndim).scale
    # A difference in the scale moves `steps` by up to STEP inside, one in the zero point moves the ends by STEP.
    to_tie = np.abs(np.abs(steps - np.rint(steps)) - 0.5)
    to_end = np.minimum(np.abs(steps - low), np.abs(steps - high))
    return np.where((to_tie > 4 * STEP) & (to_end > 4 * STEP), case.upstream, np.float32(0))
