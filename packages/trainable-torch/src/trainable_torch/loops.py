"""The loops of the native kernels: plain Python on NumPy arrays, which `trainable_torch.native` has numba compile.

All arrays are flat and of float32. Row r is ``x[r * length : (r + 1) * length]``, the last one may be shorter; it has
the scale of channel ``r % channels``. `numbers` holds inverse scale, scale and both ends counted from zero, shape (4,
channels). No operation may be reordered, contracted or approximated: each element gets the very float32 operations of
`trainable_torch.ops`. Loops without a branch become vector instructions, comparisons are written so that NaN goes
where it goes there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

BLOCK = 2**8
"""Partial sums that are added to at once; more cost small rows, fewer have more rounding errors."""


def snap(x: Array, y: Array, numbers: Array, length: int, first: int, last: int) -> None:
    """Put rows ``first`` to ``last`` of `x`, snapped to the grid, into `y`."""
    channels = numbers.shape[1]
    zero = np.float32(0.0)
    for row in range(first, last):
        inverse, scale, low, high = numbers[:, row % channels]
        values = x[row * length : min((row + 1) * length, x.size)]
        out = y[row * length : min((row + 1) * length, x.size)]
        for i in range(values.size):
            code = np.rint(values[i] * inverse)
            if code < low:
                code = low
            elif code > high:
                code = high
            out[i] = (code + zero) * scale  # -0.0 + 0.0 is +0.0


def inside(
    x: Array, upstream: Array, d_x: Array, numbers: Array, length: int, closed: Any, first: int, last: int
) -> None:
    """Put `upstream` where `x` is inside the range, `closed`: or at its ends, and zeros elsewhere into `d_x`."""
    channels = numbers.shape[1]
    zero = np.float32(0.0)
    for row in range(first, last):
        inverse, _, low, high = numbers[:, row % channels]
        values = x[row * length : min((row + 1) * length, x.size)]
        gradient = upstream[row * length : min((row + 1) * length, x.size)]
        out = d_x[row * length : min((row + 1) * length, x.size)]
        if closed:
            for i in range(values.size):
                steps = values[i] * inverse
                out[i] = gradient[i] if (steps >= low) & (steps <= high) else zero
        else:
            for i in range(values.size):
                steps = values[i] * inverse
                out[i] = gradient[i] if (steps > low) & (steps < high) else zero


def learned(
    x: Array, upstream: Array, d_x: Array, numbers: Array, length: int, sums: Any, first: int, last: int
) -> None:
    """Put the input's gradient into `d_x`, and each row's sums into `sums`, float64, shape (1 or 2, rows).

    The first one is that of the slopes, the second one, if there is one, that of `upstream` outside the range.
    """
    channels = numbers.shape[1]
    zero = np.float32(0.0)
    terms = np.empty((2, BLOCK), np.float32)
    slopes, outside = terms[0], terms[1]
    for row in range(first, last):
        inverse, _, low, high = numbers[:, row % channels]
        end = min((row + 1) * length, x.size)
        terms[:, : min(end - row * length, BLOCK)] = zero
        for start in range(row * length, end, BLOCK):
            values = x[start : min(start + BLOCK, end)]
            gradient = upstream[start : min(start + BLOCK, end)]
            out = d_x[start : min(start + BLOCK, end)]
            if sums.shape[0] == 1:
                for i in range(values.size):
                    steps = values[i] * inverse
                    between = (steps > low) & (steps < high)
                    out[i] = gradient[i] if between else zero
                    beyond = high if steps >= high else (low if steps <= low else zero)
                    slopes[i] += gradient[i] * (np.rint(steps) - steps if between else beyond)
            else:
                for i in range(values.size):
                    steps = values[i] * inverse
                    between = (steps > low) & (steps < high)
                    out[i] = gradient[i] if between else zero
                    beyond = high if steps >= high else (low if steps <= low else zero)
                    slopes[i] += gradient[i] * (np.rint(steps) - steps if between else beyond)
                    outside[i] += gradient[i] if (steps <= low) | (steps >= high) else zero
        for part in range(sums.shape[0]):
            added = terms[part]
            count = min(end - row * length, BLOCK)
            while count > 1:  # in halves: whole vectors, small rounding errors, and one order for any machine
                half = count // 2
                left, right = added[:half], added[count - half : count]
                for i in range(half):
                    left[i] += right[i]
                count -= half
            sums[part, row] = added[0]
