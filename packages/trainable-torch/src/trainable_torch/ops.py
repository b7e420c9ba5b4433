"""Fake quantization on tensors: what a method's author calls.

`fake_quantize` snaps a tensor to a grid and brings gradients back by one of two rules, `Ste` or `Lsq`; `snap` is the
forward alone, the very formula that is deployed. See `trainable_torch.kernels.plain` for the formula.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trainable_core.qparams import table_ends, table_steps
from trainable_torch.grid import Grid
from trainable_torch.kernels import fake_quantize, snap
from trainable_torch.kernels.plain import Lsq, Rule, Ste

__all__ = [
    "Lsq",
    "Rule",
    "Ste",
    "by_slopes",
    "exp2",
    "fake_quantize",
    "finite_gradient",
    "lsq_fake_quantize",
    "magnitude_gradient",
    "snap",
    "snap_to_levels",
    "snap_to_levels_passing",
    "ste_fake_quantize",
    "straight_through",
]


def ste_fake_quantize(x: Tensor, grid: Grid) -> Tensor:
    """Return `x` snapped to the grid, gradient by `trainable_core.reference.ste`; float32."""
    return fake_quantize(x, grid, Ste())


def lsq_fake_quantize(x: Tensor, grid: Grid, gradient_scale: float) -> Tensor:
    """Return `x` snapped to the grid, gradients by `trainable_core.reference.lsq`; float32."""
    return fake_quantize(x, grid, Lsq(gradient_scale))


def exp2(u: Tensor) -> Tensor:
    """Return ``2**u``, float32, exact for whole numbers on every device and in every compiler.

    A threshold that is a power of two stays that power: an `exp2` that is off by the last bit would round it up to the
    next one on a grid of method POWER_OF_TWO. Below ``2**-126`` the result is 0, from ``2**128`` on it is infinite.
    """
    result: Tensor = _Exp2.apply(u)  # type: ignore[no-untyped-call] # torch leaves it so
    return result


class _Exp2(torch.autograd.Function):
    """Two to the power of a tensor."""

    generate_vmap_rule = True

    @staticmethod
    def forward(u: Tensor) -> Tensor:
        """Return the power of the whole part, made of its bits, times that of the rest, which is between 1 and 2."""
        whole = u.floor().clamp(-126.0, 127.0).nan_to_num(0.0)
        power = ((whole.to(torch.int32) + 127) << 23).view(torch.float32)
        value = power * (u - u.floor()).exp2().nan_to_num(1.0).clamp(1.0, 2.0)
        value = torch.where(u >= 128.0, math.inf, torch.where(u < -126.0, 0.0, value))  # noqa: PLR2004 - float32's exponents
        return torch.where(u.isnan(), u, value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:  # noqa: ARG004 - torch's signature
        """Keep what the gradient needs."""
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        """Multiply by the derivative, ``2**u ln 2``."""
        (output,) = ctx.saved_tensors
        gradient: Tensor = upstream * output * math.log(2.0)
        return gradient


def straight_through(values: Tensor, smooth: Tensor) -> Tensor:
    """Return `values`, bit for bit, with the gradient of `smooth`.

    It is what ``smooth + (values - smooth).detach()`` means; in float32 that sum is not always `values`.

    Parameters
    ----------
    values : Tensor
        What is returned; it gets no gradient.
    smooth : Tensor, same shape
        What the gradient goes to, as it comes.
    """
    result: Tensor = _StraightThrough.apply(values, smooth)  # type: ignore[no-untyped-call]
    return result


class _StraightThrough(torch.autograd.Function):
    """The first argument, with a gradient for the second."""

    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, smooth: Tensor) -> Tensor:  # noqa: ARG004 - it gets the gradient
        """Return the values."""
        return values.view_as(values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor]:  # noqa: ARG004 - torch's signature
        """Pass the gradient to the second argument."""
        return None, upstream


def finite_gradient(x: Tensor) -> Tensor:
    """Return `x`; what comes back as its gradient and is not finite becomes 0."""
    result: Tensor = _FiniteGradient.apply(x)  # type: ignore[no-untyped-call]
    return result


class _FiniteGradient(torch.autograd.Function):
    """The identity, whose gradient is always finite."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        """Return the tensor."""
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:  # noqa: ARG004 - torch's signature
        """Return the gradient with zeros for what is not finite."""
        return upstream.nan_to_num(0.0, 0.0, 0.0)


def by_slopes(
    x: Tensor,
    grid: Grid,
    d_x: Tensor,
    d_scale: Tensor | None = None,
    d_zero_point: Tensor | None = None,
    *,
    by_sign: tuple[Tensor, Tensor] | None = None,
    values: Tensor | None = None,
) -> Tensor:
    """Return `x` snapped to the grid, with gradients that are given as a slope for each element; float32.

    Parameters
    ----------
    x : Tensor, float32
        Real values.
    grid : Grid
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
    smooth = x * d_x.detach()
    if d_scale is not None:
        smooth = smooth + grid.scale * d_scale.detach()
    if d_zero_point is not None and not grid.centered:
        smooth = smooth + grid.zero_point * d_zero_point.detach()
    if by_sign is not None:
        signed = x * by_sign[0].detach() + grid.scale * by_sign[1].detach()
        smooth = smooth + magnitude_gradient(signed)
    if values is None:
        values = snap(x.detach(), grid.scale.detach(), *grid.ends)
    return straight_through(values, smooth)


def snap_to_levels(x: Tensor, scale: Tensor, levels: Sequence[int | Tensor], *, signed: bool = True) -> Tensor:
    """Return `x` on the levels of a table, as `trainable_core.reference.affine.nearest_levels` says; float32.

    Parameters
    ----------
    x : Tensor, float32
        Real values.
    scale : Tensor, float32, broadcastable to `x`
        A 128th of the threshold; a 256th of that of a table without a sign.
    levels : sequence of int or of Tensor
        The table, ascending.
    signed : bool
        Whether the table may reach below zero.
    """
    steps, (first, last) = table_steps(signed=signed), table_ends(signed=signed)
    at = (x / (scale * steps) * steps).clamp(first, last)
    codes = torch.zeros_like(at) + levels[0]
    least = (at - levels[0]).abs()
    for level in levels[1:]:
        distance = (at - level).abs()
        codes = torch.where(distance < least, level if isinstance(level, Tensor) else float(level), codes)
        least = torch.minimum(least, distance)
    return torch.where(x.isnan(), x, codes * scale)


def snap_to_levels_passing(x: Tensor, scale: Tensor, levels: Sequence[int | Tensor], *, signed: bool) -> Tensor:
    """Return what `snap_to_levels` does; the gradient passes within the range of the codes, its ends included.

    It is that of `trainable_core.reference.ste` on the grid that the levels are some codes of.
    """
    values, steps = snap_to_levels(x.detach(), scale, levels, signed=signed), x.detach() / scale
    first, last = table_ends(signed=signed)
    return straight_through(values, x * ((steps >= first) & (steps <= last)).to(x.dtype))


def magnitude_gradient(x: Tensor) -> Tensor:
    """Return `x`; what comes back as its gradient counts by its magnitude."""
    result: Tensor = _MagnitudeGradient.apply(x)  # type: ignore[no-untyped-call]
    return result


class _MagnitudeGradient(torch.autograd.Function):
    """The identity, whose gradient is never negative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        """Return the tensor."""
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:  # noqa: ARG004 - torch's signature
        """Return the gradient's magnitude."""
        return upstream.abs()
