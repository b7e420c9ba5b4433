"""Batch-norm statistics after quantization: what `reestimate_batch_norm` of every backend checks.

Quantized weights whose codes change while they train leave running statistics behind them that belong to no model there
ever was. Estimated anew from a few batches, they belong to the weights as they are.

References
----------
Nagel, Fournarakis, Bondarenko and Blankevoort, "Overcoming Oscillations in Quantization-Aware Training", ICML 2022,
arXiv:2203.11086, section 5.1.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from numpy.typing import NDArray

from trainable_core.calibration.batches import check_batches
from trainable_core.errors import CalibrationError, ModelError, ShapeMismatchError, StatisticsMissingWarning

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


def require_simulated(norms: Collection[Any]) -> None:
    """Raise ModelError when a model has no batch norm whose folding is simulated, before anything is frozen."""
    if not norms:
        problem = "freeze_batch_norm: the model has no batch norm whose folding is simulated"
        raise ModelError(problem, "wrap it with fold_batch_norm: training.")


def require_several(count: int) -> None:
    """Raise ShapeMismatchError when a batch has one value of each channel: its variance says nothing.

    PyTorch's batch norm refuses such a batch too.
    """
    if count == 1:
        raise ShapeMismatchError("batch norm in training", "several values of each channel", "one", ONE_VALUE)


ONE_VALUE = "use larger batches, or freeze_batch_norm(qmodel)."


def warn_if_new(statistics: Mapping[str, tuple[NDArray[Any], NDArray[Any]]], *, stacklevel: int) -> None:
    """Warn of simulated batch norms that have seen no batch: their means are all 0, and their variances all 1.

    Parameters
    ----------
    statistics : mapping of str to (array, array)
        Running mean and variance of each, by name.
    stacklevel : int
        As of `warnings.warn`, counted from here.

    Notes
    -----
    With the first batches the variances become what they are, and the folded weights leave the ranges that they were
    calibrated to.
    """
    new = [name for name, (mean, variance) in statistics.items() if not mean.any() and (variance == 1).all()]
    if new:
        warnings.warn(StatisticsMissingWarning(new), stacklevel=stacklevel + 1)


def require_reached(missed: Iterable[str]) -> None:
    """Raise CalibrationError, with their names, when batches did not reach some batch norms."""
    names = ", ".join(missed)
    if names:
        problem = f"no batch reached {names}"
        raise CalibrationError(SUBJECT, problem, "pass forward=..., which calls the model so that they are reached.")
