"""What the backward pass of EWGS means: a function of input and grid whose derivative it is, in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainable_core.errors import InvalidArgumentError

Surrogate = Callable[[NDArray[Any], Any], NDArray[Any]]


def checked(delta: float) -> float:
    """Return the scaling factor; refuse what is negative or not finite."""
    if not 0 <= delta < float("inf"):
        raise InvalidArgumentError("EWGS: delta", f"must be >= 0 and finite, got {delta!r}")
    return float(delta)


def ewgs(x: NDArray[Any], grid: Any, upstream: NDArray[Any], delta: float) -> Surrogate:
    """Return the function that is differentiated at `x`: rounding errors and signs stay as they are here."""
    here = clipped(x, grid)
    error = (here - np.rint(here)) / (grid.quant_max - grid.quant_min)
    slope = 1 + delta * np.sign(upstream) * error
    return lambda x, grid: (np.rint(here) + slope * (clipped(x, grid) - here)) * grid.scale


def clipped(x: NDArray[Any], grid: Any) -> NDArray[Any]:
    """Return ``x / scale`` clipped to the grid's ends."""
    return np.clip(x / grid.scale, grid.quant_min - grid.zero_point, grid.quant_max - grid.zero_point)
