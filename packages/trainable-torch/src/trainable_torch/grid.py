"""From a quantizer's variables to the grid, on tensors: the same float32 operations as `trainable_core.qparams`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainable_core import qparams
from trainable_core.checks import MAX_THRESHOLD


@dataclass(frozen=True)
class Grid:
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

    @property
    def ends(self) -> tuple[Tensor, Tensor] | tuple[int, int]:
        """First and last code counted from zero: plain numbers on a centered grid, else tensors."""
        if self.centered:
            return self.quant_min, self.quant_max
        zero_point = self.zero_point.detach()
        return self.quant_min - zero_point, self.quant_max - zero_point


def _held(variable: Tensor, gradient: Tensor, low: float, high: float) -> Tensor:
    """Return the gradient where the variable is in bounds or a descent step leads back in; see the core's module."""
    inside = (variable >= low) & (variable <= high)
    back_in = ((variable < low) & (gradient < 0)) | ((variable > high) & (gradient > 0))
    return torch.where((inside | back_in) & torch.isfinite(gradient), gradient, 0.0)


def _bound(threshold: Tensor, low: float) -> Tensor:
    return torch.where(threshold.isnan(), low, threshold).clamp(low, MAX_THRESHOLD)


def _hold_zero(range_min: Tensor, range_max: Tensor) -> tuple[Tensor, Tensor]:
    """Return finite range ends with ``first <= 0 <= last``; NaN counts as zero."""
    limit = MAX_THRESHOLD / 2
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
        gradient = upstream * (1.0 / ctx.steps)
        if ctx.power_of_two:
            gradient = gradient * (scale * ctx.steps / _bound(threshold, ctx.low))
        return _held(threshold, gradient, ctx.low, MAX_THRESHOLD), None, None, None


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
        limit = MAX_THRESHOLD / 2
        first, last = _hold_zero(range_min, range_max)
        through_width = _held(
            last - first, (d_scale - d_zero * zero_point / scale) / (2**ctx.n_bits - 1), ctx.low, MAX_THRESHOLD
        )
        d_min = _held(range_min, -through_width - d_zero / scale, -limit, 0.0)
        return d_min, _held(range_max, through_width, 0.0, limit), None, None


def symmetric(threshold: Tensor, n_bits: int, *, signed: bool, power_of_two: bool, min_threshold: float) -> Grid:
    """Return the SYMMETRIC or POWER_OF_TWO grid of a threshold."""
    low = float(qparams.lower_bound(min_threshold))
    scale = SymmetricScale.apply(threshold, low, 2.0 ** (n_bits - int(signed)), power_of_two)  # type: ignore[no-untyped-call] # torch leaves it so
    quant_min, quant_max = (-(2 ** (n_bits - 1)), 2 ** (n_bits - 1) - 1) if signed else (0, 2**n_bits - 1)
    return Grid(scale, torch.zeros_like(scale), quant_min, quant_max, centered=True)


def uniform(range_min: Tensor, range_max: Tensor, n_bits: int, *, min_threshold: float) -> Grid:
    """Return the UNIFORM grid of a range."""
    low = float(qparams.lower_bound(min_threshold))
    scale, zero_point = UniformGrid.apply(range_min, range_max, low, n_bits)  # type: ignore[no-untyped-call] # torch leaves it so
    return Grid(scale, zero_point, 0, 2**n_bits - 1, centered=False)
