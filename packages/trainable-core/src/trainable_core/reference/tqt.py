"""Trained quantization thresholds: the logarithm of the threshold learns with the weights.

References
----------
Jain, Gural, Wu and Dick, "Trained Quantization Thresholds for Accurate and Efficient Fixed-Point Inference of Deep
Neural Networks", MLSys 2020, arXiv:1903.08066.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainable_core.constants import THRESHOLD
from trainable_core.enums import QuantizationMethod, TieRule
from trainable_core.qparams import Float32, QParams
from trainable_core.reference import affine
from trainable_core.reference.affine import Gradients, fake_quantize
from trainable_core.reference.method import Method
from trainable_core.reference.oracle import ExpectedGradients, Oracle, State, with_grid

__all__ = ["LOG2_THRESHOLD", "METHOD", "encode_grid", "fake_quantize", "gradients"]

LOG2_THRESHOLD = "log2_threshold"
"""Name of the variable, the paper's ``log2 t``."""


def gradients(
    x: ArrayLike, upstream: ArrayLike, qparams: QParams, *, tie_rule: TieRule = TieRule.HALF_EVEN
) -> Gradients:
    """Return the gradients of trained quantization thresholds.

    Parameters
    ----------
    x : float array, any shape
        What was quantized.
    upstream : float array, shape of `x`
        Gradient of the loss with respect to the quantized values.
    qparams : QParams
        The grid.
    tie_rule : TieRule
        That of the forward pass, which decides which values are clipped.

    Returns
    -------
    Gradients
        As below; `scale` is summed over what shares it, and `zero_point` is 0.

    Notes
    -----
    With ``v = x / scale`` and the ends n and p (equations 6 to 8):

    ==================  =====  ============
    where               dy/dx  dy/dscale
    ==================  =====  ============
    round(v) < n        0      n
    n <= round(v) <= p  1      round(v) - v
    round(v) > p        0      p
    ==================  =====  ============

    The mask is taken after rounding, so values up to half a step beyond an end count as inside. The variable is
    ``u = log2 t``. With the ceiling of POWER_OF_TWO straight-through, ``dscale/du = scale * ln 2`` (equation 7); on a
    SYMMETRIC grid, where nothing is rounded up, it is the same. There is no gradient scale. NaN gives zero everywhere.

    Examples
    --------
    >>> grid = QParams(np.float32(0.5), np.int32(0), -2, 1)
    >>> g = gradients(np.array([-9.0, 0.1, 0.7, 9.0]), np.ones(4), grid)
    >>> g.x, round(float(g.scale), 6)
    (array([0., 1., 1., 0.]), -1.6)
    """
    x, upstream = np.asarray(x), np.asarray(upstream, np.float64)
    v = affine.steps(x, qparams)
    low, high = affine.ends(qparams, x.ndim)
    codes = affine.round_steps(v, tie_rule)
    below, above, between = codes < low, codes > high, (codes >= low) & (codes <= high)
    with np.errstate(invalid="ignore"):  # inf - inf where the value is outside; not selected
        error = codes - v
    slope = np.where(below, low, np.where(above, high, np.where(between, error, np.float32(0)))).astype(np.float64)
    return Gradients(np.where(between, upstream, 0.0), qparams.reduce(upstream * slope), np.zeros(qparams.scale.shape))


def encode_grid(numbers: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Return the variable that stands for a threshold: its logarithm to base 2."""
    return {LOG2_THRESHOLD: np.log2(numbers[THRESHOLD])}


def _expected(x: Float32, upstream: Float32, state: State) -> ExpectedGradients:
    found = gradients(x, upstream, state.grid, tie_rule=state.tie_rule)
    return with_grid(found, x, upstream, state.grid)


METHOD = Method(
    name="TQT",
    title="Trained quantization thresholds",
    reference="Jain et al., MLSys 2020, arXiv:1903.08066",
    module=__name__,
    learns_grid=True,
    grid_parameters=(LOG2_THRESHOLD,),
    grids=(QuantizationMethod.POWER_OF_TWO, QuantizationMethod.SYMMETRIC),
    oracle=Oracle(_expected),
)
