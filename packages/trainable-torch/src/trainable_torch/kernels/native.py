"""The eager CPU kernels in one pass over memory, compiled by numba: the extra ``trainable-torch[speed]``.

Where numba is not installed, `trainable_torch.kernels.passes` goes on with PyTorch's own. The first call of a process compiles
(about two seconds, kept on disk for the next process where there is a place to write). Large tensors are shared by as
many threads as PyTorch would use; no sum depends on how many they are.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainable_torch.kernels import layout
from trainable_torch.kernels.numbers import Numbers

Loop = Callable[..., None]

SHARE = 2**17
"""Elements that are worth a thread of their own: handing them over takes as long as some ten thousand of them."""

SHORT = 8
"""Lines of fewer elements, as along a last axis of channels, are left to PyTorch's kernels, which broadcast."""


class Compiled(NamedTuple):
    """The loops of `loops` and `grid_loops`, compiled; they take addresses, and let other threads of Python run.

    Parameters
    ----------
    snap, inside, learned, symmetric, symmetric_gradients, uniform, uniform_gradients : callable
        Called as C functions.
    """

    snap: Loop
    inside: Loop
    learned: Loop
    symmetric: Loop
    symmetric_gradients: Loop
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
    from trainable_torch.kernels import grid_loops, loops  # noqa: PLC0415 - they need numba

    return Compiled(
        _compile(numba, loops.snap, 7, 7),
        _compile(numba, loops.inside, 7, 8),
        _compile(numba, loops.learned, 7, 8),
        _compile(numba, grid_loops.symmetric, 2, 2, floats=4),
        _compile(numba, grid_loops.symmetric_gradients, 4, 3, floats=3),
        _compile(numba, grid_loops.uniform, 3, 2, floats=1),
        _compile(numba, grid_loops.uniform_gradients, 6, 3, floats=2),
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


def lines(x: Tensor, grid: Numbers) -> Lines | None:
    """Return the lines of a dense tensor, None where they are too short or the compiled loops are missing."""
    if compiled() is None:
        return None
    size, axis = x.numel(), grid.axis
    if axis is None:
        return Lines(-(-size // layout.CHUNK), layout.CHUNK, 1, size)
    length, channels = x.stride(axis), grid.shape[axis]  # what lies inside of an axis lies within its stride
    return None if length < SHORT and length * channels != size else Lines(size // length, length, channels, size)


Marks = Any
"""An array of bytes, one for each part of a tensor: whether something in it lies outside of the range."""


def unmarked(where: Lines) -> Marks:
    """Return marks for a tensor, all zero."""
    from trainable_torch.kernels.loops import PART  # noqa: PLC0415 - it needs numba

    return (ctypes.c_uint8 * (where.number * -(-where.length // PART)))()


def snap(x: Tensor, y: Tensor, grid: Numbers, where: Lines, marks: Marks = None) -> None:
    """Put `x`, snapped to the grid, into `y`, and mark the parts that have something outside; they lie alike."""
    inverse, scale, low, high, ends = grid.addresses
    marked = 0 if marks is None else ctypes.addressof(marks)
    numbers = marks is not None, where.size, where.channels, ends, where.length
    _run(_loops().snap, where, x.data_ptr(), y.data_ptr(), marked, inverse, scale, low, high, *numbers)


def pass_inside(
    x: Tensor, upstream: Tensor, d_x: Tensor, grid: Numbers, where: Lines, *, closed: bool, marks: Marks = None
) -> None:
    """Put `upstream` where `x` is inside the range, `closed`: or at its ends, and zeros elsewhere into `d_x`.

    With `marks` `d_x` is `upstream`.
    """
    inverse, _, low, high, ends = grid.addresses
    marked = 0 if marks is None else ctypes.addressof(marks)
    numbers = closed, marks is not None, where.size, where.channels, ends, where.length
    upstream = _like(upstream, x)
    arrays = x.data_ptr(), upstream.data_ptr(), d_x.data_ptr(), marked
    _run(_loops().inside, where, *arrays, inverse, low, high, *numbers)


def learned(x: Tensor, upstream: Tensor, d_x: Tensor, grid: Numbers, where: Lines, *, outside: bool) -> Tensor:
    """Put the input's gradient into `d_x`; return each line's sums of slopes and, if asked, of `upstream` outside.

    float64, shape (1 or 2, lines).
    """
    inverse, _, low, high, ends = grid.addresses
    kinds = 2 if outside else 1
    numbers = kinds, where.size, where.channels, ends, where.length, where.number
    upstream = _like(upstream, x)
    sums = torch.empty(kinds, where.number, dtype=torch.float64, device="cpu")
    arrays = x.data_ptr(), upstream.data_ptr(), d_x.data_ptr(), sums.data_ptr()
    _run(_loops().learned, where, *arrays, inverse, low, high, *numbers)
    return sums


def total(sums: Tensor, where: Lines) -> Tensor:
    """Return each channel's sums of what `learned` returned, float32, shape (1 or 2, channels)."""
    return sums.view(len(sums), -1, where.channels).sum(1).float()


def _loops() -> Compiled:
    found = compiled()
    assert found is not None  # noqa: S101 - `lines` was asked
    return found


def _like(tensor: Tensor, other: Tensor) -> Tensor:
    """Return the tensor, copied if it lies otherwise in memory than a dense one."""
    alike = tensor.stride() == other.stride() or (tensor.is_contiguous() and other.is_contiguous())
    return tensor if alike and not tensor.is_neg() else torch.empty_like(other).copy_(tensor)


# ---- grids ----------------------------------------------------------------------------------------------------------


def serves(*tensors: Tensor) -> bool:
    """Return whether the compiled loops are there, and plain float32 CPU tensors lie as they want them."""
    if compiled() is None:
        return False
    for tensor in tensors:  # noqa: SIM110 - as in `is_plain`
        if not tensor.is_contiguous() or tensor.is_neg():
            return False
    return True


class Block(Numbers):
    """The numbers of a grid in one piece of memory, as the compiled loops made them and take them.

    Parameters
    ----------
    block : ctypes array of ``4 * channels`` float32 numbers
        All inverses, then scales, first and last codes counted from zero.
    channels : int
        How many there are of each.
    span : int
        ``quant_max - quant_min``.
    shape : tuple of int
        That of the scale as a tensor.
    centered : bool
        Whether the ends are the same for every channel.
    """

    def __init__(self, block: Any, channels: int, span: int, shape: tuple[int, ...], *, centered: bool) -> None:
        state, row, first = self.__dict__, 4 * channels, ctypes.addressof(block)
        state["block"], state["channels"], state["span"], state["shape"] = block, channels, span, shape
        state["centered"] = centered
        state["addresses"] = first, first + row, first + 2 * row, first + 3 * row, 1 if centered else channels
        if channels == 1:
            state["axis"] = None

    def _row(self, row: int, *, one: bool) -> float | Tensor:
        state = self.__dict__
        block, channels = state["block"], state["channels"]
        if one or channels == 1:
            return float(block[row * channels])
        return torch.tensor(block[row * channels : (row + 1) * channels], dtype=torch.float32, device="cpu").view(
            self.shape
        )

    @functools.cached_property
    def inverse(self) -> float | Tensor:
        """Reciprocal of the scale."""
        return self._row(0, one=False)

    @functools.cached_property
    def scale(self) -> float | Tensor:
        """Step between grid points."""
        return self._row(1, one=False)

    @functools.cached_property
    def low(self) -> float | Tensor:
        """First code counted from zero."""
        return self._row(2, one=self.__dict__["centered"])

    @functools.cached_property
    def high(self) -> float | Tensor:
        """Last code counted from zero."""
        return self._row(3, one=self.__dict__["centered"])

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what a copy is made of: it has memory of its own."""
        state = self.__dict__
        return _block, (list(state["block"]), state["channels"], state["span"], state["shape"], state["centered"])

    def __deepcopy__(self, memo: dict[int, Any]) -> Block:
        """Return a copy."""
        make, arguments = self.__reduce__()
        copied: Block = make(*arguments)
        return copied


def _block(numbers: list[float], channels: int, span: int, shape: tuple[int, ...], centered: bool) -> Block:  # noqa: FBT001 - for pickle
    return Block((ctypes.c_float * (4 * channels))(*numbers), channels, span, shape, centered=centered)


def symmetric(
    threshold: Tensor,
    low: float,
    steps: float,
    power_of_two: bool,  # noqa: FBT001 - as the grid's
    ends: tuple[int, int],
    shape: tuple[int, ...],
) -> Block:
    """Return the numbers of a grid whose scale ``SymmetricScale.forward`` returns."""
    channels = threshold.numel()
    block = (ctypes.c_float * (4 * channels))()
    numbers = low, 1.0 / steps, *ends, channels, power_of_two
    _loops().symmetric(threshold.data_ptr(), ctypes.addressof(block), *numbers)
    return Block(block, channels, ends[1] - ends[0], shape, centered=True)


def uniform(range_min: Tensor, range_max: Tensor, low: float, n_bits: int, shape: tuple[int, ...]) -> Block:
    """Return the numbers of a grid that ``UniformGrid.forward`` returns."""
    channels, span = range_min.numel(), 2**n_bits - 1
    block = (ctypes.c_float * (4 * channels))()
    _loops().uniform(range_min.data_ptr(), range_max.data_ptr(), ctypes.addressof(block), low, channels, span)
    return Block(block, channels, span, shape, centered=False)


def symmetric_gradients(  # noqa: PLR0917 - what `symmetric` was called with
    sums: Tensor,
    grid: Numbers,
    threshold: Tensor,
    gradient_scale: float,
    low: float,
    steps: float,
    power_of_two: bool,  # noqa: FBT001 - as the grid's
) -> tuple[Tensor]:
    """Return the threshold's gradient from what `learned` returned."""
    made = torch.empty_like(threshold)
    arrays = sums.data_ptr(), grid.addresses[0], threshold.data_ptr(), made.data_ptr()
    numbers = low, 1.0 / steps, gradient_scale, sums.shape[1], made.numel(), power_of_two
    _loops().symmetric_gradients(*arrays, *numbers)
    return (made,)


def uniform_gradients(
    sums: Tensor, grid: Numbers, ends: tuple[Tensor, Tensor], gradient_scale: float, low: float, n_bits: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of a range's ends from what `learned` returned."""
    made = torch.empty_like(ends[0]), torch.empty_like(ends[1])
    arrays = sums.data_ptr(), grid.addresses[0], *(each.data_ptr() for pair in (ends, made) for each in pair)
    numbers = low, gradient_scale, sums.shape[1], ends[0].numel(), 2**n_bits - 1
    _loops().uniform_gradients(*arrays, *numbers)
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
