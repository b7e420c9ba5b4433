"""The formula: fake quantization and its gradients as tensor expressions.

``clip(round(x * (1 / scale)), low, high) * scale``, as `trainable_core.reference.affine` defines it, with the ends
counted from zero and ties to even. On finite values it equals ``torch.fake_quantize_per_tensor_affine`` and
``torch.fake_quantize_per_channel_affine`` bit for bit; infinities saturate to their own side (the per-channel kernel
sends +inf to the lowest code), and NaN stays NaN. It is what compilers, transforms and other devices see. The fast
kernels give the same bits; only sums over a tensor may add the same terms in another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainable_torch.grid import Grid
from trainable_torch.kernels import eligible

End = Tensor | float


@dataclass(frozen=True)
class Ste:
    """The rule of `trainable_core.reference.ste`: the gradient passes inside the range, its ends included."""


@dataclass(frozen=True)
class Lsq:
    """The rule of `trainable_core.reference.lsq`: the gradient passes strictly inside the range, and the grid learns.

    Parameters
    ----------
    gradient_scale : float
        What the gradients of scale and zero point are multiplied by.
    """

    gradient_scale: float


Rule = Ste | Lsq
"""How gradients come back through a fake quantization."""


def snap(x: Tensor, scale: Tensor, low: End, high: End) -> Tensor:
    """Return `x` snapped to the grid; float32 in, float32 out, no gradient defined."""
    codes = (x * scale.reciprocal()).round_()
    clamp = codes.clamp if eligible.is_transformed() else codes.clamp_  # in place, `vmap` has no rule for tensors
    codes = clamp(low, high)  # type: ignore[arg-type] # numbers or tensors, not one of each
    return codes.add_(0.0).mul_(scale)  # -0.0 + 0.0 is +0.0: the deployed kernels have no negative zero


def ste_gradient(upstream: Tensor, x: Tensor, scale: Tensor, low: End, high: End) -> Tensor:
    """Return the gradient of `x`."""
    steps = x * scale.reciprocal()
    return torch.where((steps >= low) & (steps <= high), upstream, 0.0)


def lsq_gradients(
    upstream: Tensor, x: Tensor, scale: Tensor, low: End, high: End, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of `x`, scale and zero point that are needed, the last two without the gradient scale."""
    steps = x * scale.reciprocal()
    d_x = torch.where((steps > low) & (steps < high), upstream, 0.0) if needed[0] else None
    slope, outside = slopes(steps, low, high)
    d_scale = (upstream * slope).sum_to_size(scale.shape) if needed[1] else None
    d_zero = -(torch.where(outside, upstream, 0.0).sum_to_size(scale.shape) * scale) if needed[2] else None
    return d_x, d_scale, d_zero


def slopes(steps: Tensor, low: End, high: End) -> tuple[Tensor, Tensor]:
    """Return the derivative of the fake-quantized tensor by the scale, and where it moves with the zero point."""
    below, above = steps <= low, steps >= high
    between = (steps > low) & (steps < high)
    outside = torch.where(above, high, torch.where(below, low, 0.0))
    return torch.where(between, steps.round() - steps, outside.to(steps.dtype)), below | above


class _FakeQuantize(torch.autograd.Function):
    """The forward, and what is kept for backward, of both rules."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: Tensor, _zero_point: Tensor, low: End, high: End, _gradient_scale: End) -> Tensor:
        """Return `x` snapped to the grid."""
        # Each argument is spelled out: where nothing needs a gradient, torch.compile counts them, and with `*args` it
        # would pass a context first.
        return snap(x, scale, low, high)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004 - torch's signature
        """Keep the input and the grid; nothing the size of the tensor besides."""
        x, scale, _, low, high, gradient_scale = inputs
        ends = (low, high) if isinstance(low, Tensor) else ()
        factor = (gradient_scale,) if isinstance(gradient_scale, Tensor) else ()
        ctx.plain_ends = None if ends else (low, high)
        ctx.plain_scale = None if factor else gradient_scale
        ctx.save_for_backward(x, scale, *ends, *factor)
        ctx.save_for_forward(x, scale, *ends, *factor)

    @staticmethod
    def saved(ctx: Any) -> tuple[Tensor, Tensor, End, End]:
        """Return input, scale and ends."""
        x, scale, *ends = ctx.saved_tensors
        low, high = ctx.plain_ends or ends[:2]
        return x, scale, low, high

    @staticmethod
    def gradient_scale(ctx: Any) -> Any:
        """Return what the gradients of the grid are multiplied by."""
        return ctx.saved_tensors[-1] if ctx.plain_scale is None else ctx.plain_scale


class _Ste(_FakeQuantize):
    """The gradient of `Ste`."""

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Pass the gradient inside the range, its ends included."""
        return ste_gradient(upstream, *_Ste.saved(ctx)), None, None, None, None, None


class _Lsq(_FakeQuantize):
    """The gradients of `Lsq`."""

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Pass the gradient strictly inside the range; give scale and zero point theirs."""
        gradients = lsq_gradients(upstream, *_Lsq.saved(ctx), ctx.needs_input_grad[:3])
        factor = _Lsq.gradient_scale(ctx)
        d_scale, d_zero = (None if each is None else each * factor for each in gradients[1:])
        return gradients[0], d_scale, d_zero, None, None, None


# Dynamo takes no function that can be differentiated forward, so these are apart


class _SteForward(_Ste):
    """`_Ste`, which can be differentiated in forward mode as well."""

    @staticmethod
    def jvp(ctx: Any, d_x: Tensor | None, *_others: Any) -> Tensor | None:
        """Return what a tangent of the input becomes: what the gradient is multiplied by is symmetric."""
        return None if d_x is None else ste_gradient(d_x, *_Ste.saved(ctx))


class _LsqForward(_Lsq):
    """`_Lsq`, which can be differentiated in forward mode as well."""

    @staticmethod
    def jvp(ctx: Any, d_x: Tensor | None, d_scale: Tensor | None, d_zero: Tensor | None, *_others: Any) -> Any:
        """Return what tangents of input and grid become, by the derivatives that `backward` multiplies with."""
        x, scale, low, high = _Lsq.saved(ctx)
        steps = x * scale.reciprocal()
        slope, outside = slopes(steps, low, high)
        factor = _Lsq.gradient_scale(ctx)
        result = torch.zeros_like(x) if d_x is None else torch.where((steps > low) & (steps < high), d_x, 0.0)
        if d_scale is not None:
            result = result + slope * d_scale * factor
        if d_zero is not None:
            result = result - torch.where(outside, scale * d_zero * factor, 0.0)
        return result


def fake_quantize(x: Tensor, grid: Grid, rule: Rule) -> Tensor:
    """Return `x` snapped to the grid, in the graph of `x` and, if the rule learns, of the grid."""
    result: Tensor
    forward = eligible.is_transformed()
    if isinstance(rule, Lsq):
        factor: Any = rule.gradient_scale
        if torch.compiler.is_compiling():  # where a size is dynamic it is no number, which no function there may take
            factor = torch.full((), factor, dtype=torch.float32, device=x.device)
        of_lsq = _LsqForward if forward else _Lsq
        result = of_lsq.apply(x, grid.scale, grid.zero_point, *grid.ends, factor)  # type: ignore[no-untyped-call] # torch leaves it so
    else:
        of_ste = _SteForward if forward else _Ste
        result = of_ste.apply(x, grid.scale.detach(), grid.zero_point.detach(), *grid.ends, 1.0)  # type: ignore[no-untyped-call]
    return result
