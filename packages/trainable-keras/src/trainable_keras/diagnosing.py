"""What hurts a quantized model, what of it trains, and what to change, whichever Keras it is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from tqdm.auto import tqdm

from trainable_core.backend.view import Forward
from trainable_core.diagnosis import examination, suggestion
from trainable_core.diagnosis.objective import Objective
from trainable_core.diagnosis.report import Diagnosis
from trainable_core.diagnosis.suggestion import Budget, Suggestion
from trainable_core.errors import ModelError
from trainable_keras.framework import Framework
from trainable_keras.viewing import KerasView


def diagnose(
    framework: Framework,
    qmodel: Any,
    batches: Iterable[Any],
    teacher: Any,
    *,
    objective: Objective,
    gradients: bool,
    forward: Forward | None,
    progress: bool | None,
) -> Diagnosis:
    """Return what hurts a quantized model; see `trainable_keras.diagnose`."""
    return examination.diagnose(
        KerasView(framework, qmodel, forward),
        batches,
        teacher=_checked_teacher(framework, "diagnose", teacher),
        objective=objective,
        gradients=gradients,
        show_progress=partial(_bar, "diagnose", progress),
    )


def suggest(  # noqa: PLR0913 - as the verb
    framework: Framework,
    qmodel: Any,
    batches: Iterable[Any],
    budget: Budget,
    teacher: Any,
    *,
    widths: Sequence[int],
    objective: Objective,
    forward: Forward | None,
    progress: bool | None,
) -> Suggestion:
    """Return bits for each layer under a budget; see `trainable_keras.suggest`."""
    return suggestion.suggest(
        KerasView(framework, qmodel, forward),
        batches,
        budget,
        teacher=_checked_teacher(framework, "suggest", teacher),
        widths=widths,
        objective=objective,
        show_progress=partial(_bar, "suggest", progress),
    )


def _checked_teacher(framework: Framework, what: str, teacher: Any) -> Any:
    if teacher is not None and not isinstance(teacher, framework.module.Model):
        raise ModelError(f"{what}: the teacher is {type(teacher).__name__}, no model of the same Keras")
    return teacher


def _bar(what: str, progress: bool | None, total: int | None) -> Any:  # noqa: FBT001 - as the verbs have it
    return tqdm(desc=what, total=total, disable=None if progress is None else not progress, leave=False)
