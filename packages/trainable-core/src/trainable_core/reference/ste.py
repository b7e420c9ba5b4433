"""Straight-through estimator: the grid is fixed, the gradient is the identity inside the range and zero outside.

References
----------
Bengio, Léonard and Courville, "Estimating or Propagating Gradients Through Stochastic Neurons for Conditional
Computation", 2013, arXiv:1308.3432. The clipped form is that of Hubara et al., "Binarized Neural Networks", 2016, and
of TensorFlow's ``fake_quant`` operators.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainable_core.qparams import Float32, QParams
from trainable_core.reference import affine, rounding
from trainable_core.reference.affine import Gradients, fake_quantize
from trainable_core.reference.method import Method
from trainable_core.reference.oracle import ExpectedGradients, Oracle, State

__all__ = ["METHOD", "fake_quantize", "gradients", "inside"]


def inside(x: ArrayLike, qparams: QParams) -> NDArray[np.bool_]:
    """Return where values lie within the grid's ends, the ends included."""
    x = np.asarray(x)
    v = affine.steps(x, qparams)
    low, high = affine.ends(qparams, x.ndim)
    return np.asarray((v >= low) & (v <= high))


def gradients(x: ArrayLike, upstream: ArrayLike, qparams: QParams) -> Gradients:
    """Return the gradients of the straight-through estimator.

    Parameters
    ----------
    x : float array, any shape
        What was quantized.
    upstream : float array, shape of `x`
        Gradient of the loss with respect to the quantized values.
    qparams : QParams
        The grid.

    Returns
    -------
    Gradients
        ``x``: `upstream` where ``quant_min <= x / scale + zero_point <= quant_max`` (before rounding; exactly at the
        ends it passes), else 0, and 0 at NaN. ``scale`` and ``zero_point``: 0, they are not learned.

    Notes
    -----
    *Deviation* from PyTorch's ``fake_quantize``, whose mask is taken after rounding and passes up to half a step beyond
    the ends; TensorFlow's is ours. The ancestor's PyTorch code passes the gradient everywhere.

    Examples
    --------
    >>> grid = QParams(np.float32(0.5), np.int32(0), -8, 7)
    >>> gradients(np.array([-4.1, -4.0, 3.5, 3.6]), np.ones(4), grid).x
    array([0., 1., 1., 0.])
    """
    passed = np.where(inside(x, qparams), np.asarray(upstream, np.float64), 0.0)
    nothing = np.zeros(qparams.scale.shape)
    return Gradients(passed, nothing, nothing)


def _expected(x: Float32, upstream: Float32, state: State) -> ExpectedGradients:
    grid, slope = state.grid, rounding.of_arguments(state.arguments)
    found = rounding.through(
        gradients(x, upstream, grid), x, upstream, grid, slope, tie_rule=state.tie_rule, constant=0.0
    )
    return ExpectedGradients(found.x, rounding.allowed(upstream, slope, grid))


METHOD = Method(
    name="STE",
    title="Straight-through estimator",
    reference="Bengio et al., 2013, arXiv:1308.3432",
    module=__name__,
    options=rounding.OPTIONS,
    conformance_arguments=rounding.CONFORMANCE_ARGUMENTS,
    oracle=Oracle(_expected),
)
