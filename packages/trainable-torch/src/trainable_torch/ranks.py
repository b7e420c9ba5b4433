"""The processes that train one model together: how many, and what `fully_shard` leaves for us to average."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn

from trainable_core.errors import ModelError


def world_size() -> int:
    """Return the number of ranks of the default process group; 1 without one.

    A plain number also under ``torch.compile``, which takes it as a constant of the graph: start the process group
    before the first compiled forward.
    """
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


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


def average_scalar_gradients(qmodel: nn.Module, group: Any = None) -> set[nn.Parameter]:
    """Average the gradients of a model's zero-dimensional parameters over the ranks of a job, from here on.

    Parameters
    ----------
    qmodel : Module
        A wrapped model, before its first ``fully_shard``.
    group : ProcessGroup, optional
        The ranks that share a batch; by default all.

    Returns
    -------
    set of Parameter
        What ``fully_shard`` must be told to ignore.

    Notes
    -----
    FSDP2 splits each parameter along its first dimension and refuses those that have none: thresholds and ranges per
    tensor. It neither shards nor averages what it is told to ignore, so a hook on each does: it runs when the gradient
    is complete, before clipping, scaling and the optimizer see it, and works with gradient accumulation, because the
    average of what is accumulated is what was averaged before plus the average of what is new.

    Examples
    --------
    >>> scalars = average_scalar_gradients(qmodel)  # doctest: +SKIP
    >>> fully_shard(qmodel, ignored_params=scalars)  # doctest: +SKIP
    """
    scalars = {parameter for parameter in qmodel.parameters() if parameter.dim() == 0}

    @torch.no_grad()
    def average(parameter: Tensor) -> None:
        if parameter.grad is not None:
            distributed.all_reduce(parameter.grad, group=group)
            parameter.grad /= distributed.get_world_size(group)

    if world_size() > 1:
        for parameter in scalars:
            parameter.register_post_accumulate_grad_hook(average)
    return scalars
