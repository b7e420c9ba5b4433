"""The eager CPU kernels in one pass over memory, compiled by numba: the extra ``trainable-torch[speed]``.

Where numba is not installed, `trainable_torch.kernels` goes on with PyTorch's own. The first call of a process compiles
(about two seconds, kept on disk for the next process where there is a place to write). Large tensors are shared by as
many threads as PyTorch would use; no sum depends on how many they are.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainable_torch import loops
from trainable_torch.layout import Layout
from trainable_torch.scalars import Numbers

Loop = Callable[..., None]

SHARE = 2**17
"""Elements that are worth a thread of their own: handing them over takes as long as some ten thousand of them."""

SHORT = 8
"""Lines of fewer elements, as along a last axis of channels, are left to PyTorch's kernels, which broadcast."""


class Compiled(NamedTuple):
    """The loops of `trainable_torch.loops`, compiled.

    Parameters
    ----------
    snap, inside, learned : callable
        They release Python's lock.
    """

    snap: Loop
    inside: Loop
    learned: Loop


@functools.cache
def compiled() -> Compiled | None:
    """Return the compiled loops, or None where numba is missing, broken or told not to compile."""
    try:
        import numba  # noqa: PLC0415 - an extra, and it takes a third of a second
    except Exception:  # noqa: BLE001 - numba refuses a NumPy or a platform in its own ways; training goes on without
        return None
    if numba.config.DISABLE_JIT:
        return None
    floats, table, index = numba.float32[::1], numba.float32[:, ::1], numba.int64
    return Compiled(
        _compile(numba, loops.snap, floats, floats, table, index, index, index),
        _compile(numba, loops.inside, floats, floats, floats, table, index, numba.boolean, index, index),
        _compile(numba, loops.learned, floats, floats, floats, table, index, numba.float64[:, ::1], index, index),
    )


def _compile(numba: Any, loop: Loop, *types: Any) -> Loop:
    signature = numba.void(*types)
    try:
        made: Loop = numba.njit(signature, nogil=True, cache=True)(loop)
    except (OSError, RuntimeError):  # there is no place to keep it
        made = numba.njit(signature, nogil=True)(loop)
    return made


def takes(layout: Layout) -> bool:
    """Return whether the compiled loops are there and fit a tensor."""
    return (layout.channels == 1 or layout.by_row or layout.lines()[1] >= SHORT) and compiled() is not None


def snap(x: Tensor, y: Tensor, grid: Numbers, layout: Layout) -> None:
    """Put `x`, snapped to the grid, into `y`."""
    lines, length = layout.lines()
    _run(_loops().snap, lines, x.numel(), _flat(x, layout), _flat(y, layout), grid.table, length)


def pass_inside(x: Tensor, upstream: Tensor, d_x: Tensor, grid: Numbers, layout: Layout, *, closed: bool) -> None:
    """Put `upstream` where `x` is inside the range, `closed`: or at its ends, and zeros elsewhere into `d_x`."""
    lines, length = layout.lines()
    arrays = _flat(x, layout), _flat(upstream, layout), _flat(d_x, layout)
    _run(_loops().inside, lines, x.numel(), *arrays, grid.table, length, closed)


def learned(x: Tensor, upstream: Tensor, d_x: Tensor, grid: Numbers, layout: Layout, *, outside: bool) -> list[Tensor]:
    """Put the input's gradient into `d_x`; return the sums of the slopes and, if asked, of `upstream` outside."""
    lines, length = layout.lines()
    arrays = _flat(x, layout), _flat(upstream, layout), _flat(d_x, layout)
    sums = np.zeros((1 + outside, lines))
    _run(_loops().learned, lines, x.numel(), *arrays, grid.table, length, sums)
    totals = sums.reshape(1 + outside, -1, layout.channels).sum(1)
    with np.errstate(over="ignore"):
        return list(torch.from_numpy(totals.astype(np.float32)))


def _loops() -> Compiled:
    found = compiled()
    assert found is not None  # noqa: S101 - `takes` was asked
    return found


def _flat(tensor: Tensor, layout: Layout) -> NDArray[np.float32]:
    """Return the elements in the layout's order; a tensor that lies so is not copied."""
    array: NDArray[np.float32] = layout.rows(tensor.detach().resolve_neg()).numpy()
    return np.ascontiguousarray(array.reshape(-1))  # an expanded tensor is no copy yet


# ---- threads --------------------------------------------------------------------------------------------------------


def _run(loop: Loop, lines: int, size: int, *arguments: Any) -> None:
    """Run a loop over all lines, large tensors by several threads."""
    threads = min(torch.get_num_threads(), size // SHARE, lines)
    if threads <= 1:
        loop(*arguments, 0, lines)
        return
    bounds = [lines * thread // threads for thread in range(threads + 1)]
    pool = _pool(os.getpid(), torch.get_num_threads() - 1)
    others = [pool.submit(loop, *arguments, *bounds[i : i + 2]) for i in range(1, threads)]
    loop(*arguments, 0, bounds[1])
    for other in others:
        other.result()


@functools.lru_cache(maxsize=1)
def _pool(process: int, workers: int) -> ThreadPoolExecutor:  # noqa: ARG001 - a forked process has none of the threads
    return ThreadPoolExecutor(workers, thread_name_prefix="trainable-torch")
