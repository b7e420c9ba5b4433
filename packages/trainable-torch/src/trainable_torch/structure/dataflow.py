"""Where a layer's channels are after operations that only move values, and what of a tensor an operation looks at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from torch import nn

from trainable_torch.batch_norm import SimulatedBatchNorm
from trainable_torch.structure.overrides import change_of, hook_of

SIZE_METHODS = frozenset(
    (
        "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size", "is_contiguous",
        "is_floating_point", "is_complex", "get_device", "__len__", "__hash__",
    )
)  # fmt: skip
"""Methods that tell of a tensor, but nothing of its values."""
SIZE_ATTRIBUTES = frozenset(
    (
        "shape", "ndim", "dtype", "device", "layout", "itemsize", "nbytes", "requires_grad", "is_leaf", "is_meta",
        "is_cuda", "is_cpu", "is_mps", "is_xpu", "is_sparse", "is_quantized", "is_nested", "names", "grad_fn",
    )
)  # fmt: skip
_LIKE = frozenset(
    (
        "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like", "new_zeros",
        "new_ones", "new_empty", "new_full", "new_tensor", "new_empty_strided",
    )
)  # fmt: skip
_AS = frozenset(("reshape_as", "view_as", "expand_as", "type_as"))


def reads_values(name: str, position: int) -> bool:
    """Return whether a function or method of this name looks at the values of its argument at this position."""
    if name in SIZE_METHODS or name in _LIKE:
        return False
    return name not in _AS or position == 0


def is_transparent(module: nn.Module) -> bool:
    """Return whether a module passes on what it is given, in train mode and in eval mode."""
    if change_of(module, type(module)) or hook_of(module):
        return False
    if type(module) is nn.Identity or isinstance(module, SimulatedBatchNorm):
        return True
    return isinstance(module, _DROPOUTS) and module.p == 0


_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def move_of(module: nn.Module) -> tuple[str, tuple[Any, ...]] | None:
    """Return name and arguments of the operation that a module does to its input, when it only moves values."""
    if is_transparent(module):
        return "contiguous", ()
    if type(module) is nn.Flatten and not change_of(module, nn.Flatten) and not hook_of(module):
        return "flatten", (module.start_dim, module.end_dim)
    return None


IMPOSSIBLE = (-1, -1)


def moved(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], rank: int, axis: int, channels: int) -> Any:
    """Return (rank, axis of the channels) after an operation that only moves values; None when that is not known.

    `IMPOSSIBLE` when a tensor with so many dimensions can't be moved like this.

    Parameters
    ----------
    name : str
        Name of a function of PyTorch or of a tensor's method.
    args, kwargs
        Its arguments behind the tensor; only numbers are understood.
    rank, axis : int
        Number of dimensions before it, and which of them holds the channels.
    channels : int
        How many there are.
    """
    arguments = _arguments(name, args, kwargs)
    if arguments is None:
        return None
    dims = [each % rank if -rank <= each < rank else None for each in arguments]
    if name == "contiguous":
        return rank, axis
    if name in ("reshape", "view"):  # the last axis stays where it is asked for by its size
        last = bool(arguments) and arguments[-1] == channels and axis == rank - 1
        return (len(arguments), len(arguments) - 1) if last else None
    if None in dims:
        return IMPOSSIBLE
    if name == "permute":
        return (rank, dims.index(axis)) if sorted(dims) == list(range(rank)) else IMPOSSIBLE  # type: ignore[type-var]
    first, second = dims
    if name == "flatten":
        if first <= axis <= second and first != second:  # type: ignore[operator]
            return None
        return rank - (second - first), axis if axis < first else axis - (second - first)  # type: ignore[operator]
    return rank, {first: second, second: first}.get(axis, axis)


def _arguments(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[int] | None:
    """Return the arguments of an operation that only moves values; None for other operations and unknown numbers."""
    if name == "contiguous":
        return [] if not args else None
    if name in ("reshape", "view", "permute"):
        values = list(args[0]) if len(args) == 1 and isinstance(args[0], list | tuple) else list(args)
        values += list(kwargs.get("dims", ())) if name == "permute" else list(kwargs.get("shape", ()))
        known = values[-1:] if name != "permute" else values  # only the last size matters
        if not all(_is_number(each) for each in known):
            return None
        return [each if _is_number(each) else -1 for each in values]
    parameters = {
        "flatten": (("start_dim", 0), ("end_dim", -1)),
        "transpose": (("dim0", None), ("dim1", None)),
        "swapaxes": (("axis0", None), ("axis1", None)),
        "swapdims": (("dim0", None), ("dim1", None)),
    }.get(name)
    if parameters is None:
        return None
    named = dict(zip((each for each, _ in parameters), args, strict=False)) | dict(kwargs)
    found: list[Any] = [named.get(each, default) for each, default in parameters]
    return found if all(_is_number(each) for each in found) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def reshaped(before: Sequence[int], after: Sequence[int], axis: int) -> int | None:
    """Return which axis holds the channels after a reshape between two known shapes, or None.

    An axis stays one where what is before it, and what is behind it, is reshaped by itself. Where another axis has the
    same size, an example can't tell the two apart.

    Examples
    --------
    >>> reshaped((2, 5, 6), (10, 6), 2), reshaped((2, 5, 6), (2, 30), 2), reshaped((2, 6, 6), (12, 6), 2)
    (1, None, None)
    """
    channels = before[axis]
    if list(before).count(channels) > 1 or list(after).count(channels) > 1:
        return None
    return next((i for i, n in enumerate(after) if n == channels and prod(after[:i]) == prod(before[:axis])), None)
