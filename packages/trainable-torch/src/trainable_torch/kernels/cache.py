"""What evaluation keeps: quantized weights and grids are made once, and again only when something changed.

They are kept outside of their quantizers, by weak references: they are in no state dict, no copy and no pickle, and
they go when the quantizer goes. What is kept is right as long as its `Stamp` holds.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from trainable_torch.kernels import eligible, native, tier

SMALL = 2**12
"""CPU tensors of up to this many elements are compared by content, larger ones by version counters and sums of bits."""

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PLAIN = (Tensor, nn.Parameter)


class Stamp:
    """What some tensors were, to tell later whether they are the same still.

    Parameters
    ----------
    tensors : sequence of Tensor
        Plain tensors, see `eligible.is_eager`.

    Notes
    -----
    A tensor is the same when it has the same memory, shape, strides and dtype, and of a small CPU tensor all bytes are
    what they were. Any other one must be the same object, and its version counter stand where it stood. PyTorch counts
    every in-place operation on a tensor or a view of it, by optimizers and `load_state_dict` too. It does not count
    what is written through ``tensor.data`` (averages of weights are often copied so), through a NumPy array or another
    library that shares the memory, or by another process: therefore the bits of every `SMALL` elements are summed, one
    pass instead of a fake quantization's several, and the sums must be equal too. What goes unseen is an uncounted
    exchange of elements within such a piece.
    """

    __slots__ = ("_bytes", "_dtypes", "_large", "_places", "_sizes", "_strides")

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        tensors = list(tensors)
        # lists that are compared at once: a layer has up to nine tensors, and each look at one counts
        self._places, self._sizes = list(map(_place, tensors)), list(map(_size, tensors))
        self._strides, self._dtypes = list(map(_stride, tensors)), list(map(_dtype, tensors))
        large = [(index, each) for index, each in enumerate(tensors) if not is_small(each)]
        self._large = [(index, weakref.ref(each), eligible.version(each), _sums(each)) for index, each in large]
        self._bytes = native.Bytes([_bytes_of(each) for each in tensors if is_small(each)])

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether these are the tensors that were stamped, unchanged."""
        # where a tensor has no memory any more, as after `resize_(0)`, its place is 0
        if list(map(_place, tensors)) != self._places or list(map(_stride, tensors)) != self._strides:
            return False
        if list(map(_size, tensors)) != self._sizes or list(map(_dtype, tensors)) != self._dtypes:
            return False
        for index, known, version, sums in self._large:
            tensor = tensors[index]
            if known() is not tensor or eligible.version(tensor) != version or not torch.equal(sums, _sums(tensor)):
                return False
        return self._bytes.are_there()


_place, _size, _stride, _dtype = Tensor.data_ptr, Tensor.size, Tensor.stride, operator.attrgetter("dtype")


def is_small(tensor: Tensor) -> bool:
    """Return whether a tensor is compared by content."""
    return tensor.is_cpu and tensor.numel() <= SMALL


def _bytes_of(tensor: Tensor) -> tuple[Tensor, int, int]:
    """Return a tensor that shares the memory and keeps it, where its bytes begin, and how many they are."""
    size = tensor.numel() * tensor.element_size()
    return tensor.detach(), tensor.data_ptr(), size


def can_be_stamped(tensors: Iterable[Tensor]) -> bool:
    """Return whether a `Stamp` can tell of each tensor whether it changed."""
    for tensor in tensors:
        if type(tensor) not in _PLAIN or tensor.numel() == 0 or not tensor.data_ptr():
            return False
        if is_small(tensor):
            # without holes, or a sign that is to be turned, its elements are the bytes at its address
            dense = tensor.is_contiguous() or torch.empty_like(tensor).stride() == tensor.stride()
            if not dense or tensor.is_neg():
                return False
        elif tensor.is_inference():  # has no version counter
            return False
    return True


def _sums(tensor: Tensor) -> Tensor:
    """Return the sums of the bits, read as integers, of every `SMALL` elements; the last one of what is left."""
    bits = tensor.detach().reshape(-1).view(_BITS[tensor.element_size()])
    whole = bits.numel() - bits.numel() % SMALL
    return torch.cat([bits[:whole].view(-1, SMALL).sum(1), bits[whole:].sum().view(1)])


# ---- what is kept for a module --------------------------------------------------------------------------------------

T = TypeVar("T")


class _Kept(Generic[T]):
    """Something for each of some modules, as long as the module lives.

    A dictionary by identity: ``WeakKeyDictionary`` takes a microsecond, a tenth of what a small layer takes.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[nn.Module], T]] = {}

    def __bool__(self) -> bool:
        return bool(self._entries)

    def get(self, module: nn.Module) -> T | None:
        """Return what is kept for a module, or None."""
        entry = self._entries.get(id(module))
        return None if entry is None or entry[0]() is not module else entry[1]

    def put(self, module: nn.Module, value: T) -> None:
        """Keep something for a module."""
        key, entries = id(module), self._entries

        def gone(reference: weakref.ref[nn.Module]) -> None:
            entry = entries.get(key)
            if entry is not None and entry[0] is reference:  # not that of a later module in the same place
                del entries[key]

        entries[key] = weakref.ref(module, gone), value

    def drop(self, module: nn.Module) -> None:
        """Keep nothing for a module."""
        self._entries.pop(id(module), None)


Dependencies = tuple[Any, Sequence[Tensor]]
"""What a quantizer's values depend on besides its input: what decides how tensors are used, compared by ``==``; and
these tensors."""


class Quantizer(Protocol):
    """What evaluation asks of a quantizer that is to be fast; any other one works too."""

    def dependencies(self) -> Dependencies | None:
        """Return what the values depend on besides the input; None: on anything, as where it is a class of others."""

    def snapping(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """Return what snaps tensors like this one to the grid as it is now, outside of the graph."""


def dependencies_of(quantizer: Any) -> Dependencies:
    """Return what the values of any quantizer depend on besides its input."""
    found: Dependencies | None = quantizer.dependencies() if hasattr(type(quantizer), "dependencies") else None
    return (_settings(quantizer), [*quantizer.parameters(), *quantizer.buffers()]) if found is None else found


def _settings(module: nn.Module) -> dict[str, Any]:
    """Return the module's attributes: plain values, and which objects the others are."""
    plain = (bool, int, float, str)
    return {name: value if isinstance(value, plain) else id(value) for name, value in vars(module).items()}


# ---- weights --------------------------------------------------------------------------------------------------------


class _Made:
    """A quantized weight; for a whole layer also what snaps its input.

    Parameters
    ----------
    settings, tensors
        What it was made of.
    value : Tensor
        The quantized weight. Nobody should write into it; who does is noticed as with the other tensors.
    snap : callable, optional
        What snaps the layer's input.
    """

    __slots__ = ("_inference", "_settings", "_small", "_stamp", "_version", "snap", "value")

    def __init__(
        self,
        settings: Any,
        tensors: Sequence[Tensor],
        value: Tensor,
        snap: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._settings, self.value, self.snap = settings, value, snap
        self._inference = torch.is_inference_mode_enabled()
        self._small = is_small(value)
        self._version = 0 if self._small else eligible.version(value)
        self._stamp = Stamp((value, *tensors) if self._small else tensors)

    def holds(self, settings: Any, tensors: Sequence[Tensor]) -> bool:
        """Return whether everything is as it was."""
        if self._settings != settings or self._inference != torch.is_inference_mode_enabled():
            return False
        if self._small:
            return self._stamp.holds((self.value, *tensors))
        return self._version == eligible.version(self.value) and self._stamp.holds(tensors)


WEIGHTS: _Kept[_Made] = _Kept()


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
    settings, tensors = dependencies_of(quantizer)
    known = WEIGHTS.get(quantizer)
    everything = weight, *tensors
    if known is not None and known.holds(settings, everything):
        return known.value
    forget(quantizer)  # before the new value needs its memory
    value = compute()
    if value is not weight and not value.requires_grad and can_be_stamped(everything):
        WEIGHTS.put(quantizer, _Made(settings, everything, value))
    return value


def forget(quantizer: Any) -> None:
    """Drop a quantizer's weight, if there is one: training changes it at every step."""
    if (WEIGHTS or LAYERS) and isinstance(quantizer, nn.Module):
        WEIGHTS.drop(quantizer)
        LAYERS.drop(quantizer)


def remembered(quantizer: nn.Module) -> Tensor | None:
    """Return the fake-quantized weight that is kept for a quantizer, or None."""
    known = WEIGHTS.get(quantizer)
    return None if known is None else known.value


# ---- layers ---------------------------------------------------------------------------------------------------------

LAYERS: _Kept[_Made] = _Kept()
"""By the quantizer of the weight."""


class _Grid(NamedTuple):
    settings: Any
    stamp: Stamp
    snap: Callable[[Tensor], Tensor]


GRIDS: _Kept[_Grid] = _Kept()


def snapped(quantizer: Quantizer, x: Tensor, settings: Any, tensors: Sequence[Tensor]) -> Tensor | None:
    """Return a tensor snapped to a grid of one scale, outside of the graph; None where there are several.

    Parameters
    ----------
    quantizer : Quantizer
        It has no hook, and what it depends on are `settings` and `tensors`.
    x : Tensor
        A tensor that `eligible.fits`.
    """
    if tensors[0].numel() != 1:  # a grid for each channel depends on the input's dimensions
        return None
    module: Any = quantizer
    known = GRIDS.get(module)
    if known is not None and known.settings == settings and known.stamp.holds(tensors):
        return known.snap(x)
    snap = quantizer.snapping(x)
    if can_be_stamped(tensors):
        GRIDS.put(module, _Grid(settings, Stamp(tensors), snap))
    return snap(x)


def layer(
    of_x: Quantizer | None, of_weight: Quantizer | None, x: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Return input and weight of a layer, fake-quantized for evaluation; None: call each quantizer.

    Parameters
    ----------
    of_x, of_weight : Quantizer or None
        At least one of them; neither has a hook or a part in the autograd graph.
    x, weight : Tensor
        Tensors that `eligible.fits`.
    """
    settings_x, tensors_x = (None, ()) if of_x is None else of_x.dependencies() or (None, None)
    settings, tensors = (None, ()) if of_weight is None else of_weight.dependencies() or (None, None)
    if tensors is None or tensors_x is None:
        return None
    if of_weight is None:  # not kept: a weight may have hooks that refer to its layer
        x_snapped = None if of_x is None else snapped(of_x, x, settings_x, tensors_x)
        return None if x_snapped is None else (x_snapped, weight)
    owner: Any = of_weight
    known = LAYERS.get(owner)
    settings, everything = (settings_x, settings), (weight, *tensors_x, *tensors)
    if known is not None and known.holds(settings, everything):
        return x if known.snap is None else known.snap(x), known.value
    LAYERS.drop(owner)
    if tensors_x and tensors_x[0].numel() != 1:  # as above
        return None
    value = evaluated(owner, weight, lambda: owner(weight))
    snap = None if of_x is None else of_x.snapping(x)
    if can_be_stamped(everything):
        LAYERS.put(owner, _Made(settings, everything, value, snap))
    return x if snap is None else snap(x), value
