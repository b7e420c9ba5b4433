"""The eager CPU kernels in one pass over memory, compiled by numba: the extra ``trainable-torch[speed]``.

Where numba is not installed, `trainable_torch.kernels` goes on with PyTorch's own. The first call of a process compiles
(about two seconds, kept on disk for the next process where there is a place to write). Large tensors are shared by as
many threads as PyTorch would use; no sum depends on how many they are.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainable_torch import layout
from trainable_torch.scalars import Numbers, float32

Loop = Callable[..., None]

SHARE = 2**17
"""Elements that are worth a thread of their own: handing them over takes as long as some ten thousand of them."""

SHORT = 8
"""Lines of fewer elements, as along a last axis of channels, are left to PyTorch's kernels, which broadcast."""


class Compiled(NamedTuple):
    """The loops of `loops` and `grid_loops`, compiled; they take addresses, and let other threads of Python run.

    Parameters
    ----------
    snap, inside, learned, terms, symmetric, symmetric_gradient, uniform, uniform_gradients : callable
        Called as C functions.
    """

    snap: Loop
    inside: Loop
    learned: Loop
    terms: Loop
    symmetric: Loop
    symmetric_gradient: Loop
    uniform: Loop
    uniform_gradients: Loop


@functools.cache
def compiled() -> Compiled | None:
    """Return the compiled loops, or None where numba is missing, broken or told not to compile."""
    try:
        import numba  # noqa: PLC0415 - an extra, and it takes a third of a second

        return None if numba.config.DISABLE_JIT else _compile_all(numba)  # type: ignore[attr-defined] # set on import
    except Exception:  # noqa: BLE001 - numba refuses a NumPy or a platform in its own ways; training goes on without
        return None


def _compile_all(numba: Any) -> Compiled:
    from trainable_torch import grid_loops, loops  # noqa: PLC0415 - they need numba

    return Compiled(
        _compile(numba, loops.snap, 6, 6),
        _compile(numba, loops.inside, 6, 7),
        _compile(numba, loops.learned, 7, 8),
        _compile(numba, loops.terms, 8, 7),
        _compile(numba, grid_loops.symmetric, 2, 2, floats=2),
        _compile(numba, grid_loops.symmetric_gradient, 4, 2, floats=2),
        _compile(numba, grid_loops.uniform, 4, 2, floats=1),
        _compile(numba, grid_loops.uniform_gradients, 8, 2, floats=1),
    )


def _compile(numba: Any, loop: Loop, addresses: int, numbers: int, floats: int = 0) -> Loop:
    """Compile a function of so many addresses, floats and integers, in this order."""
    arguments = [numba.types.voidptr] * addresses, [numba.float64] * floats, [numba.int64] * numbers
    signature = numba.void(*itertools.chain(*arguments))
    try:
        made = numba.cfunc(signature, cache=True)(loop)
    except (OSError, RuntimeError):  # there is no place to keep it
        made = numba.cfunc(signature)(loop)
    called: Loop = made.ctypes
    return called


class Lines(NamedTuple):
    """How a dense tensor falls into lines of one scale each, in memory order.

    Parameters
    ----------
    number, length : int
        How many there are, and elements in each; the last one may be shorter where all share one scale.
    channels : int
        How many scales there are; the lines have them in turn.
    size : int
        Elements.
    """

    number: int
    length: int
    channels: int
    size: int

    @property
    def one_chunk(self) -> bool:
        """Whether they are worked on at once, whatever the number of threads."""
        return self.size <= layout.CHUNK


def lines(x: Tensor, scale: float | Tensor) -> Lines | None:
    """Return the lines of a dense tensor, None where they are too short or the compiled loops are missing."""
    if compiled() is None:
        return None
    size = x.numel()
    if isinstance(scale, float):
        return Lines(-(-size // layout.CHUNK), layout.CHUNK, 1, size)
    axis = layout.channel_axis(scale)
    length, channels = x.stride(axis), scale.shape[axis]  # what lies inside of an axis lies within its stride
    return None if length < SHORT and length * channels != size else Lines(size // length, length, channels, size)


def snap(x: Tensor, y: Tensor, grid: Numbers, where: Lines) -> None:
    """Put `x`, snapped to the grid, into `y`; they lie alike."""
    inverse, scale, low, high, ends = grid.addresses
    numbers = where.size, where.channels, ends, where.length
    _run(_loops().snap, where, x.data_ptr(), y.data_ptr(), inverse, scale, low, high, *numbers)


def pass_inside(x: Tensor, upstream: Tensor, d_x: Tensor, grid: Numbers, where: Lines, *, closed: bool) -> None:
    """Put `upstream` where `x` is inside the range, `closed`: or at its ends, and zeros elsewhere into `d_x`."""
    inverse, _, low, high, ends = grid.addresses
    numbers = closed, where.size, where.channels, ends, where.length
    upstream = _like(upstream, x)
    _run(_loops().inside, where, x.data_ptr(), upstream.data_ptr(), d_x.data_ptr(), inverse, low, high, *numbers)


def learned(
    x: Tensor, upstream: Tensor, d_x: Tensor, grid: Numbers, where: Lines, *, outside: bool
) -> list[float] | list[Tensor]:
    """Put the input's gradient into `d_x`; return the sums of the slopes and, if asked, of `upstream` outside.

    One number each where one scale serves all elements, else shape (channels,); all of them float32.
    """
    inverse, _, low, high, ends = grid.addresses
    kinds = 2 if outside else 1
    numbers = kinds, where.size, where.channels, ends, where.length, where.number
    upstream = _like(upstream, x)
    arrays = x.data_ptr(), upstream.data_ptr(), d_x.data_ptr()
    if where.channels == 1:
        parts = (ctypes.c_double * (kinds * where.number))()
        _run(_loops().learned, where, *arrays, ctypes.addressof(parts), inverse, low, high, *numbers)
        return [float32(math.fsum(parts[kind * where.number : (kind + 1) * where.number])) for kind in range(kinds)]
    sums = torch.empty(kinds, where.number, dtype=torch.float64)
    _run(_loops().learned, where, *arrays, sums.data_ptr(), inverse, low, high, *numbers)
    if where.number != where.channels:
        sums = sums.view(kinds, -1, where.channels).sum(1)
    return list(sums.float())


def terms(x: Tensor, upstream: Tensor, d_x: Tensor, grid: Numbers, where: Lines, *, outside: bool) -> list[Tensor]:
    """Put the input's gradient into `d_x`; return what `learned` adds up, each in the shape of `x`."""
    inverse, _, low, high, ends = grid.addresses
    made = [torch.empty_like(x) for _ in range(2 if outside else 1)]
    upstream = _like(upstream, x)
    arrays = x.data_ptr(), upstream.data_ptr(), d_x.data_ptr(), made[0].data_ptr(), made[-1].data_ptr()
    numbers = len(made), where.size, where.channels, ends, where.length
    _run(_loops().terms, where, *arrays, inverse, low, high, *numbers)
    return made


def _loops() -> Compiled:
    found = compiled()
    assert found is not None  # noqa: S101 - `lines` was asked
    return found


def _like(tensor: Tensor, other: Tensor) -> Tensor:
    """Return the tensor, copied if it lies otherwise in memory than a dense one."""
    alike = tensor.stride() == other.stride() or (tensor.is_contiguous() and other.is_contiguous())
    return tensor if alike and not tensor.is_neg() else torch.empty_like(other).copy_(tensor)


# ---- grids of channels ----------------------------------------------------------------------------------------------


def serves(*tensors: Tensor) -> bool:
    """Return whether the compiled loops are there, and plain float32 CPU tensors lie as they want them."""
    return compiled() is not None and all(tensor.is_contiguous() and not tensor.is_neg() for tensor in tensors)


def symmetric(threshold: Tensor, low: float, steps: float, power_of_two: bool) -> Tensor:  # noqa: FBT001 - as the grid's
    """Return what ``SymmetricScale.forward`` returns."""
    scale = torch.empty_like(threshold)
    _loops().symmetric(threshold.data_ptr(), scale.data_ptr(), low, 1.0 / steps, scale.numel(), power_of_two)
    return scale


def symmetric_gradient(
    threshold: Tensor,
    scale: Tensor,
    upstream: Tensor,
    low: float,
    steps: float,
    power_of_two: bool,  # noqa: FBT001 - as the grid's
) -> Tensor:
    """Return what ``SymmetricScale.gradient`` returns."""
    gradient = torch.empty_like(threshold)
    arrays = threshold.data_ptr(), scale.data_ptr(), upstream.data_ptr(), gradient.data_ptr()
    _loops().symmetric_gradient(*arrays, low, 1.0 / steps, scale.numel(), power_of_two)
    return gradient


def uniform(range_min: Tensor, range_max: Tensor, low: float, n_bits: int) -> tuple[Tensor, Tensor]:
    """Return what ``UniformGrid.forward`` returns."""
    scale, zero_point = torch.empty_like(range_min), torch.empty_like(range_min)
    arrays = range_min.data_ptr(), range_max.data_ptr(), scale.data_ptr(), zero_point.data_ptr()
    _loops().uniform(*arrays, low, scale.numel(), 2**n_bits - 1)
    return scale, zero_point


def uniform_gradients(
    ends: tuple[Tensor, Tensor], grid: tuple[Tensor, Tensor], d_grid: tuple[Tensor, Tensor], low: float, n_bits: int
) -> tuple[Tensor, Tensor]:
    """Return what ``UniformGrid.gradients`` returns."""
    made = torch.empty_like(ends[0]), torch.empty_like(ends[1])
    arrays = (tensor.data_ptr() for pair in (ends, grid, d_grid, made) for tensor in pair)
    _loops().uniform_gradients(*arrays, low, ends[0].numel(), 2**n_bits - 1)
    return made


# ---- threads --------------------------------------------------------------------------------------------------------


def _run(loop: Loop, where: Lines, *arguments: int) -> None:
    """Run a loop over all lines, those of a large tensor by several threads."""
    threads = min(torch.get_num_threads(), where.size // SHARE, where.number) if where.size >= 2 * SHARE else 1
    if threads == 1:
        loop(*arguments, 0, where.number)
        return
    bounds = [where.number * thread // threads for thread in range(threads + 1)]
    pool = _pool(os.getpid(), torch.get_num_threads() - 1)
    others = [pool.submit(loop, *arguments, *bounds[i : i + 2]) for i in range(1, threads)]
    loop(*arguments, 0, bounds[1])
    for other in others:
        other.result()


@functools.lru_cache(maxsize=1)
def _pool(process: int, workers: int) -> ThreadPoolExecutor:  # noqa: ARG001 - a forked process has none of the threads
    return ThreadPoolExecutor(workers, thread_name_prefix="trainable-torch")
