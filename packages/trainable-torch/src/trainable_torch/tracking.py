"""Following the training of a PyTorch model."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from trainable_core.enums import VariableGroup
from trainable_core.tracking.routine import SUBJECT, TrackingRoutine
from trainable_torch.ranks import is_first
from trainable_torch.trainers import TorchTrainers
from trainable_torch.viewing import TorchView


def track(
    qmodel: nn.Module,
    path: str | PathLike[str],
    *,
    every: int = 100,
    batches: Iterable[Any] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> TrackingCallback:
    """Return what a trainer calls so that thresholds, gradients, clipping and codes are written down as it trains.

    Parameters
    ----------
    qmodel : Module
        A wrapped model; it may be a part of what is trained.
    path : path
        A file whose name ends in ``.csv``, which gets one number a line and goes on where an earlier run stopped; any
        other name is a folder for TensorBoard.
    every : int
        Number of optimizer steps between two records.
    batches : iterable, optional
        A few batches, as `calibrate` takes them, with which activations are looked at for each record; read anew each
        time. By default activations tell their thresholds alone.
    forward : callable, optional
        ``forward(qmodel, batch)``, when these batches need another call.

    Returns
    -------
    TrackingCallback
        Its methods `start`, `step_end` and `end` are for a loop of your own; `lightning` and `transformers` return what
        these trainers take. `problems` tells what was warned of.

    Raises
    ------
    ModelError
        When the model is not wrapped, is finalized, or is sharded over ranks.
    InvalidArgumentError
        When `every` is not a whole number from 1, or the batches can be read only once.
    CalibrationError
        When `batches` are one batch.
    DocumentError
        When the path can't be written to, or is a CSV file of others.

    Warns
    -----
    GradientMissingWarning
        When thresholds that should learn had no gradient at three records in a row.
    ThresholdCollapsedWarning
        When a step is below a hundredth of what it was, at its lower bound, or not finite.
    StatisticsRunAwayWarning
        When the variance of a batch norm, or the largest value of an activation, is ten thousand times what it was.
    RecordsLostWarning
        When a record can't be written any more, or the file was removed and is begun anew; the training goes on.

    Notes
    -----
    Training is the same to the last bit. A record looks at no more than 65,536 elements of a weight, evenly spread, and
    passes the batches in evaluation mode; what that changes in the model is put back. A gradient is that of the step
    before the record, before clipping. In a distributed job the first rank looks and writes.
    """
    return TrackingCallback(TorchView(qmodel, SUBJECT, forward), path, every, batches, writes=is_first())


class TrackingCallback(TorchTrainers, TrackingRoutine):
    """What `track` returns; see there."""

    def begin(self) -> None:
        """Look at gradients when they are made: they may be gone when the step is over."""
        self.finish()
        self._seen: dict[int, Tensor] = {}
        variables = {id(v): v for tensor in self.tracked.values() for v in _learned(tensor.quantizer)}
        note = weakref.WeakMethod(self._note)  # a hook that held the model would keep it in memory for good

        def hook(variable: Tensor) -> None:
            if (noted := note()) is not None:
                noted(variable)

        self._hooks = [each.register_post_accumulate_grad_hook(hook) for each in variables.values()]

    def finish(self) -> None:
        """Remove the hooks."""
        for hook in self.__dict__.pop("_hooks", ()):
            hook.remove()

    def gradients(self) -> dict[str, float | None]:
        """Return the norm of the gradient of each quantizer's variables."""
        seen, self._seen = self._seen, {}
        found: dict[str, float | None] = {}
        for name, tensor in self.tracked.items():
            norms = [_norm(v) if v.grad is not None else seen.get(id(v)) for v in _learned(tensor.quantizer)]
            known = [norm for norm in norms if norm is not None]
            found[name] = float(torch.stack(known).norm()) if known else None
        return found

    def _note(self, variable: Tensor) -> None:
        if self.looks_next:
            self._seen[id(variable)] = _norm(variable)


def _learned(quantizer: Any) -> list[Tensor]:
    """Return the variables of a quantizer that may learn."""
    variables: list[Tensor] = quantizer.get_trainable_variables(VariableGroup.QPARAMS)
    return variables


def _norm(variable: Tensor) -> Tensor:
    assert variable.grad is not None  # noqa: S101 - asked by the hook, or by the line before
    norm: Tensor = variable.grad.detach().norm().to("cpu")
    return norm
