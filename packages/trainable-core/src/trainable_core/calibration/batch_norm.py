"""Batch-norm statistics after quantization: what `reestimate_batch_norm` of every backend checks.

Quantized weights whose codes change while they train leave running statistics behind them that belong to no model there
ever was. Estimated anew from a few batches, they belong to the weights as they are.

References
----------
Nagel, Fournarakis, Bondarenko and Blankevoort, "Overcoming Oscillations in Quantization-Aware Training", ICML 2022,
arXiv:2203.11086, section 5.1.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from trainable_core.calibration.batches import check_batches
from trainable_core.errors import CalibrationError, ModelError

SUBJECT = "reestimate_batch_norm"


def check_request(norms: Collection[Any], batches: Any, forward: object) -> None:
    """Refuse what no statistics can be estimated from, before anything is changed.

    Parameters
    ----------
    norms : collection
        The model's batch norms with running statistics.
    batches : iterable
        What the user gave.
    forward : callable or None
        The user's own call.

    Raises
    ------
    ModelError
        When the model has no batch norm.
    CalibrationError
        When the batches are none.
    """
    if not norms:
        problem = "the model has no batch norm with statistics of its own"
        raise ModelError(problem, "fold_batch_norm: after keeps them while the model trains.")
    if batches is None:
        raise CalibrationError(SUBJECT, "it needs batches, and none were given")
    check_batches(batches, forward, 0, subject=SUBJECT)


def require_reached(missed: Iterable[str]) -> None:
    """Raise CalibrationError, with their names, when batches did not reach some batch norms."""
    names = ", ".join(missed)
    if names:
        problem = f"no batch reached {names}"
        raise CalibrationError(SUBJECT, problem, "pass forward=..., which calls the model so that they are reached.")
