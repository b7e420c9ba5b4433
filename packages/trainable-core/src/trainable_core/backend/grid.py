"""The numbers that a tensor is fake-quantized with, on the tensors of any framework."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Tensor = Any


@dataclass(frozen=True)
class GridNumbers:
    """The numbers a tensor is fake-quantized with.

    Parameters
    ----------
    scale : Tensor, float32, broadcastable to the tensor
        Step between grid points; gradients flow from it to the quantizer's variables.
    zero_point : Tensor, float32, shape of `scale`
        Code of real 0.0, an integer value; gradients flow too.
    quant_min, quant_max : int
        First and last code.
    centered : bool
        Whether every zero point is 0 (SYMMETRIC, POWER_OF_TWO).
    """

    scale: Tensor
    zero_point: Tensor
    quant_min: int
    quant_max: int
    centered: bool


def ends(zero_point: Tensor, quant_min: int, quant_max: int, *, centered: bool) -> tuple[Any, Any]:
    """Return a grid's first and last code counted from zero: plain numbers on a centered grid, else tensors.

    Examples
    --------
    >>> ends(3.0, 0, 15, centered=False)
    (-3.0, 12.0)
    """
    if centered:
        return float(quant_min), float(quant_max)
    return quant_min - zero_point, quant_max - zero_point
