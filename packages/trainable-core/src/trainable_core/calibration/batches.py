"""The framework-free part of `calibrate`: which quantizers wait for numbers, and feeding batches to observers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from trainable_core.errors import CalibrationError, QuantizerStateError
from trainable_core.quantizer import BaseTrainableQuantizer


def waiting_quantizers(quantizers: Iterable[BaseTrainableQuantizer], model: str, *, force: bool) -> set[int]:
    """Return the ``id`` of each quantizer that is to be calibrated.

    Parameters
    ----------
    quantizers : iterable of BaseTrainableQuantizer
        A model's; those switched off don't count.
    model : str
        What the model is called in errors.
    force : bool
        Whether those that have their numbers are calibrated again.

    Raises
    ------
    QuantizerStateError
        When every quantizer has its numbers and `force` is false.
    """
    found = [quantizer for quantizer in quantizers if quantizer.quantization_config.enabled]
    waiting = {id(quantizer) for quantizer in found if force or not quantizer.calibrated}
    if found and not waiting:
        raise QuantizerStateError(
            model,
            f"its {len(found)} quantizers have their thresholds already, trained ones perhaps",
            "pass force=True to overwrite them.",
        )
    return waiting


def check_batches(batches: Any, forward: object, holders: int, *, single: bool) -> None:
    """Refuse what can't be iterated over for batches.

    Parameters
    ----------
    batches : iterable or None
        What the user gave.
    forward : callable or None
        The user's own call.
    holders : int
        How many activation quantizers need batches.
    single : bool
        Whether `batches` is itself a tensor, as only the framework knows.

    Raises
    ------
    CalibrationError
        When there are none, or they are one batch.
    """
    if batches is None:
        raise CalibrationError("calibrate", f"{holders} activation quantizers need batches, and none were given")
    if single or isinstance(batches, str | bytes | Mapping) or not isinstance(batches, Iterable):
        raise CalibrationError(
            "calibrate", f"batches must be an iterable of batches, got {type(batches).__name__}", "pass [batch]."
        )
    if forward is not None and not callable(forward):
        raise CalibrationError("calibrate", f"forward must be callable, got {forward!r}")


def feed(batches: Iterable[Any], call: Callable[[Any], Any]) -> None:
    """Call the model on every batch.

    Raises
    ------
    CalibrationError
        When there is none.
    """
    count = 0
    for batch in batches:
        call(batch)
        count += 1
    if count == 0:
        raise CalibrationError(
            "calibrate", "the batches are empty", "a generator can be read only once; pass a fresh one."
        )


def inputs_of(batch: Any) -> Any:
    """Return what of a batch goes into the model: of a tuple or list the first item, inputs without labels."""
    if isinstance(batch, tuple | list):
        if not batch:
            raise CalibrationError("calibrate", "a batch is an empty tuple or list")
        return batch[0]
    return batch
