"""Fake quantization with ties up, on tensors, with the gradients of STE and of LSQ.

One forward formula, that of `trainable_core.reference.affine`: ``clip(floor(v) + (v - floor(v) >= 0.5), low, high) *
scale`` with ``v = x * (1 / scale)`` and the grid's ends counted from zero. Infinities saturate to their own side, and
NaN stays NaN.

TensorFlow's ``fake_quant`` kernels add 0.5 to a shifted value instead, so next to a tie they may give the neighbouring
code: measured on 2,100,000 values, at most ``0.95 * 2**n_bits * 2**-24`` steps from it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from trainable_core.backend.grid import GridNumbers, ends
from trainable_core.qparams import table_ends, table_steps
from trainable_core.reference import lsq
from trainable_keras.functions import Function, Functions, Tensor

HALF = 0.5
"""Distance of a tie from the codes on either side."""

BELOW_HALF = HALF - 2.0**-25
"""The largest float32 below it."""

OFF_A_TIE = 2.0**-21
"""Part of its magnitude by which a value is moved off a tie."""


class HalfUp:
    """Fake quantization whose ties go up, with the gradients of STE and of LSQ.

    Parameters
    ----------
    functions : Functions
        The framework's.
    """

    def __init__(self, functions: Functions) -> None:
        self._f = functions
        self._moved = functools.cache(self._make_moved)
        self._ties_to_even = functools.cache(self._make_ties_to_even)
        self._forward = functools.cache(self._make_forward)
        self._ste = functools.cache(self._make_ste)
        self._passing = functools.cache(self._make_passing)
        self._passing_to_levels = functools.cache(self._make_passing_to_levels)
        self._lsq = functools.cache(self._make_lsq)
        self._finite_gradient = functools.cache(self._make_finite_gradient)
        self._straight_through = functools.cache(self._make_straight_through)
        self._exp2 = functools.cache(self._make_exp2)
        self._magnitude_gradient = functools.cache(self._make_magnitude_gradient)

    def exp2(self, u: Tensor) -> Tensor:
        """Return ``2**u``, float32, exact for whole numbers on every engine and in every compiler.

        A threshold that is a power of two stays that power: an `exp2` that is off by the last bit would round it up to
        the next one on a grid of method POWER_OF_TWO. Below ``2**-126`` the result is 0, from ``2**128`` on it is
        infinite.
        """
        return self._exp2()(u)

    def straight_through(self, values: Tensor, smooth: Tensor) -> Tensor:
        """Return `values`, bit for bit, with the gradient of `smooth`.

        It is what ``smooth + stop_gradient(values - smooth)`` means; in float32 that sum is not always `values`.

        Parameters
        ----------
        values : Tensor
            What is returned; it gets no gradient.
        smooth : Tensor, same shape
            What the gradient goes to, as it comes.
        """
        return self._straight_through()(values, smooth)

    def finite_gradient(self, x: Tensor) -> Tensor:
        """Return `x`; what comes back as its gradient and is not finite becomes 0."""
        return self._finite_gradient()(x)

    def round_half_up(self, v: Tensor) -> Tensor:
        """Return `v` rounded to integers, ties towards plus infinity; a zero is +0.0."""
        down = self._f.floor(v)
        return down + self._f.cast(v - down >= HALF, "float32")

    def snap(self, x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int) -> Tensor:
        """Return `x` snapped to the grid; float32 in, float32 out.

        Parameters
        ----------
        x : Tensor, float32
            Real values.
        scale : Tensor, float32, broadcastable to `x`
            Step between grid points.
        zero_point : Tensor, float32, shape of `scale`, or None
            Code of real 0.0; None for zeros.
        quant_min, quant_max : int
            First and last code.
        """
        codes = self.round_half_up(x * self._f.reciprocal(scale))
        if zero_point is None:
            return self._clip(codes, quant_min, quant_max) * scale
        # Rounded before the zero point is added, as the reference does. Clipped between numbers, not between the ends
        # counted from zero: TensorFlow makes -z of 0 - z, and with it zeros negative.
        return (self._clip(codes + zero_point, quant_min, quant_max) - zero_point) * scale

    def snap_passing(
        self, x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int
    ) -> Tensor:
        """Return what `snap` does, with the gradient of `trainable_core.reference.ste`; parameters as there.

        It is never compiled by itself as `ste_fake_quantize` is, so a graph of it runs on a TensorFlow without XLA.
        """
        numbers = (scale,) if zero_point is None else (scale, zero_point)
        return self._passing(quant_min, quant_max, zero_point is None)(x, *numbers)

    def _clip(self, codes: Tensor, quant_min: int, quant_max: int) -> Tensor:
        return self._f.minimum(self._f.maximum(codes, float(quant_min)), float(quant_max))

    def off_the_edge(self, x: Tensor, scale: Tensor) -> Tensor:
        """Return `x`, moved off the one float32 on which ways of rounding half up disagree; float32.

        The largest float32 below 0.5 rounds down, but ``floor(v + 0.5)`` rounds it up, because the sum is rounded to
        1. An input of exactly half a step may come out there, as ``x * (1 / scale)`` rounds twice. Moved by its last
        bit it is below for every way of rounding. The gradient passes as it is.

        Parameters
        ----------
        x : Tensor, float32
            Real values.
        scale : Tensor, float32, broadcastable to `x`
            Step between grid points.
        """
        return self._moved()(x, scale)

    def ties_to_even(self, x: Tensor, scale: Tensor) -> Tensor:
        """Return `x` with each tie above an even code moved below the tie, so that rounding half up gives the even one.

        Parameters
        ----------
        x : Tensor, float32
            Real values.
        scale : Tensor, float32, broadcastable to `x`
            Step between grid points.

        Notes
        -----
        Codes count from that of zero, as they do before a zero point is added. A tie is moved by a part in ``2**21`` of
        its distance from zero: more than the two roundings of ``x * (1 / scale)``, and of at most ``2**16`` steps less
        than a 32nd of one. The gradient passes as it is.
        """
        return self._ties_to_even()(x, scale)

    def ste_fake_quantize(self, x: Tensor, grid: GridNumbers) -> Tensor:
        """Return `x` snapped to the grid, gradient by `trainable_core.reference.ste`; float32."""
        function = self._ste(grid.quant_min, grid.quant_max, grid.centered)
        return function(x, *(self._f.stop_gradient(each) for each in _numbers(grid)))

    def lsq_fake_quantize(self, x: Tensor, grid: GridNumbers, replicas: int = 1) -> Tensor:
        """Return `x` snapped to the grid, gradients by `trainable_core.reference.lsq`; float32.

        Parameters
        ----------
        x : Tensor, float32
            Real values.
        grid : GridNumbers
            The grid; gradients flow to its numbers.
        replicas : int
            How many batches like this one share the grid, each on a replica of its own.
        """
        return self._lsq(grid.quant_min, grid.quant_max, grid.centered, replicas)(x, *_numbers(grid))

    def by_slopes(
        self,
        x: Tensor,
        grid: GridNumbers,
        d_x: Tensor,
        d_scale: Tensor = None,
        d_zero_point: Tensor = None,
        *,
        by_sign: tuple[Tensor, Tensor] | None = None,
        values: Tensor = None,
    ) -> Tensor:
        """Return `x` snapped to the grid, with gradients that are given as a slope for each element; float32.

        Parameters
        ----------
        x : Tensor, float32
            Real values.
        grid : GridNumbers
            The grid; gradients reach its scale and zero point as far as their slopes are given.
        d_x, d_scale, d_zero_point : Tensor, shape of `x`
            Derivatives of each output by its input, by its scale and by its zero point; finite, and constants.
        by_sign : tuple of Tensor, optional
            What is added to the first two where the upstream gradient is positive, and subtracted where it is negative.
        values : Tensor, optional
            What is returned, where that is not the nearest value of the grid, as in a table.

        Notes
        -----
        An infinite input does no harm: no derivative is computed from it.
        """
        constant = self._f.stop_gradient
        smooth = x * constant(d_x)
        if d_scale is not None:
            smooth = smooth + grid.scale * constant(d_scale)
        if d_zero_point is not None and not grid.centered:
            smooth = smooth + grid.zero_point * constant(d_zero_point)
        if by_sign is not None:
            signed = x * constant(by_sign[0]) + grid.scale * constant(by_sign[1])
            smooth = smooth + self.magnitude_gradient(signed)
        return self.straight_through(self.snapped(x, grid) if values is None else values, smooth)

    def snap_to_levels(self, x: Tensor, scale: Tensor, levels: Sequence[Any], *, signed: bool = True) -> Tensor:
        """Return `x` on the levels of a table, as `trainable_core.reference.affine.nearest_levels` says; float32.

        Parameters
        ----------
        x : Tensor, float32
            Real values.
        scale : Tensor, float32, broadcastable to `x`
            A 128th of the threshold; a 256th of that of a table without a sign.
        levels : sequence of int or of Tensor, float32
            The table, ascending.
        signed : bool
            Whether the table may reach below zero.
        """
        f, steps = self._f, float(table_steps(signed=signed))
        at = self._clip(x / (scale * steps) * steps, *table_ends(signed=signed))
        table = [level if f.is_tensor(level) else float(level) for level in levels]
        codes, least = f.zeros_like(at) + table[0], f.abs(at - table[0])
        for level in table[1:]:
            distance = f.abs(at - level)
            codes = f.where(distance < least, f.zeros_like(at) + level, codes)
            least = f.minimum(least, distance)
        return f.where(f.isnan(x), x, codes * scale)

    def snap_to_levels_passing(self, x: Tensor, scale: Tensor, levels: tuple[int, ...], *, signed: bool) -> Tensor:
        """Return what `snap_to_levels` does; the gradient passes within the range of the codes, its ends included.

        It is that of `trainable_core.reference.ste` on the grid that the levels are some codes of.
        """
        return self._passing_to_levels(levels, signed)(x, scale)

    def snapped(self, x: Tensor, grid: GridNumbers) -> Tensor:
        """Return `x` snapped to the grid, as `ste_fake_quantize` does; no gradient passes."""
        numbers = (self._f.stop_gradient(each) for each in _numbers(grid))
        return self._forward(grid.quant_min, grid.quant_max)(self._f.stop_gradient(x), *numbers)

    def magnitude_gradient(self, x: Tensor) -> Tensor:
        """Return `x`; what comes back as its gradient counts by its magnitude."""
        return self._magnitude_gradient()(x)

    def gradient_scale(self, x: Tensor, scale: Tensor, quant_max: int, replicas: int = 1) -> Any:
        """Return `trainable_core.reference.lsq.gradient_scale`; a tensor where a dimension of `x` is not known yet."""
        scales = max(math.prod(int(size) for size in scale.shape), 1)
        size = self._f.size(x)
        if isinstance(size, int):
            return lsq.gradient_scale(size // scales * replicas, quant_max)
        sharing = self._f.maximum(size / scales * replicas, 1.0)
        return self._f.rsqrt(sharing * max(quant_max, 1))

    def _make_finite_gradient(self) -> Function:
        f = self._f

        def identity(x: Tensor) -> Tensor:
            return x + 0.0

        def backward(upstream: Tensor, _: Tensor, __: Tensor) -> tuple[Tensor, ...]:
            return (f.where(f.isfinite(upstream), upstream, f.zeros_like(upstream)),)

        made: Function = f.with_gradient(identity, backward)
        return made

    def _make_magnitude_gradient(self) -> Function:
        f = self._f

        def identity(x: Tensor) -> Tensor:
            return x + 0.0

        def backward(upstream: Tensor, _: Tensor, __: Tensor) -> tuple[Tensor, ...]:
            return (f.abs(upstream),)

        made: Function = f.with_gradient(identity, backward)
        return made

    def _make_straight_through(self) -> Function:
        f = self._f

        def first(values: Tensor, smooth: Tensor) -> Tensor:  # noqa: ARG001 - it gets the gradient
            return values + 0.0

        def backward(upstream: Tensor, _: Tensor, values: Tensor, __: Tensor) -> tuple[Tensor, ...]:
            return f.zeros_like(values), upstream

        made: Function = f.with_gradient(first, backward)
        return made

    def _make_exp2(self) -> Function:
        f = self._f

        def exp2(u: Tensor) -> Tensor:
            floor = f.floor(u)
            whole = f.minimum(f.maximum(floor, -126.0), 127.0)
            whole = f.where(f.isfinite(whole), whole, f.zeros_like(whole))
            bits = (f.cast(whole, "int32") + 127) * 2**23
            rest = u - floor
            rest = f.where(f.isfinite(rest), rest, f.zeros_like(rest))
            # the exponential of zero is exactly 1 on every engine; that of a rest next to 1 must not come out above 2
            value = f.bits_float(bits) * f.minimum(f.maximum(f.exp(rest * math.log(2.0)), 1.0), 2.0)
            value = f.where(u >= 128.0, f.zeros_like(u) + math.inf, f.where(u < -126.0, f.zeros_like(u), value))  # noqa: PLR2004 - float32's exponents
            return f.where(f.isnan(u), u, value)

        def backward(upstream: Tensor, output: Tensor, _: Tensor) -> tuple[Tensor, ...]:
            return (upstream * output * math.log(2.0),)

        made: Function = f.with_gradient(exp2, backward)
        return made

    def _make_moved(self) -> Function:
        """Return the function that `off_the_edge` is."""
        f = self._f

        def moved(x: Tensor, scale: Tensor) -> Tensor:
            at_edge = x * f.reciprocal(scale) == BELOW_HALF
            return f.bits_float(f.float_bits(x) - f.cast(at_edge, "int32"))

        def backward(upstream: Tensor, _: Tensor, __: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
            return upstream, f.zeros_like(scale)

        made: Function = f.with_gradient(f.fused(moved), backward)
        return made

    def _make_ties_to_even(self) -> Function:
        """Return the function that `ties_to_even` is."""
        f = self._f

        def moved(x: Tensor, scale: Tensor) -> Tensor:
            steps = x * f.reciprocal(scale)
            down = f.floor(steps)
            is_even = f.floor(down * HALF) * 2.0 == down
            return f.where(f.all_of(steps - down == HALF, is_even), x - f.abs(x) * OFF_A_TIE, x)

        def backward(upstream: Tensor, _: Tensor, __: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
            return upstream, f.zeros_like(scale)

        made: Function = f.with_gradient(f.fused(moved), backward)
        return made

    def _make_forward(self, quant_min: int, quant_max: int) -> Function:
        """Return fake quantization: of an input, a scale and, unless the grid is centered, a zero point."""

        def values(x: Tensor, scale: Tensor, zero_point: Tensor = None) -> Tensor:
            return self.snap(x, scale, zero_point, quant_min, quant_max)

        def keeps_nan(x: Tensor, *grid: Tensor) -> Tensor:  # TensorFlow 2.15's XLA makes numbers of NaN in minimum
            return self._f.where(self._f.isnan(x), x, values(x, *grid))

        made: Function = self._f.fused(values, keeps_nan)
        return made

    def _make_mask(self, quant_min: int, quant_max: int, centered: bool) -> Function:  # noqa: FBT001
        """Return the gradient of STE: of an input, the upstream gradient, a scale and maybe a zero point."""
        f = self._f

        def masked(x: Tensor, upstream: Tensor, scale: Tensor, zero_point: Tensor = None) -> Tensor:
            low, high = ends(zero_point, quant_min, quant_max, centered=centered)
            steps = f.steps_of(x, scale, quant_min, quant_max, centered=centered)
            inside = f.all_of(steps >= low, steps <= high)
            return f.where(inside, upstream, f.zeros_like(upstream))

        return masked

    def _make_ste(self, quant_min: int, quant_max: int, centered: bool) -> Function:  # noqa: FBT001
        mask = self._f.fused(self._make_mask(quant_min, quant_max, centered))
        return self._with_mask(self._forward(quant_min, quant_max), mask)

    def _make_passing(self, quant_min: int, quant_max: int, centered: bool) -> Function:  # noqa: FBT001
        def values(x: Tensor, scale: Tensor, zero_point: Tensor = None) -> Tensor:
            return self.snap(x, scale, zero_point, quant_min, quant_max)

        return self._with_mask(values, self._make_mask(quant_min, quant_max, centered))

    def _make_passing_to_levels(self, levels: tuple[int, ...], signed: bool) -> Function:  # noqa: FBT001
        def values(x: Tensor, scale: Tensor) -> Tensor:
            return self.snap_to_levels(x, scale, levels, signed=signed)

        return self._with_mask(values, self._make_mask(*table_ends(signed=signed), True))  # noqa: FBT003 - centered

    def _with_mask(self, values: Function, mask: Function) -> Function:
        """Return a function of an input and a grid's numbers with a gradient of the input alone."""

        def backward(upstream: Tensor, _: Tensor, x: Tensor, *grid: Tensor) -> tuple[Tensor, ...]:
            return mask(x, upstream, *grid), *(self._f.zeros_like(each) for each in grid)

        made: Function = self._f.with_gradient(values, backward)
        return made

    def _make_lsq(self, quant_min: int, quant_max: int, centered: bool, replicas: int) -> Function:  # noqa: FBT001
        f = self._f

        def terms(x: Tensor, upstream: Tensor, scale: Tensor, zero_point: Tensor = None) -> tuple[Tensor, ...]:
            low, high = ends(zero_point, quant_min, quant_max, centered=centered)
            steps = f.steps_of(x, scale, quant_min, quant_max, centered=centered)
            below, above = steps <= low, steps >= high
            between = f.all_of(steps > low, steps < high)
            zeros = f.zeros_like(upstream)
            d_x = f.where(between, upstream, zeros)
            outside = f.where(above, zeros + high, f.where(below, zeros + low, zeros))
            slope = f.where(between, self.round_half_up(steps) - steps, outside)
            if centered:
                return d_x, upstream * slope
            return d_x, upstream * slope, f.where(f.any_of(below, above), upstream, zeros)

        compiled = f.fused(terms)

        def backward(upstream: Tensor, _: Tensor, x: Tensor, scale: Tensor, *zero_point: Tensor) -> tuple[Tensor, ...]:
            d_x, by_scale, *beyond = compiled(x, upstream, scale, *zero_point)
            g = self.gradient_scale(x, scale, quant_max, replicas)
            of_zero_point = (-(self._sum_to(each, scale) * scale) * g for each in beyond)
            return d_x, self._sum_to(by_scale, scale) * g, *of_zero_point

        made: Function = f.with_gradient(self._forward(quant_min, quant_max), backward)
        return made

    def _sum_to(self, values: Tensor, like: Tensor) -> Tensor:
        """Return `values` summed over the elements that share one entry of `like`."""
        shape = tuple(like.shape)
        if not shape:
            return self._f.sum(values)
        axes = tuple(axis for axis, size in enumerate(shape) if size == 1)
        return self._f.sum(values, axis=axes, keepdims=True)


def _numbers(grid: GridNumbers) -> tuple[Tensor, ...]:
    return (grid.scale,) if grid.centered else (grid.scale, grid.zero_point)
