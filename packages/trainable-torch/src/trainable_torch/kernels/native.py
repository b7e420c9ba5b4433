"""The formula in one pass over memory, by loops that numba compiles: the extra ``trainable-torch[speed]``.

The first call of a process compiles (about two seconds, kept on disk for the next process where there is a place to
write). Large tensors are shared by as many threads as PyTorch would use; no sum depends on how many they are.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import struct
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainable_core.errors import InvalidArgumentError
from trainable_torch.grid import Form
from trainable_torch.kernels import tier
from trainable_torch.kernels.memory import INTEGERS, PART, SLOTS
from trainable_torch.kernels.passes import Numbers

Loop = Callable[..., None]

CHUNK = 2**17
"""Elements of a line where one scale serves all of a tensor."""

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
    same: Callable[[int, int], int]
    forward: Callable[[int, int, int], None]
    backward: Callable[[int, int, int], None]


@functools.cache
def compiled() -> Compiled | None:
    """Return the compiled loops, or None where another tier is asked for, or numba is missing, broken or switched off.

    Raises
    ------
    InvalidArgumentError
        When the environment asks for this tier and there are none; or for a tier that doesn't exist.
    """
    wanted = tier.wanted()
    if wanted not in {None, tier.NATIVE}:
        return None
    problem: object = "numba is told not to compile (NUMBA_DISABLE_JIT)"
    try:
        import numba  # noqa: PLC0415 - an extra, and it takes a third of a second

        if not numba.config.DISABLE_JIT:  # type: ignore[attr-defined] # set on import
            return _compile_all(numba)
    except Exception as error:  # noqa: BLE001 - numba refuses a NumPy or a platform in its own ways; training goes on without
        problem = error
    if wanted == tier.NATIVE:
        raise InvalidArgumentError(
            tier.VARIABLE, f"'native' needs numba: {problem}", 'pip install "trainable-torch[speed]".'
        )
    return None


_loops: Callable[[], Compiled] = compiled  # type: ignore[assignment] # who calls the rest of this module has asked


def _compile_all(numba: Any) -> Compiled:
    from trainable_torch.kernels import grid_loops, layer_loops, loops  # noqa: PLC0415 - they need numba

    return Compiled(
        _compile(numba, loops.snap, 7, 7),
        _compile(numba, loops.inside, 7, 8),
        _compile(numba, loops.learned, 7, 8),
        _compile(numba, grid_loops.symmetric, 2, 2, floats=4),
        _compile(numba, grid_loops.symmetric_gradients, 4, 3, floats=3),
        _compile(numba, grid_loops.uniform, 3, 2, floats=1),
        _compile(numba, grid_loops.uniform_gradients, 6, 3, floats=2),
        _compile(numba, loops.same, 1, 1, result="int64"),
        _compile(numba, layer_loops.forward, 2, 1),
        _compile(numba, layer_loops.backward, 2, 1),
    )


def _compile(
    numba: Any, loop: Callable[..., Any], addresses: int, numbers: int, floats: int = 0, result: str = "void"
) -> Any:
    """Compile a function of so many addresses, floats and integers, in this order."""
    arguments = [numba.types.voidptr] * addresses, [numba.float64] * floats, [numba.int64] * numbers
    signature = getattr(numba, result)(*itertools.chain(*arguments))
    try:
        made = numba.cfunc(signature, cache=True)(loop)
    except (OSError, RuntimeError):  # there is no place to keep it
        made = numba.cfunc(signature)(loop)
    return made.ctypes


Pointers = tuple[int, int, int, int, int]
"""Addresses of inverses, scales, first and last codes counted from zero, and how many of each of the last two."""


class Block(NamedTuple):
    """The numbers of a grid in one piece of memory, as the loops make and take them.

    Parameters
    ----------
    pointers : Pointers
        Into the rows.
    rows : Tensor, float32, shape (4, channels)
        All inverses, then scales, first and last codes counted from zero.
    shape : tuple of int
        That of the scale as a tensor.
    ends : pair of float, or None
        The ends where they are the same for every channel.
    """

    pointers: Pointers
    rows: Tensor
    shape: tuple[int, ...]
    ends: tuple[float, float] | None

    def numbers(self) -> Numbers:
        """Return the same numbers for expressions of tensors."""
        inverse, scale, low, high = (row.view(self.shape) for row in self.rows)
        if self.ends is not None:
            return Numbers(scale, self.ends[0], self.ends[1], inverse)
        return Numbers(scale, low, high, inverse)


class Given(NamedTuple):
    """The numbers of a grid that are tensors already, as a deployed quantizer's are.

    Parameters
    ----------
    pointers : Pointers
        Into the tensors.
    tensors : tuple of Tensor
        What the pointers point into, so that it stays.
    """

    pointers: Pointers
    tensors: tuple[Tensor, ...]


def grid_of(form: Form, variables: Sequence[Tensor], shape: tuple[int, ...]) -> Block:
    """Return the numbers of a grid, made of its variables by the operations of `Form.numbers`."""
    channels, span = variables[0].numel(), form.quant_max - form.quant_min
    rows = torch.empty(4, channels, dtype=torch.float32, device="cpu")
    place, row = rows.data_ptr(), 4 * channels
    first, last = variables[0].contiguous(), variables[-1].contiguous()  # a threshold is both
    if form.centered:
        low, steps, power_of_two = form.arguments
        ends = float(form.quant_min), float(form.quant_max)
        _loops().symmetric(first.data_ptr(), place, low, 1.0 / steps, *ends, channels, power_of_two)
        return Block((place, place + row, place + 2 * row, place + 3 * row, 1), rows, shape, ends)
    _loops().uniform(first.data_ptr(), last.data_ptr(), place, form.arguments[0], channels, span)
    return Block((place, place + row, place + 2 * row, place + 3 * row, channels), rows, shape, None)


def given(scale: Tensor, low: float | Tensor, high: float | Tensor) -> Given:
    """Return the numbers of a grid that are tensors already."""
    if not isinstance(low, Tensor) or not isinstance(high, Tensor):
        low, high = torch.tensor((low, high), dtype=torch.float32, device="cpu").unbind()
    inverse, scale, low, high = scale.reciprocal().contiguous(), scale.contiguous(), low.contiguous(), high.contiguous()
    pointers = inverse.data_ptr(), scale.data_ptr(), low.data_ptr(), high.data_ptr(), low.numel()
    return Given(pointers, (inverse, scale, low, high))


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


def lines(x: Tensor, shape: Sequence[int]) -> tuple[Tensor, Lines | None]:
    """Return a tensor, copied where it has holes or overlaps, and its lines; no lines where they are too short.

    Parameters
    ----------
    x : Tensor, not empty
        What is quantized.
    shape : sequence of int
        Shape of the scale, broadcastable to `x`.
    """
    # `empty_like` keeps the strides of dense tensors only
    if not (x.is_contiguous() or torch.empty_like(x).stride() == x.stride()) or x.is_neg():
        x = x.contiguous().resolve_neg()
    size = x.numel()
    if not shape:
        return x, Lines(-(-size // CHUNK), CHUNK, 1, size)
    for axis, channels in enumerate(shape, start=-len(shape)):
        if channels != 1:
            length = x.stride(axis)  # what lies inside of an axis lies within its stride
            if length < SHORT and length * channels != size:
                return x, None
            return x, Lines(size // length, length, channels, size)
    return x, Lines(-(-size // CHUNK), CHUNK, 1, size)


Marks = Any
"""An array of bytes, one for each part of a tensor: whether something in it lies outside of the range; or None."""


def marks_of(where: Lines) -> tuple[Marks, int]:
    """Return a place for the marks of a tensor, and its address."""
    place = (ctypes.c_uint8 * (where.number * -(-where.length // PART)))()
    return place, ctypes.addressof(place)


def snap(x: Tensor, grid: Block | Given, where: Lines, *, marking: bool = False) -> tuple[Tensor, Marks]:
    """Return `x` snapped to the grid and, if asked, marks for `pass_inside`."""
    y = torch.empty_like(x)
    inverse, scale, low, high, ends = grid.pointers
    marks, marked = None, 0
    if marking:
        marks, marked = marks_of(where)
    numbers = marking, where.size, where.channels, ends, where.length
    _run(_loops().snap, where, x.data_ptr(), y.data_ptr(), marked, inverse, scale, low, high, *numbers)
    return y, marks


def snap_one_line(x: Tensor, grid: Block | Given) -> Tensor:
    """Return a small contiguous `x` snapped to a grid of one scale: the same with less around it."""
    y, size = torch.empty_like(x), x.numel()
    _loops().snap(x.data_ptr(), y.data_ptr(), 0, *grid.pointers[:4], 0, size, 1, 1, size, 0, 1)
    return y


def pass_inside(
    x: Tensor, upstream: Tensor, grid: Block | Given, where: Lines, *, closed: bool, reuse: bool, marks: Marks = None
) -> Tensor:
    """Return `upstream` where `x` is inside the range, `closed`: or at its ends; zeros elsewhere.

    With `reuse` it may take the place of `upstream`, which nobody else must have. Then, if `closed`, only what `snap`
    marked is looked at.
    """
    inverse, _, low, high, ends = grid.pointers
    upstream, d_x = _place(x, upstream, reuse=reuse)
    marked = ctypes.addressof(marks) if marks is not None and closed and d_x is upstream else 0
    numbers = closed, bool(marked), where.size, where.channels, ends, where.length
    arrays = x.data_ptr(), upstream.data_ptr(), d_x.data_ptr(), marked
    _run(_loops().inside, where, *arrays, inverse, low, high, *numbers)
    return d_x


def learned(
    x: Tensor, upstream: Tensor, grid: Block | Given, where: Lines, *, outside: bool, reuse: bool
) -> tuple[Tensor, Tensor]:
    """Return the input's gradient, and each line's sums of slopes and, if asked, of `upstream` outside of the range.

    The sums are float64, shape (1 or 2, lines). `reuse` as in `pass_inside`.
    """
    inverse, _, low, high, ends = grid.pointers
    kinds = 2 if outside else 1
    upstream, d_x = _place(x, upstream, reuse=reuse)
    sums = torch.empty(kinds, where.number, dtype=torch.float64, device="cpu")
    numbers = kinds, where.size, where.channels, ends, where.length, where.number
    arrays = x.data_ptr(), upstream.data_ptr(), d_x.data_ptr(), sums.data_ptr()
    _run(_loops().learned, where, *arrays, inverse, low, high, *numbers)
    return d_x, sums


def gradients(
    form: Any, variables: Sequence[Tensor], grid: Block, sums: Tensor, gradient_scale: float
) -> Sequence[Tensor]:
    """Return the variables' gradients from what `learned` returned, by the operations of `Form.gradients`."""
    first, last = variables[0].contiguous(), variables[-1].contiguous()  # a threshold is both
    d_first, d_last = torch.empty_like(first), torch.empty_like(last)
    arrays: tuple[int, ...] = (sums.data_ptr(), grid.rows.data_ptr())
    counts = sums.shape[1], first.numel()
    if form.centered:
        low, steps, power_of_two = form.arguments
        arrays += first.data_ptr(), d_first.data_ptr()
        _loops().symmetric_gradients(*arrays, low, 1.0 / steps, gradient_scale, *counts, power_of_two)
        return (d_first,)
    arrays += first.data_ptr(), last.data_ptr(), d_first.data_ptr(), d_last.data_ptr()
    _loops().uniform_gradients(*arrays, form.arguments[0], gradient_scale, *counts, form.quant_max)
    return d_first, d_last


def total(sums: Tensor, where: Lines) -> Tensor:
    """Return each channel's sums of what `learned` returned, float32, shape (1 or 2, channels)."""
    return sums.view(len(sums), -1, where.channels).sum(1).float()


def _place(x: Tensor, upstream: Tensor, *, reuse: bool) -> tuple[Tensor, Tensor]:
    """Return `upstream`, copied if it lies otherwise in memory than the dense `x`, and a place for the gradient."""
    alike = upstream.stride() == x.stride() or (upstream.is_contiguous() and x.is_contiguous())
    if alike and not upstream.is_neg():
        return upstream, upstream if reuse else torch.empty_like(x)
    upstream = torch.empty_like(x).copy_(upstream)
    return upstream, upstream


# ---- a small layer's two quantizers in one call ---------------------------------------------------------------------

X, Y, FIRST, LAST, D_FIRST, D_LAST, LEARNS = 0, 1, 4, 5, 12, 13, 14
"""Places in a table: the addresses of the tensor, of what it is snapped to (in backward: of its gradient), of the
grid's variables and of their gradients; and whether there are such gradients."""

_pack = struct.Struct(f"={INTEGERS}q{SLOTS - INTEGERS}d").pack


class Part(NamedTuple):
    """What is constant about a small tensor's quantization: its lines, and a table to copy and fill in.

    Parameters
    ----------
    table : array of int64
        Copied for each forward, and once more for each backward: so threads don't share one.
    channels : int
        How many scales there are.
    """

    table: array[int]
    channels: int


@functools.lru_cache(maxsize=1024)
def part(
    form: Form, scale_shape: tuple[int, ...], shape: torch.Size, strides: tuple[int, ...], gradient_scale: float | None
) -> Part | None:
    """Return what is constant about the quantization of tensors of a shape; None where they are not for these loops.

    Parameters
    ----------
    form : Form
        How the grid is made.
    scale_shape : tuple of int
        Shape of the scale.
    shape, strides : tuple of int
        Those of the tensor.
    gradient_scale : float or None
        LSQ's; None for STE.
    """
    probe = torch.empty_strided(shape, strides, device="meta")
    dense, where = lines(probe, scale_shape)
    if where is None or where.size >= 2 * SHARE or dense is not probe:
        return None
    lowest, per_step, whole = _constants(form)
    rows = 8 * SLOTS  # counted from the beginning of the table
    closed = gradient_scale is None
    marks = rows + 16 * where.channels if closed else 0
    numbers = (
        0, 0, marks, rows, 0, 0, form.centered, whole,
        where.size, where.channels, where.length, where.number, 0, 0, 0, closed,
        lowest, per_step, form.quant_min, form.quant_max, gradient_scale or 0.0,
    )  # fmt: skip
    marked = where.number * -(-where.length // PART) if closed else 0
    behind = 16 * where.channels + -(-marked // 8) * 8
    return Part(array("q", _pack(*numbers) + bytes(behind)), where.channels)


def _constants(form: Form) -> tuple[float, float, int]:
    """Return the lowest threshold or width, the scale of a threshold of 1, and what makes it whole: see the loops."""
    if form.centered:
        low, steps, power_of_two = form.arguments
        return low, 1.0 / steps, power_of_two
    return form.arguments[0], 0.0, form.quant_max - form.quant_min


def block_of(form: Form, table: array[int], channels: int, shape: tuple[int, ...]) -> Block:
    """Return what the loops made of a grid in a table as a block."""
    place, row, centered = table.buffer_info()[0] + 8 * SLOTS, 4 * channels, form.centered
    pointers = place, place + row, place + 2 * row, place + 3 * row, 1 if centered else channels
    ends = (float(form.quant_min), float(form.quant_max)) if centered else None
    numbers = torch.frombuffer(table, dtype=torch.float32, count=row, offset=8 * SLOTS)
    return Block(pointers, numbers.view(4, channels), shape, ends)


# ---- bytes ----------------------------------------------------------------------------------------------------------


class Bytes:
    """Copies of some pieces of memory, to tell later whether the same is there still.

    Parameters
    ----------
    pieces : sequence of (object, int, int)
        What keeps the memory, the address, and the number of bytes.
    """

    __slots__ = ("_copies", "_kept", "_places", "_table")

    def __init__(self, pieces: Sequence[tuple[object, int, int]]) -> None:
        self._kept = [kept for kept, _, _ in pieces]
        self._places = [(place, size) for _, place, size in pieces]
        self._copies = [ctypes.string_at(place, size) for place, size in self._places]
        rows = [
            (place, ctypes.cast(ctypes.c_char_p(copy), ctypes.c_void_p).value or 0, size)
            for (place, size), copy in zip(self._places, self._copies, strict=True)
        ]
        self._table = (ctypes.c_int64 * (3 * len(rows)))(*itertools.chain(*rows))

    def are_there(self) -> bool:
        """Return whether every piece of memory is as it was; all of them must be there still."""
        if compiled() is not None:
            return bool(_loops().same(ctypes.addressof(self._table), len(self._places)))
        return all(
            ctypes.string_at(place, size) == copy
            for (place, size), copy in zip(self._places, self._copies, strict=True)
        )


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
