"""Following the training of a Keras model, whichever Keras it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from os import PathLike
from typing import Any

from trainable_core.enums import VariableGroup
from trainable_core.tracking.routine import TrackingRoutine
from trainable_keras.callback import KerasSteps, told_by_keras
from trainable_keras.framework import Framework
from trainable_keras.viewing import KerasView


def track(
    framework: Framework,
    qmodel: Any,
    path: str | PathLike[str],
    *,
    every: int,
    batches: Iterable[Any] | None,
    forward: Callable[[Any, Any], Any] | None,
) -> Any:
    """Return a callback of Keras; see `trainable_keras.track`."""
    routine = KerasTracking(KerasView(framework, qmodel, forward), path, every, batches)
    routine.framework, routine.qmodel = framework, qmodel
    return told_by_keras(framework, routine)


_TRACES = "experimental_get_tracing_count"
"""What a function of TensorFlow tells of its graphs; others have none."""


class KerasTracking(KerasSteps, TrackingRoutine):
    """What is looked at in the training of a Keras model."""

    _optimizer: Any = None
    _note: Any = None
    """A variable with the sum of squares of each quantizer's gradients in the last step; NaN where there is none."""

    def begin(self) -> None:
        """Let the model's optimizer note the gradients that it is given, where that changes nothing else."""
        self.finish()
        optimizer, name = getattr(self.qmodel, "optimizer", None), self.framework.applies
        replicas = getattr(getattr(self.qmodel, "distribute_strategy", None), "num_replicas_in_sync", 1)
        if optimizer is None or not name or replicas > 1:  # each replica would note gradients of its own
            return
        new = self._note is None or optimizer is not self._optimizer
        step = getattr(self.qmodel, "train_function", None)
        if new and self.framework.restarts_random and getattr(step, _TRACES, int)() > 0:
            return
        if new:
            self._note, self._optimizer = self.framework.note_of(len(self.tracked)), optimizer
        vars(optimizer)[name] = self._noting(getattr(optimizer, name))
        if new and step is not None:
            self.qmodel.make_train_function(force=True)

    def finish(self) -> None:
        """Let the optimizer go on as before; a step that was traced goes on noting, which changes nothing."""
        if self._note is not None:
            vars(self._optimizer).pop(self.framework.applies, None)

    def gradients(self) -> dict[str, float | None] | None:
        """Return the norm of the gradient of each quantizer's variables, as the optimizer was given them."""
        if self._note is None:
            return None
        squares = self.framework.functions.to_numpy(self._note)
        return {
            name: None if math.isnan(square) else math.sqrt(square)
            for name, square in zip(self.tracked, map(float, squares), strict=True)
        }

    def _noting(self, apply: Callable[..., Any]) -> Callable[..., Any]:
        variables = [t.quantizer.get_trainable_variables(VariableGroup.QPARAMS) for t in self.tracked.values()]
        f, note = self.framework.functions, self._note

        def applied(gradients: Any, *args: Any, **kwargs: Any) -> Any:
            given = list(gradients)
            known = kwargs.get("trainable_variables", args[0] if args else None)
            pairs = (
                given if self.framework.applies == "apply_gradients" else list(zip(given, known or (), strict=False))
            )
            of = {id(variable): gradient for gradient, variable in pairs if gradient is not None}
            noted = [[of[id(v)] for v in own if id(v) in of] for own in variables]
            squares = [f.total([f.sum(_square(f, g)) for g in some]) if some else f.number(math.nan) for some in noted]
            note.assign(f.stack(squares))
            return apply(given, *args, **kwargs)

        return applied


def _square(functions: Any, gradient: Any) -> Any:
    values = functions.stop_gradient(functions.cast(gradient, "float32"))
    return values * values
