"""Adaptive rounding: whether each weight is rounded up or down is learned, while weights and grid stay as they are.

References
----------
Nagel, Amjad, van Baalen, Louizos and Blankevoort, "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML
2020, arXiv:2004.10568.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainable_core.enums import QuantizationTarget
from trainable_core.errors import InvalidArgumentError
from trainable_core.qparams import Float32, QParams
from trainable_core.reference import affine
from trainable_core.reference.method import Method, Option, OwnVariable
from trainable_core.reference.oracle import EPSILON, ExpectedGradients, ExpectedTerm, ExpectedValues, Oracle, State
from trainable_core.schedule import AnnealingScheduler, schedule_from_dict

ZETA, GAMMA = 1.1, -0.1
"""Ends that the sigmoid is stretched to, section 3.2."""

BETA = {"t_start": 200, "t_end": 1000, "initial_val": 20.0, "target_val": 2.0}
"""Default schedule of the regularizer's exponent; before its first step there is no regularizer."""

REGULARIZATION_WEIGHT = 0.01

ROUNDING = "rounding"
"""Name of the variable."""


def roundings(fraction: NDArray[np.float64], rounding: NDArray[np.float64]) -> tuple[Any, Any]:
    """Return how far each weight is rounded up, from 0 to 1, and the derivative by the variable.

    Parameters
    ----------
    fraction : float64 array
        ``w / s - floor(w / s)``, from 0 to 1.
    rounding : float64 array, same shape
        The variable.

    Notes
    -----
    ``h = clip(sigmoid(v) (zeta - gamma) + gamma, 0, 1)`` with ``v = rounding + v0``, and v0 such that h is the fraction
    where the variable is 0 (equation 23). *Deviation:* the paper's variable is `v`. Counted from v0 it begins with
    zeros, so it needs no weights to begin with, and a quantizer that has learned nothing rounds to the nearest code. A
    weight that lies on a code keeps it, so that zeros stay zeros.
    """
    v0 = -np.log((ZETA - GAMMA) / (fraction - GAMMA) - 1.0)
    sigmoid = 1.0 / (1.0 + np.exp(-(rounding + v0)))
    stretched = sigmoid * (ZETA - GAMMA) + GAMMA
    inside = (stretched > 0) & (stretched < 1) & (fraction > 0)
    return np.where(fraction > 0, np.clip(stretched, 0.0, 1.0), 0.0), np.where(
        inside, (ZETA - GAMMA) * sigmoid * (1.0 - sigmoid), 0.0
    )


@dataclass(frozen=True)
class SoftRounding:
    """What adaptive rounding makes of weights; each field is a float64 array of their shape.

    Parameters
    ----------
    soft, hard : array
        Values in training, and those that are deployed.
    derivative : array
        That of the soft values by the variable.
    h, dh : array
        How far a weight is rounded up, and the derivative by the variable.
    """

    soft: NDArray[np.float64]
    hard: NDArray[np.float64]
    derivative: NDArray[np.float64]
    h: NDArray[np.float64]
    dh: NDArray[np.float64]


def soft_rounding(x: ArrayLike, grid: QParams, rounding: ArrayLike) -> SoftRounding:
    """Return the values of adaptive rounding: ``s clip(floor(w / s) + h, n, p)``, with h, or with h rounded half up.

    Examples
    --------
    >>> grid = QParams(np.float32(0.5), np.int32(0), -8, 7)
    >>> found = soft_rounding([0.2, 0.3], grid, [0.0, -1.0])
    >>> found.hard, found.soft.round(3)
    (array([0., 0.]), array([0.2  , 0.154]))
    """
    x = affine.to_float32(np.asarray(x))
    steps = affine.steps(x, grid).astype(np.float64)
    with np.errstate(invalid="ignore"):
        lower = np.floor(steps)
        fraction = np.where(np.isfinite(steps), steps - lower, 0.0)
    low, high = affine.ends(grid, x.ndim)
    scale = grid.along(x.ndim).scale.astype(np.float64)
    h, dh = roundings(fraction, np.asarray(rounding, np.float64))
    inside = (lower + h > low) & (lower + h < high)
    up = np.where(h >= 0.5, 1.0, 0.0)  # noqa: PLR2004 - half
    return SoftRounding(
        np.clip(lower + h, low, high) * scale,
        np.clip(lower + up, low, high) * scale,
        np.where(inside, dh * scale, 0.0),
        h,
        dh,
    )


def regularizer(h: NDArray[np.float64], dh: NDArray[np.float64], beta: float) -> tuple[float, NDArray[np.float64]]:
    """Return ``sum(1 - |2 h - 1|**beta)``, equation 24, and its gradient by the variable."""
    distance = np.abs(2 * h - 1)
    gradient = -beta * distance ** (beta - 1) * np.sign(2 * h - 1) * 2 * dh
    return float((1 - distance**beta).sum()), gradient


def checked_beta(beta: Any, subject: str) -> AnnealingScheduler:
    """Return the schedule of the exponent.

    Raises
    ------
    InvalidArgumentError
        When it is no schedule, or a value is not greater than 1, where gradients would not be finite.
    """
    schedule = schedule_from_dict(BETA if beta is None else beta, f"{subject}: beta")
    if min(schedule.initial_val, schedule.target_val) <= 1:
        raise InvalidArgumentError(f"{subject}: beta", "initial_val and target_val must be greater than 1")
    return schedule


def checked_weight(weight: Any, subject: str) -> float:
    """Return the factor of the regularizer; InvalidArgumentError unless it is a number from 0."""
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 <= weight < math.inf:
        raise InvalidArgumentError(f"{subject}: regularization_weight", f"must be a number from 0, got {weight!r}")
    return float(weight)


def schedule_end(schedule: AnnealingScheduler) -> int:
    """Return the number of counted training steps from which on training values are the deployed ones.

    Examples
    --------
    >>> schedule_end(schedule_from_dict(BETA))
    1001
    """
    return math.floor(schedule.t_end) + 1


# ---- declaration ----------------------------------------------------------------------------------------------------


def _schedule_of(arguments: Mapping[str, Any]) -> AnnealingScheduler:
    return schedule_from_dict(arguments["beta"])


def _expected_values(x: Float32, state: State, training: bool) -> ExpectedValues:  # noqa: FBT001 - the signature of `Oracle.values`
    found = soft_rounding(x, state.grid, state.variables[ROUNDING])
    scale = np.broadcast_to(state.grid.along(x.ndim).scale.astype(np.float64), x.shape)
    # where h is next to a half, or a quotient next to a whole number, rounding errors may decide the code
    error = (state.grid.quant_max - state.grid.quant_min + 16) * 2 * EPSILON
    steps = affine.steps(x, state.grid).astype(np.float64)
    with np.errstate(invalid="ignore"):
        whole = np.abs(steps - np.rint(steps)) <= error
    near = (np.abs(found.h - 0.5) <= 16 * (error + EPSILON)) | (whole & (np.abs(state.variables[ROUNDING]) > 0))
    if training and state.steps < schedule_end(_schedule_of(state.arguments)):
        allowed = np.where(whole, scale, scale * 16 * error)
        return ExpectedValues(np.where(np.isnan(x), x, found.soft), allowed + np.abs(found.soft) * 4 * EPSILON)
    allowed = np.where(near, scale * (1 + EPSILON), 0.0) + np.abs(found.hard) * EPSILON
    return ExpectedValues(np.where(np.isnan(x), x, found.hard), allowed)


def _expected_gradients(x: Float32, upstream: Float32, state: State) -> ExpectedGradients:
    nothing = np.zeros(x.shape)
    if state.steps >= schedule_end(_schedule_of(state.arguments)):
        return ExpectedGradients(nothing, nothing, {ROUNDING: nothing}, {ROUNDING: nothing})
    found = soft_rounding(x, state.grid, state.variables[ROUNDING])
    scale = np.broadcast_to(state.grid.along(x.ndim).scale.astype(np.float64), x.shape)
    # the derivative of a sigmoid is at most 1/4 and as smooth; next to a whole quotient the fraction is 0 or 1
    error = (state.grid.quant_max - state.grid.quant_min + 16) * 2 * EPSILON
    steps = affine.steps(x, state.grid).astype(np.float64)
    with np.errstate(invalid="ignore"):
        jumps = np.abs(steps - np.rint(steps)) <= error
    edge = (np.abs(found.h) <= 64 * error) | (np.abs(found.h - 1) <= 64 * error) | jumps
    allowed = np.abs(upstream) * scale * np.where(edge, 0.5, 64 * error)
    return ExpectedGradients(nothing, nothing, {ROUNDING: upstream * found.derivative}, {ROUNDING: allowed})


def _expected_term(x: Float32, state: State) -> ExpectedTerm:
    schedule, step = _schedule_of(state.arguments), max(state.steps - 1, 0)
    weight = float(state.arguments["regularization_weight"])
    if not schedule.t_start <= step < schedule.t_end:
        weight = 0.0
    found = soft_rounding(x, state.grid, state.variables[ROUNDING])
    beta = float(schedule(step))
    value, gradient = regularizer(found.h, found.dh, beta)
    # h is as far off as `_expected_gradients` says; |2 h - 1|**beta is 2 beta times as steep, and its derivative
    # 4 beta**2 times. A sum over the elements has a rounding for each. A weight beyond the grid has a part in the term
    # too, and the fraction of a large quotient is as far off as the quotient.
    steps = affine.steps(x, state.grid).astype(np.float64)
    error = (state.grid.quant_max - state.grid.quant_min + 16 + np.nan_to_num(np.abs(steps))) * 2 * EPSILON
    with np.errstate(invalid="ignore"):
        jumps = np.abs(steps - np.rint(steps)) <= error  # there the fraction is 0 or 1, and so is h
    edge = (np.abs(found.h) <= 64 * error) | (np.abs(found.h - 1) <= 64 * error)
    each = np.where(jumps, 1.0, 2 * beta * 64 * error + 16 * EPSILON)
    slopes = np.where(jumps | edge, 2 * beta, (4 * beta**2 + 2 * beta) * 64 * error)
    allowed = weight * (float(each.sum()) + x.size * x.size * EPSILON)
    return ExpectedTerm(weight * value, allowed, {ROUNDING: weight * gradient}, {ROUNDING: weight * slopes})


METHOD = Method(
    name="ADAROUND",
    title="Adaptive rounding",
    reference="Nagel et al., ICML 2020, arXiv:2004.10568",
    module=__name__,
    own_variables=(OwnVariable(ROUNDING, per_element=True, initial=0.0),),
    options=(
        Option("beta", None, "a schedule, above 1: the regularizer's exponent, which ends the soft values"),
        Option("regularization_weight", REGULARIZATION_WEIGHT, "factor of the regularizer"),
    ),
    targets=(QuantizationTarget.Weights,),
    training_forward="soft",
    schedule_end=lambda arguments: schedule_end(_schedule_of(arguments)),
    counts_steps=True,
    depends_on="tensor",
    deploys_values=True,
    conformance_arguments=(
        {
            "beta": {"t_start": 1, "t_end": 3, "initial_val": 8.0, "target_val": 2.0},
            "regularization_weight": 0.25,
        },
    ),
    oracle=Oracle(_expected_gradients, _expected_values, regularization_of=_expected_term),
)
