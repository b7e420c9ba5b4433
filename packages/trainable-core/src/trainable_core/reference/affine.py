"""Affine quantization: real values to integer codes and back, under a declared tie rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainable_core.enums import TieRule
from trainable_core.qparams import Float32, Float64, QParams


@dataclass(frozen=True)
class Gradients:
    """Gradients of a loss through one fake quantization.

    Parameters
    ----------
    x : float64 array, shape of the input
        With respect to the input.
    scale, zero_point : float64 array, shape of the grid's scale
        With respect to scale and real-valued zero point, summed over the elements that share them.
    """

    x: Float64
    scale: Float64
    zero_point: Float64


def to_float32(x: ArrayLike) -> Float32:
    """Return `x` in float32; what is too large becomes infinite."""
    with np.errstate(over="ignore", invalid="ignore"):  # invalid: a signalling NaN
        return np.asarray(x).astype(np.float32)


def result_dtype(x: NDArray[Any]) -> np.dtype[Any]:
    """Return the dtype in which values are given back: that of `x`, or float32 for integers."""
    return x.dtype if np.issubdtype(x.dtype, np.floating) else np.dtype(np.float32)


def steps(x: ArrayLike, qparams: QParams) -> Float32:
    """Return ``x / scale`` in float32, computed as ``x * (1 / scale)`` like the deployed kernels do."""
    x = to_float32(x)
    # over: a huge value saturates, and infinity is the right intermediate; invalid: a signalling NaN
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(x * (np.float32(1) / qparams.along(x.ndim).scale))


def ends(qparams: QParams, ndim: int) -> tuple[Float32, Float32]:
    """Return the grid's first and last code counted from zero, float32, shaped to broadcast."""
    zero_point = qparams.along(ndim).zero_point
    return (qparams.quant_min - zero_point).astype(np.float32), (qparams.quant_max - zero_point).astype(np.float32)


def round_steps(v: Float32, tie_rule: TieRule) -> Float32:
    """Return `v` rounded to integers, ties by `tie_rule`.

    Examples
    --------
    >>> v = np.float32([-1.5, -0.5, 0.5, 1.5])
    >>> round_steps(v, TieRule.HALF_EVEN), round_steps(v, TieRule.HALF_UP)
    (array([-2., -0.,  0.,  2.], dtype=float32), array([-1.,  0.,  1.,  2.], dtype=float32))
    """
    if tie_rule is TieRule.HALF_EVEN:
        return np.rint(v)
    down = np.floor(v)
    # not floor(v + 0.5): in float32 the sum rounds the largest number below 0.5 up to 1
    with np.errstate(invalid="ignore"):  # inf - inf; the comparison is false and the infinity stays
        return np.asarray(np.where(v - down >= np.float32(0.5), down + np.float32(1), down))


def quantize(x: ArrayLike, qparams: QParams, *, tie_rule: TieRule = TieRule.HALF_EVEN) -> NDArray[np.int32]:
    """Return the grid codes of real values.

    Parameters
    ----------
    x : float array, any shape
        Real values. Infinities saturate to their own side; NaN has no code and is given `quant_min`, as PyTorch's
        kernel does.
    qparams : QParams
        The grid.
    tie_rule : TieRule
        Where a value half way between two codes goes.

    Returns
    -------
    int32 array, shape of `x`
        In ``[quant_min, quant_max]``.

    Notes
    -----
    ``clip(round(x / scale) + zero_point, quant_min, quant_max)``; rounded before the zero point is added, as ONNX
    QuantizeLinear: the other order moves every tie when the zero point is odd.

    Examples
    --------
    >>> grid = QParams(np.float32(0.5), np.int32(0), -8, 7)
    >>> quantize([0.24, 0.26, 9.0, -np.inf], grid)
    array([ 0,  1,  7, -8], dtype=int32)
    """
    x = np.asarray(x)
    low, high = ends(qparams, x.ndim)
    counted = np.clip(round_steps(steps(x, qparams), tie_rule), low, high)
    counted = np.where(np.isnan(counted), low, counted)
    return np.asarray(counted.astype(np.int32) + qparams.along(x.ndim).zero_point)


def nearest_levels(x: ArrayLike, qparams: QParams) -> Float32:
    """Return the nearest levels of a table, float32; of two that are equally near the lower one; NaN stays NaN.

    Parameters
    ----------
    x : float array, any shape
        Real values.
    qparams : QParams
        A grid with `levels`.

    Notes
    -----
    In the order of mctq's ``lut_quantizer`` without its ``eps``: ``x / threshold * 128`` is clipped to [-128, 127], for
    a table that is not signed ``x / threshold * 256`` to [0, 255], and the first level of the least distance is taken,
    all in float32. The tie rule of a backend has no say in it.

    Examples
    --------
    >>> nearest_levels([-9.0, -0.1, 0.0, 0.2], QParams(np.float32(2**-7), np.int32(0), -128, 127, None, (-64, 0, 64)))
    array([-64.,   0.,   0.,   0.], dtype=float32)
    """
    x = to_float32(x)
    steps = np.float32(qparams.threshold_steps)
    threshold = qparams.along(x.ndim).scale * steps
    with np.errstate(over="ignore", invalid="ignore"):  # a huge value saturates
        at = np.clip(x / threshold * steps, np.float32(qparams.quant_min), np.float32(qparams.quant_max))
        distances = np.stack([np.abs(at - np.float32(level)) for level in qparams.levels])
    found = np.asarray(qparams.levels, np.float32)[np.argmin(distances, axis=0)]
    return np.where(np.isnan(x), x, found).astype(np.float32)


def dequantize(codes: ArrayLike, qparams: QParams) -> Float32:
    """Return the real values, float32, that grid codes stand for: ``(code - zero_point) * scale``."""
    codes = np.asarray(codes)
    grid = qparams.along(codes.ndim)
    return np.asarray((codes - grid.zero_point).astype(np.float32) * grid.scale)


def fake_quantize(x: ArrayLike, qparams: QParams, *, tie_rule: TieRule = TieRule.HALF_EVEN) -> NDArray[Any]:
    """Return real values snapped to the grid, in the dtype of `x`; arithmetic in float32.

    NaN stays NaN. Zero comes out as +0.0, whatever the sign of what was rounded to it.

    Examples
    --------
    >>> fake_quantize(np.array([0.24, 0.26, 9.0]), QParams(np.float32(0.5), np.int32(0), -8, 7))
    array([0. , 0.5, 3.5])
    """
    x = np.asarray(x)
    low, high = ends(qparams, x.ndim)
    if qparams.levels:
        counted = nearest_levels(x, qparams)
    else:
        counted = np.clip(round_steps(steps(x, qparams), tie_rule), low, high) + np.float32(0)  # -0.0 + 0.0 is +0.0
    with np.errstate(over="ignore"):  # a float16 result beyond its range is infinite
        return np.asarray((counted * qparams.along(x.ndim).scale).astype(result_dtype(x)))
