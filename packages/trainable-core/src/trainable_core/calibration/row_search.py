"""The search for the range of least error of weights: what `search` finds, without measuring most of its candidates.

A row holds the values of one channel. On the levels ``k * s``, ``-a <= k <= b``, its error is

    E = sum of |x - s * clip(round(x / s), -a, b)|**p

and `search` measures it for 180 candidates (SYMMETRIC) or 538 (UNIFORM). This module makes the same sweeps, with three
savings.

*Clipping bounds the error from below*: ``E >= C``, where ``C = sum of |x - clip(x, -a * s, b * s)|**p`` grows as the
range shrinks. A sweep goes from the widest candidate to the narrowest and leaves a row when C alone has reached the
least error found. No candidate that could win is left out.

*A candidate is measured in float32*, in units of its step: ``|d|**p`` with ``d = v - clip(round(v), -a, b)`` and
``v = x / s``, a few passes over a tile that stays in the cache. The codes are those of the real fake quantization; the
distance d is off by ``2**-24 * |v|``. Where this matters, for grids of more than `WIDE` bits and for rows that lie on
their grid almost exactly, d is computed as ``(x - s * code) / s``, in which only the rounding of the real fake
quantization is left.

*With few levels the error is smooth* between few minima. So up to `FEW` bits and for the squared error, least squares
replaces the fine sweeps: for given codes k, the best step is

    s' = sum(x * k) / sum(k * k) = s * (1 + sum(d * k) / sum(k * k)),

and E never grows when codes and step are found in turn. The best points around the best coarse candidate are followed
down in this way, for UNIFORM also with all levels moved by one step up or down. With many levels, E as a function of s
has a minimum every ``2**-n_bits`` or so, and all candidates of the fine sweeps are measured.

The winner is measured once more, exactly and on all values, beside the bounded extremes, which win unless it is better.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from trainable_core.calibration.measure import power_error
from trainable_core.calibration.objective import power_objective
from trainable_core.calibration.observer import Float32, Float64, Int64
from trainable_core.calibration.search import COARSE, FAR, FINE, KNEE, NEAR, OCTAVES, GridKind, search
from trainable_core.enums import QuantizationMethod

BLOCK, TILE = 2**20, 2**16
"""Elements searched together, which spreads the cost of NumPy's calls, and elements measured together."""

COARSE_CHUNKS, FINE_CHUNKS = (4, 6), (15, 5)
"""How many candidates are measured between two looks at the clipping: at first, and from then on."""

FEW, WIDE = 4, 10
"""Widths up to which least squares replaces the fine sweeps, and above which distances in steps need more precision."""

POINTS = 12
"""A row is condensed to at least this many points per level, where least squares replaces the fine sweeps."""

DEPTH = 16
"""Near the ends of a sorted row, parts of it that are condensed hold up to this share of the values beyond them."""

LONG = 512
"""NumPy's loops run along rows that are not shorter than this."""

AROUND = np.arange(-4, 5) / 2
"""Points around the best coarse candidate, in units of the spacing of `COARSE` there."""

STARTS, DESCENTS = 3, (3, 2)
"""How many of these points are followed, and how many of their successors in each further step."""

ON_GRID = 1 / 64
"""Root mean error of the values other than zero, in steps, below which a row counts as lying on its grid."""

SMOOTH = 16
"""Rows of this many values per point are condensed at every width."""

CLEAR = 1 - 2.0**-7
"""An error below the other by this factor is less, whatever float32 did to the two; else they are measured exactly."""

REACHED = 0.49
"""How far beyond the last level a value rounds to it, in steps: half a step, less what float32 may make of it."""

SLACK = 1 - 2.0**-12
"""Bounds are lowered by this factor before they exclude anything: they are sums in float32."""

MAX_EXPONENT = 16
"""Up to this exponent, powers of distances fit into float32."""


@dataclass(frozen=True)
class Levels:
    """Candidate grids of C rows, each array (S, C), float32: levels ``k * scale`` with ``first <= k <= last``."""

    scale: Float32
    first: Float32
    last: Float32

    def of(self, columns: Int64) -> Levels:
        """Return the grids of some rows."""
        return Levels(self.scale[:, columns], self.first[:, columns], self.last[:, columns])


def search_rows(kind: GridKind, rows: Float32, exponent: float) -> Float64:
    """Return the range of least error among the candidates, for each row.

    Parameters
    ----------
    kind : GridKind
        The grid.
    rows : float32 array, shape (C, n)
        Finite values, one row per channel.
    exponent : float
        Exponent of the error, > 0. Beyond `MAX_EXPONENT` the search is exhaustive.

    Returns
    -------
    float64 array, shape (2, C)
        Bounded ends. Never worse than the bounded extremes, which win all ties.

    Notes
    -----
    A row is cut and summed in the same way whatever the number of rows, so its result doesn't depend on the others.
    """
    if exponent > MAX_EXPONENT:
        return search(kind, _extremes(kind, rows), power_objective(kind, rows, exponent))
    height = max(BLOCK // rows.shape[1], 1)
    blocks = [rows[top : top + height] for top in range(0, len(rows), height)]
    return np.concatenate(
        [_search_block(kind, block, exponent, precise=kind.n_bits > WIDE) for block in blocks], axis=1
    )


def _extremes(kind: GridKind, rows: Float32) -> Float64:
    return kind.extremes(rows.min(axis=1).astype(np.float64), rows.max(axis=1).astype(np.float64))


def _search_block(kind: GridKind, rows: Float32, exponent: float, *, precise: bool) -> Float64:
    """Return the ends (2, C) for rows that are searched together."""
    few = kind.n_bits <= FEW and exponent == 2  # noqa: PLR2004 - the squared error
    points = POINTS * 2**kind.n_bits
    smooth = rows.shape[1] >= points * (SMOOTH if exponent == 2 else SMOOTH**2)  # noqa: PLR2004
    with _short_buffers(), np.errstate(over="ignore", under="ignore", invalid="ignore"):
        found = _RowSearch(kind, rows, None, exponent, precise, _extremes(kind, rows))
        at_extremes = found.least.copy()
        if kind.method is not QuantizationMethod.POWER_OF_TWO and (few or smooth):
            sketch = _RowSearch(kind, *_condensed(rows, points), exponent, precise, found.extremes)
            sketch.coarse_sweeps()
            if few:
                pool = sketch.descents()
                for count in DESCENTS:
                    pool = [found.follow(scale, first) for scale, first in _best(pool, count)]
            else:
                sketch.fine_sweeps()
            found.try_ends(kind.bounded(found.extremes * kind.reach))
            found.try_ends(sketch.best)
        else:
            found.coarse_sweeps()
            found.fine_sweeps()
        ends = found.best
        (close,) = np.nonzero(found.least > at_extremes * CLEAR)
        if close.size:
            candidates = [found.extreme_ends[:, close], ends[:, close]]
            errors = power_error(rows[close], None, [kind.qparams(each) for each in candidates], exponent)
            ends[:, close] = np.where(errors[1] < errors[0], candidates[1], candidates[0])
        (again,) = np.nonzero(found.on_grid & (at_extremes > 0)) if not precise else ((),)
        if len(again):
            ends[:, again] = _search_block(kind, rows[again], exponent, precise=True)
    return ends


def _condensed(rows: Float32, points: int) -> tuple[Float32, Float32 | None]:
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


@cache
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
def _short_buffers() -> Iterator[None]:
    """Have NumPy's loops run along rows of `LONG` values and more.

    When an operand is broadcast along the rows, NumPy joins rows shorter than its buffers by copying that operand into
    a buffer, value by value, which takes three times as long as the operation.
    """
    before = np.setbufsize(LONG)
    try:
        yield
    finally:
        np.setbufsize(before)


class _RowSearch:
    """The sweeps over a block of rows: the best ends so far, their errors, and where they are among the candidates."""

    def __init__(
        self,
        kind: GridKind,
        rows: Float32,
        weights: Float32 | None,
        exponent: float,
        precise: bool,  # noqa: FBT001 - internal
        extremes: Float64,
    ) -> None:
        self.kind, self.rows, self.exponent, self.extremes = kind, rows, exponent, extremes
        self.lowest, self.highest = rows.min(axis=1).astype(np.float64), rows.max(axis=1).astype(np.float64)
        # errors are sums in units of a power of two that is not below a row's largest magnitude
        self.inverse_unit = np.ldexp(1.0, -np.frexp(np.maximum(self.highest, -self.lowest))[1])
        self.measure = _Measure(rows, weights, exponent, kind.method is QuantizationMethod.UNIFORM, precise)
        self.every = np.arange(len(rows))
        self.extreme_ends = kind.bounded(self.extremes)
        self.best = self.extreme_ends.copy()
        self.octaves = np.zeros_like(self.extremes)  # (2, C) of the best so far, against the extremes
        levels = self.levels(self.best[None])
        self.least = self.errors(levels, self.every)[0]

    @property
    def moves(self) -> list[tuple[NDArray[np.bool_], Int64]]:
        """Which ends (2, C) move together, and for which rows: both; for UNIFORM, then the upper one and the lower."""
        both = np.ones(self.extremes.shape, np.bool_)
        moves = [(both, self.every)]
        (two_sided,) = np.nonzero((self.extremes != 0).all(axis=0))
        if self.kind.method is QuantizationMethod.UNIFORM and two_sided.size:
            upper = both & [[False], [True]]
            moves += [(upper, two_sided), (~upper, two_sided)]
        return moves

    def coarse_sweeps(self) -> None:
        """Try the coarse candidates of `search`."""
        coarse = OCTAVES if self.kind.method is QuantizationMethod.POWER_OF_TWO else COARSE
        for moving, index in self.moves:
            self.sweep(moving, (math.log2(self.kind.reach) - coarse)[:, None, None], index, COARSE_CHUNKS)

    def fine_sweeps(self) -> None:
        """Try the fine candidates of `search`."""
        if self.kind.method is QuantizationMethod.POWER_OF_TWO:
            return
        for moving, index in self.moves:
            spacing = np.where(self.octaves > -KNEE, NEAR, FAR)
            self.sweep(moving, self.octaves + spacing * FINE[::-1, None, None], index, FINE_CHUNKS)

    def sweep(self, moving: NDArray[np.bool_], candidates: Float64, index: Int64, chunks: tuple[int, int]) -> None:
        """Try candidates (S, 2, C) or (S, 1, 1), in octaves and descending, for the moving ends (2, C) of some rows."""
        start, stop = self.octaves.copy(), 0
        for position in _chunks(len(candidates), chunks):
            chunk = candidates[position]
            tried = np.where(moving, chunk, start)[:, :, index]
            ends = self.kind.bounded(self.extremes[:, index] * np.exp2(tried))
            levels = self.levels(ends)
            if stop:
                clipping = self.errors(self.widest_of(ends[:1], levels), index, clipping=True)[0]
                (kept,) = np.nonzero(clipping * SLACK < self.least[index])
                index, tried, ends, levels = index[kept], tried[:, :, kept], ends[:, :, kept], levels.of(kept)
            if not index.size:
                return
            errors = self.errors(levels, index, self.worth_measuring(levels, index))
            winner = errors.argmin(axis=0)
            columns = np.arange(index.size)
            self.take(errors[winner, columns], ends[winner, :, columns].T, index, tried[winner, :, columns].T)
            stop += len(chunk)

    def widest_of(self, ends: Float64, levels: Levels) -> Levels:
        """Return the range (1, C) that holds the levels of the first candidate and of all that come after it."""
        scale = levels.scale[:1]
        if self.kind.method is not QuantizationMethod.UNIFORM:
            return Levels(scale, levels.first[:1], levels.last[:1])
        # zero moves the levels by up to half a step, and the step is rounded up to 24 - n_bits significant bits
        beyond = 0.5 + 2.0 ** (2 * self.kind.n_bits - 23)
        first, last = ends[:, 0] / scale - beyond, ends[:, 1] / scale + beyond
        return Levels(scale, first.astype(np.float32), last.astype(np.float32))

    def worth_measuring(self, levels: Levels, index: Int64) -> NDArray[np.bool_]:
        """Return which candidates (S, C) don't already lose by the clipping of one value, and aren't the one before."""
        scale = levels.scale.astype(np.float64)
        beyond = np.maximum(self.highest[index] - scale * levels.last, scale * levels.first - self.lowest[index])
        worth = (np.maximum(beyond, 0.0) * self.inverse_unit[index]) ** self.exponent * SLACK < self.least[index]
        worth[1:] &= (levels.scale[1:] != levels.scale[:-1]) | (levels.first[1:] != levels.first[:-1])
        return np.asarray(worth)

    def try_ends(self, ends: Float64) -> None:
        """Try one candidate (2, C)."""
        self.take(self.errors(self.levels(ends[None]), self.every)[0], ends, self.every)

    def take(self, errors: Float64, ends: Float64, index: Int64, octaves: Float64 | None = None) -> None:
        """Keep the candidates (2, C) of some rows where they are better."""
        better = errors < self.least[index]
        rows = index[better]
        self.least[rows], self.best[:, rows] = errors[better], ends[:, better]
        if octaves is not None:
            self.octaves[:, rows] = octaves[:, better]

    def descents(self) -> list[tuple[Float64, Float64, Float64]]:
        """Return points found by least squares from those around the best candidate, as `follow` gives them."""
        spacing = np.where((self.octaves > -KNEE).all(axis=0), NEAR, FAR)
        grid = self.levels(self.best[None])
        scale, first = grid.scale[0].astype(np.float64), grid.first[0].astype(np.float64)
        pool = [self.follow(scale * np.exp2(octaves * spacing), first) for octaves in AROUND]
        shifts = (0, -1, 1) if self.kind.method is QuantizationMethod.UNIFORM else (0,)
        return [self.follow(scale, first + shift) for scale, first in _best(pool, STARTS) for shift in shifts]

    def follow(self, scale: Float64, first: Float64) -> tuple[Float64, Float64, Float64]:
        """Measure a grid (C,) and return its errors, the step of least squares for its codes, and its first codes."""
        if self.kind.method is QuantizationMethod.UNIFORM:
            codes = 2**self.kind.n_bits - 1
            first = np.clip(first, -codes, 0)
            ends = self.kind.bounded(np.stack([first * scale, (first + codes) * scale]))
        else:
            threshold = scale * 2.0 ** (self.kind.n_bits - int(self.kind.signed))
            ends = self.kind.bounded(np.stack([-threshold if self.kind.signed else 0 * threshold, threshold]))
        levels = self.levels(ends[None])
        sums, gains = self.measure.with_gains(levels)
        errors = self.in_units(sums, levels.scale[0], self.every)
        self.take(errors, ends, self.every)
        return errors, levels.scale[0] * (1.0 + gains), levels.first[0].astype(np.float64)

    def levels(self, ends: Float64) -> Levels:
        """Return the grids of bounded ends (S, 2, C)."""
        shape = (ends.shape[0], ends.shape[2])
        grid = self.kind.qparams(ends.transpose(1, 0, 2).reshape(2, -1))
        first, last = grid.quant_min - grid.zero_point, grid.quant_max - grid.zero_point
        return Levels(*(each.astype(np.float32).reshape(shape) for each in (grid.scale, first, last)))

    def errors(
        self, levels: Levels, index: Int64, wanted: NDArray[np.bool_] | None = None, *, clipping: bool = False
    ) -> Float64:
        """Return the errors (S, C) of candidates for some rows, infinite where they aren't wanted.

        With `clipping`, what they would be without rounding.
        """
        inverse = 1.0 / levels.scale.astype(np.float64)
        above, below = self.highest[index] * inverse - levels.last, levels.first - self.lowest[index] * inverse
        clips = np.maximum(above, below) > (0.0 if clipping else REACHED)
        if wanted is None:
            wanted = clips if clipping else np.ones_like(clips)
        sums = self.measure(levels, index, wanted, clips, clipping)
        if not clipping:
            sums[~wanted] = np.inf
        return self.in_units(sums, levels.scale, index)

    def in_units(self, sums: Float64, scale: Float32, index: Int64) -> Float64:
        """Return errors that were measured in steps in units of the rows."""
        return np.asarray(sums * (scale * self.inverse_unit[index]) ** self.exponent)

    @property
    def on_grid(self) -> NDArray[np.bool_]:
        """Which rows lie on their best grid almost exactly, so that float32 can't tell the best candidates apart."""
        scale = self.kind.qparams(self.best).scale * self.inverse_unit
        return np.asarray(self.least <= np.count_nonzero(self.rows, axis=1) * (scale * ON_GRID) ** self.exponent)


class _Measure:
    """Sums over rows (C, n) of the p-th power of the distance to the nearest level, in steps, in float32."""

    def __init__(
        self,
        rows: Float32,
        weights: Float32 | None,
        exponent: float,
        per_row: bool,  # noqa: FBT001 - internal
        precise: bool,  # noqa: FBT001 - internal
    ) -> None:
        self.rows, self.weights, self.exponent, self.per_row, self.precise = rows, weights, exponent, per_row, precise
        self.columns = min(rows.shape[1], TILE)
        self.height = min(max(TILE // self.columns, 1), len(rows))
        self.buffers = [np.empty((self.height, self.columns), np.float32) for _ in range(3)]

    def __call__(
        self,
        levels: Levels,
        index: Int64,
        wanted: NDArray[np.bool_],
        clips: NDArray[np.bool_],
        clipping: bool,  # noqa: FBT001 - internal
    ) -> Float64:
        """Return the sums (S, C) for the wanted candidates of the rows `index`, 0 for the others.

        `clips` says where values may lie beyond the levels. With `clipping`, values aren't rounded.
        """
        sums = np.zeros(levels.scale.shape)
        for top in range(0, index.size, self.height):
            part = slice(top, top + self.height)
            rows = self._picked(index[part])
            for candidate in np.flatnonzero(wanted[:, part].any(axis=1)):
                (chosen,) = np.nonzero(wanted[candidate, part])
                some = 4 * chosen.size < 3 * len(rows)  # else copying costs more than measuring them all
                where: slice | Int64 = top + chosen if some else part
                measured = rows[chosen] if some else rows
                clip = bool(clips[candidate, where].any())
                sums[candidate, where] = self._sums(
                    measured, levels, candidate, where, clip=clip, rounding=not clipping
                )
        return sums

    def with_gains(self, levels: Levels) -> tuple[Float64, Float64]:
        """Return the sums (C,) for one grid, and by how much of itself its step should grow: least squares."""
        sums, gains = np.zeros(len(self.rows)), np.zeros(len(self.rows))
        for top in range(0, len(self.rows), self.height):
            part = slice(top, top + self.height)
            products, squares = 0.0, 0.0
            for left in range(0, self.rows.shape[1], self.columns):
                tile = self.rows[part, left : left + self.columns]
                distance, codes = self._distance(tile, levels, 0, part, clip=True, rounding=True)
                sums[part] += self._dot(distance, distance, left)
                products = products + self._dot(distance, codes, left).astype(np.float64)
                squares = squares + self._dot(codes, codes, left).astype(np.float64)
            gains[part] = products / np.maximum(squares, 1.0)
        return sums, gains

    def _picked(self, index: Int64) -> Float32:
        """Return some rows in ascending order, without a copy where they are neighbours."""
        first, last = index[0], index[-1]
        return self.rows[first : last + 1] if last - first == index.size - 1 else self.rows[index]

    def _sums(
        self, rows: Float32, levels: Levels, candidate: int, where: slice | Int64, *, clip: bool, rounding: bool
    ) -> Float64:
        sums = np.zeros(len(rows))
        for left in range(0, rows.shape[1], self.columns):
            tile = rows[:, left : left + self.columns]
            distance, _ = self._distance(tile, levels, candidate, where, clip=clip, rounding=rounding)
            if self.exponent == 2:  # noqa: PLR2004 - the squared error
                sums += self._dot(distance, distance, left)
                continue
            np.abs(distance, out=distance)
            if self.exponent != 1:
                np.power(distance, np.float32(self.exponent), out=distance)
            sums += self._sum(distance, left)
        return sums

    def _sum(self, costs: Float32, left: int) -> Float32:
        """Return the sums along the rows of a tile that starts at column `left`."""
        if self.weights is None:
            return np.asarray(np.einsum("ij->i", costs))
        return np.asarray(np.einsum("ij,j->i", costs, self.weights[left : left + costs.shape[1]]))

    def _dot(self, first: Float32, second: Float32, left: int) -> Float32:
        """Return the sums of products along the rows of a tile that starts at column `left`."""
        if self.weights is None:
            return np.asarray(np.einsum("ij,ij->i", first, second))
        return np.asarray(np.einsum("ij,ij,j->i", first, second, self.weights[left : left + first.shape[1]]))

    def _distance(
        self, tile: Float32, levels: Levels, candidate: int, where: slice | Int64, *, clip: bool, rounding: bool
    ) -> tuple[Float32, Float32]:
        """Return the distances of values from their levels, in steps, and the codes; both in buffers."""
        steps, codes, product = (buffer[: len(tile), : tile.shape[1]] for buffer in self.buffers)
        scale = levels.scale[candidate, where, None]
        inverse = np.float32(1) / scale
        np.multiply(tile, inverse, out=steps)
        rounded = np.rint(steps, out=codes) if rounding else steps
        if clip:
            first, last = levels.first[candidate, where, None], levels.last[candidate, where, None]
            if not self.per_row:
                np.clip(rounded, first[0, 0], last[0, 0], out=codes)
            elif tile.shape[1] >= LONG:
                np.clip(rounded, first, last, out=codes)
            else:  # on short rows, NumPy clips slowly by bounds that differ from row to row
                np.minimum(np.maximum(rounded, first, out=codes), last, out=codes)
        if self.precise and rounding:
            np.multiply(codes, scale, out=product)
            np.multiply(np.subtract(tile, product, out=steps), inverse, out=steps)
        else:
            np.subtract(steps, codes, out=steps)
        return steps, codes


def _chunks(count: int, sizes: tuple[int, int]) -> Iterator[slice]:
    """Return slices that cut ``range(count)``, of the first size once and of the second from then on.

    Examples
    --------
    >>> list(_chunks(10, (4, 5)))
    [slice(0, 4, None), slice(4, 9, None), slice(9, 10, None)]
    """
    first, then = sizes
    yield slice(0, min(first, count))
    for start in range(first, count, then):
        yield slice(start, min(start + then, count))


def _best(pool: Sequence[tuple[Float64, Float64, Float64]], count: int) -> list[tuple[Float64, Float64]]:
    """Return the successors of the points of least error, for each row: its `count` best steps and first codes."""
    errors, scale, first = (np.stack(each) for each in zip(*pool, strict=True))
    order = errors.argsort(axis=0, kind="stable")[:count]
    steps, codes = np.take_along_axis(scale, order, axis=0), np.take_along_axis(first, order, axis=0)
    return list(zip(steps, codes, strict=True))
