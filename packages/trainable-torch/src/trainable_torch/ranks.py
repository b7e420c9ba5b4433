"""The processes that train one model together: how many, and whether each holds the whole of it."""

from __future__ import annotations

from collections.abc import Callable

from torch import distributed, nn

from trainable_core.errors import ModelError


def _has_no_group() -> bool:
    return False


has_group: Callable[[], bool] = distributed.is_initialized if distributed.is_available() else _has_no_group
"""Return whether there is a default process group."""


def world_size() -> int:
    """Return the number of ranks of the default process group; 1 without one.

    A plain number also under ``torch.compile``, which takes it as a constant of the graph: start the process group
    before the first compiled forward.
    """
    return distributed.get_world_size() if has_group() else 1


def is_sharded(value: object) -> bool:
    """Return whether a tensor holds only this rank's part, as after ``fully_shard``."""
    if world_size() == 1:
        return False
    from torch.distributed.tensor import DTensor  # noqa: PLC0415 - costs a second, and only distributed jobs need it

    return isinstance(value, DTensor)


def require_whole(model: nn.Module, verb: str) -> None:
    """Raise ModelError when this rank holds only a part of a parameter or buffer.

    Reading the rest would be a collective call, which hangs unless every rank makes it.
    """
    parts = [name for name, value in [*model.named_parameters(), *model.named_buffers()] if is_sharded(value)]
    if parts:
        raise ModelError(
            f"{verb}: this rank holds only a part of {parts[0]!r}, and so of {len(parts)} tensors",
            "load torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True, called on "
            "every rank, into a model that is not sharded.",
        )


def is_first() -> bool:
    """Return whether this is the process of a job that writes files."""
    return world_size() == 1 or distributed.get_rank() == 0
