"""All loops of a small layer's two quantizers in one call, which `native` has numba compile; needs numba.

A call from Python costs as much as a thousand elements, and a small layer would make eight of them for a step. These
are the very functions of `loops` and `grid_loops`, one after the other. Each part, the input or the weight, is a table
of `SLOTS` numbers of 8 bytes, integers first, then floats; `native.part` says which. Behind them, as many bytes from
the table's beginning as it says, are the numbers of the grid and the marks. numba keeps what it compiled as long as
this file is unchanged: after a change of the other loops, touch it.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import carray  # type: ignore[attr-defined] # numba says not what it exports

from trainable_torch.kernels import grid_loops, loops
from trainable_torch.kernels.loops import as_pointer
from trainable_torch.kernels.memory import INTEGERS, SLOTS

_symmetric, _uniform = numba.njit(grid_loops.symmetric), numba.njit(grid_loops.uniform)
_symmetric_gradients = numba.njit(grid_loops.symmetric_gradients)
_uniform_gradients = numba.njit(grid_loops.uniform_gradients)
_snap, _inside, _learned = numba.njit(loops.snap), numba.njit(loops.inside), numba.njit(loops.learned)


def _forward(table: Any) -> None:
    """Make one part's grid, and snap its tensor."""
    numbers = carray(table, SLOTS, np.int64)
    x, y, marks, rows, first, last, centered, whole, size, channels, length, lines = numbers[:12]
    marking, place = np.int64(marks != 0), np.int64(numbers.ctypes.data)
    marks, rows = place + marks, place + rows
    floats = carray(table, SLOTS, np.float64)
    lowest, per_step, first_code, last_code = floats[INTEGERS : INTEGERS + 4]
    if centered:
        _symmetric(as_pointer(first), as_pointer(rows), lowest, per_step, first_code, last_code, channels, whole)
    else:
        _uniform(as_pointer(first), as_pointer(last), as_pointer(rows), lowest, channels, whole)
    row = 4 * channels
    inverse, scale, low, high = rows, rows + row, rows + 2 * row, rows + 3 * row
    ends = 1 if centered else channels
    _snap(
        as_pointer(x), as_pointer(y), as_pointer(marks), as_pointer(inverse), as_pointer(scale), as_pointer(low),
        as_pointer(high), marking, size, channels, ends, length, 0, lines,
    )  # fmt: skip


def _backward(table: Any) -> None:
    """Pass one part's gradient in its place, and give the variables of the grid theirs."""
    numbers = carray(table, SLOTS, np.int64)
    x, upstream, marks, rows, first, last, centered, whole, size, channels, length, lines = numbers[:12]
    marking, place = np.int64(marks != 0), np.int64(numbers.ctypes.data)
    marks, rows = place + marks, place + rows
    d_first, d_last, learns, closed = numbers[12:16]
    floats = carray(table, SLOTS, np.float64)
    lowest, per_step, _, _, gradient_scale = floats[INTEGERS : INTEGERS + 5]
    row = 4 * channels
    inverse, low, high = rows, rows + 2 * row, rows + 3 * row
    ends = 1 if centered else channels
    if not learns:
        _inside(
            as_pointer(x), as_pointer(upstream), as_pointer(upstream), as_pointer(marks), as_pointer(inverse),
            as_pointer(low), as_pointer(high), closed, marking, size, channels, ends, length, 0, lines,
        )  # fmt: skip
        return
    kinds = 1 if centered else 2
    sums = np.empty((kinds, lines), np.float64)
    totals = sums.ctypes.data
    _learned(
        as_pointer(x), as_pointer(upstream), as_pointer(upstream), as_pointer(totals), as_pointer(inverse),
        as_pointer(low), as_pointer(high), kinds, size, channels, ends, length, lines, 0, lines,
    )  # fmt: skip
    if centered:
        _symmetric_gradients(
            as_pointer(totals), as_pointer(rows), as_pointer(first), as_pointer(d_first), lowest, per_step,
            gradient_scale, lines, channels, whole,
        )  # fmt: skip
    else:
        _uniform_gradients(
            as_pointer(totals), as_pointer(rows), as_pointer(first), as_pointer(last), as_pointer(d_first),
            as_pointer(d_last), lowest, gradient_scale, lines, channels, whole,
        )  # fmt: skip


part_forward, part_backward = numba.njit(_forward), numba.njit(_backward)


def forward(first: Any, second: Any, parts: int) -> None:
    """Make the grids of one or two parts, and snap their tensors."""
    part_forward(first)
    if parts > 1:
        part_forward(second)


def backward(first: Any, second: Any, parts: int) -> None:
    """Pass the gradients of one or two parts."""
    part_backward(first)
    if parts > 1:
        part_backward(second)
