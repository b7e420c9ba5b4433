"""Parameterized clipping activation: the clipping bound learns from the values beyond it.

References
----------
Choi, Wang, Venkataramani, Chuang, Srinivasan and Gopalakrishnan, "PACT: Parameterized Clipping Activation for Quantized
Neural Networks", 2018, arXiv:1805.06085.
Jin, Yang and Liao, "Towards Efficient Training for Neural Network Quantization", 2019, arXiv:1912.10207 (the calibrated
gradient, section 4).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from trainable_core.enums import QuantizationTarget, TieRule
from trainable_core.errors import InvalidArgumentError
from trainable_core.qparams import Float32, QParams
from trainable_core.reference import affine
from trainable_core.reference.affine import Gradients, fake_quantize
from trainable_core.reference.method import Method, Option
from trainable_core.reference.oracle import ExpectedGradients, Oracle, State, with_grid

__all__ = ["METHOD", "checked_option", "fake_quantize", "gradients"]


def gradients(
    x: ArrayLike,
    upstream: ArrayLike,
    qparams: QParams,
    *,
    calibrated_gradient: bool = False,
    tie_rule: TieRule = TieRule.HALF_EVEN,
) -> Gradients:
    """Return the gradients of the parameterized clipping activation.

    Parameters
    ----------
    x : float array, any shape
        What was quantized.
    upstream : float array, shape of `x`
        Gradient of the loss with respect to the quantized values.
    qparams : QParams
        The grid.
    calibrated_gradient : bool
        Whether the rounding error inside the range counts too.
    tie_rule : TieRule
        That of the forward pass.

    Returns
    -------
    Gradients
        As below, `scale` and `zero_point` summed over what shares them.

    Notes
    -----
    With ``v = x / scale`` and the ends n and p (equation 3; equation 17 of Jin et al. in brackets):

    ===========  =====  ==================  ==============
    where        dy/dx  dy/dscale           dy/dzero_point
    ===========  =====  ==================  ==============
    v < n        0      n                   -scale
    n <= v < p   1      0 [round(v) - v]    0
    v >= p       0      p                   -scale
    ===========  =====  ==================  ==============

    For the range ``[0, alpha]`` of UNIFORM this is ``dy/dalpha = 1`` where ``x >= alpha`` and 0 elsewhere. *Deviation:*
    on SYMMETRIC and POWER_OF_TWO grids the last code is one step below the threshold, which learns in alpha's place,
    and signed grids are clipped on both sides. The lower end of a range learns in the same way. NaN gives zero
    everywhere. There is no gradient scale.

    Examples
    --------
    >>> grid = QParams(np.float32(0.5), np.int32(0), 0, 3)
    >>> g = gradients(np.array([-1.0, 0.1, 1.5, 9.0]), np.ones(4), grid)
    >>> g.x, float(g.scale)
    (array([0., 1., 0., 0.]), 6.0)
    """
    x, upstream = np.asarray(x), np.asarray(upstream, np.float64)
    v = affine.steps(x, qparams)
    low, high = affine.ends(qparams, x.ndim)
    below, above, between = v < low, v >= high, (v >= low) & (v < high)
    with np.errstate(invalid="ignore"):  # inf - inf where the value is outside; not selected
        error = affine.round_steps(v, tie_rule) - v if calibrated_gradient else np.zeros_like(v)
    slope = np.where(below, low, np.where(above, high, np.where(between, error, np.float32(0)))).astype(np.float64)
    d_zero = np.where(below | above, -qparams.along(x.ndim).scale.astype(np.float64), 0.0)
    return Gradients(
        np.where(between, upstream, 0.0), qparams.reduce(upstream * slope), qparams.reduce(upstream * d_zero)
    )


def checked_option(calibrated_gradient: object, subject: str) -> bool:
    """Return the option; InvalidArgumentError unless it is true or false."""
    if not isinstance(calibrated_gradient, bool):
        problem = f"must be true or false, got {calibrated_gradient!r}"
        raise InvalidArgumentError(f"{subject}: calibrated_gradient", problem)
    return calibrated_gradient


def _expected(x: Float32, upstream: Float32, state: State) -> ExpectedGradients:
    calibrated = bool(state.arguments.get("calibrated_gradient", False))
    found = gradients(x, upstream, state.grid, calibrated_gradient=calibrated, tie_rule=state.tie_rule)
    return with_grid(found, x, upstream, state.grid)


METHOD = Method(
    name="PACT",
    title="Parameterized clipping activation",
    reference="Choi et al., 2018, arXiv:1805.06085",
    module=__name__,
    learns_grid=True,
    options=(
        Option("calibrated_gradient", default=False, summary="count the rounding error inside too (Jin et al., 2019)"),
    ),
    targets=(QuantizationTarget.Activation,),
    conformance_arguments=({"calibrated_gradient": True},),
    oracle=Oracle(_expected),
)
