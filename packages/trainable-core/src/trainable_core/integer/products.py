"""Layers that add up products of codes: linear layers, matrix products and convolutions.

All of them compute ``a = sum(w * x) + b`` in 32-bit integers, with codes counted from zero and a bias on the grid
``s_x * s_w``, and requantize ``a`` to the output's grid (`trainable_core.integer.requantization`). Sums wrap around at
32 bits as the runtimes' registers do; `trainable_core.integer.certificate` says where they can't.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainable_core.integer.requantization import FLOAT32, Requantizer
from trainable_core.integer.tensor import Int32, Int64, Quantized, clipped
from trainable_core.qparams import QParams

EXACT_FLOAT64 = 2**53
"""Whole numbers below this are exact in float64, whose matrix product is the fast one in NumPy."""


@dataclass(frozen=True)
class Window:
    """How the kernel of a convolution moves over its input, one number for each spatial axis.

    Parameters
    ----------
    strides, dilations : sequence of int
        Empty for ones.
    pads : sequence of int
        Begins of all axes, then their ends, as ONNX has them; empty for zeros.
    groups : int
        Number of groups of channels.
    output_padding : sequence of int
        Of a transposed convolution: what is added at the ends of the output; empty for zeros.
    """

    strides: Sequence[int] = ()
    dilations: Sequence[int] = ()
    pads: Sequence[int] = ()
    groups: int = 1
    output_padding: Sequence[int] = ()

    def of_rank(self, rank: int) -> Window:
        """Return the same with every number written out for so many spatial axes."""
        return Window(
            tuple(self.strides) or (1,) * rank,
            tuple(self.dilations) or (1,) * rank,
            tuple(self.pads) or (0,) * (2 * rank),
            self.groups,
            tuple(self.output_padding) or (0,) * rank,
        )


def matmul_codes(x: NDArray[Any], y: NDArray[Any]) -> Int64:
    """Return the matrix product of whole numbers, exact."""
    length = x.shape[-1]
    bound = length * int(np.abs(x).max(initial=0)) * int(np.abs(y).max(initial=0))
    if bound < EXACT_FLOAT64:
        return np.asarray(np.matmul(x.astype(np.float64), y.astype(np.float64)).astype(np.int64))
    return np.asarray(np.matmul(x.astype(np.int64), y.astype(np.int64)))


def convolve_codes(x: NDArray[Any], weight: NDArray[Any], window: Window = Window()) -> Int64:
    """Return the sums of a convolution of whole numbers; zeros are padded.

    Parameters
    ----------
    x : int array, shape (N, C, *S)
        Codes counted from zero.
    weight : int array, shape (O, C / groups, *K)
        Likewise.
    window : Window
        Strides, dilations, padding and groups.
    """
    rank = x.ndim - 2
    window = window.of_rank(rank)
    begins, ends = window.pads[:rank], window.pads[rank:]
    padded = np.pad(x, [(0, 0), (0, 0), *zip(begins, ends, strict=True)])
    kernel = weight.shape[2:]
    extents = tuple((k - 1) * d + 1 for k, d in zip(kernel, window.dilations, strict=True))
    views = np.lib.stride_tricks.sliding_window_view(padded, extents, axis=tuple(range(2, 2 + rank)))
    moves = tuple(slice(None, None, s) for s in window.strides)
    taps = tuple(slice(None, None, d) for d in window.dilations)
    views = views[(slice(None), slice(None), *moves, *taps)]  # (N, C, *out, *K)
    count, groups, out = x.shape[0], window.groups, views.shape[2 : 2 + rank]
    per_group = x.shape[1] // groups
    views = views.reshape(count, groups, per_group, *out, *kernel)
    spatial, taps_axes = tuple(range(3, 3 + rank)), tuple(range(3 + rank, 3 + 2 * rank))
    columns = views.transpose(1, 0, *spatial, 2, *taps_axes).reshape(groups, count * prod(out), -1)
    rows = weight.reshape(groups, weight.shape[0] // groups, -1).transpose(0, 2, 1)
    sums = matmul_codes(columns, rows)  # (G, N * out, O / G)
    sums = sums.reshape(groups, count, *out, -1)
    sums = np.moveaxis(sums, -1, 1)  # (G, O / G, N, *out)
    return np.moveaxis(sums.reshape(weight.shape[0], count, *out), 0, 1)


def transposed_weight(weight: NDArray[Any], groups: int = 1) -> NDArray[Any]:
    """Return the weight of the convolution that a transposed convolution is over its input with zeros in between.

    Parameters
    ----------
    weight : array, shape (C, O / groups, *K)
        Of the transposed convolution.
    groups : int
        Number of groups.

    Returns
    -------
    array, shape (O, C / groups, *K)
        With the kernel's axes reversed.
    """
    channels, outputs, *kernel = weight.shape
    split = weight.reshape(groups, channels // groups, outputs, *kernel).swapaxes(1, 2)
    return np.flip(split.reshape(groups * outputs, channels // groups, *kernel), tuple(range(2, weight.ndim)))


def convolve_transposed_codes(x: NDArray[Any], weight: NDArray[Any], window: Window = Window()) -> Int64:
    """Return the sums of a transposed convolution of whole numbers.

    Parameters
    ----------
    x : int array, shape (N, C, *S)
        Codes counted from zero.
    weight : int array, shape (C, O / groups, *K)
        Likewise.
    window : Window
        `pads` is what is cut from the output.
    """
    rank = x.ndim - 2
    window = window.of_rank(rank)
    kernel = weight.shape[2:]
    spread = np.zeros(
        (*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], window.strides, strict=True))), x.dtype
    )
    spread[(slice(None), slice(None), *(slice(None, None, s) for s in window.strides))] = x
    reach = [(k - 1) * d for k, d in zip(kernel, window.dilations, strict=True)]
    begins = [r - p for r, p in zip(reach, window.pads[:rank], strict=True)]
    ends = [r - p + o for r, p, o in zip(reach, window.pads[rank:], window.output_padding, strict=True)]
    for axis, (begin, end) in enumerate(zip(begins, ends, strict=True), start=2):  # negative: more is cut than reached
        keep = slice(max(-begin, 0), spread.shape[axis] - max(-end, 0))
        spread = spread[(slice(None),) * axis + (keep,)]
    pads = (*(max(each, 0) for each in begins), *(max(each, 0) for each in ends))
    inner = Window((), window.dilations, pads, window.groups)
    return convolve_codes(spread, transposed_weight(weight, window.groups), inner)


def with_bias(sums: Int64, bias: ArrayLike | None, axis: int) -> Int32:
    """Return sums plus a bias along an axis, in a 32-bit register: what is beyond it wraps around."""
    if bias is not None:
        shape = [1] * sums.ndim
        shape[axis] = -1
        sums = sums + np.asarray(bias, np.int64).reshape(shape)
    return sums.astype(np.int32)


def requantized(
    sums: Int32, x: QParams, weight: QParams, output: QParams, axis: int, requantization: Requantizer = FLOAT32
) -> Quantized:
    """Return the codes of a layer's output.

    Parameters
    ----------
    sums : int32 array
        Products added up, bias included.
    x, weight, output : QParams
        Grids of input, weight (one scale, or one per output channel) and output.
    axis : int
        Axis of the output channels in `sums`.
    requantization : Requantizer
        The runtime's way of rounding.
    """
    shape = [1] * sums.ndim
    if weight.scale.ndim:
        shape[axis] = -1
    multiplier = requantization.multiplier(x.scale, weight.scale.reshape(shape), output.scale)
    return clipped(requantization.multiplied(sums, multiplier), output)


def linear(
    x: Quantized,
    weight: Quantized,
    bias: ArrayLike | None,
    output: QParams,
    requantization: Requantizer = FLOAT32,
) -> Quantized:
    """Return the codes of a linear layer: ``requantize(x @ weight.T + bias)``.

    Parameters
    ----------
    x : Quantized, shape (..., I)
        Input.
    weight : Quantized, shape (O, I)
        One scale, or one per output.
    bias : int array, shape (O,), or None
        On the grid ``s_x * s_w``.
    output : QParams
        Grid of the output.
    requantization : Requantizer
        The runtime's way of rounding.

    Examples
    --------
    >>> grid = QParams(np.float32(0.5), np.int32(0), -128, 127)
    >>> x, w = Quantized(np.int32([[1, 2]]), grid), Quantized(np.int32([[3, 4], [5, 6]]), grid)
    >>> linear(x, w, [1, 0], QParams(np.float32(1), np.int32(0), -128, 127)).codes  # 12 / 4 and 17 / 4
    array([[3, 4]], dtype=int32)
    """
    sums = with_bias(matmul_codes(x.counted, weight.counted.T), bias, -1)
    return requantized(sums, x.grid, weight.grid, output, -1, requantization)


def matmul(x: Quantized, y: Quantized, output: QParams, requantization: Requantizer = FLOAT32) -> Quantized:
    """Return the codes of a matrix product of two quantized tensors; `y` may have one scale per column."""
    sums = with_bias(matmul_codes(x.counted, y.counted), None, -1)
    return requantized(sums, x.grid, y.grid, output, -1, requantization)


def convolution(
    x: Quantized,
    weight: Quantized,
    bias: ArrayLike | None,
    output: QParams,
    window: Window = Window(),
    requantization: Requantizer = FLOAT32,
) -> Quantized:
    """Return the codes of a convolution: grouped, depthwise, dilated, strided and padded as `window` says.

    Parameters
    ----------
    x : Quantized, shape (N, C, *S)
        Input; what is padded has the code of zero.
    weight : Quantized, shape (O, C / groups, *K)
        One scale, or one per output channel.
    bias : int array, shape (O,), or None
        On the grid ``s_x * s_w``.
    output : QParams
        Grid of the output.
    window : Window
        Strides, dilations, padding and groups.
    requantization : Requantizer
        The runtime's way of rounding.
    """
    sums = with_bias(convolve_codes(x.counted, weight.counted, window), bias, 1)
    return requantized(sums, x.grid, weight.grid, output, 1, requantization)


def transposed_convolution(
    x: Quantized,
    weight: Quantized,
    bias: ArrayLike | None,
    output: QParams,
    window: Window = Window(),
    requantization: Requantizer = FLOAT32,
) -> Quantized:
    """Return the codes of a transposed convolution; as `convolution`, with `weight` of shape (C, O / groups, *K)."""
    sums = with_bias(convolve_transposed_codes(x.counted, weight.counted, window), bias, 1)
    return requantized(sums, x.grid, weight.grid, output, 1, requantization)
