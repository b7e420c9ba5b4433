"""The eager CPU kernels: the formulas of `trainable_torch.ops`, in as few passes over memory as PyTorch's kernels allow.

Every function here computes bit for bit what the plain expression in `ops` computes; only the sums over a tensor of
more than `CHUNK` elements, which no order of float32 additions owns, are taken chunk by chunk. What makes it faster:

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

import numpy as np
import torch
from torch import Tensor, nn

CHUNK = 2**17
"""Elements per thread that are worked on at once: 512 KiB; smaller chunks cost more calls than the cache saves."""

GRAIN = 2**15
"""PyTorch gives a kernel of fewer elements to one thread (``at::internal::GRAIN_SIZE``)."""

UNROLLED = 64
"""PyTorch's vectorized loops take whole multiples of this many elements (twice the widest vector, at most 32)."""

_HARDTANH = torch.ops.aten.hardtanh_backward.grad_input

TINY = 2.0**-126
"""The smallest normal float32 number."""


@dataclass(frozen=True)
class Numbers:
    """A grid outside the autograd graph: plain numbers where one scale serves all elements, else tensors.

    Parameters
    ----------
    scale, inverse : float, or Tensor broadcastable to the input
        Step between grid points, and its float32 reciprocal.
    low, high : float, or Tensor broadcastable to the input
        The grid's ends counted from zero; numbers too where they are the same for every channel.
    span : int
        ``quant_max - quant_min``.
    shape : tuple of int
        That of the scale as a tensor.
    """

    scale: float | Tensor
    inverse: float | Tensor
    low: float | Tensor
    high: float | Tensor
    span: int
    shape: tuple[int, ...] = ()

    @classmethod
    def of(cls, scale: float | Tensor, zero_point: float | Tensor, quant_min: int, quant_max: int) -> Numbers:
        """Return the numbers of a grid, float32; `zero_point` is a number where every one is the same."""
        shape: tuple[int, ...] = ()
        if isinstance(scale, Tensor):
            shape = tuple(scale.shape)
            if scale.numel() == 1:
                scale, zero_point = float(scale), float(zero_point)
        inverse = float(np.float32(1.0) / np.float32(scale)) if isinstance(scale, float) else scale.reciprocal()
        low, high = quant_min - zero_point, quant_max - zero_point
        if not isinstance(zero_point, Tensor):
            low, high = float(low), float(high)
        return cls(scale, inverse, low, high, quant_max - quant_min, shape)

    def zero_point(self, quant_min: int) -> float | Tensor:
        """Return the code of real 0.0."""
        return quant_min - self.low

    def tensors(self, like: Tensor) -> tuple[Tensor, float | Tensor, float | Tensor]:
        """Return scale and ends as the plain expressions take them."""
        scale = self.scale if isinstance(self.scale, Tensor) else like.new_full(self.shape, self.scale)
        return scale, self.low, self.high


def serves(*tensors: Tensor) -> bool:
    """Return whether these are plain float32 CPU tensors in eager mode, outside of function transforms and traces."""
    if torch.compiler.is_compiling():
        return False
    # nothing public tells the next two; modes (fake tensors, selective checkpoints, tracers) must see plain operations
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():  # noqa: SLF001
        return False
    if torch._C._get_tracing_state() is not None:  # noqa: SLF001 - what torch.jit.is_tracing asks
        return False
    return all(type(t) in (Tensor, nn.Parameter) and t.is_cpu and t.dtype is torch.float32 for t in tensors)


# ---- memory layout --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """A dense tensor seen as rows in memory order; each element is a row of its own when all share one scale.

    Parameters
    ----------
    order : tuple of int
        The dimensions by falling stride.
    shape : tuple of int
        Of the rows: ``(n,)``, or ``(channels, inner)``, or ``(outer, channels * inner)``.
    channels : int
        How many scales there are.
    by_row : bool
        Whether a row has one scale; else it has all of them.
    """

    order: tuple[int, ...]
    shape: tuple[int, ...]
    channels: int
    by_row: bool = True

    @property
    def row(self) -> int:
        """Elements of one row."""
        return self.shape[1] if len(self.shape) > 1 else 1

    def rows(self, x: Tensor) -> Tensor:
        """Return a view of this shape, or a copy where the tensor lies otherwise in memory."""
        return x.permute(self.order).reshape(self.shape)

    def broadcast(self, value: Tensor) -> Tensor:
        """Return one number per channel shaped to broadcast against the rows."""
        value = value.reshape(-1, 1)
        return value if self.by_row else value.expand(-1, self.row // self.channels).reshape(1, -1)

    def spans(self) -> Iterator[tuple[int, int]]:
        """Yield (first, last + 1) of chunks of rows."""
        rows, step = self.shape[0], max(1, CHUNK * torch.get_num_threads() // self.row)
        for first in range(0, rows, step):
            yield first, min(first + step, rows)


def _dense(x: Tensor, grid: Numbers) -> tuple[Tensor, _Layout]:
    """Return a tensor and how it lies in memory; one with holes or overlaps is copied first."""
    order = tuple(range(x.dim()))
    if not x.is_contiguous():
        by_stride = tuple(sorted(order, key=lambda axis: (-x.stride(axis), axis)))
        if x.permute(by_stride).is_contiguous():
            order = by_stride
        else:
            x = x.contiguous()
    return x, _layout(x, order, grid.scale)


def _layout(x: Tensor, order: tuple[int, ...], scale: float | Tensor) -> _Layout:
    n = x.numel()
    if isinstance(scale, float):
        return _Layout(order, (n,), 1)
    axis = next(index for index, size in enumerate(scale.shape) if size != 1)
    sizes = [x.shape[index] for index in order]
    place = order.index(axis)
    channels, inner = sizes[place], math.prod(sizes[place + 1 :])
    outer = n // (channels * inner)
    shape = (channels, inner) if outer == 1 else (outer, channels * inner)
    return _Layout(order, shape, channels, by_row=outer == 1)


# ---- forward --------------------------------------------------------------------------------------------------------


def snap(x: Tensor, grid: Numbers) -> Tensor:
    """Return `x` snapped to the grid, as ``ops.snap`` does."""
    x, layout = _dense(x, grid)
    y = torch.empty_like(x)
    values, out = layout.rows(x), layout.rows(y)
    if isinstance(grid.scale, float):
        zero = x.new_zeros(())
        for first, last in layout.spans():
            codes = torch.mul(values[first:last], grid.inverse, out=out[first:last])
            codes.round_().clamp_(grid.low, grid.high)  # type: ignore[arg-type] # numbers, as the scale is one
            # 0 + scale * code, rounded once: the sum is exact, and makes +0.0 of -0.0
            torch.add(zero, codes, alpha=grid.scale, out=codes)
        return y
    scale, inverse, low, high = (
        layout.broadcast(each) if isinstance(each, Tensor) else each
        for each in (grid.scale, grid.inverse, grid.low, grid.high)
    )
    for first, last in layout.spans():
        here = slice(first, last) if layout.by_row else slice(None)
        codes = torch.mul(values[first:last], inverse[here], out=out[first:last])
        _clamp(codes.round_(), low, high, here)
        codes.add_(0.0).mul_(scale[here])
    return y


def _clamp(codes: Tensor, low: float | Tensor, high: float | Tensor, here: slice) -> None:
    """Clamp in place; with tensors as two kernels, since ``clamp_`` with tensors is not vectorized."""
    if isinstance(low, Tensor) and isinstance(high, Tensor):
        torch.maximum(codes, low[here], out=codes)
        torch.minimum(codes, high[here], out=codes)
    else:
        codes.clamp_(low, high)  # type: ignore[arg-type] # both are numbers


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
class _Window:
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


def _window(grid: Numbers, *, closed: bool) -> _Window:
    """Return the window of a grid whose ends are tensors; `closed`: the ends are inside.

    One of a range's ends has a magnitude a of at least ``2**(n - 1)``, the other one less. Counted from the smaller
    one, the difference ``v - a`` has the right sign at that end, whatever v, and next to the larger end v and the
    difference have the same float32 spacing, so that it is exact. Only where the larger end is ``2**(n - 1)`` itself,
    numbers below it lie twice as dense; there the next float32 number beside `a` as the origin keeps all of them apart.
    """
    inverse, low, high = grid.inverse, grid.low, grid.high
    assert isinstance(inverse, Tensor) and isinstance(low, Tensor) and isinstance(high, Tensor)  # noqa: S101, PT018 - the caller asked
    upright = high >= (grid.span + 1) // 2
    sign = torch.where(upright, 1.0, -1.0)
    first = torch.where(upright, low, -high)
    beside = torch.nextafter(first, first.new_tensor(-math.inf if closed else math.inf))
    if closed:
        origin = torch.where(first == 0, -2 * TINY, beside)
        return _Window(
            inverse * sign, origin, _next(2 * TINY, 0.0), _next(grid.span, math.inf), first, first + grid.span, sign
        )
    origin = torch.where(first == 0, TINY, beside)
    return _Window(inverse * sign, origin, -TINY, float(grid.span), first, first + grid.span, sign)


# ---- backward -------------------------------------------------------------------------------------------------------


def pass_inside(x: Tensor, upstream: Tensor, grid: Numbers, *, closed: bool) -> Tensor:
    """Return `upstream` where `x` is inside the range, `closed`: or at its ends; 0 elsewhere."""
    x, layout = _dense(x, grid)
    d_x = torch.empty_like(x)
    values, gradient, out = layout.rows(x), layout.rows(upstream), layout.rows(d_x)
    if isinstance(grid.inverse, float):
        assert isinstance(grid.low, float) and isinstance(grid.high, float)  # noqa: S101, PT018 - all or none is a number
        first_out = _first_beyond if closed else _first_reached
        low, high = -first_out(grid.inverse, -grid.low), first_out(grid.inverse, grid.high)
        _masked(gradient, values, low, high, out)
        return d_x
    window = None if isinstance(grid.low, float) else _window(grid, closed=closed)
    inverse = layout.broadcast(grid.inverse if window is None else window.inverse)
    origin = None if window is None else layout.broadcast(window.origin)
    if window is not None:
        low, high = window.low, window.high
    else:
        low, high = grid.low, grid.high  # type: ignore[assignment] # numbers, as there is no window
        if closed:
            low, high = _next(low, -math.inf), _next(high, math.inf)
    steps: Tensor | None = None
    for first, last in layout.spans():
        here = slice(first, last) if layout.by_row else slice(None)
        steps = torch.empty_like(out[first:last]) if steps is None else steps[: last - first]
        torch.mul(values[first:last], inverse[here], out=steps)
        if origin is not None:
            steps.sub_(origin[here])
        _masked(gradient[first:last], steps, low, high, out[first:last])
    return d_x


@dataclass(frozen=True)
class Gradients:
    """Gradients of a learned grid, not yet multiplied by the gradient scale.

    Parameters
    ----------
    x : Tensor, shape of the input
        With respect to the input.
    slope : Tensor, shape of the scale
        Sum of ``upstream * d_y / d_scale``.
    outside : Tensor, shape of the scale
        Sum of `upstream` where the input is outside the range; of no meaning when nobody asked.
    """

    x: Tensor
    slope: Tensor
    outside: Tensor


def learned(x: Tensor, upstream: Tensor, grid: Numbers, *, outside: bool) -> Gradients | None:
    """Return the gradients that `trainable_core.reference.lsq` defines.

    None when a sum is not finite: NaN then stands for an element that counts as zero, or really for a gradient that is
    not finite, which the plain expression tells apart.
    """
    x, layout = _dense(x, grid)
    d_x = torch.empty_like(x)
    values, gradient, out = layout.rows(x), layout.rows(upstream), layout.rows(d_x)
    by_tensor = isinstance(grid.inverse, float)
    sums = _learned_by_tensor if by_tensor else _learned_by_channel
    slope, beyond = sums(values, gradient, out, grid, layout, outside=outside)
    if not math.isfinite(float(slope.sum())) or not math.isfinite(float(beyond.sum())):
        return None
    slope = slope.view(grid.shape)
    return Gradients(d_x, slope, beyond.view(grid.shape) if outside else slope)


def _learned_by_tensor(
    values: Tensor, gradient: Tensor, out: Tensor, grid: Numbers, layout: _Layout, *, outside: bool
) -> tuple[Tensor, Tensor]:
    """Put the input's gradient into `out` and return both sums, one scale for all."""
    low, high = grid.low, grid.high
    assert isinstance(low, float) and isinstance(high, float)  # noqa: S101, PT018 - all or none is a number
    buffers: tuple[Tensor, Tensor] | None = None
    slope = beyond = 0.0
    for first, last in layout.spans():
        above, d_x = gradient[first:last], out[first:last]
        buffers = _buffers(d_x, buffers)
        steps, inside = buffers
        torch.mul(values[first:last], grid.inverse, out=steps)
        _masked(above, steps, low, high, d_x)
        _masked(steps, steps, low, high, inside)
        # inside: round(v) - v; outside: the end that the code was clamped to
        slope += float(steps.round_().clamp_(low, high).sub_(inside).mul_(above).sum())
        if outside:
            beyond += float(torch.sub(above, d_x, out=inside).sum())  # upstream or 0, exactly
    return values.new_tensor(slope), values.new_tensor(beyond)


def _learned_by_channel(
    values: Tensor, gradient: Tensor, out: Tensor, grid: Numbers, layout: _Layout, *, outside: bool
) -> tuple[Tensor, Tensor]:
    """Put the input's gradient into `out` and return both sums, shape (C,)."""
    inverse, low, high = grid.inverse, grid.low, grid.high
    window = None if isinstance(low, float) else _window(grid, closed=False)
    origin = None
    bounds = (low, high)
    if window is not None:
        inverse, bounds = window.inverse, (window.low, window.high)
        origin, low, high = (layout.broadcast(each) for each in (window.origin, window.first, window.last))
    inverse = layout.broadcast(inverse)  # type: ignore[arg-type] # a tensor, as there are channels
    slope, beyond = values.new_zeros(layout.shape[0 if layout.by_row else 1]), values.new_zeros(())
    if outside:
        beyond = torch.zeros_like(slope)
    buffers: tuple[Tensor, Tensor] | None = None
    for first, last in layout.spans():
        here = slice(first, last) if layout.by_row else slice(None)
        above, d_x = gradient[first:last], out[first:last]
        buffers = _buffers(d_x, buffers)
        steps, inside = buffers
        torch.mul(values[first:last], inverse[here], out=steps)
        if origin is None:
            tested = steps
        else:
            tested = torch.sub(steps, origin[here], out=inside)
        _masked(above, tested, *bounds, d_x)
        _masked(steps, tested, *bounds, inside)
        _clamp(steps.round_(), low, high, here)
        _add_up(steps.sub_(inside).mul_(above), layout, slope, here)
        if outside:
            _add_up(torch.sub(above, d_x, out=inside), layout, beyond, here)
    if not layout.by_row:
        slope = slope.view(layout.channels, -1).sum(1)
        beyond = beyond.view(layout.channels, -1).sum(1) if outside else beyond
    return slope if window is None else slope * window.sign.view(-1), beyond


def _buffers(like: Tensor, buffers: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Return two temporaries of a chunk's shape: new ones for the first chunk, parts of them for a smaller last one."""
    if buffers is None:
        return torch.empty_like(like), torch.empty_like(like)
    if buffers[0].shape == like.shape:
        return buffers
    return buffers[0][: like.shape[0]], buffers[1][: like.shape[0]]


def _add_up(terms: Tensor, layout: _Layout, sums: Tensor, here: slice) -> None:
    """Add the terms of a chunk to the sums of its rows, or of its columns."""
    if layout.by_row:
        torch.sum(terms, 1, out=sums[here])
    else:
        sums += terms.sum(0)
