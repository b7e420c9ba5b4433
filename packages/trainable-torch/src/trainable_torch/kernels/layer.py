"""A layer and the quantizers of its input and weight as one autograd node.

Each node, each hook and each call of a module between them costs tens of microseconds; a small layer takes hundreds. So
in training, in eager mode on the CPU, a convolution or linear layer whose quantizers each follow a rule is called as
one function: it keeps input and weight as they were in float, and its backward makes the quantized ones again, by the
same kernels. Where anybody could notice, by a hook for instance, the layer and its quantizers are called one by one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name everyone reads

from trainable_torch.kernels import cache, eligible, native
from trainable_torch.kernels.fake_quantization import (
    FakeQuantization,
    by_autograd,
    gradients_together,
    records,
    snap_together,
)

KEPT = 2**15
"""Quantized tensors of up to so many elements are kept: to make them again would take longer than it is worth."""

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
Needs = tuple[bool, bool, bool]


class Linear(NamedTuple):
    """`torch.nn.Linear` as a function and its gradients."""

    transposes: bool = False

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the layer's output, which is no view: what a function of autograd returns is written in as it is."""
        y = F.linear(x, weight, bias)
        return y if x.dim() == 2 else _no_view(y)  # noqa: PLR2004 - rows and features, a matrix

    def gradients(self, upstream: Tensor, x: Tensor, weight: Tensor, needs: Needs) -> Gradients:
        """Return the gradients of input, weight and bias that are needed."""
        if upstream.dim() == 2:  # noqa: PLR2004 - as above
            d_x = upstream.mm(weight) if needs[0] else None
            return d_x, upstream.t().mm(x) if needs[1] else None, upstream.sum(0) if needs[2] else None
        rows = upstream.reshape(-1, upstream.shape[-1])
        return (
            rows.mm(weight).view(x.shape) if needs[0] else None,
            rows.t().mm(x.view(-1, x.shape[-1])) if needs[1] else None,
            rows.sum(0) if needs[2] else None,
        )


class Convolution(NamedTuple):
    """`torch.nn.Conv1d` to `Conv3d` as a function and its gradients.

    Parameters
    ----------
    settings : tuple
        The layer's settings, as ``torch.convolution`` takes them.
    transposes : bool
        Whether the input's gradient takes another kernel than the output, which may be slow.
    """

    settings: tuple[Any, ...]
    transposes: bool = True

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the layer's output; no view either."""
        y = torch.convolution(x, weight, bias, *self.settings)
        return _no_view(y) if x.dim() == 3 else y  # noqa: PLR2004 - in one dimension it is two with a view

    def gradients(self, upstream: Tensor, x: Tensor, weight: Tensor, needs: Needs) -> Gradients:
        """Return the gradients of input, weight and bias that are needed."""
        found = eligible.CONVOLUTION_BACKWARD(upstream, x, weight, [weight.shape[0]], *self.settings, needs)
        # in one dimension, PyTorch gives tensors of other shapes for those that it was not asked for
        d_x, d_weight, d_bias = (each if need else None for each, need in zip(found, needs, strict=True))
        return d_x, d_weight, d_bias


def _no_view(y: Tensor) -> Tensor:
    """Return the same values in the same memory, in a function of autograd not as a view, which can't be written in."""
    if torch.is_grad_enabled():
        return y
    return y.new_empty(0).set_(y.untyped_storage(), y.storage_offset(), y.shape, y.stride())


Operation = Linear | Convolution

_LINEAR = Linear()


def _linear(_layer: nn.Linear, x: Tensor) -> Linear | None:
    """Return a linear layer as a function, None where its gradients are not written for the input's dimensions."""
    return _LINEAR if x.dim() > 1 and x.is_contiguous() else None


def _convolution(layer: Any, x: Tensor) -> Convolution | None:
    """Return a convolution as a function, None where its padding or the input's dimensions need more than that."""
    dims = len(layer.kernel_size)
    if x.dim() != dims + 2 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return None
    return Convolution((layer.stride, layer.padding, layer.dilation, False, [0] * dims, layer.groups))


_OPERATIONS: dict[type, Callable[[Any, Tensor], Operation | None]] = {nn.Linear: _linear}
if eligible.CONVOLUTION_BACKWARD is not None:
    _OPERATIONS |= dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution)


class _FusedLayer(torch.autograd.Function):
    """Fake quantization of input and weight, and what the layer computes of them."""

    @staticmethod
    def forward(
        ctx: Any,
        operation: Operation,
        made: tuple[FakeQuantization | None, FakeQuantization | None],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *leaves: Tensor,
    ) -> Tensor:
        """Return the layer's output; keep the float input and weight, and what learns of both grids."""
        of_x, of_weight = made
        (snapped_x, marks_x), (snapped_weight, marks_weight) = snap_together(((of_x, x), (of_weight, weight)))
        ctx.operation, ctx.made, ctx.marks = operation, made, (marks_x, marks_weight)
        most = KEPT if native.compiled() is not None else math.inf  # several passes cost too much
        kept_x = None if snapped_x.numel() > most else snapped_x
        ctx.kept = kept_x, None if snapped_weight.numel() > most else snapped_weight
        ctx.save_for_backward(x, weight, bias, *leaves)
        return operation(snapped_x, snapped_weight, bias)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of input, weight, bias and all leaves."""
        if not eligible.fits_backward(upstream):
            needed = ctx.needs_input_grad[2:]
            return None, None, *by_autograd(_in_graph(ctx), ctx.saved_tensors, needed, upstream)
        if torch.is_grad_enabled():
            return None, None, *_gradients_in_graph(ctx, upstream)
        x, weight, _, *leaves = ctx.saved_tensors
        _, _, needs_x, needs_weight, needs_bias, *needs = ctx.needs_input_grad
        of_x, of_weight = ctx.made
        snapped_x, snapped_weight = ctx.kept
        if snapped_x is None:
            snapped_x = x if of_x is None else of_x.snap(x)
        if snapped_weight is None:
            snapped_weight = weight if of_weight is None else of_weight.snap(weight)
        split = 0 if of_x is None else len(of_x.leaves)
        needs_of = (needs_x, *needs[:split]), (needs_weight, *needs[split:])
        sums = None
        if any(needs[:split]) and not needs_x and math.prod(of_x.shape) == 1 and ctx.operation.transposes:
            sums = _along(ctx.operation, of_x.directions(x), snapped_weight, upstream)
        of_layer = any(needs_of[0]) and sums is None, any(needs_of[1]), needs_bias
        d_x, d_weight, d_bias = ctx.operation.gradients(upstream, snapped_x, snapped_weight, of_layer)
        del snapped_x, snapped_weight
        # the layer's operation has just made these gradients, so theirs may take their places
        (d_x, *d_first), (d_weight, *d_second) = gradients_together(
            (
                (of_x, x, d_x, leaves[:split], needs_of[0], ctx.marks[0]),
                (of_weight, weight, d_weight, leaves[split:], needs_of[1], ctx.marks[1]),
            )
        )
        if sums is not None:
            d_first = of_x.leaf_gradients(leaves[:split], sums)
        return None, None, d_x, d_weight, d_bias, *d_first, *d_second


# what `apply` does where no function transform is active, without looking through the arguments for their wrappers
_apply: Any = super(torch.autograd.Function, _FusedLayer).apply


def _along(operation: Operation, directions: Sequence[Tensor], weight: Tensor, upstream: Tensor) -> list[Tensor]:
    """Return the products of the input's gradient with some directions, without that gradient.

    A layer's threshold learns though nothing before it does, as a model's first one. The product of a direction with
    what the transposed convolution makes of `upstream` is that of `upstream` with what the convolution makes of the
    direction; and of few channels the transposed one takes several times as long.
    """
    return [operation(each, weight, None).mul_(upstream).sum() for each in directions]


def _gradients_in_graph(ctx: Any, upstream: Tensor) -> Sequence[Tensor | None]:
    """Return the gradients that are wanted, themselves in the autograd graph, as where a backward is differentiated."""
    x, weight, bias, *leaves = ctx.saved_tensors
    of_x, of_weight = ctx.made
    needed = [
        need
        for need, each in zip(ctx.needs_input_grad[2:], (x, weight, bias, *leaves), strict=True)
        if each is not None
    ]
    wanted = eligible.wanted(ctx, needed)
    if bias is None:
        wanted.insert(2, False)
    split = 3 + (0 if of_x is None else len(of_x.leaves))
    wants_x, wants_weight = (wanted[0], *wanted[3:split]), (wanted[1], *wanted[split:])
    of_layer = any(wants_x), any(wants_weight), wanted[2]
    snapped_x = x if of_x is None or not of_layer[1] else of_x.apply(x)
    snapped_weight = weight if of_weight is None or not of_layer[0] else of_weight.apply(weight)
    d_x, d_weight, d_bias = ctx.operation.gradients(upstream, snapped_x, snapped_weight, of_layer)
    d_first: Sequence[Tensor | None] = [None for _ in leaves[: split - 3]]
    d_second: Sequence[Tensor | None] = [None for _ in leaves[split - 3 :]]
    if of_x is not None and d_x is not None:
        d_x, *d_first = of_x.gradients_in_graph(x, d_x, leaves[: split - 3], wants_x)
    if of_weight is not None and d_weight is not None:
        d_weight, *d_second = of_weight.gradients_in_graph(weight, d_weight, leaves[split - 3 :], wants_weight)
    return d_x, d_weight, d_bias, *d_first, *d_second


def _in_graph(ctx: Any) -> Callable[..., Tensor]:
    """Return the layer as a function in the autograd graph, of the tensors that were kept."""
    first, second = ctx.made
    split = 0 if first is None else len(first.leaves)

    def function(x: Tensor, weight: Tensor, bias: Tensor | None, *leaves: Tensor) -> Tensor:
        x = x if first is None else first.plain(x, *leaves[:split])
        weight = weight if second is None else second.plain(weight, *leaves[split:])
        y: Tensor = ctx.operation(x, weight, bias)
        return y

    return function


@functools.lru_cache(maxsize=256)
def _operation_of(own_class: type) -> Callable[[Any, Tensor], Operation | None] | None:
    """Return how to make a function of a layer; None where its class computes anything of its own."""
    for cls, make in _OPERATIONS.items():
        if issubclass(own_class, cls):
            computes = ("forward", "_conv_forward", "weight", "bias")
            alike = all(getattr(own_class, name, None) is getattr(cls, name, None) for name in computes)
            return make if alike else None
    return None


class Quantizer(cache.Quantizer, Protocol):
    """What `call` asks of a quantizer; in evaluation no more than `cache.Quantizer`."""

    def fake_quantization(self, x: Tensor) -> FakeQuantization | None:
        """Return how a tensor is fake-quantized, None where the method does something of its own."""


def call(
    layer: nn.Module,
    own_class: type,
    x: Any,
    quantizers: tuple[Quantizer | None, Quantizer | None],
    *,
    watched: Sequence[nn.Module],
    on_grid: Callable[[Tensor], Tensor] | None = None,
) -> Tensor | None:
    """Return what a layer gives for its only argument; None where the parts are to be called one by one.

    In training, all quantizers are trainable. In evaluation none has a part in the autograd graph: gradients are off,
    or all are deployed.

    Parameters
    ----------
    layer : Module
        The layer.
    own_class : type
        Its class, without what wrapping adds.
    x : object
        The argument.
    quantizers : pair of Quantizer or None
        Those of the argument and of the weight, if these are quantized.
    watched : sequence of Module
        The modules that are not called here; none may have a hook.
    on_grid : callable, optional
        Quantizes the bias.
    """
    make = _operation_of(own_class)
    if not layer.training:
        return _evaluated(layer, make, x, quantizers, watched, on_grid)
    if make is None or not torch.is_grad_enabled() or not eligible.is_unwatched():
        return None
    parameters = layer._parameters  # noqa: SLF001 - attributes of modules cost ten times as much
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if weight is None or "bias" not in parameters or not isinstance(x, Tensor):
        return None
    operation = make(layer, x)
    if operation is None or eligible.has_hooks(watched):
        return None
    of_x, of_weight = quantizers
    first = second = None
    tensors = [x, weight] if bias is None else [x, weight, bias]
    leaves: Sequence[Tensor] = ()
    if of_x is not None:
        first = of_x.fake_quantization(x)
        if first is None:
            return None
        tensors += first.variables
        leaves = first.leaves
    if of_weight is not None:
        second = of_weight.fake_quantization(weight)
        if second is None:
            return None
        tensors += second.variables
        leaves = (*leaves, *second.leaves)
    if not eligible.are_plain(tensors) or x.numel() == 0 or not records(x, weight, *leaves):
        return None
    of_layer = bias if bias is None or on_grid is None else on_grid(bias)
    y: Tensor = _apply(operation, (first, second), x, weight, of_layer, *leaves)
    # the float layer returns a view where it has flattened the input, and a view can't be detached in place
    return y.view(y.shape) if isinstance(operation, Linear) and bias is not None and x.dim() > 2 else y  # noqa: PLR2004


# ---- evaluation -----------------------------------------------------------------------------------------------------


def _linear_in_evaluation(_layer: nn.Linear, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x.contiguous(), weight, bias)  # else it may be another kernel where a gradient is needed


def _convolution_in_evaluation(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = layer._conv_forward(x, weight, bias)  # noqa: SLF001 - the class's own, see `_operation_of`
    return y


_IN_EVALUATION: dict[Any, Callable[..., Tensor]] = {
    _linear: _linear_in_evaluation,
    _convolution: _convolution_in_evaluation,
}


def _evaluated(
    layer: nn.Module,
    make: Callable[..., Any] | None,
    x: Any,
    quantizers: tuple[cache.Quantizer | None, cache.Quantizer | None],
    watched: Sequence[nn.Module],
    on_grid: Callable[[Tensor], Tensor] | None = None,
) -> Tensor | None:
    """Return what `call` does in evaluation; `make` is what `_operation_of` says of the layer's class."""
    if make is None:
        return None
    parameters = layer._parameters  # noqa: SLF001 - as above
    weight = parameters.get("weight")
    if weight is None or "bias" not in parameters or not eligible.fits(x, weight):
        return None
    if x.numel() == 0 or eligible.are_modules_watched() or eligible.has_hooks(watched):
        return None
    found = cache.layer(*quantizers, x, weight)
    if found is None:
        return None
    bias = parameters["bias"]
    of_layer = bias if bias is None or on_grid is None else on_grid(bias)
    return _IN_EVALUATION[make](layer, *found, of_layer)
