"""Batch-norm folding in NumPy: kernel and bias take over a normalization's statistics."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainable_core.qparams import Float64


def gain_and_shift(
    mean: ArrayLike, variance: ArrayLike, epsilon: float, gamma: ArrayLike | None, beta: ArrayLike | None
) -> tuple[Float64, Float64]:
    """Return g and h with ``normalize(y) == y * g + h``, float64, shape (C,).

    Examples
    --------
    >>> gain_and_shift([2.0], [3.0], 1.0, [4.0], None)
    (array([2.]), array([-4.]))
    """
    gain = 1.0 / np.sqrt(np.asarray(variance, np.float64) + epsilon)
    if gamma is not None:
        gain = gain * np.asarray(gamma, np.float64)
    shift = -np.asarray(mean, np.float64) * gain
    if beta is not None:
        shift = shift + np.asarray(beta, np.float64)
    return gain, shift


def fold(
    kernel: NDArray[np.floating],
    bias: ArrayLike | None,
    gain: Float64,
    shift: Float64,
    axes: tuple[int, ...],
) -> tuple[Float64, Float64]:
    """Return kernel and bias of a layer that does its own work and the normalization's: ``w * g`` and ``b * g + h``.

    Parameters
    ----------
    kernel : float array
        Weights.
    bias : float array, shape (C,), or None
        None counts as zeros.
    gain, shift : float64 array, shape (C,)
        From `gain_and_shift`.
    axes : tuple of int
        Axes of the kernel that make the C output channels, in order: one, or two for a depthwise kernel.

    Returns
    -------
    float64 arrays, shapes of kernel and bias
    """
    shape = [1] * kernel.ndim
    for axis in axes:
        shape[axis] = kernel.shape[axis]
    folded = kernel.astype(np.float64) * gain.reshape(shape)
    return folded, shift if bias is None else np.asarray(bias, np.float64) * gain + shift
