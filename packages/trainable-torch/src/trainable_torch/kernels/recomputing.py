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

from trainable_torch.kernels import eligible, fake_quantization, native


class Remade:
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
        made: Tensor = self.node.made.snap(self.node.saved_tensors[0].detach())
        return made.as_strided(self.shape, self.strides, self.offset)


class Kept:
    """A tensor that is kept as it is, and refused when it was written into, as autograd does without hooks.

    Parameters
    ----------
    tensor : Tensor
        What a layer wants to keep.
    version : int
        How often it was written into so far.
    """

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor, version: int) -> None:
        self.tensor, self.version = tensor, version

    def make(self) -> Tensor:
        """Return the tensor."""
        now = eligible.version(self.tensor)
        if now != self.version:
            message = (
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{list(self.tensor.shape)} is at version {now}; expected version {self.version} instead."
            )
            raise RuntimeError(message)
        return self.tensor


def recomputed(tensors: Iterable[Any]) -> AbstractContextManager[Any]:
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
        if type(tensor) is Tensor and fake_quantization.is_quantized(tensor):  # others may have no memory of their own
            nodes[tensor.untyped_storage().data_ptr()] = tensor.grad_fn
    if not nodes or not eligible.is_eager() or eligible.saved_tensors_are_watched():
        return nullcontext()

    def pack(tensor: Tensor) -> Any:
        if type(tensor) not in eligible.PLAIN:
            return Kept(tensor, eligible.version(tensor))
        node: Any = nodes.get(tensor.untyped_storage().data_ptr())
        # a layer may have written into it, or read its bits as another type
        unchanged = node is not None and eligible.version(tensor) == node.version and tensor.dtype is torch.float32
        return Remade(node, tensor) if unchanged else Kept(tensor, eligible.version(tensor))

    return torch.autograd.graph.saved_tensors_hooks(pack, _unpack)


def _unpack(kept: Remade | Kept) -> Tensor:
    return kept.make()
