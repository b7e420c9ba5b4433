"""A grid as plain numbers, and the functions of `trainable_torch.grid` for one number, bit for bit what tensors give.

Sum, product and quotient of two float32 numbers, rounded to float64 and then to float32, are those rounded to float32
at once: float64 has more than twice the digits and two.
"""

from __future__ import annotations

import ctypes
import functools
import math
import struct
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trainable_core.validation import MAX_THRESHOLD

LIMIT = MAX_THRESHOLD / 2


def float32(value: float) -> float:
    """Return the float32 number next to a float; infinite beyond, and no warning."""
    return ctypes.c_float(value).value


@dataclass(frozen=True)
class Numbers:
    """A grid outside the autograd graph: plain numbers where one scale serves all elements, else tensors.

    Parameters
    ----------
    scale, inverse : float, or Tensor broadcastable to the input
        Step between grid points, and its float32 reciprocal.
    low, high : float, or Tensor broadcastable to the input
        The grid's ends counted from zero; numbers too where they are the same for every channel.
    span : int
        ``quant_max - quant_min``.
    shape : tuple of int
        That of the scale as a tensor.
    """

    scale: float | Tensor
    inverse: float | Tensor
    low: float | Tensor
    high: float | Tensor
    span: int
    shape: tuple[int, ...] = ()

    @classmethod
    def of(cls, scale: float | Tensor, zero_point: float | Tensor, quant_min: int, quant_max: int) -> Numbers:
        """Return the numbers of a grid, float32; `zero_point` is a number where every one is the same."""
        return cls.between(scale, quant_min - zero_point, quant_max - zero_point, quant_max - quant_min)

    @classmethod
    def between(cls, scale: float | Tensor, low: float | Tensor, high: float | Tensor, span: int = 0) -> Numbers:
        """Return the numbers of a grid with these ends; without a `span` they serve `snap` alone."""
        shape: tuple[int, ...] = ()
        if isinstance(scale, Tensor):
            shape = tuple(scale.shape)
            if scale.numel() > 1:
                if not isinstance(low, Tensor):
                    low, high = float(low), float(high)
                return cls(scale, scale.reciprocal(), low, high, span, shape)
            scale = float(scale)
        return cls(scale, float32(1.0 / scale), float(low), float(high), span, shape)

    @functools.cached_property
    def axis(self) -> int | None:
        """The axis that there is one scale per channel of, None where one scale serves all elements."""
        return next((index for index, size in enumerate(self.shape) if size != 1), None)

    def zero_point(self, quant_min: int) -> float | Tensor:
        """Return the code of real 0.0."""
        return quant_min - self.low

    def tensors(self, like: Tensor) -> tuple[Tensor, float | Tensor, float | Tensor]:
        """Return scale and ends as the plain expressions take them."""
        scale = self.scale if isinstance(self.scale, Tensor) else like.new_full(self.shape, self.scale)
        return scale, self.low, self.high

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy starts from: no addresses, which are this object's."""
        return {name: value for name, value in self.__dict__.items() if name not in {"addresses", "_arrays"}}

    @functools.cached_property
    def addresses(self) -> tuple[int, int, int, int, int]:
        """Addresses of inverse, scale and both ends in memory, and how many of each end there are."""
        inverse, scale, low, high = self.inverse, self.scale, self.low, self.high
        ends = low.numel() if isinstance(low, Tensor) else 1
        plain = [0.0 if isinstance(each, Tensor) else each for each in (inverse, scale, low, high)]
        numbers = (ctypes.c_float * 4)(*plain)
        first = ctypes.addressof(numbers)
        if isinstance(scale, float):
            self.__dict__["_arrays"] = numbers  # stays as long as its address
            return first, first + 4, first + 8, first + 12, ends
        arrays = [each.contiguous() if isinstance(each, Tensor) else each for each in (inverse, scale, low, high)]
        self.__dict__["_arrays"] = numbers, arrays
        addresses = [
            each.data_ptr() if isinstance(each, Tensor) else first + 4 * index for index, each in enumerate(arrays)
        ]
        return addresses[0], addresses[1], addresses[2], addresses[3], ends


def symmetric_scale(threshold: float, low: float, steps: float, *, power_of_two: bool) -> float:
    """Return what ``SymmetricScale.forward`` returns; every step is exact."""
    bounded = _bound(threshold, low)
    if power_of_two:
        mantissa, exponent = math.frexp(bounded)
        bounded = math.ldexp(1.0, exponent - (mantissa == 0.5))  # noqa: PLR2004 - the mantissa of a power of two
    return bounded / steps


def symmetric_gradient(
    threshold: float, scale: float, upstream: float, low: float, steps: float, *, power_of_two: bool
) -> float:
    """Return what ``SymmetricScale.gradient`` returns."""
    gradient = float32(upstream / steps)
    if power_of_two:
        gradient = float32(gradient * float32(scale * steps / _bound(threshold, low)))
    return _held(threshold, gradient, low, MAX_THRESHOLD)


def uniform_grid(range_min: float, range_max: float, low: float, n_bits: int) -> tuple[float, float]:
    """Return what ``UniformGrid.forward`` returns."""
    quant_max = 2**n_bits - 1
    first, last = _hold_zero(range_min, range_max)
    width = _bound(float32(last - first), low)
    (bits,) = struct.unpack("<i", struct.pack("<f", width / quant_max))
    (scale,) = struct.unpack("<f", struct.pack("<i", (bits + quant_max) & ~quant_max))
    return scale, float(min(max(round(float32(-first / scale)), 0), quant_max))


def uniform_gradients(
    ends: tuple[float, float], grid: tuple[float, float], d_grid: tuple[float, float], low: float, n_bits: int
) -> tuple[float, float]:
    """Return what ``UniformGrid.gradients`` returns."""
    (range_min, range_max), (scale, zero_point), (d_scale, d_zero) = ends, grid, d_grid
    first, last = _hold_zero(range_min, range_max)
    nudged = float32(float32(d_zero * zero_point) / scale)
    through_width = float32(float32(d_scale - nudged) / (2**n_bits - 1))
    through_width = _held(float32(last - first), through_width, low, MAX_THRESHOLD)
    d_min = float32(-through_width - float32(d_zero / scale))
    return _held(range_min, d_min, -LIMIT, 0.0), _held(range_max, through_width, 0.0, LIMIT)


def _bound(threshold: float, low: float) -> float:
    return low if math.isnan(threshold) else min(max(threshold, low), MAX_THRESHOLD)


def _hold_zero(range_min: float, range_max: float) -> tuple[float, float]:
    first = 0.0 if math.isnan(range_min) else min(max(range_min, -LIMIT), 0.0)
    return first, 0.0 if math.isnan(range_max) else max(min(range_max, LIMIT), 0.0)


def _held(variable: float, gradient: float, low: float, high: float) -> float:
    inside = low <= variable <= high
    back_in = (variable < low and gradient < 0) or (variable > high and gradient > 0)
    return gradient if (inside or back_in) and math.isfinite(gradient) else 0.0
