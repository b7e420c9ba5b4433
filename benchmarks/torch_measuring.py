"""What is PyTorch's own about measuring: one thread, bytes held, with and without numba, what it was measured on."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Collection
from typing import TypeVar

import measuring
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from trainable_torch.kernels import native

T = TypeVar("T")
PART = f"PyTorch {'.'.join(torch.__version__.split('.')[:2])}"
"""The heading of what is measured in this environment."""


def arguments(description: str, rounds: int, peers: Collection[str] = ()) -> argparse.Namespace:
    """Return the command line's options, and set PyTorch to one thread."""
    options = measuring.arguments(description, rounds, peers)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return options


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Return the bytes that a forward allocates and does not free: what is kept for backward, and the output.

    PyTorch's allocator is asked, not the hooks for saved tensors: where these are active nothing is made again in
    backward.
    """
    model(x)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        output = model(x)
    assert output.requires_grad  # noqa: S101 - and it holds the graph until here
    return sum(event.self_cpu_memory_usage for event in seen.key_averages())


def without_numba(run: Callable[[], T]) -> Callable[[], T]:
    """Return the same run on PyTorch's own kernels, as where numba is not installed."""

    def own() -> T:
        before = native.compiled
        native.compiled = _nothing
        try:
            return run()
        finally:
            native.compiled = before

    return own


def _nothing() -> None:
    """Return None, as `trainable_torch.kernels.native.compiled` does without numba."""


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the most bytes that a run holds at once beyond what was held before it, as PyTorch's allocator counts."""
    run()  # what is made once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = seen.profiler.kineto_results.events()  # type: ignore[union-attr] # set once it has run
    held = peak = 0
    for event in sorted((each for each in events if each.name() == "[memory]"), key=lambda each: each.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def conditions() -> str:
    """Return what the numbers were measured on, in one line."""
    compiled = "with" if native.compiled() is not None else "without"
    return (
        f"PyTorch {torch.__version__} {compiled} numba, {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} thread, "
        f"{platform.machine()} {platform.system()}, Python {platform.python_version()}"
    )
