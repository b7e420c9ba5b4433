"""What is PyTorch's own about measuring: one thread, bytes kept for backward, what the numbers were measured on."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable

import measuring
import torch
from torch import Tensor, nn


def arguments(description: str, rounds: int) -> argparse.Namespace:
    """Return the command line's options, and set PyTorch to one thread."""
    options = measuring.arguments(description, rounds)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return options


def kept_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Return the bytes that a forward keeps for backward, each storage once, without parameters and buffers."""
    own = {each.untyped_storage().data_ptr() for each in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # else the next storage may get the same place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(kept.values())


def conditions() -> str:
    """Return what the numbers were measured on, in one line."""
    return (
        f"PyTorch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread, "
        f"{platform.machine()} {platform.system()}, Python {platform.python_version()}"
    )
