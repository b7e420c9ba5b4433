"""What a callback does for any trainer: at which steps thresholds freeze, and statistics and logs are due."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from trainable_core.backend.freezing import IncrementalFreezing, learning
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

    @property
    def has_state(self) -> bool:
        """Whether a training that goes on in another process needs a `state_dict`."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """Return what a training goes on with beside the model and the optimizer."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - a routine without a state does nothing
        """Go on with what `state_dict` returned."""


class TrainingRoutine(StepRoutine):
    """What is due after a training step and before an evaluation; a backend says how it is done.

    Parameters
    ----------
    freeze_at : int, optional
        Number of optimizer steps after which thresholds and ranges stop learning; None: they never do.
    freeze_every : int, optional
        Number of steps between two quantizers that freeze, from `freeze_at` on; see
        `trainable_core.backend.freezing.IncrementalFreezing`. None: all freeze at once.
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
        freeze_every: int | None,
        batches: Iterable[Any] | None,
        log: Callable[[dict[str, float]], Any] | None,
        log_every: int,
        freeze_batch_norm_at: int | None = None,
    ) -> None:
        if freeze_at is not None:
            check_count(SUBJECT, "freeze_at", freeze_at, 0)
        if freeze_batch_norm_at is not None:
            check_count(SUBJECT, "freeze_batch_norm_at", freeze_batch_norm_at, 0)
        self._incremental: IncrementalFreezing | None = None
        if freeze_every is not None:
            check_count(SUBJECT, "freeze_every", freeze_every, 1)
            if freeze_at is None:
                problem = "freeze_every says how quantizers freeze from the step freeze_at on, and there is none"
                raise InvalidArgumentError(SUBJECT, problem, "give freeze_at too.")
            self._incremental = IncrementalFreezing(freeze_at, freeze_every)
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
        self._begun = False

    # ---- what a backend writes --------------------------------------------------------------------------------------

    @abstractmethod
    def quantizers(self) -> Mapping[str, BaseTrainableQuantizer]:
        """Return the model's trainable quantizers by name."""

    @abstractmethod
    def freeze(self, names: Collection[str] | None = None) -> None:
        """Stop thresholds and ranges from learning, those of the named quantizers or all."""

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
        if self._incremental is not None:
            if not self._begun or step < self.step:
                self._incremental.go_on(step)
            self._freeze_again(self._incremental.frozen)
        self._begun = True
        self.step, self._counted = step, self._steps_counted()
        self._freeze_if_due()

    def step_end(self, step: int | None = None) -> None:
        """Do what is due after an optimizer step; `step` is how many there were, by default one more than before."""
        self.step = self.step + 1 if step is None else step
        if self._steps_counted() == self._counted:  # no forward of the model has: its parts are trained by themselves
            self.advance()
        self._counted = self._steps_counted()
        if self._incremental is not None:
            chosen = self._incremental.after_step(self.step, self.quantizers())
            if chosen is not None:
                self.freeze([chosen])
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

    @property
    def has_state(self) -> bool:
        """Whether quantizers freeze one after another."""
        return self._incremental is not None

    def state_dict(self) -> dict[str, Any]:
        """Return what a training goes on with bit for bit, beside the model and the optimizer: JSON-clean.

        Only quantizers that freeze one after another need it.
        """
        freezing = {} if self._incremental is None else self._incremental.state_dict()
        return {"step": self.step, "freezing": freezing}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what `state_dict` returned, before `start`, which freezes what was frozen.

        Raises
        ------
        InvalidArgumentError
            When it is no such state, or names quantizers that the model doesn't have.
        """
        read: dict[str, Any] = dict(state) if isinstance(state, Mapping) else {}
        step, freezing = read.get("step"), read.get("freezing")
        check_count(SUBJECT, "the state's step", step, 0)
        if self._incremental is not None and freezing:
            if not isinstance(freezing, Mapping):
                raise InvalidArgumentError(SUBJECT, f"not a state of its freezing: {freezing!r}")
            new = IncrementalFreezing(self._incremental.at, self._incremental.every)
            new.load_state_dict(freezing, SUBJECT)
            unknown = sorted({*new.frozen, *new.averages} - set(self.quantizers()))
            if unknown:
                raise InvalidArgumentError(SUBJECT, f"the model has no quantizers {', '.join(unknown)}")
            self._incremental, self._begun = new, True
        self.step = read["step"]

    def _freeze_again(self, names: Collection[str]) -> None:
        """Freeze those of some quantizers that learn, as in a new process they do."""
        quantizers = self.quantizers()
        waiting = [name for name in names if learning(quantizers[name])]
        if waiting:
            self.freeze(waiting)

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
        at_once = self.freeze_at is not None and self._incremental is None
        if at_once and self.step >= (self.freeze_at or 0) and not self._frozen:
            self._frozen = True
            self.freeze()
        at = self.freeze_batch_norm_at
        if at is not None and self.step >= at and not self._statistics_frozen:
            self._statistics_frozen = True
            self.freeze_statistics()

    def _steps_counted(self) -> int:
        return sum(quantizer.counted_steps for quantizer in self.quantizers().values() if quantizer.has_schedule)
