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

from trainable_torch.grid import Grid, VariableGrid
from trainable_torch.kernels import native, passes
from trainable_torch.kernels.numbers import Numbers, float32

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
    if passes.serves(x, scale) and x.numel() > 0:
        return passes.snap(x, Numbers.between(scale, low, high))
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
    d_x = torch.where((steps > low) & (steps < high), upstream, 0.0) if needed[0] else None
    slope, outside = _slopes(steps, low, high)
    d_scale = (upstream * slope).sum_to_size(scale.shape) if needed[1] else None
    d_zero = -(torch.where(outside, upstream, 0.0).sum_to_size(scale.shape) * scale) if needed[2] else None
    return d_x, d_scale, d_zero


def _slopes(steps: Tensor, low: End, high: End) -> tuple[Tensor, Tensor]:
    """Return the derivative of the fake-quantized tensor by the scale, and where it moves with the zero point."""
    below, above = steps <= low, steps >= high
    between = (steps > low) & (steps < high)
    outside = torch.where(above, high, torch.where(below, low, 0.0))
    return torch.where(between, steps.round() - steps, outside.to(steps.dtype)), below | above


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
        return passes.snap(x, self.grid.numbers)

    def snap_for_backward(self, x: Tensor) -> tuple[Tensor, Any]:
        """Return the same, and what helps `gradients`; nothing the size of the tensor."""
        return self.snap(x), None

    def plain(self, x: Tensor, leaves: Sequence[Tensor] | None = None) -> Tensor:
        """Return `x` snapped to the grid by the plain expression, in the graph of `x` and the leaves, or others."""
        raise NotImplementedError

    def gradients(
        self,
        x: Tensor,
        upstream: Tensor,
        leaves: Sequence[Tensor],
        needs: Sequence[bool],
        *,
        reuse: bool = False,
        known: Any = None,
    ) -> Sequence[Tensor | None]:
        """Return the gradients of input and leaves, by the eager kernels.

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
        reuse : bool
            Whether the input's gradient may take the place of `upstream`, which nobody else must have.
        known : object
            What `snap_for_backward` returned besides.
        """
        raise NotImplementedError

    def directions(self, x: Tensor) -> Sequence[Tensor]:  # noqa: ARG002 - for rules that learn
        """Return how the fake-quantized tensor moves with each number of a grid of one scale, shapes of `x`."""
        return ()

    def leaf_gradients(self, leaves: Sequence[Tensor], sums: Sequence[float]) -> Sequence[Tensor | None]:
        """Return the gradients of the leaves from those along the `directions`."""
        raise NotImplementedError

    def plain_gradients(
        self, x: Tensor, upstream: Tensor, leaves: Sequence[Tensor], needs: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """Return the same by plain expressions, where the backward pass is itself differentiated or vectorized."""
        raise NotImplementedError


class Ste(Rule):
    """The straight-through estimator of `trainable_core.reference.ste`."""

    __slots__ = ()

    def snap_for_backward(self, x: Tensor) -> tuple[Tensor, Any]:
        """Return `x` snapped to the grid, and in which parts of it gradients have to be masked."""
        return passes.snap_marking(x, self.grid.numbers)

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
        *,
        reuse: bool = False,
        known: Any = None,
    ) -> Sequence[Tensor | None]:
        """Pass the gradient inside the range, its ends included; see the base."""
        return (passes.pass_inside(x, upstream, self.grid.numbers, closed=True, reuse=reuse, marks=known),)

    def plain_gradients(
        self,
        x: Tensor,
        upstream: Tensor,
        leaves: Sequence[Tensor],  # noqa: ARG002 - as above
        needs: Sequence[bool],  # noqa: ARG002
    ) -> Sequence[Tensor | None]:
        """Pass the gradient inside the range, its ends included; see the base."""
        return (_ste_gradient(upstream, x, *self.grid.numbers.tensors(x)),)


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
        self,
        x: Tensor,
        upstream: Tensor,
        leaves: Sequence[Tensor],
        needs: Sequence[bool],
        *,
        reuse: bool = False,
        known: Any = None,  # noqa: ARG002 - for rules that know something
    ) -> Sequence[Tensor | None]:
        """Pass the gradient strictly inside the range; give the variables theirs; see the base."""
        grid, outside = self.grid, len(leaves) > 1  # a threshold has no part in the zero point
        numbers = grid.numbers
        if not any(needs[1:]):
            return passes.pass_inside(x, upstream, numbers, closed=False, reuse=reuse), *(None for _ in leaves)
        if isinstance(grid, VariableGrid) and isinstance(numbers, native.Block):
            found = passes.learned_lines(x, upstream, numbers, outside=outside, reuse=reuse)
            if found is not None:
                return found[0], *grid.line_gradients(leaves, found[1], self.gradient_scale)
        sums = passes.learned(x, upstream, numbers, outside=outside)
        if sums is not None:
            return sums.x, *self._of_sums(leaves, sums.slope, sums.outside)
        scale, low, high = numbers.tensors(x)
        d_x, *d_grid = _lsq_gradients(upstream, x, scale, low, high, (needs[0], True, outside))
        return d_x, *self._of_grid(leaves, (numbers.scale, numbers.zero_point(grid.quant_min)), d_grid)

    def directions(self, x: Tensor) -> Sequence[Tensor]:
        """Return the derivative by the scale and, where it learns, that by the zero point over the negative scale."""
        scale, low, high = self.grid.numbers.tensors(x)
        slope, outside = _slopes(x * scale.reciprocal(), low, high)
        return (slope,) if len(self.grid.leaves) == 1 else (slope, outside.to(x.dtype))

    def leaf_gradients(self, leaves: Sequence[Tensor], sums: Sequence[float]) -> Sequence[Tensor | None]:
        """Return the gradients of the variables; see the base."""
        return self._of_sums(leaves, sums[0], sums[1] if len(sums) > 1 else None)

    def _of_sums(self, leaves: Sequence[Tensor], slope: float | Tensor, outside: Part) -> Sequence[Tensor | None]:
        numbers = self.grid.numbers
        d_zero = None if outside is None else _times(-outside, numbers.scale)
        return self._of_grid(leaves, (numbers.scale, numbers.zero_point(self.grid.quant_min)), (slope, d_zero))

    def plain_gradients(
        self, x: Tensor, upstream: Tensor, leaves: Sequence[Tensor], needs: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """Pass the gradient strictly inside the range; give the variables theirs; see the base."""
        grid, outside = self._of_tensors(leaves), len(leaves) > 1
        low: End
        high: End
        low, high = grid.ends
        d_x, *d_grid = _lsq_gradients(upstream, x, grid.scale, low, high, (needs[0], True, outside))
        return d_x, *self._of_grid(leaves, (grid.scale, grid.zero_point), d_grid)

    def _of_grid(
        self, leaves: Sequence[Tensor], made: tuple[float | Tensor, float | Tensor], d_grid: Sequence[Part]
    ) -> Sequence[Tensor | None]:
        scaled = [None if each is None else _times(each, self.gradient_scale) for each in d_grid]
        return self.grid.leaf_gradients(leaves, made, scaled)


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
        gradients = ctx.rule.gradients if passes.serves_backward(upstream) else ctx.rule.plain_gradients
        d_x, *d_leaves = gradients(x, upstream, leaves, (needs_x, *needs))
        return d_x, None, *d_leaves


def _times(value: float | Tensor, factor: Any) -> float | Tensor:
    """Return the product in float32, of numbers too."""
    return float32(value * float32(factor)) if isinstance(value, float) else value * factor


_NODE: Any = _Eager._backward_cls  # noqa: SLF001 - what nodes are


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
    if not (passes.serves(x) and rule.grid.served and x.numel() > 0):
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
