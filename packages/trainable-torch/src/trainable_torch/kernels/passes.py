"""The eager CPU kernels: the formulas of `trainable_torch.ops`, in few passes over memory.

Every function here computes bit for bit what the plain expression in `ops` computes; only the sums over a tensor of
more than `layout.CHUNK` elements, which no order of float32 additions owns, are taken chunk by chunk. What makes it
faster:

- one temporary, reused; large tensors go chunk by chunk, so that all passes but the first run in the cache;
- a gradient is masked in one pass by ``hardtanh_backward``, which passes it strictly between two plain numbers, instead
  of two comparisons, their conjunction and a selection;
- the numbers of a grid for a whole tensor are Python floats: no tensors of one element.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainable_torch.kernels import native
from trainable_torch.kernels.cache import is_plain
from trainable_torch.kernels.layout import Buffers, Layout, dense, look
from trainable_torch.kernels.numbers import Numbers

GRAIN = 2**15
"""PyTorch gives a kernel of fewer elements to one thread (``at::internal::GRAIN_SIZE``)."""

UNROLLED = 64
"""PyTorch's vectorized loops take whole multiples of this many elements (twice the widest vector, at most 32)."""

_HARDTANH = torch.ops.aten.hardtanh_backward.grad_input

_ZERO = torch.zeros((), device="cpu")

TINY = 2.0**-126
"""The smallest normal float32 number."""


def serves(*tensors: Tensor) -> bool:
    """Return whether these are plain float32 CPU tensors in eager mode."""
    if not is_plain(*tensors):
        return False
    for tensor in tensors:  # noqa: SIM110 - as in `is_plain`
        if not tensor.is_cpu or tensor.dtype is not torch.float32:
            return False
    return True


def serves_backward(*gradients: Tensor) -> bool:
    """Return whether a backward pass may take the eager kernels: it is neither differentiated nor vectorized itself."""
    if torch.is_grad_enabled() or not serves(*gradients):
        return False
    # ``is_grads_batched`` batches the gradient outside of a transform; nothing public tells
    return not any(map(torch._C._functorch.is_legacy_batchedtensor, gradients))  # noqa: SLF001


# ---- forward --------------------------------------------------------------------------------------------------------


def snap(x: Tensor, grid: Numbers) -> Tensor:
    """Return `x` snapped to the grid, as ``ops.snap`` does."""
    x, y = dense(x)
    lines = native.lines(x, grid)
    if lines is not None:
        native.snap(x, y, grid, lines)
        return y
    layout = look(x, grid.axis)
    chunks = layout.chunks(layout.rows(x), layout.rows(y))
    if isinstance(grid.scale, float):
        for _, (values, codes) in chunks:
            torch.mul(values, grid.inverse, out=codes)
            codes.round_().clamp_(grid.low, grid.high)  # type: ignore[arg-type] # numbers, as the scale is one
            # 0 + scale * code, rounded once: the sum is exact, and makes +0.0 of -0.0
            torch.add(_ZERO, codes, alpha=grid.scale, out=codes)
        return y
    scale, inverse, low, high = (
        layout.numbers(each) if isinstance(each, Tensor) else each
        for each in (grid.scale, grid.inverse, grid.low, grid.high)
    )
    for here, (values, codes) in chunks:
        torch.mul(values, _at(inverse, here), out=codes)
        _clamp(codes.round_(), low, high, here).add_(0.0).mul_(_at(scale, here))
    return y


def snap_marking(x: Tensor, grid: Numbers) -> tuple[Tensor, native.Marks]:
    """Return `x` snapped to the grid, and marks for `pass_inside`; None without native loops."""
    lines = native.lines(x, grid) if native.serves(x) else None
    if lines is None:
        return snap(x, grid), None
    y, marks = torch.empty_like(x), native.unmarked(lines)
    native.snap(x, y, grid, lines, marks)
    return y, marks


def _at(value: Any, here: slice | None) -> Any:
    """Return the part of what there is one of per row."""
    return value if here is None else value[here]


def _clamp(codes: Tensor, low: float | Tensor, high: float | Tensor, here: slice | None) -> Tensor:
    """Clamp in place; with tensors as two kernels, since ``clamp_`` with tensors is not vectorized."""
    if not isinstance(low, Tensor):
        return codes.clamp_(low, high)  # type: ignore[arg-type] # both are numbers
    torch.maximum(codes, _at(low, here), out=codes)
    return torch.minimum(codes, _at(high, here), out=codes)


# ---- masks ----------------------------------------------------------------------------------------------------------


def _masked(values: Tensor, tested: Tensor, low: float, high: float, out: Tensor) -> None:
    """Put `values` where ``low < tested < high`` and zeros elsewhere, at NaN too, into `out`; all of one dense shape.

    The vectorized loop of ``hardtanh_backward`` does that, the scalar one that finishes an odd number of elements would
    let NaN pass. So the kernel gets whole multiples of what the loop unrolls, for each thread, and the rest goes by
    selection.
    """
    n, threads = tested.numel(), torch.get_num_threads()
    if n % UNROLLED == 0 and (threads == 1 or n <= GRAIN):
        _HARDTANH(values, tested, low, high, grad_input=out)
        return
    values, tested, out = values.view(-1), tested.view(-1), out.view(-1)
    first = 0
    for size in _pieces(n, threads):
        here = slice(first, first + size)
        _HARDTANH(values[here], tested[here], low, high, grad_input=out[here])
        first += size
    if first < n:
        rest = tested[first:]
        out[first:] = torch.where((rest > low) & (rest < high), values[first:], 0.0)


def _pieces(n: int, threads: int) -> Iterator[int]:
    """Yield sizes of which every thread gets a multiple of `UNROLLED`; fewer than `UNROLLED` elements are left over."""
    if threads > 1:
        shared = n - n % (UNROLLED * threads)
        if shared > GRAIN * (threads - 1):  # else fewer threads get a piece, of a size that is not ours
            yield shared
            n -= shared
        for _ in range(n // GRAIN):
            yield GRAIN
        n %= GRAIN
    if n >= UNROLLED:
        yield n - n % UNROLLED


@functools.lru_cache(maxsize=4096)
def _first_beyond(inverse: float, end: float) -> float:
    """Return the smallest float32 number x for which ``x * inverse``, in float32, is above `end`; `end` >= 0."""
    factor = np.float32(inverse)

    def beyond(bits: int) -> bool:
        with np.errstate(over="ignore", under="ignore"):
            return bool(np.int32(bits).view(np.float32) * factor > np.float32(end))

    # Positive float32 numbers are ordered as their bits are. Mostly the quotient is a few units off.
    low, high, step = 0, 0x7F800000, 4
    guess = int(np.float32(end / inverse).view(np.int32))
    while low < guess - step and beyond(guess - step):
        step *= 16
    low = max(low, guess - step)
    step = 4
    while guess + step < high and not beyond(guess + step):
        step *= 16
    high = min(high, guess + step)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if beyond(middle) else (middle, high)
    return float(np.int32(high).view(np.float32))


def _first_reached(inverse: float, end: float) -> float:
    """Return the smallest float32 number x for which ``x * inverse``, in float32, is at least `end`; `end` >= 0."""
    if end > 0:
        return _first_beyond(inverse, _next(end, 0.0))
    return -_next(_first_beyond(inverse, 0.0), 0.0)  # the products of what is nearer to zero are zeros


def _next(value: float, towards: float) -> float:
    """Return the next float32 number."""
    return float(np.nextafter(np.float32(value), np.float32(towards)))


@dataclass(frozen=True)
class Window:
    """Per channel: a map from inputs to one line, on which the same two plain numbers bound every channel's range.

    Parameters
    ----------
    inverse, origin : Tensor, shape of the scales
        ``x * inverse - origin``; the product is ``x / scale``, or its negative.
    low, high : float
        An element is inside where ``low < x * inverse - origin < high``, in float32.
    first, last : Tensor
        The grid's ends as `inverse` counts them.
    sign : Tensor
        1, or -1 where the product is the negative.
    """

    inverse: Tensor
    origin: Tensor
    low: float
    high: float
    first: Tensor
    last: Tensor
    sign: Tensor


def _window(grid: Numbers, *, closed: bool) -> Window | None:
    """Return the window of a grid, None where its ends are plain numbers; `closed`: the ends are inside.

    One of a range's ends has a magnitude a of at least ``2**(n - 1)``, the other one less. Counted from the smaller
    one, the difference ``v - a`` has the right sign at that end, whatever v, and next to the larger end v and the
    difference have the same float32 spacing, so that it is exact. Only where the larger end is ``2**(n - 1)`` itself,
    numbers below it lie twice as dense; there the next float32 number beside `a` as the origin keeps all of them apart.
    """
    inverse, low, high = grid.inverse, grid.low, grid.high
    if not (isinstance(inverse, Tensor) and isinstance(low, Tensor) and isinstance(high, Tensor)):
        return None
    upright = high >= (grid.span + 1) // 2
    sign = torch.where(upright, 1.0, -1.0)
    first = torch.where(upright, low, -high)
    beside = torch.nextafter(first, first.new_tensor(-math.inf if closed else math.inf))
    if closed:
        origin = torch.where(first == 0, -2 * TINY, beside)
        return Window(
            inverse * sign, origin, _next(2 * TINY, 0.0), _next(grid.span, math.inf), first, first + grid.span, sign
        )
    origin = torch.where(first == 0, TINY, beside)
    return Window(inverse * sign, origin, -TINY, float(grid.span), first, first + grid.span, sign)


# ---- backward -------------------------------------------------------------------------------------------------------


def pass_inside(
    x: Tensor, upstream: Tensor, grid: Numbers, *, closed: bool, reuse: bool = False, marks: native.Marks = None
) -> Tensor:
    """Return `upstream` where `x` is inside the range, `closed`: or at its ends; 0 elsewhere.

    With `reuse` it may take the place of `upstream`, which nobody else must have. Then, if `closed`, only what
    `snap_marking` marked is looked at.
    """
    x, d_x, lines = _place(x, upstream, grid, reuse=reuse)
    if lines is not None:
        known = marks if closed and d_x is upstream else None
        native.pass_inside(x, upstream, d_x, grid, lines, closed=closed, marks=known)
        return d_x
    layout = look(x, grid.axis)
    rows = layout.rows(x), layout.rows(upstream), layout.rows(d_x)
    if isinstance(grid.inverse, float):
        assert isinstance(grid.low, float) and isinstance(grid.high, float)  # noqa: S101, PT018 - all or none is a number
        first_out = _first_beyond if closed else _first_reached
        values, gradient, out = rows
        _masked(gradient, values, -first_out(grid.inverse, -grid.low), first_out(grid.inverse, grid.high), out)
        return d_x
    inverse, origin, low, high = _line(grid, _window(grid, closed=closed), layout, closed=closed)
    buffers = Buffers(1)
    for here, (values, gradient, out) in layout.chunks(*rows):
        (steps,) = buffers.like(out)
        torch.mul(values, _at(inverse, here), out=steps)
        if origin is not None:
            steps.sub_(_at(origin, here))
        _masked(gradient, steps, low, high, out)
    return d_x


def _place(x: Tensor, upstream: Tensor, grid: Numbers, *, reuse: bool) -> tuple[Tensor, Tensor, native.Lines | None]:
    """Return the input dense, a place for its gradient, and the lines for native loops; `reuse` as in `pass_inside`."""
    if reuse and native.serves(x, upstream):
        lines = native.lines(x, grid)
        if lines is not None:
            return x, upstream, lines
    x, d_x = dense(x)
    return x, d_x, native.lines(x, grid)


def _line(
    grid: Numbers, window: Window | None, layout: Layout, *, closed: bool
) -> tuple[Tensor, Tensor | None, float, float]:
    """Return inverse, origin and bounds: an element is inside where ``low < x * inverse - origin < high``."""
    if window is not None:
        return layout.numbers(window.inverse), layout.numbers(window.origin), window.low, window.high
    inverse, low, high = grid.inverse, grid.low, grid.high
    assert isinstance(inverse, Tensor) and isinstance(low, float) and isinstance(high, float)  # noqa: S101, PT018 - no window
    bounds = (_next(low, -math.inf), _next(high, math.inf)) if closed else (low, high)
    return layout.numbers(inverse), None, *bounds


class Gradients(NamedTuple):
    """Gradients of a learned grid, not yet multiplied by the gradient scale.

    Parameters
    ----------
    x : Tensor, shape of the input
        With respect to the input.
    slope : float, or Tensor of the scale's shape
        Sum of ``upstream * d_y / d_scale``; a number where one scale serves all elements.
    outside : float, or Tensor of the scale's shape, or None
        Sum of `upstream` where the input is outside the range; None when nobody asked.
    """

    x: Tensor
    slope: float | Tensor
    outside: float | Tensor | None


def learned(x: Tensor, upstream: Tensor, grid: Numbers, *, outside: bool) -> Gradients | None:
    """Return the gradients that `trainable_core.reference.lsq` defines.

    None when a sum is not finite: NaN then stands for an element that counts as zero, or really for a gradient that is
    not finite, which the plain expression tells apart.
    """
    x, d_x = dense(x)
    totals, signs = _totals(x, upstream, d_x, grid, outside=outside)
    if not all(math.isfinite(total if isinstance(total, float) else float(total.sum())) for total in totals):
        return None
    if signs is not None:
        totals[0] = totals[0] * signs
    return Gradients(d_x, totals[0], totals[1] if outside else None)


def learned_lines(
    x: Tensor, upstream: Tensor, grid: Numbers, *, outside: bool, reuse: bool = False
) -> tuple[Tensor, Tensor] | None:
    """Return the input's gradient and, for each line, the sums that `learned` is made of; None without native loops.

    `reuse` as in `pass_inside`.
    """
    x, d_x, lines = _place(x, upstream, grid, reuse=reuse)
    return None if lines is None else (d_x, native.learned(x, upstream, d_x, grid, lines, outside=outside))


def _totals(
    x: Tensor, upstream: Tensor, d_x: Tensor, grid: Numbers, *, outside: bool
) -> tuple[list[float | Tensor], Tensor | None]:
    """Put the input's gradient into `d_x`; return the sums of slopes and of what is outside, and the slopes' signs."""
    lines = native.lines(x, grid)
    if lines is not None:
        found = native.total(native.learned(x, upstream, d_x, grid, lines, outside=outside), lines)
        return [float(each) if grid.axis is None else each.view(grid.shape) for each in found], None
    layout = look(x, grid.axis)
    rows = layout.rows(x), layout.rows(upstream), layout.rows(d_x)
    if isinstance(grid.inverse, float):
        sums = _sums_by_tensor(rows, grid, layout, outside=outside)
        return [float(layout.total(parts)) for parts in sums if parts], None
    window = _window(grid, closed=False)
    sums = _sums_by_channel(rows, grid, window, layout, outside=outside)
    return [layout.total(parts).view(grid.shape) for parts in sums if parts], None if window is None else window.sign


Rows = tuple[Tensor, Tensor, Tensor]
Sums = tuple[list[Tensor], list[Tensor]]


def _sums_by_tensor(rows: Rows, grid: Numbers, layout: Layout, *, outside: bool) -> Sums:
    """Put the input's gradient into the third of the rows; return each chunk's sum of slopes and of what is outside."""
    low, high = grid.low, grid.high
    assert isinstance(low, float) and isinstance(high, float)  # noqa: S101, PT018 - all or none is a number
    slopes, beyond, buffers = [], [], Buffers(2)
    for _, (values, gradient, out) in layout.chunks(*rows):
        steps, inside = buffers.like(out)
        torch.mul(values, grid.inverse, out=steps)
        _masked(gradient, steps, low, high, out)
        _masked(steps, steps, low, high, inside)
        # inside: round(v) - v; outside: the end that the code was clamped to
        slopes.append(layout.part(steps.round_().clamp_(low, high).sub_(inside).mul_(gradient)))
        if outside:
            beyond.append(layout.part(torch.sub(gradient, out, out=inside)))  # upstream or 0, exactly
    return slopes, beyond


def _sums_by_channel(rows: Rows, grid: Numbers, window: Window | None, layout: Layout, *, outside: bool) -> Sums:
    """As `_sums_by_tensor`, a sum for each channel; the slopes with a window's sign."""
    slopes, beyond, buffers = [], [], Buffers(2)
    low, high = grid.low, grid.high
    if window is not None:
        low, high = layout.numbers(window.first), layout.numbers(window.last)
    inverse, origin, first, last = _line(grid, window, layout, closed=False)
    for here, (values, gradient, out) in layout.chunks(*rows):
        steps, inside = buffers.like(out)
        torch.mul(values, _at(inverse, here), out=steps)
        tested = steps if origin is None else torch.sub(steps, _at(origin, here), out=inside)
        _masked(gradient, tested, first, last, out)
        _masked(steps, tested, first, last, inside)
        terms = _clamp(steps.round_(), low, high, here).sub_(inside).mul_(gradient)
        slopes.append(layout.part(terms))
        if outside:
            beyond.append(layout.part(torch.sub(gradient, out, out=inside)))
    return slopes, beyond
