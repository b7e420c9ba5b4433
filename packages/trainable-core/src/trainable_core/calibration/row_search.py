"""The search for the range of least error of weights: what `search` finds, without measuring most of its candidates.

A row holds the values of one channel. On the levels ``k * s``, ``-a <= k <= b``, its error is

    E = sum of |x - s * clip(round(x / s), -a, b)|**p

and `search` measures it, in float64, for 180 candidates (SYMMETRIC) or 538 (UNIFORM). This module makes the same sweeps
over them with five savings.

*Clipping bounds the error from below*: ``E >= C``, where ``C = sum of |x - clip(x, -a * s, b * s)|**p`` grows as the
range shrinks. A sweep goes from the widest candidate to the narrowest and leaves a row when C alone has reached the
least error found. No candidate that could win is left out.

*A candidate is measured in float32*, see `row_measure`. Where two errors are closer than float32 can tell, beside the
extremes or for rows that lie on their grid almost exactly, they are measured exactly.

*With few levels the error is smooth* between few minima. So up to `FEW` bits and for the squared error, least squares
replaces the fine sweeps: for given codes k, the best step is

    s' = sum(x * k) / sum(k * k) = s * (1 + sum(d * k) / sum(k * k)),    d = x / s - k,

and E never grows when codes and step are found in turn. The best points around the best coarse candidate are followed
down in this way, for UNIFORM also with all levels moved by one step up or down. With many levels, E as a function of s
has a minimum every ``2**-n_bits`` or so, and all candidates of the fine sweeps are measured.

*Neighbours among the candidates have similar errors.* With n values and not too many levels, the errors of the fine
candidates differ as if by chance, by about ``1 / sqrt(n)`` of themselves, and those of close neighbours differ less. So
for rows of at least `MANY` values, every second or fourth fine candidate is measured, and then those beside a good one.
The errors of rows that hold the same values again and again jump; for these, and with more than 8 bits, every candidate
is measured.

*Neighbours among the sorted values count together* where the levels are far apart beside them: the sweeps go over a
row's condensed form, as `row_measure.condensed` makes it, and what they found is followed down, or measured, on all
values. This is so for rows of at least ``2 * POINTS`` values per level where least squares takes over, and elsewhere of
``SMOOTH * POINTS``, or ``SMOOTH**2 * POINTS`` for exponents other than 2.

The first two savings leave the result as it is. The third and the last change it: on grids of up to `FEW` bits, errors
are lower on average, most of all for UNIFORM, whose ends `search` moves one at a time. About one row in 400 of unusual
distributions ends up more than 0.1 per cent above what `search` finds, by up to a few per cent. The fourth leaves the
error within 0.1 per cent, but for about one row in 2000 of unusual distributions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainable_core.calibration.measure import power_error
from trainable_core.calibration.objective import power_objective
from trainable_core.calibration.observer import Float32, Float64, Int64
from trainable_core.calibration.row_measure import TILE, Levels, RowMeasure, condensed, short_buffers
from trainable_core.calibration.search import COARSE, FAR, KNEE, NEAR, OCTAVES, GridKind, search
from trainable_core.enums import QuantizationMethod
from trainable_core.qparams import lower_bound

BLOCK, ROWS = 2**20, 2**13
"""Elements and rows searched together at most: enough to spread the cost of NumPy's calls, and little memory."""

COARSE_CHUNKS, FINE_CHUNKS = (4, 6), (15, 5)
"""How many candidates are measured between two looks at the clipping: at first, and from then on."""

SMALL, SMALL_CHUNKS, SMALL_FINE_CHUNKS = 2**16, (8, 24), (15, 15)
"""The same for blocks of fewer elements, where looking costs more than measuring."""

FEW, WIDE = 4, 10
"""Widths up to which least squares replaces the fine sweeps, and above which float32 needs more care."""

HALF = 16
"""Fine candidates from one coarse candidate to the next, which is the last of them and is left out."""

APART = {1: 4, 2: 4, 3: 4, 4: 4, 5: 4, 6: 4, 7: 2, 8: 2}
"""How far apart the fine candidates are that are measured in any case, by width; with more levels, all of them are."""

MANY, AGAIN, NOISE = 128, 1 / 16, 4.0
"""Only for rows of so many values, of which no larger part comes again, and not beside a candidate that is worse than
the best by more than `NOISE` times what errors differ by chance."""

POINTS, SMOOTH = 24, 16
"""Points per level of a condensed row, and values per point from which every search starts on condensed rows."""

AROUND = np.arange(-4, 5) / 2
"""Points around the best coarse candidate, in units of the spacing of `COARSE` there."""

STARTS, DESCENTS = 3, (3, 2)
"""How many of these points are followed, and how many of their successors in each further step."""

ON_GRID = 1 / 64
"""Root mean error of the values other than zero, in steps, below which a row counts as lying on its grid."""

CLEAR = 1 - 2.0**-7
"""An error below another by this factor is less, whatever float32 did to the two."""

REACHED = 0.49
"""How far beyond the last level a value rounds to it, in steps: half a step, less what float32 may make of it."""

SLACK = 1 - 2.0**-12
"""Bounds are lowered by this factor before they exclude anything: they are sums in float32."""

MAX_EXPONENT = 16
"""Up to this exponent, powers of distances fit into float32."""

Moves = tuple[bool, bool]
"""Which ends move, the lower one and the upper one."""

TINY = 4
"""Rows of so few values may have errors that only float64 can tell from zero."""


def search_rows(kind: GridKind, rows: Float32, exponent: float) -> Float64:
    """Return the range of least error among the candidates, for each row.

    Parameters
    ----------
    kind : GridKind
        The grid.
    rows : float32 array, shape (C, n)
        Finite values, one row per channel.
    exponent : float
        Exponent of the error, > 0. Beyond `MAX_EXPONENT`, and for `TINY` rows, the search is exhaustive.

    Returns
    -------
    float64 array, shape (2, C)
        Bounded ends. Never worse than the bounded extremes, which win all ties.

    Notes
    -----
    A row is cut and summed in the same way whatever the number of rows, so its result doesn't depend on the others.
    """
    height = min(max(BLOCK // rows.shape[1], 1), ROWS)
    blocks = [rows[top : top + height] for top in range(0, len(rows), height)]
    if exponent > MAX_EXPONENT or rows.shape[1] <= TINY:
        found = [search(kind, _extremes(kind, block), power_objective(kind, block, exponent)) for block in blocks]
        return np.concatenate(found, axis=1)
    return np.concatenate(
        [_search_block(kind, block, exponent, precise=kind.n_bits > WIDE) for block in blocks], axis=1
    )


def _extremes(kind: GridKind, rows: Float32) -> Float64:
    return kind.extremes(rows.min(axis=1).astype(np.float64), rows.max(axis=1).astype(np.float64))


def _search_block(kind: GridKind, rows: Float32, exponent: float, *, precise: bool) -> Float64:
    """Return the ends (2, C) for rows that are searched together."""
    few = kind.n_bits <= FEW and exponent == 2  # noqa: PLR2004 - the squared error
    size = POINTS * 2**kind.n_bits
    smooth = rows.shape[1] >= size * (SMOOTH if exponent == 2 else SMOOTH**2)  # noqa: PLR2004
    with short_buffers(), np.errstate(over="ignore", under="ignore", invalid="ignore"):
        found = _RowSearch(kind, rows, None, exponent, _extremes(kind, rows), precise=precise)
        at_extremes = found.least.copy()
        if kind.method is not QuantizationMethod.POWER_OF_TWO and (few or smooth):
            sketch = _RowSearch(kind, *condensed(rows, size), exponent, found.extremes, precise=precise)
            sketch.coarse_sweeps()
            if few:
                points = sketch.descents()
                for count in DESCENTS:
                    points = found.follow(*points.best(count))
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
            measured = rows if close.size == len(rows) else rows[close]
            errors = power_error(measured, None, [kind.qparams(each) for each in candidates], exponent)
            ends[:, close] = np.where(errors[1] < errors[0], candidates[1], candidates[0])
        if not precise:
            (again,) = np.nonzero(found.on_grid & (at_extremes > 0))
            if again.size:
                on_grid = rows if again.size == len(rows) else rows[again]
                ends[:, again] = _search_block(kind, on_grid, exponent, precise=True)
    return ends


@dataclass(frozen=True)
class Points:
    """Grids that were measured, each array (S, C), and where least squares goes from them."""

    errors: Float64
    scale: Float64
    first: Float64

    def best(self, count: int) -> tuple[Float64, Float64]:
        """Return the steps and first codes (count, C) that follow the points of least error, row by row."""
        order = self.errors.argsort(axis=0, kind="stable")[:count]
        return np.take_along_axis(self.scale, order, axis=0), np.take_along_axis(self.first, order, axis=0)


class _RowSearch:
    """The sweeps over a block of rows: the best ends so far, their errors, and where they are among the candidates."""

    def __init__(
        self,
        kind: GridKind,
        rows: Float32,
        weights: Float32 | None,
        exponent: float,
        extremes: Float64,
        *,
        precise: bool,
    ) -> None:
        self.kind, self.rows, self.exponent, self.extremes = kind, rows, exponent, extremes
        self.lowest, self.highest = rows.min(axis=1).astype(np.float64), rows.max(axis=1).astype(np.float64)
        # errors are sums in units of a power of two that is not below a row's largest magnitude
        self.inverse_unit = np.ldexp(1.0, -np.frexp(np.maximum(self.highest, -self.lowest))[1])
        self.measure = RowMeasure(
            rows, weights, exponent, per_row=kind.method is QuantizationMethod.UNIFORM, precise=precise
        )
        self.every = np.arange(len(rows))
        self.extreme_ends = kind.bounded(self.extremes)
        self.best = self.extreme_ends.copy()
        self.octaves = np.zeros_like(self.extremes)  # (2, C) of the best so far, against the extremes
        levels = self.levels(self.best[None])
        self.least = self.errors(levels, self.every)[0]

    @property
    def moves(self) -> list[tuple[Moves, Int64]]:
        """Which ends move together, and for which rows: both; for UNIFORM, then the upper one and the lower."""
        moves: list[tuple[Moves, Int64]] = [((True, True), self.every)]
        (two_sided,) = np.nonzero((self.extremes != 0).all(axis=0))
        if self.kind.method is QuantizationMethod.UNIFORM and two_sided.size:
            moves += [((False, True), two_sided), ((True, False), two_sided)]
        return moves

    def coarse_sweeps(self) -> None:
        """Try the coarse candidates of `search`."""
        coarse = OCTAVES if self.kind.method is QuantizationMethod.POWER_OF_TWO else COARSE
        chunks = SMALL_CHUNKS if self.rows.size < SMALL else COARSE_CHUNKS
        for moves, index in self.moves:
            self.sweep(moves, (math.log2(self.kind.reach) - coarse)[:, None, None], index, chunks)

    def fine_sweeps(self) -> None:
        """Try the fine candidates of `search`: a part of them, and of the others those beside one that is good.

        How far apart two candidates have to be to have errors of their own depends on the width: `APART`.
        """
        if self.kind.method is QuantizationMethod.POWER_OF_TWO:
            return
        widest = 1 if self.rows.shape[1] < MANY else APART.get(self.kind.n_bits, 1)
        noise = NOISE * _noise(self.rows) if widest > 1 else 0.0
        chunks = SMALL_FINE_CHUNKS if self.rows.size < SMALL else FINE_CHUNKS
        for moves, index in self.moves:
            spacing = np.where(self.octaves > -KNEE, NEAR, FAR)
            centre = self.octaves.copy()
            errors = np.full((2 * HALF + 1, self.every.size), np.inf)  # HALF is the place of the centre
            errors[HALF] = self.least
            stride = widest
            while stride:
                places = _places(stride, first=stride == widest)
                wanted = None
                if stride < widest:
                    good = errors <= self.least * (1.0 + noise * (stride / widest) ** 2)
                    wanted = good[places + stride] | good[places - stride]
                candidates = centre + spacing * ((places - HALF) / HALF)[:, None, None]
                errors[places] = self.sweep(moves, candidates, index, chunks, start=centre, wanted=wanted)
                stride //= 2

    def sweep(
        self,
        moves: Moves,
        candidates: Float64,
        index: Int64,
        chunks: tuple[int, int],
        start: Float64 | None = None,
        wanted: NDArray[np.bool_] | None = None,
    ) -> Float64:
        """Try candidates (S, 2, C) or (S, 1, 1), in octaves and descending, for the moving ends of some rows.

        The other ends are where they are at `start`, by default at the best so far. `wanted` (S, C) leaves candidates
        out. Returns the errors (S, C), infinite for what was not measured.
        """
        start, stop = self.octaves.copy() if start is None else start, 0
        index = index[self.least[index] > 0]
        found = np.full((len(candidates), self.every.size), np.inf)
        for position in _chunks(len(candidates), chunks):
            chunk = candidates[position]
            if stop:
                # no later candidate is worth more than the widest one of this chunk
                widest = self.ends_of(moves, chunk[:1], start, index)
                levels = self.widest_of(widest, self.levels(widest))
                index = index[self.beyond(levels, index)[0] < self.allowed(index)]
                if index.size:
                    widest = self.ends_of(moves, chunk[:1], start, index)
                    levels = self.widest_of(widest, self.levels(widest))
                    clipping = self.errors(levels, index, clipping=True)[0]
                    index = index[clipping * SLACK < self.least[index]]
            if not index.size:
                return found
            ends = self.ends_of(moves, chunk, start, index)
            levels = self.levels(ends)
            worth = self.worth_measuring(levels, index)
            if wanted is not None:
                worth &= wanted[position][:, index]
            errors = self.errors(levels, index, worth)
            found[position, index] = errors
            winner, columns = errors.argmin(axis=0), np.arange(index.size)
            octaves = [
                chunk[winner, end % chunk.shape[1], index % chunk.shape[2]] if moves[end] else start[end, index]
                for end in (0, 1)
            ]
            self.take(errors[winner, columns], ends[winner, :, columns].T, index, np.stack(octaves))
            stop += len(chunk)
        return found

    def ends_of(self, moves: Moves, candidates: Float64, start: Float64, index: Int64) -> Float32:
        """Return the bounded ends (S, 2, C) of candidates for some rows; parameters as in `sweep`."""
        ends = np.empty((len(candidates), 2, index.size), np.float32)
        for end in (0, 1):
            octaves = start[None, end] if not moves[end] else candidates[:, end % candidates.shape[1]]
            if octaves.shape[1] > 1:
                octaves = octaves[:, index]
            ends[:, end] = self.extremes[end, index] * np.exp2(octaves)
        return self.kind.bound_in_place(ends)

    def widest_of(self, ends: Float32 | Float64, levels: Levels) -> Levels:
        """Return the range (1, C) that holds the levels of the first candidate and of all that come after it."""
        scale = levels.scale[:1]
        if self.kind.method is not QuantizationMethod.UNIFORM:
            return Levels(scale, levels.first[:1], levels.last[:1])
        # zero moves the levels by up to half a step; the step is rounded up to 24 - n_bits significant bits; and where
        # the range is narrower than it may be, either end moves
        beyond = 0.5 + 2.0 ** (2 * self.kind.n_bits - 23) + float(lower_bound(self.kind.min_threshold)) / scale
        ends = ends.astype(np.float64)
        first, last = ends[:, 0] / scale - beyond, ends[:, 1] / scale + beyond
        return Levels(scale, first.astype(np.float32), last.astype(np.float32))

    def beyond(self, levels: Levels, index: Int64) -> Float64:
        """Return how far (S, C) the farthest value of each row lies beyond the levels; negative where none does."""
        scale = levels.scale.astype(np.float64)
        above = self.highest[index] - scale * levels.last
        np.multiply(scale, levels.first, out=scale)
        beyond: Float64 = np.maximum(above, np.subtract(scale, self.lowest[index], out=scale), out=above)
        return beyond

    def allowed(self, index: Int64) -> Float64:
        """Return how far beyond the levels the farthest value of some rows may lie: else it costs the least error."""
        return np.asarray((self.least[index] / SLACK) ** (1 / self.exponent) / self.inverse_unit[index])

    def worth_measuring(self, levels: Levels, index: Int64) -> NDArray[np.bool_]:
        """Return which candidates (S, C) don't already lose by the clipping of one value, and aren't the one before."""
        worth = self.beyond(levels, index) < self.allowed(index)
        same = levels.scale[1:] == levels.scale[:-1]
        if same.any():
            worth[1:] &= ~same | (levels.first[1:] != levels.first[:-1])
        return np.asarray(worth)

    def try_ends(self, ends: Float64) -> None:
        """Try one candidate (2, C)."""
        self.take(self.errors(self.levels(ends[None]), self.every)[0], ends, self.every)

    def take(self, errors: Float64, ends: Float32 | Float64, index: Int64, octaves: Float64 | None = None) -> None:
        """Keep the candidates (2, C) of some rows where they are better."""
        better = errors < self.least[index]
        rows = index[better]
        self.least[rows], self.best[:, rows] = errors[better], ends[:, better]
        if octaves is not None:
            self.octaves[:, rows] = octaves[:, better]

    def descents(self) -> Points:
        """Return points found by least squares from those around the best candidate, as `follow` gives them."""
        spacing = np.where((self.octaves > -KNEE).all(axis=0), NEAR, FAR)
        grid = self.levels(self.best[None])
        around = grid.scale.astype(np.float64) * np.exp2(AROUND[:, None] * spacing)
        scale, first = self.follow(around, np.broadcast_to(grid.first, around.shape).astype(np.float64)).best(STARTS)
        if self.kind.method is QuantizationMethod.UNIFORM:
            scale, first = np.concatenate([scale] * 3), np.concatenate([first, first - 1, first + 1])
        return self.follow(scale, first)

    def follow(self, scale: Float64, first: Float64) -> Points:
        """Measure grids (S, C) and return their errors and the steps of least squares for their codes."""
        if self.kind.method is QuantizationMethod.UNIFORM:
            codes = 2**self.kind.n_bits - 1
            first = np.clip(first, -codes, 0)
            ends = np.stack([first * scale, (first + codes) * scale], axis=1)
        else:
            threshold = scale * 2.0 ** (self.kind.n_bits - int(self.kind.signed))
            ends = np.stack([-threshold if self.kind.signed else 0 * threshold, threshold], axis=1)
        ends = self.kind.bounded(ends)
        levels = self.levels(ends)
        sums, gains = self.measure.with_gains(levels)
        errors = self.in_units(sums, levels.scale, self.every)
        winner = errors.argmin(axis=0)
        self.take(errors[winner, self.every], ends[winner, :, self.every].T, self.every)
        return Points(errors, levels.scale * (1.0 + gains), levels.first.astype(np.float64))

    def levels(self, ends: Float32 | Float64) -> Levels:
        """Return the grids of bounded ends (S, 2, C)."""
        return Levels(*self.kind.levels(ends))

    def errors(
        self, levels: Levels, index: Int64, wanted: NDArray[np.bool_] | None = None, *, clipping: bool = False
    ) -> Float64:
        """Return the errors (S, C) of candidates for some rows, infinite where they aren't wanted.

        With `clipping`, what they would be without rounding.
        """
        clips = self.beyond(levels, index) > (0.0 if clipping else levels.scale * np.float32(REACHED))
        if wanted is None:
            wanted = clips if clipping else np.ones_like(clips)
        sums = self.measure(levels, index, wanted, clips, rounding=not clipping)
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
        tiles = range(0, self.rows.shape[1], TILE)  # NumPy makes an array of truth values of what it is given
        others = sum(np.count_nonzero(self.rows[:, left : left + TILE], axis=1) for left in tiles)
        return np.asarray(self.least <= others * (scale * ON_GRID) ** self.exponent)


def _noise(rows: Float32) -> Float64:
    """Return by how much of itself, about, the error of each row differs between fine candidates.

    That is as the mean of n independent numbers varies, for n values other than zero: ``1 / sqrt(n)``. A row of values
    that come again and again, such as one that lies on a grid already, may have any errors: infinity.
    """
    again, others = np.zeros(len(rows)), np.zeros(len(rows))
    height = max(TILE // rows.shape[1], 1)
    for top in range(0, len(rows), height):
        ordered = np.sort(rows[top : top + height], axis=1)
        part = slice(top, top + height)
        others[part] = np.count_nonzero(ordered, axis=1)
        again[part] = np.count_nonzero((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != 0), axis=1)
    return np.where(again > AGAIN * others, np.inf, 1 / np.sqrt(np.maximum(others, 1)))


def _places(stride: int, *, first: bool) -> Int64:
    """Return the places of fine candidates, descending: multiples of a stride, or only those between the former ones.

    Examples
    --------
    >>> _places(8, first=True), _places(8, first=False), _places(4, first=False)
    (array([24,  8]), array([24,  8]), array([28, 20, 12,  4]))
    """
    distance = np.arange(HALF - 1, -HALF, -1)
    chosen = (distance % stride == 0) & (distance != 0) if first else distance % (2 * stride) == stride
    return np.asarray(distance[chosen] + HALF)


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
