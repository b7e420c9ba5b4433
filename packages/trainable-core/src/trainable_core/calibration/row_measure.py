"""What a candidate grid costs rows of values, in float32: fast enough to try many of them.

For each row and candidate, a few passes over a tile that stays in the cache give the sum of ``|d|**p``, with
``d = v - k``, ``v = x / s`` and the codes ``k = clip(round(v), -a, b)``. The codes are those of the real fake
quantization, as both compute ``x * (1 / s)`` in float32. The distance d, in steps, is off by ``2**-24 * |v|``. A
*precise* measure computes it as ``(x - s * k) / s`` instead: the product is the fake-quantized value itself, and its
difference from a value nearby is exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from trainable_core.calibration.observer import Float32, Float64, Int64

TILE = 2**16
"""Elements measured at once."""

DEPTH = 16
"""Near the ends of a sorted row, a part of it that is condensed holds up to this share of the values beyond it."""

LONG = 128
"""NumPy's loops run along rows that are not shorter than this; shorter rows are laid out with the channels last."""

BLAS = 2**13
"""Longest part of a row that BLAS sums up: longer ones it shares among threads, and their number changes the sum."""

_products_of_rows = getattr(np, "vecdot", None)  # NumPy 2 has it


@dataclass(frozen=True)
class Levels:
    """Candidate grids of C rows, each array (S, C), float32: levels ``k * scale`` with ``first <= k <= last``."""

    scale: Float32
    first: Float32
    last: Float32


def condensed(rows: Float32, points: int) -> tuple[Float32, Float32 | None]:
    """Return rows (C, m) that stand for longer ones, and the weights (m,) of their values; None if the rows are short.

    Sorted, a row is cut as `_cuts` says, and the means of its parts stand for them. Rows of more than `TILE` values are
    condensed tile by tile.
    """
    channels, size = rows.shape
    if size < 2 * points:
        return rows, None
    tiles = [(left, min(left + TILE, size)) for left in range(0, size, TILE)]
    cuts = [_cuts(right - left, points) for left, right in tiles]
    weights = np.concatenate([np.diff(each) for each in cuts]).astype(np.float32)
    means = np.empty((channels, weights.size), np.float32)
    height, column = max(TILE // size, 1), 0
    for (left, right), cut in zip(tiles, cuts, strict=True):
        part = slice(column, column + len(cut) - 1)
        for top in range(0, channels, height):
            ordered = np.sort(rows[top : top + height, left:right], axis=1)
            means[top : top + height, part] = np.add.reduceat(ordered, cut[:-1], axis=1) / weights[part]
        column = part.stop
    return means, weights


@lru_cache(maxsize=64)
def _cuts(size: int, points: int) -> list[int]:
    """Return where to cut sorted values: in `points` equal parts, and in ever finer ones towards the two ends.

    The values at the ends, which decide over the clipping, are kept one by one; further inward, a part holds up to a
    `DEPTH`-th of the values beyond it.
    """
    largest, cut = max(size // points, 1), 0
    cuts = {0, size}
    while cut < size - cut:
        cuts |= {cut, size - cut}
        cut += min(max(cut // DEPTH, 1), largest)
    return sorted(cuts)


@contextmanager
def short_buffers() -> Iterator[None]:
    """Have NumPy's loops run along rows of `LONG` values and more.

    When an operand is broadcast along the rows, NumPy joins rows shorter than its buffers by copying that operand into
    a buffer, value by value, which takes three times as long as the operation.
    """
    before = np.setbufsize(LONG)
    try:
        yield
    finally:
        np.setbufsize(before)


def _dots(first: Float32, second: Float32) -> Float32 | Float64:
    """Return the products of the rows of one array with those of another, or with its only row."""
    if _products_of_rows is None:
        return np.asarray(np.einsum("ij,ij->i", first, np.broadcast_to(second, first.shape)))
    sums: Float64 = np.zeros(len(first))
    for start in range(0, first.shape[1], BLAS):
        part = slice(start, start + BLAS)
        sums += _products_of_rows(first[:, part], second[:, part])
    return sums


def _down(subscripts: str, *operands: Float32) -> Float32:
    """Return sums down the columns, in the order of the rows: NumPy sums up a lone column in another order."""
    if operands[0].shape[1] > 1:
        return np.asarray(np.einsum(subscripts, *operands))
    pairs = [np.repeat(each, 2, axis=1) if each.ndim > 1 else each for each in operands]
    return np.asarray(np.einsum(subscripts, *pairs)[:1])


class RowMeasure:
    """Sums over rows (C, n) of the p-th power of the distance to the nearest level, in steps, in float32.

    Short rows are kept with the channels along the last axis: NumPy's loops are as long as the last axis, and each of
    them costs as much as some hundred values.
    """

    def __init__(
        self,
        rows: Float32,
        weights: Float32 | None,
        exponent: float,
        *,
        per_row: bool,
        precise: bool,
    ) -> None:
        self.channels_last = rows.shape[1] < LONG
        self.rows = np.ascontiguousarray(rows.T) if self.channels_last else rows
        self.weights, self.exponent, self.per_row, self.precise = weights, exponent, per_row, precise
        self.count, self.length = rows.shape
        self.columns = min(self.length, TILE)
        self.together = 2 * rows.size <= TILE
        self.height = max(TILE // self.columns, 1)
        if not self.together:
            self.height = min(self.height, self.count)
        shape = (self.columns, self.height) if self.channels_last else (self.height, self.columns)
        self.buffers = [np.empty(shape, np.float32) for _ in range(3)]

    def __call__(
        self,
        levels: Levels,
        index: Int64,
        wanted: NDArray[np.bool_],
        clips: NDArray[np.bool_],
        *,
        rounding: bool,
    ) -> Float64:
        """Return the sums (S, C) for the wanted candidates of the rows `index`, 0 for the others.

        `clips` says where values may lie beyond the levels. Without `rounding`, the sums are those of clipping alone.
        """
        sums = np.zeros(levels.scale.shape)
        if self.together:
            for candidates, places in self._pairs(wanted):
                clip = bool(clips[candidates, places].any())
                rows = self._rows_at(index[places])
                sums[candidates, places] = self._sums(rows, levels, candidates, places, clip=clip, rounding=rounding)
            return sums
        for top in range(0, index.size, self.height):
            part = slice(top, top + self.height)
            rows = self._picked(index[part])
            count = rows.shape[-1] if self.channels_last else len(rows)
            for candidate in np.flatnonzero(wanted[:, part].any(axis=1)).tolist():
                (chosen,) = np.nonzero(wanted[candidate, part])
                some = (8 if self.channels_last else 4) * chosen.size < 3 * count  # else copying costs more
                where: slice | Int64 = top + chosen if some else part
                measured = rows if not some else rows.take(chosen, axis=1) if self.channels_last else rows[chosen]
                clip = bool(clips[candidate, where].any())
                sums[candidate, where] = self._sums(measured, levels, candidate, where, clip=clip, rounding=rounding)
        return sums

    def with_gains(self, levels: Levels) -> tuple[Float64, Float64]:
        """Return the sums (S, C), and by how much of itself each step should grow: least squares for its codes."""
        sums, products, squares = (np.zeros(levels.scale.shape) for _ in range(3))
        if self.together:
            for candidates, places in self._pairs(np.ones(levels.scale.shape, np.bool_)):
                rows = self._rows_at(places)
                distance, codes = self._distance(rows, levels, candidates, places, clip=True, rounding=True)
                for found, pair in (
                    (sums, (distance, distance)),
                    (products, (distance, codes)),
                    (squares, (codes,) * 2),
                ):
                    found[candidates, places] = self._dot(*pair, 0)
            return sums, products / np.maximum(squares, 1.0)
        for top in range(0, self.count, self.height):
            part = slice(top, top + self.height)
            rows = self.rows[:, part] if self.channels_last else self.rows[part]
            for left, tile in self._tiles(rows):
                for candidate in range(len(sums)):
                    distance, codes = self._distance(tile, levels, candidate, part, clip=True, rounding=True)
                    sums[candidate, part] += self._dot(distance, distance, left)
                    products[candidate, part] += self._dot(distance, codes, left)
                    squares[candidate, part] += self._dot(codes, codes, left)
        return sums, products / np.maximum(squares, 1.0)

    def _pairs(self, wanted: NDArray[np.bool_]) -> Iterator[tuple[Int64, Int64]]:
        """Yield the candidates and the places of rows that are wanted (S, C), as many pairs as fit into a tile.

        Of few rows, many candidates are measured at once: an operation of NumPy costs as much as a thousand values.
        """
        candidates, places = np.nonzero(wanted)
        for start in range(0, candidates.size, self.height):
            yield candidates[start : start + self.height], places[start : start + self.height]

    def _rows_at(self, index: Int64) -> Float32:
        """Return copies of some rows, one more than once where it is asked for."""
        return self.rows.take(index, axis=1) if self.channels_last else self.rows[index]

    def _picked(self, index: Int64) -> Float32:
        """Return some rows in ascending order, without a copy where they are neighbours."""
        first, last = index[0], index[-1]
        neighbours = last - first == index.size - 1
        if self.channels_last:
            return self.rows[:, first : last + 1] if neighbours else self.rows.take(index, axis=1)
        return self.rows[first : last + 1] if neighbours else self.rows[index]

    def _tiles(self, rows: Float32) -> Iterator[tuple[int, Float32]]:
        """Yield the first column of each tile of rows, and the tile."""
        if self.channels_last:
            yield 0, rows
            return
        for left in range(0, self.length, self.columns):
            yield left, rows[:, left : left + self.columns]

    def _sums(
        self, rows: Float32, levels: Levels, candidate: int | Int64, where: slice | Int64, *, clip: bool, rounding: bool
    ) -> Float64:
        sums: Float64 = np.zeros(rows.shape[-1] if self.channels_last else len(rows))
        for left, tile in self._tiles(rows):
            distance, _ = self._distance(tile, levels, candidate, where, clip=clip, rounding=rounding)
            if self.exponent == 2:  # noqa: PLR2004 - the squared error
                sums += self._dot(distance, distance, left)
                continue
            np.abs(distance, out=distance)
            if self.exponent != 1:
                np.power(distance, np.float32(self.exponent), out=distance)
            sums += self._sum(distance, left)
        return sums

    def _sum(self, costs: Float32, left: int) -> Float32 | Float64:
        """Return the weighted sums along the rows of a tile that starts at column `left`."""
        if self.channels_last:
            weights = [] if self.weights is None else [self.weights]
            return _down("ij->j" if self.weights is None else "ij,i->j", costs, *weights)
        if self.weights is None:
            return np.asarray(np.einsum("ij->i", costs))
        return _dots(costs, self.weights[None, left : left + costs.shape[1]])

    def _dot(self, first: Float32, second: Float32, left: int) -> Float32 | Float64:
        """Return the weighted sums of products along the rows of a tile that starts at column `left`."""
        if self.weights is not None:
            product = self.buffers[2][: len(first), : first.shape[1]]
            return self._sum(np.multiply(first, second, out=product), left)  # twice as fast as one einsum of the three
        return _down("ij,ij->j", first, second) if self.channels_last else _dots(first, second)

    def _distance(
        self, tile: Float32, levels: Levels, candidate: int | Int64, where: slice | Int64, *, clip: bool, rounding: bool
    ) -> tuple[Float32, Float32]:
        """Return the distances of values from their levels, in steps, and the codes; both in buffers.

        `candidate` is that of all rows, or an array with that of each row.
        """
        steps, codes, product = (buffer[: tile.shape[0], : tile.shape[1]] for buffer in self.buffers)
        scale, first, last = (
            each[candidate, where] if self.channels_last else each[candidate, where, None]
            for each in (levels.scale, levels.first, levels.last)
        )
        inverse = np.float32(1) / scale
        np.multiply(tile, inverse, out=steps)
        rounded = np.rint(steps, out=codes) if rounding else steps
        if clip:
            if not self.per_row:
                np.clip(rounded, first.flat[0], last.flat[0], out=codes)
            elif not self.channels_last:
                np.clip(rounded, first, last, out=codes)
            else:  # on short rows, NumPy clips slowly by bounds that differ from row to row
                np.minimum(np.maximum(rounded, first, out=codes), last, out=codes)
        if self.precise and rounding:
            np.multiply(codes, scale, out=product)
            np.multiply(np.subtract(tile, product, out=steps), inverse, out=steps)
        else:
            np.subtract(steps, codes, out=steps)
        return steps, codes
