"""What a callback does for any trainer: at which steps thresholds freeze, and statistics and logs are due."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from trainable_core.errors import InvalidArgumentError
from trainable_core.quantizer import BaseTrainableQuantizer

SUBJECT = "training_callback"


def check_count(subject: str, name: str, value: object, least: int) -> None:
    """Raise InvalidArgumentError unless an argument is a whole number that is large enough."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InvalidArgumentError(subject, f"{name} must be a whole number from {least}, got {value!r}")


def check_repeatable(subject: str, batches: object) -> None:
    """Raise InvalidArgumentError for batches that can be read only once."""
    if isinstance(batches, Iterator):
        problem = f"batches is a {type(batches).__name__}, which can be read only once"
        raise InvalidArgumentError(subject, problem, "pass a list, or a loader that begins anew.")


class StepRoutine(ABC):
    """What a trainer calls: at the start, after each optimizer step, before each evaluation, and at the end."""

    step: int = 0
    """Number of optimizer steps so far, as the trainer counts them."""

    @abstractmethod
    def start(self, step: int = 0) -> None:
        """Begin, or go on, after `step` optimizer steps."""

    @abstractmethod
    def step_end(self, step: int | None = None) -> None:
        """Do what is due after an optimizer step; `step` is how many there were, by default one more than before."""

    @abstractmethod
    def before_evaluation(self) -> None:
        """Do what is due before the model is evaluated."""

    @abstractmethod
    def end(self) -> None:
        """Do what is due when the training is over."""


class TrainingRoutine(StepRoutine):
    """What is due after a training step and before an evaluation; a backend says how it is done.

    Parameters
    ----------
    freeze_at : int, optional
        Number of optimizer steps after which thresholds and ranges stop learning; None: they never do.
    batches : iterable, optional
        What batch-norm statistics are estimated from before each evaluation; read anew each time. None: they are not.
    log : callable, optional
        Called with a dictionary of numbers by name.
    log_every : int
        Number of optimizer steps between two calls of `log`.
    freeze_batch_norm_at : int, optional
        Number of optimizer steps after which batch norms whose folding is simulated use their running statistics in
        training too; None: they never do.

    Raises
    ------
    InvalidArgumentError
        When a number is not a whole one in range, `log` is not callable, or the batches can be read only once.
    """

    def __init__(
        self,
        freeze_at: int | None,
        batches: Iterable[Any] | None,
        log: Callable[[dict[str, float]], Any] | None,
        log_every: int,
        freeze_batch_norm_at: int | None = None,
    ) -> None:
        if freeze_at is not None:
            check_count(SUBJECT, "freeze_at", freeze_at, 0)
        if freeze_batch_norm_at is not None:
            check_count(SUBJECT, "freeze_batch_norm_at", freeze_batch_norm_at, 0)
        check_count(SUBJECT, "log_every", log_every, 1)
        if log is not None and not callable(log):
            raise InvalidArgumentError(SUBJECT, f"log must be callable, got {log!r}")
        check_repeatable(SUBJECT, batches)
        self.freeze_at = freeze_at
        self.freeze_batch_norm_at = freeze_batch_norm_at
        self.batches = batches
        self.log = log
        self.log_every = log_every
        self._counted = 0
        self._frozen = False
        self._statistics_frozen = False

    # ---- what a backend writes --------------------------------------------------------------------------------------

    @abstractmethod
    def quantizers(self) -> Mapping[str, BaseTrainableQuantizer]:
        """Return the model's trainable quantizers by name."""

    @abstractmethod
    def freeze(self) -> None:
        """Stop thresholds and ranges from learning."""

    @abstractmethod
    def freeze_statistics(self) -> None:
        """Let batch norms whose folding is simulated use their running statistics in training too."""

    @abstractmethod
    def advance(self) -> None:
        """Count one step of every schedule."""

    @abstractmethod
    def reestimate(self, batches: Iterable[Any]) -> None:
        """Estimate the statistics of the model's batch norms anew."""

    # ---- what a trainer calls ---------------------------------------------------------------------------------------

    def start(self, step: int = 0) -> None:
        """Begin, or go on, after `step` optimizer steps."""
        self.step, self._counted = step, self._steps_counted()
        self._freeze_if_due()

    def step_end(self, step: int | None = None) -> None:
        """Do what is due after an optimizer step; `step` is how many there were, by default one more than before."""
        self.step = self.step + 1 if step is None else step
        if self._steps_counted() == self._counted:  # no forward of the model has: its parts are trained by themselves
            self.advance()
        self._counted = self._steps_counted()
        self._freeze_if_due()
        if self.log is not None and self.step % self.log_every == 0:
            self.log(self.numbers())

    def before_evaluation(self) -> None:
        """Estimate batch-norm statistics anew, where there are batches for it."""
        if self.batches is not None:
            self.reestimate(self.batches)

    def end(self) -> None:
        """Estimate batch-norm statistics anew, as before an evaluation."""
        self.before_evaluation()

    def numbers(self) -> dict[str, float]:
        """Return what there is to log: of each quantizer its mean threshold, or ends, and what modifiers report."""
        found: dict[str, float] = {}
        for name, quantizer in self.quantizers().items():
            if not quantizer.calibrated or not quantizer.quantization_config.enabled or not quantizer.variable_names:
                continue
            for key, value in quantizer.grid_numbers(quantizer.selected_width).items():
                found[f"{name}/{key}"] = float(np.mean(value, dtype=np.float64))
            for report in quantizer.report().values():
                found |= {f"{name}/{key}": float(value) for key, value in report.items()}
        return found

    def _freeze_if_due(self) -> None:
        if self.freeze_at is not None and self.step >= self.freeze_at and not self._frozen:
            self._frozen = True
            self.freeze()
        at = self.freeze_batch_norm_at
        if at is not None and self.step >= at and not self._statistics_frozen:
            self._statistics_frozen = True
            self.freeze_statistics()

    def _steps_counted(self) -> int:
        return sum(quantizer.counted_steps for quantizer in self.quantizers().values() if quantizer.has_schedule)
