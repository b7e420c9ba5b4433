"""Fake quantization on tensors: one forward formula, which training and deployment share, and two ways back.

The formula is that of `trainable_core.reference.affine`: ``clip(round(x * (1 / scale)), low, high) * scale`` with the
ends counted from zero, ties to even. On finite values it equals ``torch.fake_quantize_per_tensor_affine`` and
``torch.fake_quantize_per_channel_affine`` bit for bit; infinities saturate to their own side (the per-channel kernel
sends +inf to the lowest code), and NaN stays NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainable_torch.grid import Grid

End = Tensor | int


def snap(x: Tensor, scale: Tensor, low: End, high: End) -> Tensor:
    """Return `x` snapped to the grid; float32 in, float32 out, no gradient defined.

    Parameters
    ----------
    x : Tensor, float32
        Real values.
    scale : Tensor, float32, broadcastable to `x`
        Step between grid points.
    low, high : int, or Tensor broadcastable to `x`
        The grid's ends counted from zero.
    """
    codes = (x * scale.reciprocal()).round_().clamp_(low, high)  # type: ignore[arg-type] # numbers or tensors, not one of each
    return codes.add_(0.0).mul_(scale)  # -0.0 + 0.0 is +0.0: the deployed kernels have no negative zero


class _FakeQuantize(torch.autograd.Function):
    """Forward and bookkeeping that every gradient rule shares."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: Tensor, _zero_point: Tensor, low: End, high: End, _gradient_scale: float) -> Tensor:
        """Return `x` snapped to the grid."""
        # Each argument is spelled out: where nothing needs a gradient, torch.compile counts them, and with `*args` it
        # would pass a context first.
        return snap(x, scale, low, high)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004 - torch's signature
        """Keep the input and the grid; nothing the size of the tensor besides."""
        x, scale, _, low, high, ctx.gradient_scale = inputs
        ends = (low, high) if isinstance(low, Tensor) else ()
        ctx.plain_ends = None if ends else (low, high)
        ctx.save_for_backward(x, scale, *ends)

    @staticmethod
    def saved(ctx: Any) -> tuple[Tensor, Tensor, End, End]:
        """Return input, scale and ends."""
        x, scale, *ends = ctx.saved_tensors
        low, high = ctx.plain_ends or ends
        return x, scale, low, high


class _Ste(_FakeQuantize):
    """Gradient of `trainable_core.reference.ste`."""

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Pass the gradient inside the range, its ends included."""
        x, scale, low, high = _Ste.saved(ctx)
        steps = x * scale.reciprocal()
        return torch.where((steps >= low) & (steps <= high), upstream, 0.0), None, None, None, None, None


class _Lsq(_FakeQuantize):
    """Gradients of `trainable_core.reference.lsq`."""

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Pass the gradient strictly inside the range; give scale and zero point theirs."""
        x, scale, low, high = _Lsq.saved(ctx)
        steps = x * scale.reciprocal()
        below, above = steps <= low, steps >= high
        between = (steps > low) & (steps < high)
        d_x = torch.where(between, upstream, 0.0) if ctx.needs_input_grad[0] else None
        d_scale = d_zero = None
        if ctx.needs_input_grad[1]:
            outside = torch.where(above, high, torch.where(below, low, 0.0))
            slope = torch.where(between, steps.round() - steps, outside.to(steps.dtype))
            d_scale = (upstream * slope).sum_to_size(scale.shape) * ctx.gradient_scale
        if ctx.needs_input_grad[2]:
            d_zero = -(torch.where(below | above, upstream, 0.0).sum_to_size(scale.shape) * scale) * ctx.gradient_scale
        return d_x, d_scale, d_zero, None, None, None


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    """Return ``function.apply(*arguments)``, typed."""
    result: Tensor = function.apply(*arguments)
    return result


def ste_fake_quantize(x: Tensor, grid: Grid) -> Tensor:
    """Return `x` snapped to the grid, gradient by `trainable_core.reference.ste`; float32."""
    return apply(_Ste, x, grid.scale.detach(), grid.zero_point.detach(), *grid.ends, 1.0)


def lsq_fake_quantize(x: Tensor, grid: Grid, gradient_scale: float) -> Tensor:
    """Return `x` snapped to the grid, gradients by `trainable_core.reference.lsq`; float32."""
    return apply(_Lsq, x, grid.scale, grid.zero_point, *grid.ends, gradient_scale)
