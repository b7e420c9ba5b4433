"""How a tensor uses its grid: what is clipped, and which codes there are, of all elements or of a sample."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainable_core.backend.view import scale_of_elements
from trainable_core.granularity import Blocks
from trainable_core.qparams import Float32, QParams
from trainable_core.reference import affine

SAMPLE = 2**16
"""Elements of a tensor that are looked at; shares have a standard error of at most 0.2 % then."""


def places_of(size: int, limit: int = SAMPLE) -> NDArray[np.int64]:
    """Return at most `limit` positions, evenly spread over a flattened tensor.

    Notes
    -----
    The distance between two of them has no factor in common with the number of elements, so that they do not stay in
    some of the channels.

    Examples
    --------
    >>> places_of(3, 8), places_of(8, 3)
    (array([0, 1, 2]), array([0, 3, 6]))
    """
    step = max(-(-size // limit), 1)
    while step > 1 and math.gcd(step, size) != 1:
        step += 1
    return np.arange(0, size, step, dtype=np.int64)


@dataclass(frozen=True)
class Sample:
    """Some elements of a weight, with the grid of each.

    Parameters
    ----------
    values : float32 array, shape (K,)
        Float values.
    codes : int32 array, shape (K,)
        Their codes.
    clipped : bool array, shape (K,)
        Which are farther beyond the ends of the grid than half a step, so that their error is more than one of
        rounding.
    """

    values: Float32
    codes: NDArray[np.int32]
    clipped: NDArray[np.bool_]


def sample_of(values: Float32, quantized: Float32, grid: QParams, blocks: Blocks | None, limit: int = SAMPLE) -> Sample:
    """Return a sample of a weight.

    Parameters
    ----------
    values, quantized : float32 array, any shape
        The weight, and what its quantizer makes of it.
    grid : QParams
        Its grid; of one with blocks, that of the rows.
    blocks : Blocks or None
        Which elements share a scale where it is finer than channels.
    limit : int
        Number of elements at most.

    Examples
    --------
    >>> found = sample_of(*np.float32([[0.4, -9.0], [0.5, -4.0]]), QParams(np.float32(0.5), np.int32(0), -8, 7), None)
    >>> found.codes, found.clipped
    (array([ 1, -8], dtype=int32), array([False,  True]))
    """
    if blocks is not None:
        values, quantized = blocks.rows(values), blocks.rows(quantized)
    places = places_of(values.size, limit)
    own = scale_of_elements(grid, values.shape, places)
    taken, result = values.reshape(-1)[places], quantized.reshape(-1)[places]
    codes = np.rint(result.astype(np.float64) / own.scale) + own.zero_point
    with np.errstate(invalid="ignore"):  # NaN has no code
        return Sample(taken, codes.astype(np.int32), beyond(taken, own))


def beyond(values: Float32, grid: QParams) -> NDArray[np.bool_]:
    """Return which values are farther beyond the ends of a grid than half a step; NaN is not."""
    low, high = affine.ends(grid, values.ndim)
    with np.errstate(invalid="ignore"):  # comparisons of NaN
        steps = affine.steps(values, grid)
        return np.asarray((steps < low - 0.5) | (steps > high + 0.5))


def ends_of(grid: QParams) -> tuple[float, float]:
    """Return the ends of a grid in real units, the mean over its channels.

    Examples
    --------
    >>> ends_of(QParams(np.float32([0.5, 1.5]), np.int32([0, 0]), -8, 7, 0))
    (-8.0, 7.0)
    """
    first, last = (grid.levels[0], grid.levels[-1]) if grid.levels else (grid.quant_min, grid.quant_max)
    scale = grid.scale.astype(np.float64)
    return float(np.mean((first - grid.zero_point) * scale)), float(np.mean((last - grid.zero_point) * scale))


def number_of_codes(grid: QParams) -> int:
    """Return how many codes a grid has."""
    return len(grid.levels) or grid.quant_max - grid.quant_min + 1


class CodeCounter:
    """How often each code of an activation is used, and how much is clipped; bounded memory.

    Parameters
    ----------
    grid : QParams
        Per tensor.

    Examples
    --------
    >>> counter = CodeCounter(QParams(np.float32(1.0), np.int32(0), 0, 3))
    >>> counter.update(np.float32([0.2, 1.1, 0.9, 9.0]))
    >>> counter.counts, counter.clipped
    (array([1, 2, 0, 1]), 1)
    """

    def __init__(self, grid: QParams) -> None:
        self.grid = grid
        self.counts: NDArray[np.int64] = np.zeros(grid.quant_max - grid.quant_min + 1, np.int64)
        self.clipped = 0

    @property
    def count(self) -> int:
        """How many values were seen."""
        return int(self.counts.sum())

    def update(self, values: NDArray[np.generic]) -> None:
        """Take in values of any shape; NaN counts with the first code, as PyTorch's kernel has it."""
        flat = affine.to_float32(values).reshape(-1)
        codes = affine.quantize(flat, self.grid) - self.grid.quant_min
        self.counts += np.bincount(codes, minlength=self.counts.size)
        self.clipped += int(beyond(flat, self.grid).sum())
