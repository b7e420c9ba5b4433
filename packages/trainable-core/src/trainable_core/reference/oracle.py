"""What a training method's numbers must be, and how far from them a float32 computation may end up.

A method's oracle is part of its declaration (`trainable_core.reference.method`); the conformance kit compares every
backend with it. Tolerances are those of single float32 operations, derived where they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainable_core.config import TrainableQuantizerConfig
from trainable_core.enums import TieRule
from trainable_core.qparams import TABLE_STEPS, Float32, Float64, QParams
from trainable_core.reference import affine

EPSILON = 2.0**-23
"""Distance from 1 to the next float32 number: twice the largest relative error of one operation."""


@dataclass(frozen=True)
class State:
    """The numbers that decide what a quantizer gives for an input.

    Parameters
    ----------
    grids : dict of int to QParams
        The quantizer's grids by bit width, ascending.
    width : int
        The width that is deployed.
    variables : dict of str to array
        All its variables, by name.
    arguments : mapping
        The constructor's further arguments, as `get_arguments` returns them.
    steps : int
        How many training steps its schedule has counted. The step of a forward in training mode is counted before its
        values are computed, so the first one is computed with 1; a quantizer that nobody counts for has 0.
    tie_rule : TieRule
        Where its kernels send a value half way between two codes.
    """

    grids: dict[int, QParams]
    width: int
    variables: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 0
    tie_rule: TieRule = TieRule.HALF_EVEN

    @property
    def grid(self) -> QParams:
        """The grid that is deployed."""
        return self.grids[self.width]


@dataclass(frozen=True)
class ExpectedValues:
    """Values that are right, and the distance allowed from each.

    Parameters
    ----------
    values, allowed : float array, shape of the input
    """

    values: NDArray[Any]
    allowed: NDArray[Any]


@dataclass(frozen=True)
class GridGradients:
    """Gradients of a grid's numbers, and the sums of the magnitudes of the terms that each is added up from.

    A float32 sum is as far from the exact one as these sizes let it be.

    Parameters
    ----------
    scale, zero_point : float64 array, shape of the grid's scale
    scale_size, zero_point_size : float64 array, same shape
    """

    scale: Float64
    zero_point: Float64
    scale_size: Float64
    zero_point_size: Float64


@dataclass(frozen=True)
class ExpectedGradients:
    """Gradients that are right, and the distance allowed from each.

    Parameters
    ----------
    x, x_allowed : float64 array, shape of the input
        Gradient of the input.
    variables, variables_allowed : dict of str to float64 array
        Gradients of the variables that the method has beside its grids.
    grid : GridGradients or None
        Gradients of the deployed grid; None when it is not learned.
    """

    x: Float64
    x_allowed: Float64
    variables: dict[str, Float64] = field(default_factory=dict)
    variables_allowed: dict[str, Float64] = field(default_factory=dict)
    grid: GridGradients | None = None


def is_exact(grid: QParams) -> bool:
    """Return whether every scale is a power of two, so that dividing by it rounds nothing."""
    return bool((np.frexp(grid.scale)[0] == 0.5).all())  # noqa: PLR2004 - the mantissa of a power of two


def steps(x: Float32, grid: QParams) -> tuple[Float64, float]:
    """Return ``x / scale``, and how far from it rounding errors may lead: nowhere where scales are powers of two."""
    quotient = x.astype(np.float64) / grid.along(x.ndim).scale
    return np.asarray(quotient), 0.0 if is_exact(grid) else (grid.quant_max - grid.quant_min + 1) * 2.0**-24


def middles(grid: QParams) -> Float64:
    """Return the places half way between the levels of a table, in steps."""
    levels = np.asarray(grid.levels, np.float64)
    return np.asarray((levels[1:] + levels[:-1]) / 2)


def near_tie(x: Float32, grid: QParams) -> NDArray[np.bool_]:
    """Return where rounding errors may decide a code: within ``2**n_bits * 2**-24`` step of a tie.

    The distances to two levels of a table, at most 256 steps, are rounded besides, on every grid: twice that.
    """
    quotient, error = steps(x, grid)
    if grid.levels:
        with np.errstate(invalid="ignore"):
            away = np.abs(quotient[..., None] - middles(grid)).min(axis=-1)
        return np.asarray(away <= 2 * (2 * TABLE_STEPS) * 2.0**-24)
    with np.errstate(invalid="ignore"):  # inf - inf is NaN: an infinity is far from every tie
        distance = np.abs(np.abs(quotient - np.rint(quotient)) - 0.5)
    return np.asarray((distance <= error) & (not is_exact(grid)))


def on_grid(x: Float32, state: State, training: bool) -> ExpectedValues:  # noqa: ARG001, FBT001 - the signature of `Oracle.values`
    """Return the deployed grid's values: those of every method that trains with what it deploys."""
    grid = state.grid
    expected = affine.fake_quantize(x, grid, tie_rule=state.tie_rule)
    # Codes may differ by one step where rounding decides; the product of code and scale is rounded once.
    widest = float(np.diff(grid.levels).max()) if len(grid.levels) > 1 else 1.0
    step = np.where(near_tie(x, grid), widest * grid.along(x.ndim).scale.astype(np.float64), 0.0)
    return ExpectedValues(expected, step * (1 + EPSILON))


def with_grid(
    found: affine.Gradients, x: Float32, upstream: Float32, grid: QParams, constant: float = 1.0, slack: float = 1.0
) -> ExpectedGradients:
    """Return what is expected of a method that learns its grid, from the gradients of input, scale and zero point.

    Parameters
    ----------
    found : Gradients
        What is right.
    x, upstream : float32 array
        The input, and the gradient of the output.
    grid : QParams
        The deployed grid.
    constant : float
        What `found` has multiplied the gradients of scale and zero point by.
    slack : float
        How many times as far from right as a rounded term may be one whose slope is computed from a rounded input.

    Notes
    -----
    Terms of the scale are at most ``max(|low|, |high|) * upstream``; inside, `steps` has two roundings of up to that
    size. Terms of the zero point are a scale times the upstream gradient.
    """
    low, high = affine.ends(grid, x.ndim)
    sizes = np.abs(upstream).astype(np.float64)
    size = grid.reduce(sizes * np.maximum(np.abs(low), np.abs(high))) * constant * slack
    size_zero = grid.reduce(sizes * grid.along(x.ndim).scale.astype(np.float64)) * constant
    learned = GridGradients(found.scale, found.zero_point, size, size_zero)
    x_allowed = sizes * (slack - 1) * EPSILON
    return ExpectedGradients(found.x, x_allowed, grid=learned)


@dataclass(frozen=True)
class ExpectedTerm:
    """A term for the loss that is right, and the distance allowed from it.

    Parameters
    ----------
    value, allowed : float
    variables, variables_allowed : dict of str to float64 array
        Its gradients by the method's own variables.
    """

    value: float
    allowed: float
    variables: Mapping[str, Float64]
    variables_allowed: Mapping[str, Float64]


@dataclass(frozen=True)
class Oracle:
    """What is expected of a training method, as functions of input and state.

    Parameters
    ----------
    gradients : callable
        From the input, the upstream gradient and the state to `ExpectedGradients` in training mode.
    values : callable
        From the input, the state and whether the model trains to `ExpectedValues`.
    regularization : callable, optional
        From the state to the term for the loss, and how far from it a float32 computation may be.
    regularization_of : callable, optional
        From the input and the state to the `ExpectedTerm` for the loss that depends on the input too. The state's
        `steps` are those counted so far.
    grid : callable, optional
        From the input, the quantizer's config and its further arguments to the grid that the input has for itself; of a
        method that computes its grid.
    """

    gradients: Callable[[Float32, Float32, State], ExpectedGradients]
    values: Callable[[Float32, State, bool], ExpectedValues] = on_grid
    regularization: Callable[[State], tuple[float, float]] | None = None
    regularization_of: Callable[[Float32, State], ExpectedTerm] | None = None
    grid: Callable[[Float32, TrainableQuantizerConfig, Mapping[str, Any]], QParams] | None = None
