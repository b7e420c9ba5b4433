"""What tells a routine of the steps of a trainer: Lightning's, and Hugging Face's."""

from __future__ import annotations

from typing import Any

from trainable_core.backend.routine import StepRoutine


class TorchTrainers(StepRoutine):
    """A routine that goes into the trainers that people train PyTorch with."""

    def lightning(self) -> Any:
        """Return a callback for Lightning's ``Trainer(callbacks=[...])``."""
        from lightning.pytorch import Callback  # noqa: PLC0415 - only for those who have it

        routine = self

        class QuantizationCallback(Callback):
            """Tells the routine of Lightning's steps."""

            def on_train_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002 - Lightning's signature
                routine.start(trainer.global_step)

            def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
                if trainer.global_step != routine.step:  # else gradients were only accumulated
                    routine.step_end(trainer.global_step)

            def on_validation_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002 - as above
                if not trainer.sanity_checking:
                    routine.before_evaluation()

            def on_train_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002 - as above
                routine.end()

        class StatefulCallback(QuantizationCallback):
            """Has a state in Lightning's checkpoints."""

            def state_dict(self) -> dict[str, Any]:
                return routine.state_dict()

            def load_state_dict(self, state_dict: dict[str, Any]) -> None:
                routine.load_state_dict(state_dict)

        return StatefulCallback() if routine.has_state else QuantizationCallback()

    def transformers(self) -> Any:
        """Return a callback for Hugging Face's ``Trainer(callbacks=[...])``."""
        from transformers import TrainerCallback  # noqa: PLC0415 - only for those who have it

        routine = self

        class QuantizationCallback(TrainerCallback):
            """Tells the routine of the Trainer's steps."""

            def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002 - the Trainer's signature
                routine.start(state.global_step)

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002 - as above
                routine.step_end(state.global_step)
                self._evaluates(control)

            def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002 - as above
                self._evaluates(control)

            def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002 - as above
                routine.end()

            @staticmethod
            def _evaluates(control: Any) -> None:
                if control.should_evaluate:
                    routine.before_evaluation()

        return QuantizationCallback()
