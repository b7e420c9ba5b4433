"""Quantization to the levels of a look-up table whose threshold learns: what the methods with fixed levels share."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from trainable_core.enums import LUT_METHODS, QuantizationTarget
from trainable_core.qparams import Float32, QParams
from trainable_core.reference import affine
from trainable_core.reference.affine import Gradients, fake_quantize
from trainable_core.reference.method import Method, Option
from trainable_core.reference.oracle import ExpectedGradients, Oracle, State, with_grid

__all__ = ["edges", "fake_quantize", "gradient_scale", "gradients", "last_code", "table_method"]


def edges(levels: tuple[int, ...]) -> tuple[float, float]:
    """Return how far the gradient passes: half a gap beyond the outermost levels, in codes.

    A table that begins with zero is for values that are not negative, and its gradient ends there.

    Examples
    --------
    >>> edges((-96, -32, 32, 96)), edges((-64, 0, 64)), edges((0, 64, 128))
    ((-128.0, 128.0), (-96.0, 96.0), (0.0, 160.0))
    """
    below = (levels[1] - levels[0]) / 2 if levels[0] else 0.0
    return levels[0] - below, levels[-1] + (levels[-1] - levels[-2]) / 2


def last_code(n_bits: int, *, signed: bool) -> int:
    """Return the last code of a grid of equal steps that has as many levels, at least 1.

    Examples
    --------
    >>> last_code(4, signed=True), last_code(4, signed=False), last_code(1, signed=True)
    (7, 15, 1)
    """
    return int(max(2 ** (n_bits - int(signed)) - 1, 1))


def gradient_scale(sharing: int, n_bits: int, *, signed: bool = True) -> float:
    """Return ``1 / sqrt(N * last_code)``, what the gradient of the threshold is multiplied by; see `last_code`.

    Parameters
    ----------
    sharing : int
        Number of elements that share one threshold.
    n_bits : int
        Width of the codes.
    signed : bool
        Whether the table reaches below zero.

    Examples
    --------
    >>> gradient_scale(900, 1)
    0.03333333333333333
    """
    return 1.0 / math.sqrt(max(sharing, 1) * last_code(n_bits, signed=signed))


def gradients(x: ArrayLike, upstream: ArrayLike, qparams: QParams, n_bits: int) -> Gradients:
    """Return the gradients of quantization to a table with a learned threshold.

    Parameters
    ----------
    x : float array, any shape
        What was quantized.
    upstream : float array, shape of `x`
        Gradient of the loss with respect to the quantized values.
    qparams : QParams
        The table; its scale is a 128th of the threshold, or a 256th where it is not signed.
    n_bits : int
        Width of the codes.

    Returns
    -------
    Gradients
        As below, `scale` multiplied by `gradient_scale` and summed over what shares it; `zero_point`: 0.

    Notes
    -----
    With ``v = x / scale``, the nearest level q, and the `edges` of the table (ParetoQ, section 3; APoT, equation 8,
    whose mask is taken at the outermost level):

    =====================  ======  =========
    where                  dy/dx   dy/dscale
    =====================  ======  =========
    v <= first edge        0       first level
    between                1       q - v
    v >= last edge         0       last level
    =====================  ======  =========

    NaN gives zero everywhere.

    Examples
    --------
    >>> table = QParams(np.float32(2**-7), np.int32(0), -128, 127, None, (-64, 64))
    >>> gradients(np.array([-2.0, 0.25]), np.ones(2), table, 1).x
    array([0., 1.])
    """
    x, upstream = np.asarray(x), np.asarray(upstream, np.float64)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        v = (affine.to_float32(x) / qparams.along(x.ndim).scale).astype(np.float64)
    first, last = edges(qparams.levels)
    below, above, between = v <= first, v >= last, (v > first) & (v < last)
    nearest = affine.nearest_levels(x, qparams).astype(np.float64)
    with np.errstate(invalid="ignore"):
        error = np.where(between, nearest - v, 0.0)
    slope = np.where(below, qparams.levels[0], np.where(above, qparams.levels[-1], error))
    g = gradient_scale(qparams.sharing(x.size), n_bits, signed=qparams.signed)
    return Gradients(
        np.where(between, upstream, 0.0), qparams.reduce(upstream * slope) * g, np.zeros(qparams.scale.shape)
    )


def _expected(x: Float32, upstream: Float32, state: State) -> ExpectedGradients:
    grid = state.grid
    found = gradients(x, upstream, grid, state.width)
    constant = gradient_scale(grid.sharing(x.size), state.width, signed=grid.signed)
    return with_grid(found, x, upstream, grid, constant)


def table_method(
    name: str,
    title: str,
    reference: str,
    module: str,
    options: tuple[Option, ...] = (),
    conformance_arguments: tuple[dict[str, Any], ...] = (),
    *,
    targets: tuple[QuantizationTarget, ...] = (QuantizationTarget.Weights,),
) -> Method:
    """Return the declaration of a method with fixed levels and a learned threshold."""
    return Method(
        name=name,
        title=title,
        reference=reference,
        module=module,
        learns_grid=True,
        options=options,
        targets=targets,
        grids=LUT_METHODS,
        conformance_arguments=conformance_arguments,
        oracle=Oracle(_expected),
    )
