"""Weights in evaluation: they are fake-quantized once, and again only when something changed.

The quantized weights are kept outside of their quantizers, by weak references: they are in no state dict, no copy and
no pickle, and they go when the quantizer goes. A kept weight is right as long as its `Stamp` holds.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainable_torch.kernels import eligible, tier

SMALL = 2**12
"""CPU tensors of up to this many elements are compared by content, larger ones by version counters and sums of bits."""

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Stamp:
    """What some tensors were, to tell later whether they are the same still.

    Parameters
    ----------
    tensors : sequence of Tensor
        Plain tensors, see `eligible.is_eager`.

    Notes
    -----
    A small CPU tensor is the same when its content is. Any other one when it is the same object, with the same memory,
    shape and dtype, and its version counter stands where it stood. PyTorch counts every in-place operation on a tensor
    or a view of it, by optimizers and `load_state_dict` too. It does not count what is written through ``tensor.data``
    (averages of weights are often copied so), through a NumPy array or another library that shares the memory, or by
    another process: therefore the bits of every `SMALL` elements are summed, one pass instead of a fake quantization's
    several, and the sums must be equal too. What goes unseen is an uncounted exchange of elements within such a piece.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._marks = [_mark(tensor) for tensor in tensors]

    def holds(self, tensors: Iterable[Tensor]) -> bool:
        """Return whether these are the tensors that were stamped, unchanged."""
        tensors = list(tensors)
        return len(tensors) == len(self._marks) and all(map(_is_as_marked, self._marks, tensors))


Mark = tuple[Tensor | None, Any]


def _mark(tensor: Tensor) -> Mark:
    if tensor.is_cpu and tensor.numel() <= SMALL:
        return tensor.detach().clone(), None
    if tensor.is_inference():  # has no version counter
        return None, None
    return None, (weakref.ref(tensor), _facts(tensor), _sums(tensor))


def _is_as_marked(mark: Mark, tensor: Tensor) -> bool:
    content, reference = mark
    if content is not None:
        alike = tensor.is_cpu and tensor.dtype == content.dtype and tensor.shape == content.shape
        return alike and torch.equal(tensor, content)
    if reference is None or tensor.is_inference():
        return False
    known, facts, sums = reference
    return known() is tensor and facts == _facts(tensor) and torch.equal(sums, _sums(tensor))


def _sums(tensor: Tensor) -> Tensor:
    """Return the sums of the bits, read as integers, of every `SMALL` elements; the last one of what is left."""
    bits = tensor.detach().reshape(-1).view(_BITS[tensor.element_size()])
    whole = bits.numel() - bits.numel() % SMALL
    return torch.cat([bits[:whole].view(-1, SMALL).sum(1), bits[whole:].sum().view(1)])


def _facts(tensor: Tensor) -> tuple[Any, ...]:
    where = tensor.data_ptr(), tensor.dtype, tensor.device
    return eligible.version(tensor), *where, tensor.shape, tensor.stride()


@dataclass(frozen=True)
class _Weight:
    stamp: Stamp
    settings: dict[str, Any]
    value: Tensor
    version: int
    inference: bool


WEIGHTS: MutableMapping[nn.Module, _Weight] = weakref.WeakKeyDictionary()


def evaluated(quantizer: nn.Module, weight: Tensor, compute: Callable[[], Tensor]) -> Tensor:
    """Return a weight fake-quantized for evaluation: ``compute()``, or what it returned for the same numbers before.

    Parameters
    ----------
    quantizer : Module
        Its parameters, buffers and plain attributes are what the value may depend on, besides the weight.
    weight : Tensor
        The float weight.
    compute : callable
        Fake-quantizes it; the result must need no gradient.
    """
    hooked = quantizer._forward_hooks or quantizer._forward_pre_hooks  # noqa: SLF001 - they must run
    if hooked or tier.wanted() == tier.PLAIN or not eligible.is_eager(weight):
        return compute()
    known, tensors, settings = WEIGHTS.get(quantizer), [weight, *_tensors(quantizer)], _settings(quantizer)
    inference = torch.is_inference_mode_enabled()
    if (
        known is not None
        and known.inference == inference
        and known.settings == settings
        and known.version == eligible.version(known.value)  # nobody wrote into it
        and known.stamp.holds(tensors)
    ):
        return known.value
    WEIGHTS.pop(quantizer, None)  # before the new value needs its memory
    value = compute()
    if value is not weight and not value.requires_grad:
        WEIGHTS[quantizer] = _Weight(Stamp(tensors), settings, value, eligible.version(value), inference)
    return value


def forget(quantizer: Any) -> None:
    """Drop a quantizer's weight, if there is one: training changes it at every step."""
    if WEIGHTS and isinstance(quantizer, nn.Module):
        WEIGHTS.pop(quantizer, None)


def remembered(quantizer: nn.Module) -> Tensor | None:
    """Return the fake-quantized weight that is kept for a quantizer, or None."""
    known = WEIGHTS.get(quantizer)
    return None if known is None else known.value


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _settings(module: nn.Module) -> dict[str, Any]:
    """Return the module's attributes: plain values, and which objects the others are."""
    plain = (bool, int, float, str)
    return {name: value if isinstance(value, plain) else id(value) for name, value in vars(module).items()}
