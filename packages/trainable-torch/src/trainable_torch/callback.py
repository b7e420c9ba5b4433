"""One callback for loops of one's own, Lightning and Hugging Face's Trainer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

from torch import nn

from trainable_core.backend.routine import TrainingRoutine
from trainable_core.calibration.batch_norm import check_request, require_simulated
from trainable_torch.batch_norm import simulated_batch_norms
from trainable_torch.quantizers.base import BasePytorchTrainableQuantizer
from trainable_torch.state import state_of
from trainable_torch.statistics import batch_norms, freeze_batch_norm, reestimate_batch_norm
from trainable_torch.trainers import TorchTrainers
from trainable_torch.training import advance_schedules, freeze_quant_params, quantizers_of


def training_callback(
    qmodel: nn.Module,
    *,
    freeze_at: int | None = None,
    freeze_every: int | None = None,
    batches: Iterable[Any] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    log: Callable[[dict[str, float]], Any] | None = None,
    log_every: int = 100,
    freeze_batch_norm_at: int | None = None,
) -> TrainingCallback:
    """Return what a trainer calls so that thresholds freeze, statistics are estimated anew, and numbers are logged.

    Parameters
    ----------
    qmodel : Module
        A wrapped model; it may be a part of what is trained.
    freeze_at : int, optional
        Number of optimizer steps after which thresholds and ranges stop learning; by default they never do.
    freeze_every : int, optional
        Number of steps between two quantizers that freeze, from `freeze_at` on: each time the one whose thresholds move
        least, when powers of two are where they are on average. By default all freeze at `freeze_at`.
    batches : iterable, optional
        Read anew before each evaluation and at the end, to estimate batch-norm statistics from; see
        `reestimate_batch_norm`.
    forward : callable, optional
        ``forward(qmodel, batch)``, when these batches need another call.
    log : callable, optional
        Called with a dictionary of numbers by name, such as `print` or ``wandb.log``.
    log_every : int
        Number of optimizer steps between two calls of `log`.
    freeze_batch_norm_at : int, optional
        Number of optimizer steps after which batch norms whose folding is simulated use their running statistics in
        training too, as `freeze_batch_norm` does; by default they never do.

    Returns
    -------
    TrainingCallback
        Its methods `start`, `step_end` and `before_evaluation` are for a loop of your own; `lightning` and
        `transformers` return what these trainers take. With `freeze_every`, `state_dict` is what to save for a training
        that goes on in another process, and `load_state_dict` takes it before `start`; both trainers do so by
        themselves.

    Raises
    ------
    ModelError
        When the model is not wrapped, there are batches and no batch norm, or statistics are to be frozen and no batch
        norm is simulated as folded.
    InvalidArgumentError
        When an argument is of a wrong kind, or the batches can be read only once.
    CalibrationError
        When `batches` are one batch.
    """
    state_of(qmodel)
    callback = TrainingCallback(freeze_at, freeze_every, batches, log, log_every, freeze_batch_norm_at)
    callback.qmodel, callback.forward = qmodel, forward
    if batches is not None:
        check_request(batch_norms(qmodel), batches, forward)
    if freeze_batch_norm_at is not None:
        require_simulated(simulated_batch_norms(qmodel))
    return callback


class TrainingCallback(TorchTrainers, TrainingRoutine):
    """What `training_callback` returns; see there."""

    qmodel: nn.Module
    forward: Callable[[nn.Module, Any], Any] | None

    def quantizers(self) -> dict[str, BasePytorchTrainableQuantizer]:
        """Return the model's trainable quantizers by module name."""
        return quantizers_of(self.qmodel)

    def freeze(self, names: Collection[str] | None = None) -> None:
        """Stop thresholds and ranges from learning, those of the named quantizers or all."""
        if names is None:
            freeze_quant_params(self.qmodel)
            return
        for name in names:
            self.quantizers()[name].freeze()

    def freeze_statistics(self) -> None:
        """Let batch norms whose folding is simulated use their running statistics in training too."""
        freeze_batch_norm(self.qmodel)

    def advance(self) -> None:
        """Count one step of every schedule."""
        advance_schedules(self.qmodel)

    def reestimate(self, batches: Iterable[Any]) -> None:
        """Estimate the statistics of the model's batch norms anew."""
        reestimate_batch_norm(self.qmodel, batches, forward=self.forward)
