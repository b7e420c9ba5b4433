"""The grid of a quantizer: five numbers, and how they are made of its variables, as tensor expressions.

These are the float32 operations of `trainable_core.qparams`, one by one. The loops in
`trainable_torch.kernels.grid_loops` are the same operations once more, for numba; a test holds them together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainable_core import qparams
from trainable_core.backend import grid as tensor_grid
from trainable_core.enums import LUT_METHODS, QuantizationMethod
from trainable_core.validation import MAX_THRESHOLD

_LARGEST = repr(MAX_THRESHOLD)  # a text: a module's number is a variable to `torch.compile(dynamic=True)`


class Grid(tensor_grid.GridNumbers):
    """The numbers a tensor is fake-quantized with; see `trainable_core.backend.grid.GridNumbers`."""

    @property
    def ends(self) -> tuple[Tensor, Tensor] | tuple[int, int]:
        """First and last code counted from zero: plain numbers on a centered grid, else tensors."""
        if self.centered:
            return self.quant_min, self.quant_max
        zero_point = self.zero_point.detach()
        return self.quant_min - zero_point, self.quant_max - zero_point

    @property
    def inverse(self) -> Tensor:
        """``1 / scale``; the deployed kernels multiply by it."""
        inverse: Tensor = self.scale.reciprocal()
        return inverse

    def steps(self, x: Tensor) -> Tensor:
        """Return ``x * inverse``, what the deployed kernels round: `x` in steps of the grid, counted from zero.

        Parameters
        ----------
        x : Tensor, float32, broadcastable to `scale`
            Real values.
        """
        return x * self.inverse


def _held(variable: Tensor, gradient: Tensor, low: float, high: float) -> Tensor:
    """Return the gradient where the variable is in bounds or a descent step leads back in; see the core's module."""
    # Clamped by two open ways, each open when the variable has not passed the bound that it leads to; NaN has none.
    down = torch.where(variable >= low, math.inf, 0.0)
    up = torch.where(variable <= high, -math.inf, 0.0)
    return torch.nan_to_num(gradient, 0.0, 0.0, 0.0).clamp(up, down)


def _bound(threshold: Tensor, low: float) -> Tensor:
    largest = float(_LARGEST)
    return torch.nan_to_num(threshold, low, largest, low).clamp(low, largest)


def _hold_zero(range_min: Tensor, range_max: Tensor) -> tuple[Tensor, Tensor]:
    """Return finite range ends with ``first <= 0 <= last``; NaN counts as zero."""
    limit = float(_LARGEST) / 2
    first = range_min.nan_to_num(0.0, limit, -limit).clamp(-limit, 0.0)
    return first, range_max.nan_to_num(0.0, limit, -limit).clamp(0.0, limit)


class SymmetricScale(torch.autograd.Function):
    """Threshold to scale; see `trainable_core.qparams.from_variables` and `variable_gradients`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(threshold: Tensor, low: float, steps: float, power_of_two: bool) -> Tensor:  # noqa: FBT001
        """Return ``threshold / steps`` after bounding and rounding up to a power of two."""
        bounded = _bound(threshold, low)
        if power_of_two:
            bounded = ((bounded.view(torch.int32) + 0x007FFFFF) & 0x7F800000).view(torch.float32)
        return bounded * (1.0 / steps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what the gradient needs."""
        threshold, ctx.low, ctx.steps, ctx.power_of_two = inputs
        ctx.save_for_backward(threshold, output)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Return the threshold's gradient."""
        threshold, scale = ctx.saved_tensors
        gradient = SymmetricScale.gradient(threshold, scale, upstream, ctx.low, ctx.steps, ctx.power_of_two)
        return gradient, None, None, None

    @staticmethod
    def gradient(
        threshold: Tensor,
        scale: Any,
        upstream: Tensor,
        low: float,
        steps: float,
        power_of_two: bool,  # noqa: FBT001 - as in `forward`
    ) -> Tensor:
        """Return the threshold's gradient from the scale's."""
        gradient = upstream * (1.0 / steps)
        if power_of_two:
            gradient = gradient * (scale * steps / _bound(threshold, low))
        return _held(threshold, gradient, low, float(_LARGEST))


class UniformGrid(torch.autograd.Function):
    """Range ends to scale and zero point; see `trainable_core.qparams.from_variables` and `variable_gradients`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(range_min: Tensor, range_max: Tensor, low: float, n_bits: int) -> tuple[Tensor, Tensor]:
        """Return scale and zero point of the range widened to hold zero."""
        quant_max = 2**n_bits - 1
        first, last = _hold_zero(range_min, range_max)
        width = _bound(last - first, low)
        # by a tensor: CUDA multiplies by the inverse of a plain number, which is another float32 number
        scale = width / torch.full_like(width, quant_max)
        scale = ((scale.view(torch.int32) + quant_max) & ~quant_max).view(torch.float32)
        return scale, (-first / scale).round().clamp(0, quant_max)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep what the gradient needs."""
        range_min, range_max, ctx.low, ctx.n_bits = inputs
        ctx.save_for_backward(range_min, range_max, *output)

    @staticmethod
    def backward(ctx: Any, d_scale: Tensor, d_zero: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the range's ends."""
        range_min, range_max, scale, zero_point = ctx.saved_tensors
        d_grid, grid = (d_scale, d_zero), (scale, zero_point)
        return *UniformGrid.gradients((range_min, range_max), grid, d_grid, ctx.low, ctx.n_bits), None, None

    @staticmethod
    def gradients(
        ends: tuple[Tensor, Tensor],
        grid: tuple[Any, Any],
        d_grid: tuple[Tensor, Tensor],
        low: float,
        n_bits: int,
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of the range's ends from those of scale and zero point."""
        (range_min, range_max), (scale, zero_point), (d_scale, d_zero) = ends, grid, d_grid
        limit = float(_LARGEST) / 2
        first, last = _hold_zero(range_min, range_max)
        through_width = _held(
            last - first, (d_scale - d_zero * zero_point / scale) / (2**n_bits - 1), low, float(_LARGEST)
        )
        d_min = _held(range_min, -through_width - d_zero / scale, -limit, 0.0)
        return d_min, _held(range_max, through_width, 0.0, limit)


class Form(NamedTuple):
    """How a quantizer's variables become its grid: what is constant about it.

    Parameters
    ----------
    function : type
        `SymmetricScale` or `UniformGrid`.
    arguments : tuple
        The function's arguments besides the variables.
    quant_min, quant_max : int
        First and last code.
    centered : bool
        Whether every zero point is 0.
    """

    function: type[SymmetricScale | UniformGrid]
    arguments: tuple[Any, ...]
    quant_min: int
    quant_max: int
    centered: bool

    spelled: tuple[str, ...] = ()
    """The arguments, then first and last code, as texts: `torch.compile` makes variables of numbers, not of texts."""

    def constants(self) -> tuple[tuple[Any, ...], int, int]:
        """Return the arguments and the two codes, for a compiler as constants."""
        if not torch.compiler.is_compiling():
            return self.arguments, self.quant_min, self.quant_max
        *arguments, quant_min, quant_max = [float(text) if "." in text else int(text) for text in self.spelled]
        return tuple(arguments), int(quant_min), int(quant_max)

    def grid(self, variables: Sequence[Tensor], shape: tuple[int, ...]) -> Grid:
        """Return the grid, in the autograd graph of the variables; scale and zero point have the shape."""
        shaped = [each if each.shape == shape else each.view(shape) for each in variables]
        arguments, quant_min, quant_max = self.constants()
        made: Any = self.function.apply(*shaped, *arguments)  # type: ignore[no-untyped-call] # torch leaves it so
        scale, zero_point = (made, torch.zeros_like(made)) if self.centered else made
        return Grid(scale, zero_point, quant_min, quant_max, self.centered)

    @torch.no_grad()
    def numbers(self, variables: Sequence[Tensor], shape: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        """Return scale and zero point outside of the graph; no zero point where every one is 0."""
        function: Any = self.function
        made = function.forward(*(each.detach().view(shape) for each in variables), *self.arguments)
        return (made, None) if self.centered else made

    def gradients(
        self, variables: Sequence[Tensor], numbers: tuple[Tensor, Tensor | None], d_grid: tuple[Tensor, Tensor | None]
    ) -> tuple[Tensor, ...]:
        """Return the variables' gradients from those of the numbers."""
        shape = variables[0].shape
        (scale, zero_point), (d_scale, d_zero) = numbers, d_grid
        scale, d_scale = scale.view(shape), d_scale.view(shape)
        if zero_point is None or d_zero is None:
            return (SymmetricScale.gradient(variables[0], scale, d_scale, *self.arguments),)
        ends, d_grid = (variables[0], variables[1]), (d_scale, d_zero.view(shape))
        return UniformGrid.gradients(ends, (scale, zero_point.view(shape)), d_grid, *self.arguments)


def form(method: QuantizationMethod, n_bits: int, *, signed: bool, min_threshold: float) -> Form:
    """Return what makes the grids of a quantization method."""
    low = float(qparams.lower_bound(min_threshold))
    arguments: tuple[Any, ...]
    function: type[SymmetricScale | UniformGrid]
    if method is QuantizationMethod.UNIFORM:
        function, arguments, ends = UniformGrid, (low, n_bits), (0, 2**n_bits - 1)
    elif method in LUT_METHODS:
        power_of_two, steps = method is QuantizationMethod.LUT_POT_QUANTIZER, qparams.table_steps(signed=signed)
        function, arguments = SymmetricScale, (low, float(steps), power_of_two)
        ends = qparams.table_ends(signed=signed)
    else:
        power_of_two = method is QuantizationMethod.POWER_OF_TWO
        function, arguments = SymmetricScale, (low, 2.0 ** (n_bits - int(signed)), power_of_two)
        ends = (-(2 ** (n_bits - 1)), 2 ** (n_bits - 1) - 1) if signed else (0, 2**n_bits - 1)
    spelled = tuple(f"{each:.17e}" if isinstance(each, float) else str(int(each)) for each in (*arguments, *ends))
    return Form(function, arguments, *ends, method is not QuantizationMethod.UNIFORM, spelled)
