"""One callback for `fit` and for loops of one's own, whichever Keras it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from trainable_core.backend.routine import SUBJECT, StepRoutine, TrainingRoutine
from trainable_core.calibration.batch_norm import check_request
from trainable_core.errors import UnsupportedConfigError
from trainable_keras import training
from trainable_keras.framework import Framework
from trainable_keras.statistics import batch_norms, reestimate_batch_norm
from trainable_keras.wrapping import state_of


def training_callback(
    framework: Framework,
    qmodel: Any,
    *,
    freeze_at: int | None,
    batches: Iterable[Any] | None,
    forward: Callable[[Any, Any], Any] | None,
    log: Callable[[dict[str, float]], Any] | None,
    log_every: int,
) -> Any:
    """Return a callback of Keras; see `trainable_keras.training_callback`."""
    state_of(framework, qmodel)
    routine = KerasRoutine(freeze_at, batches, log, log_every)
    routine.framework, routine.qmodel, routine.forward = framework, qmodel, forward
    if freeze_at is not None and not framework.can_freeze_in_fit:
        problem = "freeze_at: Keras's trainer on JAX can't go on with fewer variables"
        raise UnsupportedConfigError(SUBJECT, problem, "call freeze_quant_params between two calls of fit.")
    if batches is not None:
        check_request(batch_norms(framework, qmodel), batches, forward)
    return told_by_keras(framework, routine)


def told_by_keras(framework: Framework, routine: Any) -> Any:
    """Return a callback of Keras that tells a routine of the steps of `fit`.

    Parameters
    ----------
    framework : Framework
        Whose callback.
    routine : KerasSteps
        What is told; its public methods are the callback's too, for loops of one's own.
    """
    base: Any = framework.module.callbacks.Callback

    class QuantizationCallback(base):  # type: ignore[misc] # Keras is untyped
        """Tells the routine of the steps of `fit`; a loop of one's own calls `start`, `step_end` and so on itself."""

        def __init__(self) -> None:
            super().__init__()
            self.routine = routine
            self.start, self.step_end, self.end = routine.start, routine.step_end, routine.end
            self.before_evaluation = routine.before_evaluation

        def __getattr__(self, name: str) -> Any:
            """Return what else the routine tells."""
            if name == "routine" or name.startswith("_"):
                raise AttributeError(name)
            return getattr(self.routine, name)

        def on_train_begin(self, logs: Any = None) -> None:  # noqa: ARG002 - Keras's signature
            routine.start(routine.optimizer_steps())

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002 - as above
            routine.step_end(routine.optimizer_steps())

        def on_test_begin(self, logs: Any = None) -> None:  # noqa: ARG002 - as above
            routine.before_evaluation()

        def on_train_end(self, logs: Any = None) -> None:  # noqa: ARG002 - as above
            routine.end()

    return QuantizationCallback()


class KerasSteps(StepRoutine):
    """A routine that `fit` tells of its steps."""

    framework: Framework
    qmodel: Any

    def optimizer_steps(self) -> int:
        """Return how many steps the model's optimizer has taken."""
        sync = getattr(self.qmodel, "jax_state_sync", None)
        if sync is not None:  # JAX's trainer keeps the variables' values to itself between batches
            sync()
        return int(self.framework.functions.to_numpy(self.qmodel.optimizer.iterations))


class KerasRoutine(KerasSteps, TrainingRoutine):
    """What is due in the training of a Keras model."""

    forward: Callable[[Any, Any], Any] | None

    def quantizers(self) -> dict[str, Any]:
        """Return the model's trainable quantizers by the name of their tensor."""
        return training.quantizers_of(self.qmodel)

    def freeze(self) -> None:
        """Stop thresholds and ranges from learning; within `fit`, go on with a training function for the others."""
        fitting = getattr(self.qmodel, "train_function", None) is not None
        training.freeze_quant_params(self.framework, self.qmodel, frozen=True)
        if fitting:
            self.qmodel.make_train_function(force=True)

    def advance(self) -> None:
        """Count one step of every schedule."""
        training.advance_schedules(self.framework, self.qmodel)

    def reestimate(self, batches: Iterable[Any]) -> None:
        """Estimate the statistics of the model's batch norms anew."""
        reestimate_batch_norm(self.framework, self.qmodel, batches, self.forward)
