"""One option for each of several items, so that losses are least and sizes within a limit: exactly, by SciPy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from trainable_core.errors import InvalidArgumentError
from trainable_core.export.libraries import library

EXTRA = "trainable-core[suggest]"
"""What brings SciPy."""

SLACK = 1e-9
"""How far the sizes of a choice may be above the limit, relatively: they are sums of float64 numbers."""

RANGE = 1e6
"""The smallest loss that could be at stake, in the solver's unit: it stops at an absolute gap of 1e-6."""


def choose(losses: Sequence[Sequence[float]], sizes: Sequence[Sequence[float]], limit: float) -> list[int]:
    """Return the index of the option of each item, of those choices within the limit the one of least loss.

    Parameters
    ----------
    losses, sizes : sequence of sequence of float
        For each item, those of its options. A loss may be infinite: the option is taken where there is no other.
    limit : float
        Of the sum of the sizes.

    Raises
    ------
    InvalidArgumentError
        When not even the smallest options are within the limit.
    MissingLibraryError
        When SciPy is not installed.

    Notes
    -----
    A multiple-choice knapsack problem: ``minimize sum(loss * x)`` with ``sum(x) == 1`` for each item,
    ``sum(size * x) <= limit`` and x binary.

    Examples
    --------
    >>> choose([[9.0, 1.0], [2.0, 1.0]], [[2.0, 4.0], [2.0, 4.0]], limit=6.0)
    [1, 0]
    """
    smallest = sum(map(min, sizes))
    bound = limit * (1 + SLACK)
    if smallest > bound:
        raise InvalidArgumentError("budget", f"{limit:g} is too small: the smallest widths take {smallest:g}")
    optimize, sparse = require()
    counts = [len(options) for options in losses]
    loss = np.concatenate([_finite(options) for options in losses])
    size = np.concatenate([np.asarray(options, np.float64) for options in sizes])
    # a loss that all options of an item have is no matter of choice
    loss = loss - np.repeat([min(_finite(options)) for options in losses], counts)
    spread = loss[loss > 0]
    scale = RANGE / float(spread.max()) if spread.size else 1.0
    one_of = sparse.csr_matrix((np.ones(loss.size), (np.repeat(np.arange(len(counts)), counts), np.arange(loss.size))))
    span = float(size.max()) or 1.0
    found = optimize.milp(
        loss * scale,
        integrality=np.ones(loss.size),
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(one_of, 1, 1),
            optimize.LinearConstraint(size[None] / span, -np.inf, bound / span),
        ],
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise InvalidArgumentError("budget", f"no choice was found: {found.message}")
    ends = np.cumsum(counts)
    return [int(np.argmax(found.x[end - count : end])) for end, count in zip(ends, counts, strict=True)]


def _finite(losses: Sequence[float]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Return losses with a thousand times the largest finite one in the place of infinite ones."""
    finite = [abs(each) for each in losses if math.isfinite(each)]
    worst = 1e3 * max(finite, default=0.0) or 1.0
    return np.nan_to_num(np.asarray(losses, np.float64), nan=worst, posinf=worst, neginf=-worst)


def require() -> tuple[Any, Any]:
    """Return SciPy's modules for optimization and for sparse matrices.

    Raises
    ------
    MissingLibraryError
        When SciPy is not installed; names the extra.
    """
    optimize, sparse = (library(f"scipy.{name}", "suggest", EXTRA) for name in ("optimize", "sparse"))
    return optimize, sparse
