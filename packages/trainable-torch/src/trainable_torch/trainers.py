"""What tells a routine of the steps of a trainer: Lightning's, and Hugging Face's."""

from __future__ import annotations

from typing import Any

from torch import nn

from trainable_core.backend.routine import StepRoutine


class TorchTrainers(StepRoutine):
    """A routine that goes into the trainers that people train PyTorch with."""

    qmodel: nn.Module
    """The wrapped model of a routine that has a state; it may be a part of what is trained."""

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
        """Return a callback for Hugging Face's ``Trainer(callbacks=[...])``; checkpoints hold its state if it has one.

        It goes on with that whether or not ``restore_callback_states_from_checkpoint`` is set.
        """
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

        if not routine.has_state:
            return QuantizationCallback()

        from transformers.trainer_callback import ExportableState  # noqa: PLC0415 - older releases don't have it

        class StatefulQuantizationCallback(QuantizationCallback, ExportableState):
            """Has a state in the Trainer's checkpoints."""

            module: str | None = None
            """Where the routine's model is in the trained one: several such callbacks share a list of states."""

            def state(self) -> dict[str, Any]:
                return {"args": {}, "attributes": {"saved": routine.state_dict(), "module": self.module}}

            def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
                modules = rest["model"].named_modules() if rest.get("model") is not None else ()
                self.module = next((name for name, each in modules if each is routine.qmodel), None)
                saved = state.stateful_callbacks.get(type(self).__name__, []) if state.global_step else []
                found = [each["attributes"] for each in (saved if isinstance(saved, list) else [saved])]
                found = [each for each in found if each["saved"]["step"] == state.global_step]
                if len(found) > 1:
                    found = [each for each in found if each["module"] == self.module]
                if found:
                    routine.load_state_dict(found[-1]["saved"])
                super().on_train_begin(args, state, control, **rest)

        return StatefulQuantizationCallback()
