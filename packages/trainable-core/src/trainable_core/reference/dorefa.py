"""DoReFa-Net's weights: squashed into the range by the hyperbolic tangent, so none is clipped.

References
----------
Zhou, Wu, Ni, Zhou, Wen and Zou, "DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks with Low Bitwidth
Gradients", 2016, arXiv:1606.06160.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainable_core.enums import QuantizationMethod, QuantizationTarget, TieRule
from trainable_core.qparams import Float32, Float64, QParams
from trainable_core.reference import affine
from trainable_core.reference.affine import Gradients
from trainable_core.reference.method import Method
from trainable_core.reference.oracle import EPSILON, ExpectedGradients, ExpectedValues, Oracle, State

__all__ = ["METHOD", "fake_quantize", "gradients", "squashed"]


LEAST = 2.0**-64
"""What the largest tangent counts as at least, where it is not 0: float32 would not hold larger gradients."""


def squashed(x: ArrayLike, qparams: QParams) -> Float64:
    """Return weights squashed into the range, in steps of the grid.

    Parameters
    ----------
    x : float array, any shape
        Weights.
    qparams : QParams
        The grid, SYMMETRIC or POWER_OF_TWO and signed; its threshold is ``-quant_min`` steps.

    Returns
    -------
    float64 array, shape of `x`
        ``tanh(x) / max|tanh(x)| * (threshold / scale)``, the maximum being that of the elements that share a threshold
        (equation 9 before it is rounded). Zeros where all of them are zero.

    Examples
    --------
    >>> grid = QParams(np.float32(0.25), np.int32(0), -4, 3)
    >>> squashed([0.0, 20.0, -20.0], grid)
    array([ 0.,  4., -4.])
    """
    tangent, largest = _tangent(np.asarray(x), qparams)
    return np.asarray(tangent / largest * -qparams.quant_min)


def _tangent(x: NDArray[Any], qparams: QParams) -> tuple[Float64, Float64]:
    """Return the tangent of each weight, and the largest magnitude among those that share its threshold."""
    tangent = np.tanh(np.asarray(x, np.float64))
    axis = qparams.channels_axis
    others = tuple(i for i in range(x.ndim) if axis is None or i != axis % x.ndim)
    largest = np.abs(tangent).max(axis=others, keepdims=True, initial=0.0)
    return tangent, np.where(largest == 0, 1.0, np.maximum(largest, LEAST))


def fake_quantize(x: ArrayLike, qparams: QParams, *, tie_rule: TieRule = TieRule.HALF_EVEN) -> NDArray[Any]:
    """Return squashed weights snapped to the grid, in the dtype of `x`.

    Examples
    --------
    >>> fake_quantize(np.array([0.0, 20.0, -20.0]), QParams(np.float32(0.25), np.int32(0), -4, 3))
    array([ 0.  ,  0.75, -1.  ])
    """
    x = np.asarray(x)
    scale = qparams.along(x.ndim).scale
    values = affine.fake_quantize((squashed(x, qparams) * scale).astype(np.float32), qparams, tie_rule=tie_rule)
    return values.astype(affine.result_dtype(x))


def gradients(x: ArrayLike, upstream: ArrayLike, qparams: QParams) -> Gradients:
    """Return the gradients of DoReFa-Net's weights.

    Parameters
    ----------
    x : float array, any shape
        Weights.
    upstream : float array, shape of `x`
        Gradient of the loss with respect to the quantized values.
    qparams : QParams
        The grid.

    Returns
    -------
    Gradients
        ``x``: ``upstream * threshold * (1 - tanh(x)**2) / max|tanh(x)|`` everywhere; `scale` and `zero_point`: 0, they
        are not learned.

    Notes
    -----
    Rounding is straight-through, and nothing is clipped (equations 5 and 9). *Deviation:* the maximum counts as a
    constant. The paper's levels are ``2**n_bits`` evenly spaced ones from -1 to 1, without zero; ours are the grid's,
    times the threshold, which calibration sets: with ``minmax`` to the largest magnitude. A weight at the positive end
    is half a step beyond the last code at least, and its gradient passes like the others'. A maximum below `LEAST`
    counts as that, because float32 would not hold the gradients.

    Examples
    --------
    >>> grid = QParams(np.float32(0.25), np.int32(0), -4, 3)
    >>> gradients(np.array([0.0, 20.0]), np.ones(2), grid).x
    array([1., 0.])
    """
    x, upstream = np.asarray(x), np.asarray(upstream, np.float64)
    tangent, largest = _tangent(x, qparams)
    threshold = qparams.along(x.ndim).scale.astype(np.float64) * -qparams.quant_min
    nothing = np.zeros(qparams.scale.shape)
    return Gradients(upstream * threshold * (1 - np.square(tangent)) / largest, nothing, nothing)


def _expected_values(x: Float32, state: State, training: bool) -> ExpectedValues:  # noqa: ARG001, FBT001 - the signature of `Oracle.values`
    grid = state.grid
    steps = squashed(x, grid)
    # tangent, quotient and product: a few units in the last place each, of a value of up to half of the codes
    error = (grid.quant_max - grid.quant_min + 1) * 2.0**-24 * ROUNDINGS
    near_tie = np.abs(np.abs(steps - np.rint(steps)) - 0.5) <= error
    step = np.where(near_tie, grid.along(x.ndim).scale.astype(np.float64), 0.0)
    return ExpectedValues(fake_quantize(x, grid, tie_rule=state.tie_rule), step * (1 + EPSILON))


def _expected(x: Float32, upstream: Float32, state: State) -> ExpectedGradients:
    found = gradients(x, upstream, state.grid).x
    # 1 - tanh**2 cancels where the tangent is next to 1: its error is that of the tangent, relative to 1
    _, largest = _tangent(x, state.grid)
    threshold = state.grid.along(x.ndim).scale.astype(np.float64) * -state.grid.quant_min
    return ExpectedGradients(found, np.abs(upstream) * threshold / largest * ROUNDINGS * EPSILON)


ROUNDINGS = 16
"""Units in the last place that a tangent, a quotient and a product may be off by, generously, in any framework."""

METHOD = Method(
    name="DOREFA",
    title="DoReFa-Net's squashed weights",
    reference="Zhou et al., 2016, arXiv:1606.06160",
    module=__name__,
    targets=(QuantizationTarget.Weights,),
    grids=(QuantizationMethod.SYMMETRIC, QuantizationMethod.POWER_OF_TWO),
    depends_on="channel",
    deploys_values=True,
    oracle=Oracle(_expected, _expected_values),
)
