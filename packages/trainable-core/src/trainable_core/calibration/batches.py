"""The batches that a model is calibrated with: what is accepted, and which part of one goes into the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from trainable_core.errors import CalibrationError, TrainableError

T = TypeVar("T")


def is_tensor(value: Any) -> bool:
    """Return whether a value is a tensor or an array of any framework: one batch, and not several."""
    return hasattr(value, "__array__") or (hasattr(value, "dtype") and hasattr(value, "shape"))  # or a ragged tensor


def is_one_batch(items: tuple[Any, ...]) -> bool:
    """Return whether the items of a tuple are those of a batch, inputs and labels, and can't well be batches.

    They have as many rows each, and differ in type or in the shape of a row; or only some of them are tensors. What
    might be either, as the inputs and targets of an autoencoder, is taken for batches.

    Examples
    --------
    >>> import numpy as np
    >>> x, y = np.zeros((4, 3)), np.zeros(4)
    >>> is_one_batch((x, y)), is_one_batch((x, x)), is_one_batch((x, y[:2])), is_one_batch(((x, y), (x, y)))
    (True, False, False, False)
    """
    tensors = [each for each in items if is_tensor(each)]
    if len(tensors) < len(items):
        return bool(tensors)
    shapes = [tuple(each.shape) for each in tensors]
    rows = {shape[:1] for shape in shapes}
    kinds = {(shape[1:], str(each.dtype)) for shape, each in zip(shapes, tensors, strict=True)}
    return len(rows) == 1 and len(kinds) > 1


def in_a_list(batches: Any) -> Any:
    """Return batches as they are, and a single one, which may be inputs with labels, in a list."""
    single = (
        is_tensor(batches) or isinstance(batches, Mapping) or (isinstance(batches, tuple) and is_one_batch(batches))
    )
    return [batches] if single else batches


def check_batches(batches: Any, forward: object, holders: int, *, subject: str = "calibrate") -> None:
    """Refuse what can't be iterated over for batches.

    Parameters
    ----------
    batches : iterable or None
        What the user gave.
    forward : callable or None
        The user's own call.
    holders : int
        How many activation quantizers need batches.
    subject : str
        What needs the batches, for errors.

    Raises
    ------
    CalibrationError
        When there are none, or they are one batch: a tensor, a mapping, or a tuple as `is_one_batch` tells it.
    """
    if batches is None:
        problem = f"{holders} activation quantizers need batches" if holders else "it needs batches"
        raise CalibrationError(subject, f"{problem}, and none were given")
    if isinstance(batches, tuple) and is_one_batch(batches):
        problem = "batches must be an iterable of batches, and the items of this tuple look like inputs and labels"
        raise CalibrationError(subject, problem, "pass [(x, y)] for one batch, or a list of batches.")
    if is_tensor(batches) or isinstance(batches, str | bytes | Mapping) or not isinstance(batches, Iterable):
        raise CalibrationError(
            subject, f"batches must be an iterable of batches, got {type(batches).__name__}", "pass [batch]."
        )
    if forward is not None and not callable(forward):
        raise CalibrationError(subject, f"forward must be callable, got {forward!r}")


def feed(batches: Iterable[Any], call: Callable[[Any], Any], subject: str = "calibrate") -> None:
    """Call the model on every batch; `subject` is what needs them, for errors.

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
        raise CalibrationError(subject, "the batches are empty", "a generator can be read only once; pass a fresh one.")


def inputs_of(batch: Any) -> Any:
    """Return the part of a batch that goes into the model: the first item of a tuple or list, without the labels."""
    if isinstance(batch, tuple | list):
        if not batch:
            raise CalibrationError("calibrate", "a batch is an empty tuple or list")
        return batch[0]
    return batch


def explained(batch: Any, call: Callable[[], T]) -> T:
    """Return what a call of the model with `inputs_of` a batch gives.

    Raises
    ------
    CalibrationError
        Where the model refuses the first item of a tuple or list that has others: says that these were left out.
    """
    try:
        return call()
    except (TypeError, ValueError) as error:
        if isinstance(error, TrainableError) or not isinstance(batch, tuple | list) or len(batch) == 1:
            raise
        told = f"{type(error).__name__}: {error}".split("\n", 1)[0]
        problem = f"the model can't be called with the first of the {len(batch)} items of a batch: {told}"
        hint = "the others are taken for labels; forward=lambda model, batch: ... calls the model in another way."
        raise CalibrationError("calibrate", problem, hint) from error
