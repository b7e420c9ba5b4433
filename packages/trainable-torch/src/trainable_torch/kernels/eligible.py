"""Which tensors the fast kernels may take; and every private name of PyTorch that this package uses.

Each private name is looked up once, when this module is imported. Where a release of PyTorch lacks one, what needs it
is switched off: tensors are then quantized the plain way, or a question gets its cautious answer. `remarks` says so,
and ``trainable doctor`` prints it. No missing name breaks an import.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from trainable_torch.kernels import tier

PLAIN_WAY = "tensors are quantized the plain way"

_missing: dict[str, str] = {}


def _private(path: str, without: str = PLAIN_WAY) -> Any:
    """Return what has a private name of PyTorch, or None; `remarks` tells then what happens without it."""
    found: Any = torch
    for name in path.split(".")[1:]:
        found = getattr(found, name, None)
    if found is None:
        _missing[path] = without
    return found


_transforms_are_active = _private("torch._C._are_functorch_transforms_active")
_count_dispatch_modes = _private("torch._C._len_torch_dispatch_stack")
_tracing_state = _private("torch._C._get_tracing_state")
_is_batched = _private("torch._C._functorch.is_legacy_batchedtensor")
_CAN_TELL = None not in (_transforms_are_active, _count_dispatch_modes, _tracing_state, _is_batched)
if not hasattr(Tensor, "_version"):
    _missing["torch.Tensor._version"] = PLAIN_WAY
    _CAN_TELL = False


def _differentiates_forward() -> bool:
    """Return whether tangents are computed with the values, as in ``torch.autograd.forward_ad.dual_level``."""
    level: int = getattr(forward_ad, "_current_level", -1)
    return level >= 0


_PARTS = "a layer and its quantizers are separate autograd nodes"
_has_global_hooks = _private("torch.nn.modules.module._has_any_global_hook", _PARTS)
_count_function_modes = _private("torch._C._len_torch_function_stack", _PARTS)
_top_saved_tensors_hooks = _private("torch._C._autograd._top_saved_tensors_default_hooks", _PARTS)
_saved_tensors_hooks_are_allowed = _private("torch._C._autograd._saved_tensors_hooks_is_enabled", _PARTS)
_CANT_WATCH = None in (
    _has_global_hooks, _count_function_modes, _top_saved_tensors_hooks, _saved_tensors_hooks_are_allowed,
)  # fmt: skip
_current_backward = _private(
    "torch._C._current_graph_task_id", "under activation checkpointing schedules count the forward in backward as well"
)
_will_execute = _private("torch._C._will_engine_execute_node", "a differentiated backward pass computes all gradients")

_call = _private("torch.nn.Module._call_impl", "functional operations of models that can't be traced stay float")
CALL_CODE: Any = getattr(_call, "__code__", None)
"""The code that runs whenever a module is called; its local ``self`` is the module. None where it is not known."""

CONVOLUTION_BACKWARD: Any = _private("torch.ops.aten.convolution_backward.default", _PARTS)
"""All gradients of a convolution in one call, or None."""

_norm_base = _private(
    "torch.nn.modules.batchnorm._NormBase", "only PyTorch's own batch and instance normalizations are recognized"
)
NORMALIZATION: tuple[type[nn.Module], ...] = (_norm_base,) if _norm_base is not None else (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)  # fmt: skip
"""The normalizations that keep running statistics: their base, or the classes themselves."""

POOLING: tuple[type[nn.Module], ...] = (
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
)  # fmt: skip
DROPOUT: tuple[type[nn.Module], ...] = (
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip

PLAIN = (Tensor, nn.Parameter)
"""Classes of tensors that are nothing but tensors."""


def remarks() -> list[str]:
    """Return one sentence for each private name that this release of PyTorch lacks: what is done without it."""
    return [f"PyTorch {torch.__version__} has no {name}: {without}" for name, without in _missing.items()]


def is_eager(*tensors: Tensor) -> bool:
    """Return whether these are plain tensors, outside of compilation, function transforms, traces and modes."""
    if torch.compiler.is_compiling() or not _CAN_TELL or _differentiates_forward():
        return False
    if _transforms_are_active() or _count_dispatch_modes() or _tracing_state() is not None:
        return False
    for tensor in tensors:  # noqa: SIM110 - `all` with a generator takes twice as long, and every quantizer pays for it
        if type(tensor) not in PLAIN:
            return False
    return True


def is_transformed() -> bool:
    """Return whether a function transform or forward-mode differentiation is active, in eager mode."""
    if torch.compiler.is_compiling():
        return False
    return _differentiates_forward() or bool(_transforms_are_active is not None and _transforms_are_active())


def fits(*tensors: Tensor) -> bool:
    """Return whether the fast kernels may take these tensors: plain float32 CPU tensors in eager mode."""
    if torch.compiler.is_compiling() or not _CAN_TELL or tier.wanted() == tier.PLAIN:
        return False
    if _differentiates_forward() or _transforms_are_active() or _count_dispatch_modes() or _tracing_state() is not None:
        return False
    return are_plain(tensors)


def are_plain(tensors: Iterable[Tensor]) -> bool:
    """Return whether these are float32 CPU tensors of PyTorch's own classes."""
    for tensor in tensors:
        if type(tensor) not in PLAIN or not tensor.is_cpu or tensor.dtype is not torch.float32:
            return False
    return True


def fits_backward(upstream: Tensor) -> bool:
    """Return whether a backward pass may take the fast kernels: it is not vectorized itself."""
    # With ``is_grads_batched`` the gradient is batched outside of any transform.
    return fits(upstream) and not _is_batched(upstream)


def wanted(node: Any, needed: Sequence[bool]) -> list[bool]:
    """Return which gradients of its tensors a node has to give in the backward pass that runs.

    Parameters
    ----------
    node : autograd node
        The one that is asked, as its ``backward`` gets it.
    needed : sequence of bool
        Whether each of its tensors needs a gradient at all. ``torch.autograd.grad`` may want only some of them, which
        a node of Python isn't told.
    """
    if _will_execute is None:
        return list(needed)
    return [need and _is_executed(each) for need, (each, _) in zip(needed, node.next_functions, strict=True)]


def _is_executed(node: Any) -> bool:
    try:
        return bool(_will_execute(node))
    except RuntimeError:  # a leaf whose gradient `torch.autograd.grad` returns
        return True


def is_unwatched() -> bool:
    """Return whether the fast kernels are on, and nobody but the caller would see a layer and its quantizers called.

    Nothing looks at all modules, at all functions, at what they are given or at what is kept for backward; it is eager
    mode, and no autocast.
    """
    # in one function: each further one would cost a layer half a microsecond
    return not (
        not _CAN_TELL
        or _CANT_WATCH
        or torch.compiler.is_compiling()
        or tier.wanted() == tier.PLAIN
        or _differentiates_forward()
        or _transforms_are_active()
        or _count_dispatch_modes()
        or _tracing_state() is not None
        or _has_global_hooks()
        or _count_function_modes()
        or torch.is_autocast_enabled("cpu")
        or not _saved_tensors_hooks_are_allowed()
        or _top_saved_tensors_hooks(False) is not None  # noqa: FBT003 - torch names no such argument
    )


def are_modules_watched() -> bool:
    """Return whether anything looks at all modules or at all functions."""
    return (
        _has_global_hooks is None or _count_function_modes is None or _has_global_hooks() or _count_function_modes() > 0
    )


def has_hooks(modules: Iterable[nn.Module]) -> bool:
    """Return whether any of the modules has a hook on its forward or backward, or a forward of its own."""
    for module in modules:
        state = module.__dict__
        if (
            "forward" in state
            or state["_forward_pre_hooks"]
            or state["_forward_hooks"]
            or state["_backward_pre_hooks"]
            or state["_backward_hooks"]
        ):
            return True
    return False


def saved_tensors_are_watched() -> bool:
    """Return whether hooks for saved tensors are active or forbidden, or this PyTorch can't tell."""
    if _top_saved_tensors_hooks is None or _saved_tensors_hooks_are_allowed is None:
        return True
    return not _saved_tensors_hooks_are_allowed() or _top_saved_tensors_hooks(False) is not None  # noqa: FBT003


_TRANSFORMED = "nothing is calibrated that passes through a transform such as vmap"
_is_wrapped = _private("torch._C._functorch.is_functorch_wrapped_tensor", _TRANSFORMED)
_unwrapped = _private("torch._C._functorch.get_unwrapped", _TRANSFORMED)
_outside_of_transforms = _private("torch._C._DisableFuncTorch", _TRANSFORMED)


def values_of(tensor: Tensor) -> Any:
    """Return a tensor's values as a NumPy array of float32; all of a batch of which ``vmap`` shows parts."""
    values = tensor.detach().to("cpu", torch.float32)
    if None in (_is_wrapped, _unwrapped, _outside_of_transforms):
        return values.numpy()
    while _is_wrapped(values):
        values = _unwrapped(values)
    with _outside_of_transforms():
        return values.numpy()


def version(tensor: Tensor) -> int:
    """Return how often a tensor was written into; call it only where `is_eager` or `fits` said yes."""
    return 0 if tensor.is_inference() else tensor._version  # noqa: SLF001


def is_tracing() -> bool:
    """Return whether a TorchScript trace is running."""
    public: Any = torch.jit
    return bool(public.is_tracing() if _tracing_state is None else _tracing_state())


def is_differentiated(x: Tensor) -> bool:
    """Return whether a derivative of what is made of a tensor may be asked for; a TorchScript trace takes none."""
    return ((torch.is_grad_enabled() and x.requires_grad) or is_transformed()) and not is_tracing()


def is_in_backward() -> bool:
    """Return whether a backward pass is running, as where activation checkpointing computes a forward again."""
    return not torch.compiler.is_compiling() and _current_backward is not None and _current_backward() != -1


def node_class(function: type[torch.autograd.Function]) -> type | None:
    """Return the class of an autograd function's nodes in the graph, or None."""
    found: type | None = getattr(function, "_backward_cls", None)
    if found is None:
        _missing["torch.autograd.Function._backward_cls"] = "layers keep their quantized inputs for backward"
    return found
