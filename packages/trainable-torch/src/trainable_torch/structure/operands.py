"""Which op kind a function that PyTorch calls is of, and which tensors it works on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name everyone reads

from trainable_torch.layers import FUNCTIONS

_KINDS: dict[Any, str | None] = {}


def operation_kind(function: Callable[..., Any] | str) -> str | None:
    """Return the op kind of a function, of a tensor's method, or of a method's name; None for all others."""
    try:
        return _KINDS[function]
    except KeyError:
        kind = FUNCTIONS.get(function)
        if kind is None and getattr(function, "__qualname__", "").startswith(("Tensor.", "TensorBase.")):
            kind = FUNCTIONS.get(getattr(function, "__name__", ""))
        _KINDS[function] = kind
        return kind
    except TypeError:  # not hashable
        return None


def operands(function: Any, args: Any, kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the different tensors of real numbers that an operation works on: no sizes, no mask.

    None where the result is written into another tensor.
    """
    if kwargs.get("out") is not None:
        return []
    if function is F.scaled_dot_product_attention:
        named = dict(zip(("query", "key", "value"), args, strict=False)) | dict(kwargs)
        given: list[Any] = [named.get(name) for name in ("query", "key", "value")]
    else:
        given = [*args, *kwargs.values()]
    found: dict[int, Tensor] = {}
    for value in given:
        for each in value if isinstance(value, tuple | list) else (value,):
            if isinstance(each, Tensor) and each.is_floating_point():
                found.setdefault(id(each), each)
    return list(found.values())


def replaced(arguments: Any, values: Mapping[int, Any]) -> Any:
    """Return arguments with others in the place of some tensors, which are given by their ``id``."""
    if isinstance(arguments, Mapping):
        return {name: replaced(value, values) for name, value in arguments.items()}
    if type(arguments) in (tuple, list):
        return type(arguments)(replaced(value, values) for value in arguments)
    return values.get(id(arguments), arguments)


def is_in_place(function: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Return whether an operation changes its first argument: by its name, or because it is told to."""
    name = getattr(function, "__name__", "")
    named = name.endswith("_") and not name.endswith("__")
    told = kwargs.get("inplace") is True or any(each is True for each in args[1:])
    return (named or told) and bool(args) and isinstance(args[0], Tensor)
