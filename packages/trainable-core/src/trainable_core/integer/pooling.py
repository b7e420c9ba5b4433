"""Pooling and padding of codes."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainable_core.integer.elementwise import quantize
from trainable_core.integer.products import Window
from trainable_core.integer.tensor import Quantized, clipped
from trainable_core.qparams import QParams


def pad(x: Quantized, pads: Sequence[tuple[int, int]], mode: str = "constant") -> Quantized:
    """Return codes with a border: zeros have the code of zero; ``reflect``, ``edge`` and ``wrap`` repeat codes."""
    if mode == "constant":
        return x.moved(lambda codes: np.pad(codes, pads, constant_values=int(x.grid.zero_point)))
    return x.moved(lambda codes: np.pad(codes, pads, mode=mode))  # type: ignore[call-overload] # one of three names


def windows(codes: NDArray[Any], kernel: Sequence[int], window: Window, fill: float, *, ceil: bool) -> NDArray[Any]:
    """Return the values under a kernel at each place: shape (N, C, *out, *kernel), padded with `fill`."""
    rank = len(kernel)
    window = window.of_rank(rank)
    extents = [(k - 1) * d + 1 for k, d in zip(kernel, window.dilations, strict=True)]
    begins, ends = list(window.pads[:rank]), list(window.pads[rank:])
    if ceil:
        for axis, (size, extent, stride) in enumerate(zip(codes.shape[2:], extents, window.strides, strict=True)):
            span = size + begins[axis] + ends[axis] - extent
            steps = -(-span // stride)
            if steps * stride >= size + begins[axis]:  # a window may not begin in the padding at the end
                steps -= 1
            ends[axis] += max(steps * stride - span, 0)
    borders = [(0, 0), (0, 0), *zip(begins, ends, strict=True)]
    padded = np.pad(codes, borders, constant_values=fill)
    views = np.lib.stride_tricks.sliding_window_view(padded, extents, axis=tuple(range(2, 2 + rank)))
    moves = tuple(slice(None, None, s) for s in window.strides)
    taps = tuple(slice(None, None, d) for d in window.dilations)
    return views[(slice(None), slice(None), *moves, *taps)]


def max_pool(x: Quantized, kernel: Sequence[int], window: Window = Window(), *, ceil: bool = False) -> Quantized:  # noqa: B008 - frozen
    """Return the largest code under the kernel at each place; codes grow with values, so no grid is needed."""
    axes = tuple(range(-len(kernel), 0))
    below = int(x.codes.min(initial=0)) - 1
    return x.moved(lambda codes: windows(codes, kernel, window, below, ceil=ceil).max(axis=axes))


def average_pool(
    x: Quantized,
    kernel: Sequence[int],
    output: QParams,
    window: Window = Window(),  # noqa: B008 - frozen
    *,
    ceil: bool = False,
    count_include_pad: bool = False,
) -> Quantized:
    """Return the codes of the mean under the kernel at each place.

    Notes
    -----
    ONNX Runtime's QLinearAveragePool: dequantized values are added up in float32 and divided by their number, and the
    mean is quantized. Adding goes tap by tap, in the order of the kernel.
    """
    values = x.values
    axes = tuple(range(-len(kernel), 0))
    under = windows(values, kernel, window, 0.0, ceil=ceil)
    taps = under.reshape(*under.shape[: under.ndim - len(kernel)], -1)
    total = np.zeros(taps.shape[:-1], np.float32)
    for tap in range(taps.shape[-1]):
        total = total + taps[..., tap]
    if count_include_pad:
        number: Any = np.float32(prod(kernel))
    else:
        number = windows(np.ones_like(values), kernel, window, 0.0, ceil=ceil).sum(axis=axes).astype(np.float32)
    return quantize(total / number, output)


def global_average_pool(x: Quantized, output: QParams) -> Quantized:
    """Return the codes of the mean of each channel, with spatial axes of size one.

    Notes
    -----
    ONNX Runtime's QLinearGlobalAveragePool (``MlasQLinearGlobalAveragePool``): ``rint(sum(a) * M)`` with codes counted
    from zero and ``M = s_x / (s_y * n)`` in float32, where `n` is the number of values.
    """
    axes = tuple(range(2, x.codes.ndim))
    number = np.float32(prod(x.codes.shape[2:]))
    total = x.counted.sum(axis=axes, keepdims=True)
    multiplier = np.float32(x.grid.scale / np.float32(output.scale * number))
    steps = np.rint(total.astype(np.float32) * multiplier)
    return clipped(np.clip(steps, -(2.0**31), 2.0**31).astype(np.int64), output)
