"""What a layer keeps for backward: of a quantized tensor the way to make it again, not the tensor.

A convolution keeps its input and its weight. When both are quantized, that is a second copy of each, beside the float
tensors that the quantizers keep for their own gradients. A quantized tensor is a function of the float one and of the
grid, so the layer's backward makes the same bits again, by the same kernel.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from trainable_torch import ops
from trainable_torch.kernels import native
from trainable_torch.kernels.cache import is_plain


class Recipe:
    """How a quantized tensor, or a view of it, is made again.

    Parameters
    ----------
    node : autograd node
        Of the fake quantization; it keeps the float tensor, and PyTorch raises a RuntimeError when that was changed.
    tensor : Tensor
        What a layer wants to keep.
    """

    __slots__ = ("node", "offset", "shape", "strides")

    def __init__(self, node: Any, tensor: Tensor) -> None:
        self.node = node
        self.shape, self.strides, self.offset = tensor.shape, tensor.stride(), tensor.storage_offset()

    def make(self) -> Tensor:
        """Return the tensor, bit for bit."""
        made: Tensor = self.node.rule.snap(self.node.saved_tensors[0].detach())
        return made.as_strided(self.shape, self.strides, self.offset)


def recomputing(tensors: Iterable[Any]) -> AbstractContextManager[Any]:
    """Return a context in which those of these tensors that the eager kernels quantized are not kept for backward.

    Parameters
    ----------
    tensors : iterable of Tensor and other objects
        What a layer is called with.

    Notes
    -----
    Without the native kernels nothing is made again: PyTorch's own take several passes, 5 to 10 per cent of a step.
    It stands aside where PyTorch traces, compiles or transforms, and where other hooks for saved tensors are active:
    activation checkpointing counts what is saved, and ``save_on_cpu`` keeps it in its own way.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or native.compiled() is None:
        return nullcontext()
    nodes = {}
    for tensor in tensors:
        if isinstance(tensor, Tensor) and ops.is_quantized(tensor):
            nodes[tensor.untyped_storage().data_ptr()] = tensor.grad_fn
    if not nodes or not is_plain() or others_are_active():
        return nullcontext()

    def pack(tensor: Tensor) -> Any:
        node: Any = nodes.get(tensor.untyped_storage().data_ptr())
        # a layer may have written into it, or read its bits as another type
        unchanged = node is not None and tensor._version == node.version and tensor.dtype is torch.float32  # noqa: SLF001
        return Recipe(node, tensor) if unchanged else tensor

    return torch.autograd.graph.saved_tensors_hooks(pack, _unpack)


def _unpack(kept: Any) -> Tensor:
    made: Tensor = kept.make() if isinstance(kept, Recipe) else kept
    return made


def others_are_active() -> bool:
    """Return whether somebody else's hooks are active, or hooks are forbidden, or this PyTorch can't tell."""
    autograd: Any = torch._C._autograd  # noqa: SLF001 - nothing public tells
    top = getattr(autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or not autograd._saved_tensors_hooks_is_enabled() or top(False) is not None  # noqa: FBT003, SLF001
