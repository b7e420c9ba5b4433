"""Rounding gradients: what passes back through the rounding of a value inside the range, as an option of a method.

Rounding has no useful derivative, so each method puts a surrogate in its place. The straight-through estimator's is 1.
Others depend on where between two codes a value lies: the gradient of the input is the upstream gradient times the
surrogate's slope, and that of the scale follows from ``y = scale * round(x / scale)`` by the product rule. The forward
pass is the same for all, so what is deployed is too.

References
----------
Lee, Kim and Ham, "Network Quantization with Element-wise Gradient Scaling", CVPR 2021, arXiv:2104.00903 (EWGS).
"StableQAT", 2026, arXiv:2601.19320 (the Fourier surrogate).
Gong, Liu, Jiang, Li, Hu, Lin, Yu and Yan, "Differentiable Soft Quantization: Bridging Full-Precision and Low-Bit Neural
Networks", ICCV 2019, arXiv:1908.05033 (DSQ).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from trainable_core.enums import TieRule
from trainable_core.errors import InvalidArgumentError, nearest
from trainable_core.qparams import Float64, QParams
from trainable_core.reference import affine
from trainable_core.reference.affine import Gradients
from trainable_core.reference.method import Option
from trainable_core.reference.oracle import EPSILON

STE, EWGS, FOURIER, DSQ = "ste", "ewgs", "fourier", "dsq"

STRENGTHS: Mapping[str, tuple[float, float, float]] = {
    STE: (0.0, 0.0, 0.0),
    EWGS: (1e-3, 0.0, 16.0),
    FOURIER: (0.21, 0.0, 0.22),  # sqrt(2) * pi * A must be below 1
    DSQ: (0.3, 0.05, 0.45),
}
"""For each surrogate, the default of its number, and the smallest and the largest one."""

OPTIONS = (
    Option("rounding", STE, f"what passes back through rounding: {', '.join(STRENGTHS)}"),
    Option("rounding_strength", None, "EWGS's delta, the Fourier surrogate's A or DSQ's alpha; None: the default"),
)
"""The options of a method that has the slot."""

CONFORMANCE_ARGUMENTS: tuple[dict[str, Any], ...] = (
    {},
    {"rounding": EWGS},
    {},
    {"rounding": FOURIER},
    {},
    {"rounding": DSQ},
    {},
)
"""Mostly none: the straight-through estimator has paths of its own in a backend, and they need their cases."""


@dataclass(frozen=True)
class Rounding:
    """A surrogate and its number.

    Parameters
    ----------
    name : str
        ``ste``, ``ewgs``, ``fourier`` or ``dsq``.
    strength : float
        EWGS's delta, the Fourier surrogate's A, or DSQ's alpha.
    """

    name: str = STE
    strength: float = 0.0

    @property
    def is_straight_through(self) -> bool:
        """Whether the slope is 1 everywhere."""
        return self.name == STE

    @property
    def arguments(self) -> dict[str, Any]:
        """The options that stand for it; none for the default."""
        return {} if self.is_straight_through else {"rounding": self.name, "rounding_strength": self.strength}

    @property
    def wave(self) -> float:
        """The Fourier surrogate's amplitude, ``sqrt(2) * pi * A``."""
        return math.sqrt(2) * math.pi * self.strength

    @property
    def steepness(self) -> float:
        """DSQ's k for an interval of width 1, ``log(2 / alpha - 1)``."""
        return math.log(2 / self.strength - 1)

    @property
    def peak(self) -> float:
        """DSQ's slope in the middle of an interval."""
        return self.steepness / (2 * (1 - self.strength))

    def slack(self, span: int) -> float:
        """Return how many roundings a float32 slope may be off by, for values of up to `span` steps of the grid.

        A value is rounded relative to its size, and the slope changes with its place between two codes. The functions
        themselves are a few units in the last place off; 32 covers them.
        """
        if self.is_straight_through:
            return 1.0
        steepest = {EWGS: self.strength / span, FOURIER: 2 * math.pi * self.wave}.get(self.name, 0.0)
        if self.name == DSQ:
            steepest = 2 * self.peak * self.steepness
        return 32 + steepest * (span + 1)


def checked(rounding: object, strength: object, subject: str) -> Rounding:
    """Return the surrogate that the options of a method ask for.

    Parameters
    ----------
    rounding : str
        The name of the surrogate.
    strength : float or None
        Its number; None takes the default.
    subject : str
        The quantizer, for errors.

    Raises
    ------
    InvalidArgumentError
        When there is no such surrogate, or its number is out of bounds.

    Examples
    --------
    >>> checked("dsq", None, "q").strength
    0.3
    """
    if not isinstance(rounding, str) or rounding not in STRENGTHS:
        problem = f"{rounding!r} is not one of {', '.join(STRENGTHS)}"
        hint = nearest(rounding, STRENGTHS).strip().removeprefix("Hint: ") if isinstance(rounding, str) else ""
        raise InvalidArgumentError(f"{subject}: rounding", problem, hint)
    default, low, high = STRENGTHS[rounding]
    if strength is None:
        return Rounding(rounding, default)
    number = isinstance(strength, Real) and not isinstance(strength, bool)
    if rounding == STE or not number or not low <= strength <= high:  # type: ignore[operator] # it is a number
        problem = f"must be from {low} to {high} for {rounding}, got {strength!r}"
        problem = f"{rounding} has none, got {strength!r}" if rounding == STE else problem
        raise InvalidArgumentError(f"{subject}: rounding_strength", problem)
    return Rounding(rounding, float(strength))  # type: ignore[arg-type]


def slopes(v: ArrayLike, codes: ArrayLike, upstream: ArrayLike, rounding: Rounding, span: int) -> Float64:
    """Return the slope of a surrogate for rounding.

    Parameters
    ----------
    v : float array
        Values in steps of the grid, inside the range.
    codes : float array, shape of `v`
        What they are rounded to.
    upstream : float array, shape of `v`
        Gradient of the loss with respect to the quantized values.
    rounding : Rounding
        The surrogate.
    span : int
        Number of steps from the first code to the last.

    Returns
    -------
    float64 array, shape of `v`

    Notes
    -----
    With ``e = v - round(v)`` and g the upstream gradient:

    - *ste*: 1.
    - *ewgs*: ``1 + delta * sign(g) * e / span`` (equation 4; the paper's ``x_n - x_q`` of the range normalized to
      [0, 1] is ``e / span``). *Deviation:* delta is a constant, which the paper also derives from the Hessian's trace.
    - *fourier*: ``(1 - c) / (1 + c)`` with ``c = sqrt(2) * pi * A * cos(pi * e)``; the paper writes
      ``v + round(v)`` for e, which is a whole number of periods more.
    - *dsq*: ``k / (2 * (1 - alpha)) * (1 - tanh(k * (v - m))**2)`` with ``k = log(2 / alpha - 1)`` and the middle
      between two codes ``m = floor(v) + 0.5``: the derivative of equations 3 to 6. *Deviation:* alpha is a constant,
      and the forward pass rounds, as the paper's does in its stage of hard quantization.

    Examples
    --------
    >>> v = np.array([0.0, 0.25, 0.5])
    >>> slopes(v, np.rint(v), np.ones(3), Rounding("ewgs", 1.0), 1)
    array([1.  , 1.25, 1.5 ])
    >>> slopes(v, np.rint(v), np.ones(3), Rounding("fourier", 0.0), 1)
    array([1., 1., 1.])
    """
    v, codes, upstream = (np.asarray(each, np.float64) for each in (v, codes, upstream))
    if rounding.name == EWGS:
        return np.asarray(1 + rounding.strength * np.sign(upstream) * (v - codes) / span)
    if rounding.name == FOURIER:
        wave = rounding.wave * np.cos(np.pi * (v - codes))
        return np.asarray((1 - wave) / (1 + wave))
    if rounding.name == DSQ:
        bend = np.tanh(rounding.steepness * (v - np.floor(v) - 0.5))
        return np.asarray(rounding.peak * (1 - np.square(bend)))
    return np.ones(v.shape)


def through(
    found: Gradients,
    x: ArrayLike,
    upstream: ArrayLike,
    qparams: QParams,
    rounding: Rounding,
    *,
    tie_rule: TieRule,
    constant: float = 1.0,
) -> Gradients:
    """Return the gradients of a straight-through method with another surrogate in the place of the slope 1.

    Parameters
    ----------
    found : Gradients
        Those of the method, whose input gradient is `upstream` inside and 0 outside.
    x, upstream : float array
        As the method's gradients take them.
    qparams : QParams
        The grid.
    rounding : Rounding
        The surrogate.
    tie_rule : TieRule
        That of the forward pass.
    constant : float
        What the method multiplies the gradient of the scale by; 0 where it is not learned.

    Returns
    -------
    Gradients
        ``dy/dx`` is the slope inside, and ``dy/dscale = round(v) - slope * v``; outside both are those of `found`.
    """
    if rounding.is_straight_through:
        return found
    x, upstream = np.asarray(x), np.asarray(upstream, np.float64)
    v = affine.steps(x, qparams).astype(np.float64)
    inside = found.x != 0
    at = np.where(inside, v, 0.0)
    slope = slopes(
        at,
        affine.round_steps(at.astype(np.float32), tie_rule),
        upstream,
        rounding,
        qparams.quant_max - qparams.quant_min,
    )
    by_scale = qparams.reduce(np.where(inside, upstream * (1 - slope) * at, 0.0)) * constant
    return Gradients(found.x * slope, found.scale + by_scale, found.zero_point)


def of_arguments(arguments: Mapping[str, Any]) -> Rounding:
    """Return the surrogate of a quantizer, from what its `get_arguments` returns."""
    return checked(arguments.get("rounding", STE), arguments.get("rounding_strength"), "rounding")


def allowed(upstream: ArrayLike, rounding: Rounding, qparams: QParams) -> Float64:
    """Return how far a float32 gradient of the input may be from the one that is right."""
    slack = rounding.slack(qparams.quant_max - qparams.quant_min)
    return np.abs(np.asarray(upstream, np.float64)) * (slack - 1) * EPSILON
