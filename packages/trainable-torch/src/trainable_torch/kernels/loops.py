"""The loops of the native kernels, which `native` has numba compile; importing this needs numba.

Arrays come as addresses of float32 numbers in memory order. A line is `length` elements of one scale, the last one may
be shorter; line r has the scale of channel ``r % channels``. The ends, counted from zero, are one for all channels or
one for each. No operation may be reordered, contracted or approximated: each element gets the very float32 operations
of `trainable_torch.kernels.plain`. Loops without a branch become vector instructions, and comparisons are written so
that NaN goes where it goes there. Gradients are masked as bits: a choice between a number and zero became a branch, at
half the speed. They pass through a part of their own, so that the input's gradient may take the place of the upstream
one, and the loops stay vector instructions then too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, types  # type: ignore[attr-defined] # numba says not what it exports
from numba.extending import intrinsic

from trainable_torch.kernels.memory import PART

ALL, NONE = np.int32(-1), np.int32(0)

BLOCK = 2**8
"""Partial sums that are added to in turn: more of them cost short lines, fewer have larger rounding errors."""


def snap(  # noqa: PLR0913, PLR0917 - a function in C's manner
    x: Any,
    y: Any,
    marks: Any,
    inverses: Any,
    scales: Any,
    lows: Any,
    highs: Any,
    marking: int,
    size: int,
    channels: int,
    ends: int,
    length: int,
    first: int,
    last: int,
) -> None:
    """Put lines `first` to `last` of `x`, snapped to the grid, into `y`; `marking`: mark parts that leave the range."""
    values, out = carray(x, size, np.float32), carray(y, size, np.float32)
    inverse, scale = carray(inverses, channels, np.float32), carray(scales, channels, np.float32)
    low, high = carray(lows, ends, np.float32), carray(highs, ends, np.float32)
    zero = np.float32(0.0)
    parts = (length + PART - 1) // PART
    marked = carray(marks, last * parts, np.uint8)
    for line in range(first, last):
        channel = line % channels
        factor, step, bottom, top = inverse[channel], scale[channel], low[channel % ends], high[channel % ends]
        begin, end, part = line * length, min((line + 1) * length, size), line * parts
        for start in range(begin, end, PART):
            stop = min(start + PART, end)
            these, codes = values[start:stop], out[start:stop]
            outside = NONE
            for i in range(these.size):
                steps = these[i] * factor
                outside |= np.int32(not ((steps >= bottom) & (steps <= top)))
                code = np.rint(steps)
                if code < bottom:
                    code = bottom
                elif code > top:
                    code = top
                codes[i] = (code + zero) * step  # -0.0 + 0.0 is +0.0
            if marking:
                marked[part] = outside
            part += 1


def inside(  # noqa: PLR0913, PLR0917 - as above
    x: Any,
    upstream: Any,
    d_x: Any,
    marks: Any,
    inverses: Any,
    lows: Any,
    highs: Any,
    closed: int,
    marking: int,
    size: int,
    channels: int,
    ends: int,
    length: int,
    first: int,
    last: int,
) -> None:
    """Put `upstream` where `x` is inside the range, `closed`: or at its ends, and zeros elsewhere into `d_x`.

    `marking`: `d_x` is `upstream`, and only the parts that `snap` marked have something outside.
    """
    values, given, out = carray(x, size, np.float32), carray(upstream, size, np.int32), carray(d_x, size, np.int32)
    inverse = carray(inverses, channels, np.float32)
    low, high = carray(lows, ends, np.float32), carray(highs, ends, np.float32)
    mask = np.empty(PART, np.int32)
    parts = (length + PART - 1) // PART
    marked = carray(marks, last * parts, np.uint8)
    for line in range(first, last):
        channel = line % channels
        factor, bottom, top = inverse[channel], low[channel % ends], high[channel % ends]
        begin, end, part = line * length, min((line + 1) * length, size), line * parts - 1
        for start in range(begin, end, PART):
            part += 1
            if marking and not marked[part]:
                continue
            stop = min(start + PART, end)
            these, gradient, passed = values[start:stop], given[start:stop], out[start:stop]
            if closed:
                for i in range(these.size):
                    steps = these[i] * factor
                    mask[i] = gradient[i] & (ALL if (steps >= bottom) & (steps <= top) else NONE)
            else:
                for i in range(these.size):
                    steps = these[i] * factor
                    mask[i] = gradient[i] & (ALL if (steps > bottom) & (steps < top) else NONE)
            for i in range(these.size):
                passed[i] = mask[i]


def learned(  # noqa: PLR0913, PLR0917 - as above
    x: Any,
    upstream: Any,
    d_x: Any,
    sums: Any,
    inverses: Any,
    lows: Any,
    highs: Any,
    kinds: int,
    size: int,
    channels: int,
    ends: int,
    length: int,
    lines: int,
    first: int,
    last: int,
) -> None:
    """Put the input's gradient into `d_x`, and each line's sums into `sums`, float64, shape (kinds, lines).

    The first kind is that of the slopes, the second one, if there is one, that of `upstream` outside the range.
    """
    values, given, out = carray(x, size, np.float32), carray(upstream, size, np.float32), carray(d_x, size, np.int32)
    bits = carray(upstream, size, np.int32)
    totals = carray(sums, (kinds, lines), np.float64)
    inverse = carray(inverses, channels, np.float32)
    low, high = carray(lows, ends, np.float32), carray(highs, ends, np.float32)
    zero = np.float32(0.0)
    terms = np.empty((2, BLOCK), np.float32)
    slopes, outside, part = terms[0], terms[1], np.empty(BLOCK, np.int32)
    for line in range(first, last):
        channel = line % channels
        factor, bottom, top = inverse[channel], low[channel % ends], high[channel % ends]
        begin, end = line * length, min((line + 1) * length, size)
        width = min(end - begin, BLOCK)
        terms[:, :width] = zero
        for start in range(begin, end, BLOCK):
            stop = min(start + BLOCK, end)
            these, gradient, given_bits, passed = (
                values[start:stop],
                given[start:stop],
                bits[start:stop],
                out[start:stop],
            )
            if kinds == 1:
                for i in range(these.size):
                    steps = these[i] * factor
                    between = (steps > bottom) & (steps < top)
                    beyond = top if steps >= top else (bottom if steps <= bottom else zero)
                    slopes[i] += gradient[i] * (np.rint(steps) - steps if between else beyond)
                    part[i] = given_bits[i] & (ALL if between else NONE)
            else:
                for i in range(these.size):
                    steps = these[i] * factor
                    between = (steps > bottom) & (steps < top)
                    beyond = top if steps >= top else (bottom if steps <= bottom else zero)
                    slopes[i] += gradient[i] * (np.rint(steps) - steps if between else beyond)
                    outside[i] += gradient[i] if (steps <= bottom) | (steps >= top) else zero
                    part[i] = given_bits[i] & (ALL if between else NONE)
            for i in range(these.size):
                passed[i] = part[i]
        for kind in range(kinds):
            added, count = terms[kind], width
            while count > 1:  # in halves: whole vectors, small rounding errors, and one order for any machine
                half = count // 2
                left, right = added[:half], added[count - half : count]
                for i in range(half):
                    left[i] += right[i]
                count -= half
            totals[kind, line] = added[0]


def _as_pointer(_context: Any, _address: Any) -> Any:
    """Return an integer as an address."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


as_pointer: Any = intrinsic(_as_pointer)


def same(table: Any, pieces: int) -> int:
    """Return 1 if pieces of memory equal their copies, else 0; the table has two addresses and a size for each."""
    rows = carray(table, (pieces, 3), np.int64)
    for piece in range(pieces):
        size = rows[piece, 2]
        found = carray(as_pointer(rows[piece, 0]), size, np.uint8)
        copy = carray(as_pointer(rows[piece, 1]), size, np.uint8)
        differs = np.uint8(0)
        for i in range(size):
            differs |= found[i] ^ copy[i]
        if differs:
            return 0
    return 1
