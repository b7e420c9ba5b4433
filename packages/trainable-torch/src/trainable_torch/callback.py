"""One callback for loops of one's own, Lightning and Hugging Face's Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from trainable_core.backend.routine import TrainingRoutine
from trainable_core.calibration.batch_norm import check_request
from trainable_torch.quantizers.base import BasePytorchTrainableQuantizer
from trainable_torch.state import state_of
from trainable_torch.statistics import batch_norms, reestimate_batch_norm
from trainable_torch.trainers import TorchTrainers
from trainable_torch.training import advance_schedules, freeze_quant_params, quantizers_of


def training_callback(
    qmodel: nn.Module,
    *,
    freeze_at: int | None = None,
    batches: Iterable[Any] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    log: Callable[[dict[str, float]], Any] | None = None,
    log_every: int = 100,
) -> TrainingCallback:
    """Return what a trainer calls so that thresholds freeze, statistics are estimated anew, and numbers are logged.

    Parameters
    ----------
    qmodel : Module
        A wrapped model; it may be a part of what is trained.
    freeze_at : int, optional
        Number of optimizer steps after which thresholds and ranges stop learning; by default they never do.
    batches : iterable, optional
        Read anew before each evaluation and at the end, to estimate batch-norm statistics from; see
        `reestimate_batch_norm`.
    forward : callable, optional
        ``forward(qmodel, batch)``, when these batches need another call.
    log : callable, optional
        Called with a dictionary of numbers by name, such as `print` or ``wandb.log``.
    log_every : int
        Number of optimizer steps between two calls of `log`.

    Returns
    -------
    TrainingCallback
        Its methods `start`, `step_end` and `before_evaluation` are for a loop of your own; `lightning` and
        `transformers` return what these trainers take.

    Raises
    ------
    ModelError
        When the model is not wrapped, or there are batches and no batch norm.
    InvalidArgumentError
        When an argument is of a wrong kind, or the batches can be read only once.
    CalibrationError
        When `batches` are one batch.
    """
    state_of(qmodel)
    callback = TrainingCallback(freeze_at, batches, log, log_every)
    callback.qmodel, callback.forward = qmodel, forward
    if batches is not None:
        check_request(batch_norms(qmodel), batches, forward)
    return callback


class TrainingCallback(TorchTrainers, TrainingRoutine):
    """What `training_callback` returns; see there."""

    qmodel: nn.Module
    forward: Callable[[nn.Module, Any], Any] | None

    def quantizers(self) -> dict[str, BasePytorchTrainableQuantizer]:
        """Return the model's trainable quantizers by module name."""
        return quantizers_of(self.qmodel)

    def freeze(self) -> None:
        """Stop thresholds and ranges from learning."""
        freeze_quant_params(self.qmodel)

    def advance(self) -> None:
        """Count one step of every schedule."""
        advance_schedules(self.qmodel)

    def reestimate(self, batches: Iterable[Any]) -> None:
        """Estimate the statistics of the model's batch norms anew."""
        reestimate_batch_norm(self.qmodel, batches, forward=self.forward)
