"""A layer and the quantizers of its input and weight as one autograd node.

Each node, each hook and each call of a module between them costs tens of microseconds; a small layer takes hundreds.
So in training, in eager mode on the CPU, a convolution or linear layer whose quantizers each follow one rule is called
as one function: it keeps input and weight as they were in float, and its backward makes the quantized ones again, by
the same kernels. Whatever anybody could see of the parts, hooks for instance, sends the layer its usual way.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name everyone reads
from torch.nn.modules.module import _has_any_global_hook

from trainable_torch import ops
from trainable_torch.holder import ActivationQuantizationHolder
from trainable_torch.kernels import cache, native, passes, recomputing
from trainable_torch.quantizers.base import BasePytorchTrainableQuantizer

_CONVOLUTION_BACKWARD = torch.ops.aten.convolution_backward.default

KEPT = 2**15
"""Quantized tensors of up to so many elements are kept: to make them again would take longer than it is worth."""

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
Needs = tuple[bool, bool, bool]

_METHODS = ("__call__", "forward", "quantize", "fake_quantize", "rule", "grid")


class Linear:
    """`torch.nn.Linear` as a function and its gradients.

    Parameters
    ----------
    layer : Linear
        The layer.
    """

    __slots__ = ()

    transposes = False

    def __init__(self, layer: nn.Linear) -> None: ...

    def takes(self, x: Tensor) -> bool:
        """Return whether the input has dimensions that the gradients are written for."""
        return x.dim() > 1 and x.is_contiguous()

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the layer's output."""
        return F.linear(x, weight, bias)

    def gradients(self, upstream: Tensor, x: Tensor, weight: Tensor, needs: Needs) -> Gradients:
        """Return the gradients of input, weight and bias that are needed."""
        rows = upstream.reshape(-1, upstream.shape[-1])
        return (
            rows.mm(weight).view(x.shape) if needs[0] else None,
            rows.t().mm(x.view(-1, x.shape[-1])) if needs[1] else None,
            rows.sum(0) if needs[2] else None,
        )


class Convolution:
    """`torch.nn.Conv1d` to `Conv3d` as a function and its gradients.

    Parameters
    ----------
    layer : Conv1d, Conv2d or Conv3d
        The layer.
    """

    __slots__ = ("dims", "settings")

    transposes = True
    """Whether the input's gradient takes another kernel than the output, which may be slow."""

    def __init__(self, layer: Any) -> None:
        self.dims = len(layer.kernel_size) + 2
        self.settings = layer.stride, layer.padding, layer.dilation, False, [0] * (self.dims - 2), layer.groups

    def takes(self, x: Tensor) -> bool:
        """Return whether the input has dimensions that the gradients are written for."""
        return x.dim() == self.dims

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the layer's output."""
        return torch.convolution(x, weight, bias, *self.settings)

    def gradients(self, upstream: Tensor, x: Tensor, weight: Tensor, needs: Needs) -> Gradients:
        """Return the gradients of input, weight and bias that are needed."""
        found: Gradients = _CONVOLUTION_BACKWARD(upstream, x, weight, [weight.shape[0]], *self.settings, needs)
        return found


def _operation(layer: Any) -> Linear | Convolution | None:
    """Return a layer as a function, None where it is of another class, or not as its class makes it."""
    if type(layer) is nn.Linear:
        return Linear(layer)
    if type(layer) in {nn.Conv1d, nn.Conv2d, nn.Conv3d}:
        plain = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        return Convolution(layer) if plain else None
    return None


class _FusedLayer(torch.autograd.Function):
    """Fake quantization of input and weight, and what the layer computes of them."""

    @staticmethod
    def forward(
        ctx: Any,
        operation: Linear | Convolution,
        rules: tuple[ops.Rule | None, ops.Rule | None],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *leaves: Tensor,
    ) -> Tensor:
        """Return the layer's output; keep the float input and weight, and the leaves of both rules."""
        of_x, of_weight = rules
        snapped_x, known_x = (x, None) if of_x is None else of_x.snap_for_backward(x)
        snapped_weight, known_weight = (weight, None) if of_weight is None else of_weight.snap_for_backward(weight)
        ctx.operation, ctx.rules, ctx.known = operation, rules, (known_x, known_weight)
        most = KEPT if native.compiled() is not None else math.inf  # PyTorch's own kernels take several passes
        ctx.kept = [None if each.numel() > most else each for each in (snapped_x, snapped_weight)]
        ctx.save_for_backward(x, weight, bias, *leaves)
        return operation(snapped_x, snapped_weight, bias)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of input, weight, bias and all leaves."""
        if not passes.serves_backward(upstream):
            return None, None, *_plain_gradients(ctx, upstream)
        x, weight, _, *leaves = ctx.saved_tensors
        _, _, needs_x, needs_weight, needs_bias, *needs = ctx.needs_input_grad
        of_x, of_weight = ctx.rules
        snapped_x, snapped_weight = ctx.kept
        if snapped_x is None:
            snapped_x = x if of_x is None else of_x.snap(x)
        if snapped_weight is None:
            snapped_weight = weight if of_weight is None else of_weight.snap(weight)
        split = 0 if of_x is None else len(of_x.leaves)
        needs_of = (needs_x, *needs[:split]), (needs_weight, *needs[split:])
        sums = None
        if any(needs[:split]) and not needs_x and of_x.grid.numbers.axis is None and ctx.operation.transposes:
            sums = _along(ctx.operation, of_x.directions(x), snapped_weight, upstream)
        of_layer = any(needs_of[0]) and sums is None, any(needs_of[1]), needs_bias
        d_x, d_weight, d_bias = ctx.operation.gradients(upstream, snapped_x, snapped_weight, of_layer)
        del snapped_x, snapped_weight
        d_x, *d_first = _through(of_x, x, d_x, leaves[:split], needs_of[0], ctx.known[0])
        if sums is not None:
            d_first = of_x.leaf_gradients(leaves[:split], sums)
        d_weight, *d_second = _through(of_weight, weight, d_weight, leaves[split:], needs_of[1], ctx.known[1])
        return None, None, d_x, d_weight, d_bias, *d_first, *d_second


def _along(operation: Convolution, directions: Sequence[Tensor], weight: Tensor, upstream: Tensor) -> list[float]:
    """Return the products of the input's gradient with some directions, without that gradient.

    A layer's threshold learns though nothing before it does, as a model's first one. The product of a direction with
    what the transposed convolution makes of `upstream` is that of `upstream` with what the convolution makes of the
    direction; and of few channels the transposed one takes several times as long.
    """
    return [float(operation(each, weight, None).mul_(upstream).sum()) for each in directions]


def _through(
    rule: ops.Rule | None,
    x: Tensor,
    upstream: Tensor | None,
    leaves: Sequence[Tensor],
    needs: Sequence[bool],
    known: Any,
) -> Sequence[Tensor | None]:
    """Return the gradients of a quantizer's input and leaves."""
    if rule is None or upstream is None:
        return upstream, *(None for _ in leaves)
    # the layer's operation has just made `upstream`
    return rule.gradients(x, upstream, leaves, needs, reuse=True, known=known)


def _plain_gradients(ctx: Any, upstream: Tensor) -> list[Tensor | None]:
    """Return the gradients of a backward pass that is itself differentiated or vectorized, by plain expressions."""
    differentiated = torch.is_grad_enabled()
    needed = ctx.needs_input_grad[2:]
    with torch.enable_grad():
        # views: else the gradient of a weight would count what the input owes to it
        given = [None if each is None else each.view_as(each) for each in ctx.saved_tensors]
        x, weight, bias, *leaves = given
        first, second = ctx.rules
        split = 0 if first is None else len(first.leaves)
        x = x if first is None else first.plain(x, leaves[:split])
        weight = weight if second is None else second.plain(weight, leaves[split:])
        y = ctx.operation(x, weight, bias)
        wanted = [each for each, need in zip(given, needed, strict=True) if need and each is not None]
        found = iter(torch.autograd.grad(y, wanted, upstream, create_graph=differentiated, allow_unused=True))
    return [next(found) if need else None for need in needed]


class _Parts(NamedTuple):
    """What a wrapper's layer is called with, besides its input."""

    operation: Linear | Convolution
    weight: Tensor
    bias: Tensor | None
    holder: ActivationQuantizationHolder | None
    quantizer: Any


def call(wrapper: Any, x: Any) -> Tensor | None:
    """Return what a wrapper's layer gives for its only argument; None: it has to go its usual way.

    Parameters
    ----------
    wrapper : QuantizationWrapper
        With a layer that is a module, in training.
    x : object
        The argument.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return None
    parts = _parts(wrapper)
    if parts is None or not passes.serves(*(each for each in (x, parts.weight, parts.bias) if each is not None)):
        return None
    if not (x.numel() and parts.operation.takes(x)) or _is_watched():
        return None
    of_x = None if parts.holder is None else _rule(parts.holder.activation_holder_quantizer, x)
    of_weight = None if parts.quantizer is None else _rule(parts.quantizer, parts.weight)
    if (of_x is None) != (parts.holder is None) or (of_weight is None) != (parts.quantizer is None):
        return None
    leaves = [leaf for rule in (of_x, of_weight) if rule is not None for leaf in rule.leaves]
    if not ops.records(x, parts.weight, *leaves):
        return None
    cache.forget(parts.quantizer)
    return ops.apply(_FusedLayer, parts.operation, (of_x, of_weight), x, parts.weight, parts.bias, *leaves)


def _parts(wrapper: Any) -> _Parts | None:
    """Return a layer's parts where they are no other than this module knows, and nobody looks at them."""
    layer, modules = wrapper.layer, wrapper._modules  # noqa: SLF001 - attributes of modules cost ten times as much
    operation = _operation(layer)
    if operation is None or _hooked(layer) or "forward" in layer.__dict__:
        return None
    if wrapper.op_call_args or wrapper.op_call_kwargs or not wrapper.quantizes_weights:
        return None
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")  # noqa: SLF001 - as above
    holders, quantizers = modules["input_holders"]._modules, modules["weights_quantizers"]  # noqa: SLF001 - as above
    if weight is None or len(holders) > 1 or len(quantizers) != ("weight" in quantizers):
        return None
    holder = next(iter(holders.values()), None)
    if holder is not None and (type(holder) is not ActivationQuantizationHolder or holder.observer or _hooked(holder)):
        return None
    return _Parts(operation, weight, bias, holder, quantizers["weight"] if len(quantizers) else None)


def _hooked(module: nn.Module) -> bool:
    state = module.__dict__
    return bool(
        state["_forward_pre_hooks"]
        or state["_forward_hooks"]
        or state["_backward_pre_hooks"]
        or state["_backward_hooks"]
    )


def _is_watched() -> bool:
    """Return whether somebody else looks at modules, casts what they are given, or at what is kept for backward."""
    return (
        _has_any_global_hook()
        or torch.is_autocast_enabled("cpu")
        or torch._C._len_torch_function_stack() > 0  # noqa: SLF001 - nothing public tells
        or recomputing.others_are_active()
    )


def _rule(quantizer: Any, x: Tensor) -> ops.Rule | None:
    """Return what a quantizer does with a tensor, if nothing but its rule."""
    if not _follows_rule(quantizer.__class__) or _hooked(quantizer):
        return None
    if not quantizer.__dict__.keys().isdisjoint(_METHODS):
        return None
    rule: ops.Rule | None = quantizer.checked_rule(x)
    return rule if rule is not None and rule.grid.served else None


@functools.lru_cache(maxsize=256)
def _follows_rule(cls: Hashable) -> bool:
    """Return whether no method of a quantizer class was changed after the rule was written that stands for them."""
    if not (isinstance(cls, type) and issubclass(cls, BasePytorchTrainableQuantizer)):
        return False
    owners = {name: next(index for index, each in enumerate(cls.__mro__) if name in vars(each)) for name in _METHODS}
    return owners["rule"] == min(owners.values())
