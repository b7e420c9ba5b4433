"""What a training loop needs of a wrapped model: optimizer groups, terms for the loss, freezing, step counting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from trainable_core.backend.variable_groups import variable_groups
from trainable_core.calibration.batches import inputs_of
from trainable_core.enums import VariableGroup
from trainable_core.errors import QuantizerStateError
from trainable_torch.quantizers.base import BasePytorchTrainableQuantizer
from trainable_torch.ranks import world_size
from trainable_torch.state import state_of
from trainable_torch.wrapper import QuantizationWrapper
from trainable_torch.wrapping import advance


def quantizers_of(model: nn.Module) -> dict[str, BasePytorchTrainableQuantizer]:
    """Return a model's trainable quantizers by module name, each once."""
    return {name: m for name, m in model.named_modules() if isinstance(m, BasePytorchTrainableQuantizer)}


def call_with(model: nn.Module, batch: Any) -> Any:
    """Return what a model returns for a batch: a mapping is its keyword arguments, else `inputs_of` says its input."""
    return model(**batch) if isinstance(batch, Mapping) else model(inputs_of(batch))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set every module to evaluation mode by its attribute, past a ``train`` of its own, and back in the end."""
    modes = {module: module.training for module in model.modules() if hasattr(module, "training")}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def parameter_groups(
    qmodel: nn.Module,
    *,
    weights: Mapping[str, Any] | None = None,
    qparams: Mapping[str, Any] | None = None,
    pace: str = "threshold",
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
    pace : {"threshold", "scale"}
        ``threshold`` is for Adam and all that divide by the gradient's size. ``scale`` is for SGD: the learning rate
        of thresholds and ranges, which `qparams` or `weights` must have as ``lr``, is multiplied by ``4**(n_bits -
        signed)``, which moves the scale as SGD on the scale itself would, and there is a group QPARAMS for each factor.

    Returns
    -------
    list of dict
        ``{"params": [...], "name": "WEIGHTS" or "QPARAMS", **options}``; a group without parameters is left out.

    Raises
    ------
    ModelError
        When the model is not wrapped.
    InvalidArgumentError
        When an option would replace the parameters or the name, or `pace` is unknown or has no learning rate.

    Examples
    --------
    ``torch.optim.Adam(parameter_groups(qmodel, qparams={"lr": 1e-4}), lr=1e-3)``
    ``torch.optim.SGD(parameter_groups(qmodel, qparams={"lr": 1e-2}, pace="scale"), lr=1e-2, momentum=0.9)``
    """
    state_of(qmodel)
    trainable = [parameter for parameter in qmodel.parameters() if parameter.requires_grad]
    return variable_groups(trainable, quantizers_of(qmodel).values(), weights, qparams, pace)


def exclude_from_weight_decay(optimizer: Optimizer, qmodel: nn.Module) -> None:
    """Let an optimizer that somebody else made leave thresholds, ranges and the like out of weight decay.

    Parameters
    ----------
    optimizer : Optimizer
        Changed in place: the quantizers' variables are moved to a group that has the same options and no weight decay.
        Without such a group, one is added.
    qmodel : Module
        A wrapped model.

    Raises
    ------
    ModelError
        When the model is not wrapped.
    QuantizerStateError
        When a group would have to be added and a learning-rate scheduler, which would not know it, is there already.

    Notes
    -----
    `parameter_groups` does this for an optimizer of your own. Hugging Face's ``Trainer`` makes one that decays every
    parameter whose name has no *bias* or *norm* in it. It calls ``create_optimizer`` only once, so that this line
    before ``trainer.train()`` is all, also where the training is resumed:
    ``exclude_from_weight_decay(trainer.create_optimizer(), qmodel)``.
    """
    state_of(qmodel)
    own = {
        id(variable)
        for quantizer in quantizers_of(qmodel).values()
        for variable in quantizer.get_trainable_variables(VariableGroup.QPARAMS)
    }
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if id(parameter) in own]
        if not moved or not group.get("weight_decay"):
            continue
        options = {key: value for key, value in group.items() if key != "params"} | {"weight_decay": 0.0}
        twin = next((each for each in optimizer.param_groups if _has_options(each, options)), None)
        if twin is None and "initial_lr" in group:
            problem = "a learning-rate scheduler knows its groups already, and a group without weight decay is missing"
            hint = "call exclude_from_weight_decay before the scheduler is made."
            raise QuantizerStateError("exclude_from_weight_decay", problem, hint)
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
        if twin is None:
            optimizer.add_param_group({"params": moved, **options})
        else:
            twin["params"].extend(moved)


def _has_options(group: Mapping[str, Any], options: Mapping[str, Any]) -> bool:
    """Return whether a group has these options and no others."""
    same = group.keys() - {"params"} == options.keys()
    return same and all(group[key] is value or group[key] == value for key, value in options.items())


def regularization(qmodel: nn.Module) -> Tensor:
    """Return the sum of the quantizers' terms for the loss; a zero scalar when no method has one.

    Add it to the loss: ``loss = criterion(qmodel(x), y) + regularization(qmodel)``.
    """
    state_of(qmodel)
    terms = [each.regularization() for each in quantizers_of(qmodel).values() if not each.is_switched_off]
    weights = [(weight, each) for weight, each in _weights_of(qmodel) if not each.is_switched_off]
    terms += [quantizer.regularization_of(weight.float()) for weight, quantizer in weights]
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
