"""How codes are stored in a file, and what is added to them for it.

Integer kernels take 8-bit tensors: unsigned activations, and weights of either sign. So activations are shifted until
their first code is 0, and narrower codes stand in 8 bits with a Clip at the ends of their own grid. Activations of more
than 8 bits are 16-bit tensors, which runtimes compute in float.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainable_core.integer.tensor import Int32, Quantized
from trainable_core.qparams import Float32, QParams

BYTE = 8


@dataclass(frozen=True)
class Container:
    """Where a quantized tensor's codes stand.

    Parameters
    ----------
    dtype : numpy dtype
        ``uint8``, ``int8``, ``uint16`` or ``int16``.
    scale : float32 array, shape () or (C,)
        The grid's own.
    zero_point : int array, shape of `scale`
        The stored code of zero.
    low, high : int
        The first and the last stored code of the grid.
    axis : int or None
        Axis of the channels that have scales of their own.
    """

    dtype: np.dtype[Any]
    scale: Float32
    zero_point: NDArray[Any]
    low: int
    high: int
    axis: int | None = None

    @property
    def clips(self) -> bool:
        """Whether the dtype holds more codes than the grid has."""
        info = np.iinfo(self.dtype)
        return (self.low, self.high) != (info.min, info.max)

    @property
    def is_byte(self) -> bool:
        """Whether integer kernels can take it."""
        return self.dtype.itemsize == 1

    @property
    def per_tensor(self) -> bool:
        """Whether all elements share one scale."""
        return self.axis is None

    @property
    def grid(self) -> QParams:
        """The grid that the stored codes are on."""
        zero_point = np.asarray(self.zero_point, np.int32)
        return QParams(np.asarray(self.scale, np.float32), zero_point, self.low, self.high, self.axis)


def for_activation(grid: QParams) -> Container:
    """Return the container of an activation's codes; the stored code is ``code - quant_min``.

    Examples
    --------
    >>> box = for_activation(QParams(np.float32(0.5), np.int32(0), -8, 7))
    >>> box.dtype.name, int(box.zero_point), box.low, box.high
    ('uint8', 8, 0, 15)
    """
    last = grid.quant_max - grid.quant_min
    dtype = np.dtype(np.uint8 if last < 2**BYTE else np.uint16)
    return Container(dtype, grid.scale, (grid.zero_point - grid.quant_min).astype(dtype), 0, last)


def for_weight(weight: Quantized) -> tuple[Container, NDArray[Any]]:
    """Return the container of a weight, and the codes as they are stored.

    Codes counted from zero are stored as ``int8`` where all of them fit, so that zero is 0 for every channel. Otherwise
    they stand as they are, beside their zero points: in ``uint8`` where one byte holds them, else in 16 bits.
    """
    grid, counted = weight.grid, weight.counted
    axis = None if grid.channels_axis is None else grid.channels_axis % weight.codes.ndim
    if grid.scale.ndim == 0 or grid.scale.size == 1:
        grid, axis = QParams(grid.scale.reshape(()), grid.zero_point.reshape(()), grid.quant_min, grid.quant_max), None
    for dtype in (np.dtype(np.int8), np.dtype(np.uint8), np.dtype(np.int16), np.dtype(np.int32)):
        info = np.iinfo(dtype)
        signed = info.min < 0
        codes: Any = counted if signed else weight.codes
        if not signed and (grid.quant_min < 0 or not _same(grid.zero_point)):
            continue  # kernels of convolutions take one zero point for all channels
        if codes.min(initial=0) >= info.min and codes.max(initial=0) <= info.max:
            zero_point = np.zeros_like(grid.zero_point) if signed else grid.zero_point
            box = Container(dtype, grid.scale, zero_point.astype(dtype), info.min, info.max, axis)
            return box, codes.astype(dtype)
    raise AssertionError  # codes of at most 16 bits fit into 32


def _same(values: Int32) -> bool:
    return bool((values == values.reshape(-1)[:1]).all()) if values.size else True
