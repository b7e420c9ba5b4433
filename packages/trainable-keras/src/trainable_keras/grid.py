"""From a quantizer's variables to the grid, on tensors: the float32 operations of core's `qparams`, with gradients."""

from __future__ import annotations

import functools
from typing import ClassVar, Generic, TypeVar

from trainable_core import qparams
from trainable_core.backend.grid import GridNumbers, ends
from trainable_core.validation import MAX_THRESHOLD
from trainable_keras.functions import Function, Functions, Tensor

_MANTISSA, _EXPONENT = 0x007FFFFF, 0x7F800000
"""Bits of a positive float32: adding the first and keeping the second rounds up to a power of two."""

FAR = 2.0**30
"""A number of steps beyond every grid."""

End = Tensor | float
"""A grid's end: a number or a tensor."""


class Grid(GridNumbers):
    """The numbers a tensor is fake-quantized with; see `trainable_core.backend.grid.GridNumbers`."""

    functions: ClassVar[Functions]

    @property
    def ends(self) -> tuple[End, End]:
        """First and last code counted from zero: plain numbers on a centered grid, else tensors."""
        zero_point = self.functions.stop_gradient(self.zero_point)
        return ends(zero_point, self.quant_min, self.quant_max, centered=self.centered)

    @property
    def inverse(self) -> Tensor:
        """``1 / scale``, correctly rounded in every graph and compiler; the deployed kernels multiply by it."""
        return self.functions.reciprocal(self.scale)

    def steps(self, x: Tensor) -> Tensor:
        """Return ``x * inverse``, what the deployed kernels round: `x` in steps of the grid, counted from zero.

        Parameters
        ----------
        x : Tensor, float32, broadcastable to `scale`
            Real values.

        Notes
        -----
        Values are held within ``+-2**30``, far beyond every grid. Because of that no compiler contracts the product
        with an addition that follows, which would round once instead of twice.
        """
        f = self.functions
        return f.minimum(f.maximum(x * self.inverse, -FAR), FAR)


G = TypeVar("G", bound=GridNumbers)


class GridMaker(Generic[G]):
    """Makes grids from thresholds and ranges.

    Parameters
    ----------
    functions : Functions
        The framework's.
    grid : type
        The backend's class of grids.
    """

    def __init__(self, functions: Functions, grid: type[G]) -> None:
        self._f, self._grid = functions, grid
        # made once for each kind of grid: a graph traces a function with a gradient anew whenever it is another one
        self._symmetric_scale = functools.cache(self._make_symmetric_scale)
        self._uniform_grid = functools.cache(self._make_uniform_grid)

    def symmetric(self, threshold: Tensor, n_bits: int, *, signed: bool, power_of_two: bool, min_threshold: float) -> G:
        """Return the SYMMETRIC or POWER_OF_TWO grid of a threshold.

        Parameters
        ----------
        threshold : Tensor, float32
            In units of what is quantized; bounded here.
        n_bits : int
            Width of the codes.
        signed : bool
            Whether the grid reaches below zero.
        power_of_two : bool
            Whether the threshold is rounded up to a power of two.
        min_threshold : float
            The least threshold.
        """
        low = float(qparams.lower_bound(min_threshold))
        scale = self._symmetric_scale(low, 2.0 ** (n_bits - int(signed)), power_of_two)(threshold)
        quant_min, quant_max = (-(2 ** (n_bits - 1)), 2 ** (n_bits - 1) - 1) if signed else (0, 2**n_bits - 1)
        return self._grid(scale, self._f.zeros_like(scale), quant_min, quant_max, centered=True)

    def uniform(self, range_min: Tensor, range_max: Tensor, n_bits: int, *, min_threshold: float) -> G:
        """Return the UNIFORM grid of a range.

        Parameters
        ----------
        range_min, range_max : Tensor, float32
            Ends of the range; bounded and nudged here so that zero is on the grid.
        n_bits : int
            Width of the codes.
        min_threshold : float
            The least width of the range.
        """
        stacked = self._uniform_grid(float(qparams.lower_bound(min_threshold)), n_bits)(range_min, range_max)
        return self._grid(stacked[0], stacked[1], 0, 2**n_bits - 1, centered=False)

    def _held(self, variable: Tensor, gradient: Tensor, low: float, high: float) -> Tensor:
        """Return the gradient where the variable is in bounds or a descent step leads back in; see `qparams`."""
        f = self._f
        inside = f.all_of(variable >= low, variable <= high)
        back_in = f.any_of(f.all_of(variable < low, gradient < 0), f.all_of(variable > high, gradient > 0))
        passes = f.all_of(f.any_of(inside, back_in), f.isfinite(gradient))
        return f.where(passes, gradient, f.zeros_like(gradient))

    def _clip(self, x: Tensor, low: float, high: float, for_nan: float) -> Tensor:
        f = self._f
        held = f.minimum(f.maximum(x, f.number(low)), f.number(high))
        return f.where(f.isnan(x), f.number(for_nan), held)

    def _make_symmetric_scale(self, low: float, steps: float, power_of_two: bool) -> Function:  # noqa: FBT001 - a key of the cache
        """Return the function from threshold to scale; see `qparams`."""
        f = self._f

        def bounded(threshold: Tensor) -> Tensor:
            return self._clip(threshold, low, MAX_THRESHOLD, low)

        def forward(threshold: Tensor) -> Tensor:
            value = bounded(threshold)
            if power_of_two:
                value = f.bits_float(f.bits_and(f.float_bits(value) + _MANTISSA, _EXPONENT))
            return f.hide_shape(value * (1.0 / steps))  # a power of two: exact

        def backward(upstream: Tensor, scale: Tensor, threshold: Tensor) -> tuple[Tensor, ...]:
            gradient = upstream * (1.0 / steps)
            if power_of_two:
                gradient = gradient * (scale * steps / bounded(threshold))
            return (self._held(threshold, gradient, low, MAX_THRESHOLD),)

        return f.with_gradient(forward, backward)

    def _make_uniform_grid(self, low: float, n_bits: int) -> Function:
        """Return the function from range ends to scale and zero point, stacked; see `qparams`."""
        f, clip, held = self._f, self._clip, self._held
        quant_max = 2**n_bits - 1
        limit = MAX_THRESHOLD / 2

        def forward(range_min: Tensor, range_max: Tensor) -> Tensor:
            first, last = clip(range_min, -limit, 0.0, 0.0), clip(range_max, 0.0, limit, 0.0)
            bits = f.float_bits(f.divide_by(clip(last - first, low, MAX_THRESHOLD, low), quant_max))
            scale = f.bits_float(f.bits_and(bits + quant_max, ~quant_max))
            zero_point = f.minimum(f.maximum(f.round(-first / scale), 0.0), float(quant_max))
            return f.hide_shape(f.stack([scale, zero_point]))

        def backward(upstream: Tensor, output: Tensor, range_min: Tensor, range_max: Tensor) -> tuple[Tensor, ...]:
            d_scale, d_zero = upstream[0], upstream[1]
            scale, zero_point = output[0], output[1]
            width = clip(range_max, 0.0, limit, 0.0) - clip(range_min, -limit, 0.0, 0.0)
            through_width = held(width, (d_scale - d_zero * zero_point / scale) / quant_max, low, MAX_THRESHOLD)
            d_min = held(range_min, -through_width - d_zero / scale, -limit, 0.0)
            return d_min, held(range_max, through_width, 0.0, limit)

        return f.with_gradient(forward, backward)
