"""What a DQA quantizer's further arguments may be, the same in every backend."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, TypeVar

import numpy as np

from trainable_core.config import TrainableQuantizerConfig
from trainable_core.errors import UnsupportedConfigError
from trainable_core.qparams import Float32
from trainable_core.reference import dqa
from trainable_core.schedule import LinearAnnealingScheduler

S = TypeVar("S", bound=LinearAnnealingScheduler)

TEMPERATURE = {"t_start": 0, "t_end": 1000, "initial_val": 1.0, "target_val": 0.02}
"""Default schedule: from an even mixture to a clear choice within 1000 training steps."""

F32_MAX = float(np.finfo(np.float32).max)


def temperature_schedule(scheduler: type[S], temperature: object, subject: str) -> S:
    """Return the schedule of a DQA quantizer's temperature.

    Parameters
    ----------
    scheduler : type
        The backend's `LinearAnnealingScheduler`.
    temperature : mapping or None
        Its arguments; None takes `TEMPERATURE`.
    subject : str
        The quantizer, for errors.

    Raises
    ------
    UnsupportedConfigError
        When it is no such mapping, or a value is not positive.
    """
    subject = f"{subject}: temperature"
    given = TEMPERATURE if temperature is None else temperature
    if not isinstance(given, Mapping):
        raise UnsupportedConfigError(subject, f"must be a mapping, got {given!r}", f"give {', '.join(TEMPERATURE)}.")
    try:
        schedule: Any = scheduler.from_dict(given)
    except UnsupportedConfigError as error:
        raise UnsupportedConfigError(subject, error.problem) from error
    if not (schedule.initial_val > 0 and schedule.target_val > 0):
        raise UnsupportedConfigError(subject, "initial_val and target_val must be positive")
    made: S = schedule
    return made


def bit_cost(bit_cost_weight: Any, subject: str) -> float:
    """Return the weight of the expected bit width in the loss; UnsupportedConfigError unless 0 to float32's largest."""
    number = isinstance(bit_cost_weight, Real) and not isinstance(bit_cost_weight, bool)
    if not number or not 0 <= bit_cost_weight <= F32_MAX:
        raise UnsupportedConfigError(
            f"{subject}: bit_cost_weight", f"must be a number from 0 to {F32_MAX:.3g}, got {bit_cost_weight!r}"
        )
    return float(bit_cost_weight)


def candidate_widths(config: TrainableQuantizerConfig) -> tuple[int, ...]:
    """Return the candidate widths, ascending: the config's, else n, 2n and 4n, at most 16."""
    if config.candidates is None:
        return tuple(dqa.default_widths(config.n_bits))
    return tuple(sorted({candidate.n_bits for candidate in config.candidates}))


def selecting_logits(widths: Sequence[int], width: int) -> Float32:
    """Return logits of which that of `width` is the largest.

    Examples
    --------
    >>> selecting_logits((2, 4, 8), 4)
    array([0., 1., 0.], dtype=float32)
    """
    return np.asarray([float(each == width) for each in widths], np.float32)


def schedule_end(schedule: LinearAnnealingScheduler) -> int:
    """Return the number of training steps after which training values are the deployed ones."""
    return math.floor(schedule.t_end) + 1
