"""How a dense tensor lies in memory, and the chunks that the eager CPU kernels work on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 2**17
"""Elements per thread that are worked on at once: 512 KiB; smaller chunks cost more calls than the cache saves."""


class Layout(NamedTuple):
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
    others : tuple of int, or None
        For a tensor of one chunk, which stays as it is: the dimensions along which a scale is shared. Else None.
    """

    order: tuple[int, ...]
    shape: tuple[int, ...]
    channels: int
    by_row: bool
    others: tuple[int, ...] | None

    def rows(self, x: Tensor) -> Tensor:
        """Return a view of the shape, or a copy where a tensor lies otherwise in memory."""
        if self.others is not None:
            return x if x.is_contiguous() else x.contiguous()
        return x.permute(self.order).reshape(self.shape)

    def numbers(self, value: Tensor) -> Tensor:
        """Return what there is one of per channel, shaped to broadcast against the rows."""
        if self.others is not None:
            return value
        value = value.reshape(-1, 1)
        return value if self.by_row else value.expand(-1, self.shape[1] // self.channels).reshape(1, -1)

    def chunks(self, *arrays: Tensor) -> Iterator[tuple[slice | None, tuple[Tensor, ...]]]:
        """Yield the same chunk of arrays, and what part of a number per row belongs to it, None for all."""
        if self.others is not None:
            yield None, arrays
            return
        rows, row = self.shape[0], self.shape[1] if len(self.shape) > 1 else 1
        step = max(1, CHUNK * torch.get_num_threads() // row)
        for first in range(0, rows, step):
            here = slice(first, min(first + step, rows))
            yield here if self.by_row else None, tuple(array[here] for array in arrays)

    def part(self, terms: Tensor) -> Tensor:
        """Return a chunk's sums, one per channel as far as its rows have one."""
        if self.channels == 1:
            return terms.sum()
        if self.others is not None:
            return terms.sum(self.others) if self.others else terms  # no dimensions would mean all of them
        return terms.sum(1 if self.by_row else 0)

    def total(self, parts: list[Tensor]) -> Tensor:
        """Return the sums over all chunks, shape () or (channels,)."""
        if self.channels == 1:
            return parts[0] if len(parts) == 1 else torch.stack(parts).sum(dtype=torch.float64).float()
        if self.by_row or self.others is not None:
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        return torch.stack(parts).sum(0).view(self.channels, -1).sum(1)


def dense(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return a tensor without holes or overlaps, copied if it has some, and an empty one that lies alike."""
    like = torch.empty_like(x)  # keeps the strides of a dense tensor, and of no other
    if like.stride() == x.stride() and not x.is_neg():
        return x, like
    x = x.contiguous().resolve_neg()
    return x, torch.empty_like(x)


def look(x: Tensor, axis: int | None) -> Layout:
    """Return how a tensor lies in memory.

    Parameters
    ----------
    x : Tensor, any shape, not empty, as `dense` returns it
        What is quantized.
    axis : int, or None
        Along which there is one scale per channel; None when one serves all elements.
    """
    n, order, contiguous = x.numel(), tuple(range(x.dim())), x.is_contiguous()
    if not contiguous:
        strides = x.stride()
        order = tuple(sorted(order, key=lambda each: (-strides[each], each)))
    whole = contiguous and n <= CHUNK * torch.get_num_threads()
    if axis is None:
        return Layout(order, (n,), 1, by_row=True, others=order if whole else None)
    sizes = [x.shape[index] for index in order]
    place = order.index(axis)
    channels, inner = sizes[place], math.prod(sizes[place + 1 :])
    outer = n // (channels * inner)
    others = tuple(index for index in order if index != axis) if whole else None
    shape = (channels, inner) if outer == 1 else (outer, channels * inner)
    return Layout(order, shape, channels, by_row=outer == 1, others=others)


class Buffers:
    """Temporaries that are made for the first chunk and serve the others, a smaller last one by a part of them.

    Parameters
    ----------
    count : int
        How many.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._made: list[Tensor] = []

    def like(self, chunk: Tensor) -> list[Tensor]:
        """Return them in the shape of a chunk."""
        if not self._made:
            self._made = [torch.empty_like(chunk) for _ in range(self._count)]
        if self._made[0].shape != chunk.shape:
            return [each[: chunk.shape[0]] for each in self._made]
        return self._made
