"""What a training loop needs of a wrapped model: optimizer groups, terms for the loss, freezing, step counting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn

from trainable_core.backend.variable_groups import variable_groups
from trainable_torch.quantizers.base import BasePytorchTrainableQuantizer
from trainable_torch.ranks import world_size
from trainable_torch.state import state_of
from trainable_torch.wrapper import QuantizationWrapper
from trainable_torch.wrapping import advance


def quantizers_of(model: nn.Module) -> dict[str, BasePytorchTrainableQuantizer]:
    """Return a model's trainable quantizers by module name, each once."""
    return {name: m for name, m in model.named_modules() if isinstance(m, BasePytorchTrainableQuantizer)}


def parameter_groups(
    qmodel: nn.Module, *, weights: Mapping[str, Any] | None = None, qparams: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Return the model's trainable parameters in groups, ready for an optimizer.

    Parameters
    ----------
    qmodel : Module
        A wrapped model.
    weights : mapping, optional
        Optimizer options of the group WEIGHTS: everything that is not a quantizer's.
    qparams : mapping, optional
        Optimizer options of the group QPARAMS: thresholds, ranges, attention logits. Without a ``weight_decay`` here it
        is 0: decay would pull thresholds to zero.

    Returns
    -------
    list of dict
        ``{"params": [...], "name": "WEIGHTS" or "QPARAMS", **options}``; a group without parameters is left out.

    Raises
    ------
    ModelError
        When the model is not wrapped.
    InvalidArgumentError
        When an option would replace the parameters or the name.

    Examples
    --------
    ``torch.optim.Adam(parameter_groups(qmodel, qparams={"lr": 1e-4}), lr=1e-3)``
    """
    state_of(qmodel)
    trainable = [parameter for parameter in qmodel.parameters() if parameter.requires_grad]
    return variable_groups(trainable, quantizers_of(qmodel).values(), weights, qparams)


def regularization(qmodel: nn.Module) -> Tensor:
    """Return the sum of the quantizers' terms for the loss; a zero scalar when no method has one.

    Add it to the loss: ``loss = criterion(qmodel(x), y) + regularization(qmodel)``.
    """
    state_of(qmodel)
    terms = [quantizer.regularization() for quantizer in quantizers_of(qmodel).values()]
    terms += [quantizer.regularization_of(weight.float()) for weight, quantizer in _weights_of(qmodel)]
    terms = [term for term in terms if term is not None]
    if not terms:
        device = next((p.device for p in qmodel.parameters()), torch.device("cpu"))
        return torch.zeros((), device=device)
    return torch.stack(terms).sum()


def _weights_of(qmodel: nn.Module) -> Iterator[tuple[Tensor, BasePytorchTrainableQuantizer]]:
    """Yield each weight with its trainable quantizer; of those that tied weights share, once."""
    seen = set()
    for module in qmodel.modules():
        for _, weight, quantizer in module.get_weights_vars() if isinstance(module, QuantizationWrapper) else ():
            if isinstance(quantizer, BasePytorchTrainableQuantizer) and id(quantizer) not in seen:
                seen.add(id(quantizer))
                yield weight, quantizer


def freeze_quant_params(qmodel: nn.Module, frozen: bool = True) -> nn.Module:  # noqa: FBT001, FBT002 - reads as a fact
    """Stop every quantizer's variables from learning, or let them learn again; returns the model."""
    state_of(qmodel)
    for quantizer in quantizers_of(qmodel).values():
        quantizer.freeze(frozen)
    return qmodel


def advance_schedules(qmodel: nn.Module) -> None:
    """Count one training step in every quantizer with a schedule.

    The wrapped model's own forward does it in training mode; call this only when you train a part of the model by
    itself.
    """
    state_of(qmodel)
    advance(qmodel)


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

    Raises
    ------
    ModelError
        When the model is not wrapped.

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
    state_of(qmodel)
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
