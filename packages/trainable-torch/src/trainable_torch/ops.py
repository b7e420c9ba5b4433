"""Fake quantization on tensors: one forward formula, which training and deployment share, and two ways back.

The formula is that of `trainable_core.reference.affine`: ``clip(round(x * (1 / scale)), low, high) * scale`` with the
ends counted from zero, ties to even. On finite values it equals ``torch.fake_quantize_per_tensor_affine`` and
``torch.fake_quantize_per_channel_affine`` bit for bit; infinities saturate to their own side (the per-channel kernel
sends +inf to the lowest code), and NaN stays NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trainable_torch import kernels
from trainable_torch.grid import Grid
from trainable_torch.scalars import Numbers, float32

End = Tensor | float
Part = Tensor | float | None


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
    if kernels.serves(x, scale) and x.numel() > 0:
        return kernels.snap(x, Numbers.between(scale, low, high))
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
        return _ste_gradient(upstream, *_Ste.saved(ctx)), None, None, None, None, None


class _Lsq(_FakeQuantize):
    """Gradients of `trainable_core.reference.lsq`."""

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Pass the gradient strictly inside the range; give scale and zero point theirs."""
        gradients = _lsq_gradients(upstream, *_Lsq.saved(ctx), ctx.needs_input_grad[:3])
        d_scale, d_zero = (None if each is None else each * ctx.gradient_scale for each in gradients[1:])
        return gradients[0], d_scale, d_zero, None, None, None


def _ste_gradient(upstream: Tensor, x: Tensor, scale: Tensor, low: End, high: End) -> Tensor:
    steps = x * scale.reciprocal()
    return torch.where((steps >= low) & (steps <= high), upstream, 0.0)


def _lsq_gradients(
    upstream: Tensor, x: Tensor, scale: Tensor, low: End, high: End, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of input, scale and zero point that are needed, the last two without the gradient scale."""
    steps = x * scale.reciprocal()
    below, above = steps <= low, steps >= high
    between = (steps > low) & (steps < high)
    d_x = torch.where(between, upstream, 0.0) if needed[0] else None
    d_scale = d_zero = None
    if needed[1]:
        outside = torch.where(above, high, torch.where(below, low, 0.0))
        slope = torch.where(between, steps.round() - steps, outside.to(steps.dtype))
        d_scale = (upstream * slope).sum_to_size(scale.shape)
    if needed[2]:
        d_zero = -(torch.where(below | above, upstream, 0.0).sum_to_size(scale.shape) * scale)
    return d_x, d_scale, d_zero


class Rule:
    """How a tensor is fake-quantized on one grid by the eager CPU kernels, and how gradients come back.

    Parameters
    ----------
    grid : Grid
        The numbers a tensor is fake-quantized with.
    """

    __slots__ = ("grid",)

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """The tensors besides the input that get a gradient."""
        return ()

    def snap(self, x: Tensor) -> Tensor:
        """Return `x` snapped to the grid, outside the autograd graph."""
        return kernels.snap(x, self.grid.numbers)

    def plain(self, x: Tensor, leaves: Sequence[Tensor] | None = None) -> Tensor:
        """Return `x` snapped to the grid by the plain expression, in the graph of `x` and the leaves, or others."""
        raise NotImplementedError

    def gradients(
        self, x: Tensor, upstream: Tensor, leaves: Sequence[Tensor], needs: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """Return the gradients of input and leaves.

        Parameters
        ----------
        x : Tensor
            The input.
        upstream : Tensor, shape of `x`
            Gradient of the fake-quantized tensor.
        leaves : sequence of Tensor
            As they were in the forward.
        needs : sequence of bool
            Whether the input and each of the leaves needs a gradient.
        """
        raise NotImplementedError


class Ste(Rule):
    """The straight-through estimator of `trainable_core.reference.ste`."""

    __slots__ = ()

    def plain(self, x: Tensor, leaves: Sequence[Tensor] | None = None) -> Tensor:  # noqa: ARG002 - the base's signature
        """Return `x` snapped to the grid, in its graph; see the base."""
        grid = self.grid
        return apply(_Ste, x, grid.scale.detach(), grid.zero_point.detach(), *grid.ends, 1.0)

    def gradients(
        self,
        x: Tensor,
        upstream: Tensor,
        leaves: Sequence[Tensor],  # noqa: ARG002 - the base's signature
        needs: Sequence[bool],  # noqa: ARG002
    ) -> Sequence[Tensor | None]:
        """Pass the gradient inside the range, its ends included; see the base."""
        numbers = self.grid.numbers
        if kernels.serves_backward(upstream):
            return (kernels.pass_inside(x, upstream, numbers, closed=True),)
        return (_ste_gradient(upstream, x, *numbers.tensors(x)),)


class Lsq(Rule):
    """Learned step size quantization of `trainable_core.reference.lsq`, the grid's own function with it.

    Parameters
    ----------
    grid : Grid
        As above.
    gradient_scale : float
        What the gradients of scale and zero point are multiplied by.
    """

    __slots__ = ("gradient_scale",)

    def __init__(self, grid: Grid, gradient_scale: float) -> None:
        super().__init__(grid)
        self.gradient_scale = gradient_scale

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """The grid's variables."""
        return self.grid.leaves

    def plain(self, x: Tensor, leaves: Sequence[Tensor] | None = None) -> Tensor:
        """Return `x` snapped to the grid, in its graph and that of the leaves; see the base."""
        grid = self.grid if leaves is None else self._of_tensors(leaves)
        return apply(_Lsq, x, grid.scale, grid.zero_point, *grid.ends, self.gradient_scale)

    def _of_tensors(self, leaves: Sequence[Tensor]) -> Grid:
        grid = self.grid
        return Grid(*grid.tensors(leaves), grid.quant_min, grid.quant_max, grid.centered)

    def gradients(
        self, x: Tensor, upstream: Tensor, leaves: Sequence[Tensor], needs: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """Pass the gradient strictly inside the range; give the variables theirs; see the base."""
        needs_x, *needs_leaves = needs
        grid: Grid = self.grid
        numbers, outside = grid.numbers, len(leaves) > 1  # a threshold has no part in the zero point
        d_scale: Part
        d_zero: Part
        if not kernels.serves_backward(upstream):  # this backward pass is differentiated, or vectorized
            plain = self._of_tensors(leaves)
            low: End
            high: End
            low, high = plain.ends
            d_x, d_scale, d_zero = _lsq_gradients(upstream, x, plain.scale, low, high, (needs_x, True, outside))
            made: tuple[Any, Any] = plain.scale, plain.zero_point
        elif not any(needs_leaves):
            return kernels.pass_inside(x, upstream, numbers, closed=False), *(None for _ in leaves)
        else:
            made = numbers.scale, numbers.zero_point(grid.quant_min)
            found = kernels.learned(x, upstream, numbers, outside=outside)
            if found is None:
                scale, low, high = numbers.tensors(x)
                d_x, d_scale, d_zero = _lsq_gradients(upstream, x, scale, low, high, (needs_x, True, outside))
            else:
                d_x, d_scale = found.x if needs_x else None, found.slope
                d_zero = None if found.outside is None else _times(-found.outside, numbers.scale)
        d_grid = [None if each is None else _times(each, self.gradient_scale) for each in (d_scale, d_zero)]
        return d_x, *grid.leaf_gradients(leaves, made, d_grid)


class _Eager(torch.autograd.Function):
    """A fake quantization by the eager CPU kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rule: Rule, *leaves: Tensor) -> Tensor:
        """Return `x` snapped to the grid; keep `x` and the leaves."""
        ctx.rule = rule
        ctx.save_for_backward(x, *leaves)
        y = rule.snap(x)
        ctx.version = y._version  # noqa: SLF001 - nothing public tells it
        return y

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients that the rule defines."""
        x, *leaves = ctx.saved_tensors
        needs_x, _, *needs = ctx.needs_input_grad
        d_x, *d_leaves = ctx.rule.gradients(x, upstream, leaves, (needs_x, *needs))
        return d_x, None, *d_leaves


def _times(value: float | Tensor, factor: Any) -> float | Tensor:
    """Return the product in float32, of numbers too."""
    return float32(value * float32(factor)) if isinstance(value, float) else value * factor


_NODE = _Eager._backward_cls  # type: ignore[attr-defined]  # noqa: SLF001 - what nodes are


def is_quantized(tensor: Tensor) -> bool:
    """Return whether a tensor is what an eager fake quantization returned, as it was then.

    Its autograd node keeps the float tensor first, and has the `rule` and the tensor's `version`.
    """
    node: Any = tensor.grad_fn
    return type(node) is _NODE and tensor._version == node.version  # noqa: SLF001 - as above


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    """Return ``function.apply(*arguments)``, typed."""
    result: Tensor = function.apply(*arguments)
    return result


def ste_fake_quantize(x: Tensor, grid: Grid) -> Tensor:
    """Return `x` snapped to the grid, gradient by `trainable_core.reference.ste`; float32."""
    return fake_quantize(x, Ste(grid))


def lsq_fake_quantize(x: Tensor, grid: Grid, gradient_scale: float) -> Tensor:
    """Return `x` snapped to the grid, gradients by `trainable_core.reference.lsq`; float32."""
    return fake_quantize(x, Lsq(grid, gradient_scale))


def fake_quantize(x: Tensor, rule: Rule) -> Tensor:
    """Return `x` snapped to a rule's grid, with the rule's gradients; float32."""
    if not (kernels.serves(x) and rule.grid.served and x.numel() > 0):
        return rule.plain(x)
    leaves = rule.leaves
    return apply(_Eager, x, rule, *leaves) if records(x, *leaves) else rule.snap(x)


def records(*tensors: Tensor) -> bool:
    """Return whether autograd records what is done with these tensors."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor.requires_grad:
                return True
    return False
