"""The arithmetic of batch-norm folding: kernel and bias take over a normalization's statistics.

Written with operators that NumPy arrays and a framework's tensors share, so that each backend folds on the device where
its model is. Pass everything in float64: the results are rounded once, when they are stored.
"""

from __future__ import annotations

from typing import Any, TypeVar

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
