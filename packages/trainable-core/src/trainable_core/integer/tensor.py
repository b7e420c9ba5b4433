"""Codes together with the grid that says what they mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainable_core.qparams import Float32, QParams

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Quantized:
    """A quantized tensor.

    Parameters
    ----------
    codes : int32 array, any shape
        In ``[grid.quant_min, grid.quant_max]``.
    grid : QParams
        What the codes stand for: ``(code - zero_point) * scale``.
    """

    codes: Int32
    grid: QParams

    @property
    def counted(self) -> Int64:
        """The codes counted from the code of zero, ``code - zero_point``."""
        return self.codes.astype(np.int64) - self.grid.along(self.codes.ndim).zero_point

    @property
    def values(self) -> Float32:
        """The real values, float32."""
        return np.asarray(self.counted.astype(np.float32) * self.grid.along(self.codes.ndim).scale)

    def moved(self, move: Callable[[Int32], NDArray[Any]]) -> Quantized:
        """Return what an operation gives that only moves values, as a reshape does; for one scale per tensor."""
        return Quantized(np.asarray(move(self.codes)).astype(np.int32), self.grid)


def clipped(counted: NDArray[Any], grid: QParams) -> Quantized:
    """Return codes from whole numbers counted from zero, saturated at the ends of the grid."""
    along = grid.along(np.ndim(counted))
    low, high = grid.quant_min - along.zero_point, grid.quant_max - along.zero_point
    return Quantized((np.clip(counted, low, high) + along.zero_point).astype(np.int32), grid)
