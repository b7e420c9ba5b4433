"""The arithmetic of batch-norm folding: kernel and bias take over a normalization's statistics.

Written with operators that NumPy arrays and a framework's tensors share, so that each backend folds on the device where
its model is. Pass everything in float64: the results are rounded once, when they are stored.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from trainable_core.enums import LUT_METHODS, QuantizationMethod
from trainable_core.qparams import SMALLEST_THRESHOLD, Float32, QParams, shorten_scale
from trainable_core.validation import MAX_THRESHOLD

Array = TypeVar("Array", bound=Any)


def gain_and_shift(
    mean: Array, inverse_deviation: Array, gamma: Array | None, beta: Array | None
) -> tuple[Array, Array]:
    """Return g and h with ``normalize(y) == y * g + h``.

    Parameters
    ----------
    mean : float64 array or tensor, shape (C,)
        The running mean.
    inverse_deviation : float64 array or tensor, shape (C,)
        ``1 / sqrt(variance + epsilon)`` of the running variance, by the framework's own function.
    gamma, beta : float64 array or tensor, shape (C,), or None
        Its own scale and shift; None counts as ones and zeros.

    Returns
    -------
    float64 arrays or tensors, shape (C,)

    Examples
    --------
    >>> import numpy as np
    >>> gain_and_shift(np.array([2.0]), 1 / np.sqrt([3.0 + 1.0]), np.array([4.0]), None)
    (array([2.]), array([-4.]))
    """
    gain = inverse_deviation if gamma is None else inverse_deviation * gamma
    shift = -mean * gain
    if beta is not None:
        shift = shift + beta
    return gain, shift


def fold(kernel: Array, bias: Array | None, gain: Array, shift: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """Return kernel and bias of a layer that does its own work and the normalization's: ``w * g`` and ``b * g + h``.

    Parameters
    ----------
    kernel : float64 array or tensor
        Weights.
    bias : float64 array or tensor, shape (C,), or None
        None counts as zeros.
    gain, shift : float64 array or tensor, shape (C,)
        From `gain_and_shift`.
    axes : tuple of int
        Axes of the kernel that make the C output channels, in order: one, or two for a depthwise kernel and for a
        grouped transposed convolution.

    Returns
    -------
    float64 arrays or tensors, shapes of kernel and bias
    """
    shape = [1] * kernel.ndim
    for axis in axes:
        shape[axis] = kernel.shape[axis]
    return kernel * gain.reshape(shape), shift if bias is None else bias * gain + shift


def fold_codes(
    values: Float32, grid: QParams, method: QuantizationMethod, n_bits: int, gain: NDArray[np.float64], axis: int
) -> tuple[Float32, QParams] | str:
    """Return quantized weights and their grid after a normalization was folded into them, with the same codes.

    Parameters
    ----------
    values : float32 array
        Weights on the grid.
    grid : QParams
        Their grid.
    method : QuantizationMethod
        What kind of grid it is.
    n_bits : int
        Its width.
    gain : float64 array, shape (C,)
        From `gain_and_shift`.
    axis : int
        Axis of the weights that the gain goes along, the only one with output channels.

    Returns
    -------
    (float32 array, QParams), or str
        The new weights, which are on the new grid, and the grid; or why there is no such grid.

    Notes
    -----
    Not the weights are multiplied by the gain but the scales, by its magnitude, so codes stay as they were trained; a
    negative gain turns their signs round (UNIFORM: the zero point too). The product is rounded once, to float32, and to
    the short scales of UNIFORM (`trainable_core.qparams.shorten_scale`). A channel whose gain is 0, or so small that
    the inverse of its scale would not be finite, has codes 0.

    Examples
    --------
    >>> grid = QParams(np.array([0.5, 0.25], np.float32), np.array([0, 0], np.int32), -2, 1, 0)
    >>> values = np.array([[-1.0, 0.5], [0.25, -0.25]], np.float32)
    >>> folded, new = fold_codes(values, grid, QuantizationMethod.SYMMETRIC, 2, np.array([3.0, -2.0]), 0)
    >>> folded, new.scale
    (array([[-3. ,  1.5],
           [-0.5,  0.5]], dtype=float32), array([1.5, 0.5], dtype=float32))
    """
    if method in LUT_METHODS:
        return "its weights are values of a table, without a scale"
    if grid.channels_axis is None or grid.scale.shape != gain.shape or grid.channels_axis % values.ndim != axis:
        return "the layer's weight has no scale for each output channel"
    if method is QuantizationMethod.POWER_OF_TWO and not (np.abs(np.frexp(gain)[0]) == 0.5).all():  # noqa: PLR2004 - a power's mantissa
        return "its gain is no power of two, which scales have to be"
    old = grid.along(values.ndim).scale
    codes = np.rint(values / old)
    with np.errstate(over="ignore", under="ignore"):
        scale = (grid.scale.astype(np.float64) * np.abs(gain)).astype(np.float32)
    dead = scale < SMALLEST_THRESHOLD * 2.0**-16
    scale = np.where(dead, grid.scale, scale)
    if method is QuantizationMethod.UNIFORM:
        scale = shorten_scale(scale, n_bits)
    if not (scale * 2.0**n_bits <= MAX_THRESHOLD).all():
        return "its gain makes scales that are not finite"
    zero_point = np.where(gain < 0, grid.quant_min + grid.quant_max - grid.zero_point, grid.zero_point)
    if method is not QuantizationMethod.UNIFORM:
        zero_point = grid.zero_point
    new = QParams(scale, np.asarray(zero_point, np.int32), grid.quant_min, grid.quant_max, grid.channels_axis)
    shape = [1] * values.ndim
    shape[axis] = -1
    codes = codes * np.where(dead, 0.0, np.sign(gain)).reshape(shape)
    along = new.along(values.ndim)
    if ((codes + along.zero_point < grid.quant_min) | (codes + along.zero_point > grid.quant_max)).any():
        return "a channel of negative gain holds the lowest code, whose opposite is beyond the grid"
    return np.asarray((codes * along.scale + 0.0).astype(np.float32)), new
