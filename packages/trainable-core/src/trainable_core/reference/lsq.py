"""Learned step size quantization: the scale, and for a uniform range the zero point, learn with the weights.

References
----------
Esser, McKinstry, Bablani, Appuswamy and Modha, "Learned Step Size Quantization", ICLR 2020, arXiv:1902.08153.
Bhalgat, Lee, Nagel, Blankevoort and Kwak, "LSQ+: Improving low-bit quantization through learnable offsets and better
initialization", CVPR Workshops 2020, arXiv:2004.09576 (the zero point).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from trainable_core.enums import TieRule
from trainable_core.qparams import Float32, QParams
from trainable_core.reference import affine, rounding
from trainable_core.reference.affine import Gradients, fake_quantize
from trainable_core.reference.method import Method
from trainable_core.reference.oracle import ExpectedGradients, Oracle, State, with_grid

__all__ = ["METHOD", "fake_quantize", "gradient_scale", "gradients"]


def gradient_scale(sharing: int, quant_max: int) -> float:
    """Return g, the constant that the gradients of the quantizer's variables are multiplied by.

    Parameters
    ----------
    sharing : int
        Number of elements that share one scale.
    quant_max : int
        Last code of the grid.

    Returns
    -------
    float
        ``1 / sqrt(sharing * quant_max)``, section 2.2 of the paper.

    Notes
    -----
    *Deviation:* a signed 1-bit grid has ``quant_max == 0``, where the paper's g is infinite; 1 is taken instead. An
    empty tensor counts as one element.

    Examples
    --------
    >>> gradient_scale(900, 1)
    0.03333333333333333
    """
    return 1.0 / math.sqrt(max(sharing, 1) * max(quant_max, 1))


def gradients(
    x: ArrayLike, upstream: ArrayLike, qparams: QParams, *, tie_rule: TieRule = TieRule.HALF_EVEN
) -> Gradients:
    """Return the gradients of learned step size quantization.

    Parameters
    ----------
    x : float array, any shape
        What was quantized.
    upstream : float array, shape of `x`
        Gradient of the loss with respect to the quantized values.
    qparams : QParams
        The grid.
    tie_rule : TieRule
        That of the forward pass.

    Returns
    -------
    Gradients
        As below, `scale` and `zero_point` multiplied by `gradient_scale` and summed over what shares them.

    Notes
    -----
    With ``v = x / scale`` and the ends ``n = quant_min - zero_point``, ``p = quant_max - zero_point`` (equations 3
    and 5):

    =========  =====  ============  ==============
    where      dy/dx  dy/dscale     dy/dzero_point
    =========  =====  ============  ==============
    v <= n     0      n             -scale
    n < v < p  1      round(v) - v  0
    v >= p     0      p             -scale
    =========  =====  ============  ==============

    Exactly at an end the value counts as outside, as in the paper. NaN gives zero everywhere.

    Examples
    --------
    >>> grid = QParams(np.float32(0.5), np.int32(0), -2, 1)
    >>> g = gradients(np.array([-9.0, 0.1, 9.0]), np.ones(3), grid)
    >>> g.x, round(float(g.scale / gradient_scale(3, 1)), 6)
    (array([0., 1., 0.]), -1.2)
    """
    x, upstream = np.asarray(x), np.asarray(upstream, np.float64)
    v = affine.steps(x, qparams)
    low, high = affine.ends(qparams, x.ndim)
    below, above, between = v <= low, v >= high, (v > low) & (v < high)
    with np.errstate(invalid="ignore"):  # inf - inf where the value is outside; not selected
        error = affine.round_steps(v, tie_rule) - v
    d_scale = np.where(below, low, np.where(above, high, np.where(between, error, np.float32(0)))).astype(np.float64)
    d_zero = np.where(below | above, -qparams.along(x.ndim).scale.astype(np.float64), 0.0)
    g = gradient_scale(qparams.sharing(x.size), qparams.quant_max)
    return Gradients(
        np.where(between, upstream, 0.0),
        qparams.reduce(upstream * d_scale) * g,
        qparams.reduce(upstream * d_zero) * g,
    )


def _expected(x: Float32, upstream: Float32, state: State) -> ExpectedGradients:
    grid, slope = state.grid, rounding.of_arguments(state.arguments)
    constant = gradient_scale(grid.sharing(x.size), grid.quant_max)
    found = gradients(x, upstream, grid, tie_rule=state.tie_rule)
    found = rounding.through(found, x, upstream, grid, slope, tie_rule=state.tie_rule, constant=constant)
    return with_grid(found, x, upstream, grid, constant, slope.slack(grid.quant_max - grid.quant_min))


METHOD = Method(
    name="LSQ",
    title="Learned step size quantization",
    reference="Esser et al., ICLR 2020, arXiv:1902.08153",
    module=__name__,
    learns_grid=True,
    options=rounding.OPTIONS,
    conformance_arguments=rounding.CONFORMANCE_ARGUMENTS,
    oracle=Oracle(_expected),
)
