"""Whether a module does what PyTorch's own class does, or a subclass, a hook or an attribute changes it."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

_HARMLESS = frozenset(
    (
        "__init__", "__new__", "__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__annotations__",
        "__annotate__", "__annotate_func__", "__annotations_cache__", "__static_attributes__", "__firstlineno__",
        "__repr__", "__constants__", "__parameters__", "__orig_bases__", "__init_subclass__", "__class_getitem__",
        "__jit_unused_properties__", "__abstractmethods__", "_abc_impl", "extra_repr", "reset_parameters",
        "reset_running_stats", "_version", "get_extra_state", "set_extra_state", "state_dict",
        "load_state_dict", "_load_from_state_dict", "_save_to_state_dict", "__setstate__", "__getstate__",
        "__reduce__", "__reduce_ex__", "__deepcopy__", "__copy__", "to", "cuda", "cpu", "half", "float", "double",
        "bfloat16", "_apply", "share_memory", "named_parameters", "parameters", "zero_grad", "requires_grad_",
        "__sizeof__", "__hash__", "__eq__", "__dir__", "dump_patches",
    )
)  # fmt: skip
"""What a subclass may define without changing what a call computes."""
_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
)  # fmt: skip
_READ = frozenset(
    (
        "weight", "bias", "running_mean", "running_var", "num_batches_tracked", "eps", "momentum", "affine",
        "track_running_stats", "training", "stride", "padding", "dilation", "groups", "padding_mode", "output_padding",
        "transposed", "kernel_size", "in_channels", "out_channels", "_reversed_padding_repeated_twice",
    )
)  # fmt: skip
"""Attributes of an instance that the forwards of PyTorch's layers and normalizations read."""


def own_class(module: nn.Module, bases: tuple[type[nn.Module], ...]) -> type[nn.Module] | None:
    """Return which of some classes of PyTorch a module is an instance of, or None."""
    return next((cls for cls in type(module).__mro__ if cls in bases), None)


def change_of(module: nn.Module, base: type[nn.Module]) -> str:
    """Return what makes a call of a module another than one of its base class; empty when nothing does.

    Parameters
    ----------
    module : Module
        An instance of a subclass, or of the class itself.
    base : type
        The class of PyTorch whose forward is known.
    """
    patched = [name for name in vars(module) if callable(getattr(base, name, None)) and name not in _HARMLESS]
    if patched:
        return f"its {patched[0]} is replaced on the instance"
    return change_of_class(type(module), base)


def change_of_class(own: type, base: type[nn.Module]) -> str:
    """Return what makes a call of one of a subclass's instances another than one of its base class; see `change_of`."""
    for cls in own.__mro__:
        if cls is base or cls in base.__mro__:
            continue
        changed = [name for name in vars(cls) if name not in _HARMLESS and (name in _READ or hasattr(base, name))]
        if changed:
            return f"{own.__name__} has its own {'forward' if 'forward' in changed else changed[0]}"
        if inspect.isfunction(vars(cls).get("__getattr__")):
            return f"{own.__name__} has its own __getattr__"
    return ""


def hook_of(module: nn.Module) -> str:
    """Return what kind of hook is registered on a module, or an empty string."""
    found = [name for name in _HOOKS if getattr(module, name, None)]
    return found[0].strip("_").removesuffix("s").replace("_", " ") if found else ""


def tensors_of(module: nn.Module) -> list[Any]:
    """Return a module's own parameters and buffers, without those of its children."""
    own = [*module._parameters.values(), *module._buffers.values()]  # noqa: SLF001 - the public ways look at children
    return [tensor for tensor in own if tensor is not None]
