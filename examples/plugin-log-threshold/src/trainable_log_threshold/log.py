"""The logarithm of the threshold (Jain et al., MLSys 2020): what every framework shares, in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from mct_quantizers import QuantizationMethod
from numpy.typing import NDArray

METHODS = [QuantizationMethod.POWER_OF_TWO, QuantizationMethod.SYMMETRIC]

Array = NDArray[Any]


def encode(numbers: dict[str, Array]) -> dict[str, Array]:
    """Return what is trained: the logarithm of the threshold."""
    return {"log2_threshold": np.log2(numbers["threshold"])}


def surrogate(x: Array, grid: Any) -> Callable[[Array, Any], Array]:
    """Return what equations 6 and 8 differentiate: the rounding error is a constant, and the mask is on the codes."""
    steps = x / grid.scale
    codes = np.rint(steps)
    inside = (codes >= grid.quant_min) & (codes <= grid.quant_max)
    end = np.clip(codes, grid.quant_min, grid.quant_max)
    return lambda x, grid: np.where(inside, x / grid.scale + codes - steps, end) * grid.scale
