"""Modifiers: what stands on top of any training method, and is said in a recipe beside it.

A modifier has a name, arguments that pydantic checks, and state that it keeps in its quantizer. What its arguments mean
is written here, once for every framework; what it does with tensors, a subclass in each backend. Plugins offer
subclasses of `Modifier` by the hook ``trainable_register_modifiers``.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema, field_validator

from trainable_core.config import number
from trainable_core.enums import LUT_METHODS, QuantizationTarget
from trainable_core.errors import UnsupportedConfigError
from trainable_core.schedule import AnnealingScheduler, schedule_from_dict
from trainable_core.validation import plain


def _schedule(value: object) -> object:
    """Return a schedule, or a plain number for a value that does not change."""
    if isinstance(value, AnnealingScheduler):
        return value
    if isinstance(value, Mapping):
        return schedule_from_dict(value)
    value = number(value)
    if not isinstance(value, int | float) or not math.isfinite(value):
        message = f"must be a number, or a schedule with t_start, t_end, initial_val and target_val, got {value!r}"
        raise ValueError(message)
    return value


def _schedule_document(value: Any) -> Any:
    return value.to_dict() if isinstance(value, AnnealingScheduler) else value


Schedule = Annotated[
    Any,
    BeforeValidator(_schedule),
    PlainSerializer(_schedule_document),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "object"}]}),
]
"""A number, or an `AnnealingScheduler`; in documents, what its `to_dict` returns."""

Share = Annotated[float, Field(gt=0, le=1), BeforeValidator(number)]


def ends_of(schedule: Any) -> tuple[float, float]:
    """Return the smallest and the largest value of a schedule, or of a number."""
    if not isinstance(schedule, AnnealingScheduler):
        return float(schedule), float(schedule)
    ends = float(schedule.initial_val), float(schedule.target_val)
    return min(ends), max(ends)


class Modifier(BaseModel):
    """Base of all modifiers: frozen arguments, and what a backend may do with a quantizer's tensor.

    Notes
    -----
    One object may serve several quantizers: what it remembers is state of the quantizer, made by `add_state`. State is
    saved, loaded and copied with the quantizer's variables.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: ClassVar[str]
    """What recipes call it."""

    changes_values: ClassVar[bool] = False
    """Whether the quantizer's values are others with it, in training or after."""

    counts_steps: ClassVar[bool] = False
    """Whether training steps have to be counted, in the quantizer's state variable ``step``."""

    deploys_values: ClassVar[bool] = False
    """Whether the quantized values are to be stored in the place of the float weights when a model is finalized."""

    def check(self, quantizer: Any) -> None:
        """Refuse a quantizer that it can't stand on; called before anything is made.

        Raises
        ------
        UnsupportedConfigError
            When it can't.
        """

    def add_state(self, quantizer: Any) -> None:
        """Create its state by the quantizer's `add_state`; the quantizer's `tensor_shape` is known by then."""

    def start_anew(self, quantizer: Any) -> None:
        """Give the state its first values; called when the quantizer gets other numbers by calibration."""

    def observe(self, quantizer: Any, x: Any) -> None:
        """Look at a weight at the beginning of a training step, and update the state; outside of the graph."""

    def enter(self, quantizer: Any, x: Any, training: bool) -> Any:  # noqa: ARG002, FBT001 - a subclass's
        """Return what is quantized in the place of a float32 tensor."""
        return x

    def leave(self, quantizer: Any, x: Any, quantized: Any, training: bool) -> Any:  # noqa: ARG002, FBT001 - as above
        """Return what becomes of the quantized tensor."""
        return quantized

    def term(self, quantizer: Any, x: Any) -> Any:  # noqa: ARG002 - as above
        """Return a scalar term for the loss that depends on the tensor, or None."""
        return None

    def report(self, quantizer: Any) -> dict[str, float]:  # noqa: ARG002 - as above
        """Return what `describe` tells of it: numbers by name."""
        return {}


class _OnOscillations(Modifier):
    """What the modifiers of oscillating weights share; see `trainable_core.reference.oscillation`."""

    counts_steps = True

    momentum: Share = 0.01

    def check(self, quantizer: Any) -> None:
        """Refuse activations, look-up tables, and methods whose codes are not those of the weight on the grid."""
        config = quantizer.quantization_config
        problem = ""
        if config.target is not QuantizationTarget.Weights:
            problem = "it is for weights"
        elif config.quantization_method in LUT_METHODS:
            problem = f"the values of {config.quantization_method} are those of a table, and have no codes to count"
        elif quantizer.training_forward != "deployed" or quantizer.depends_on != "element" or quantizer.deploys_values:
            problem = f"{quantizer.training_method} does not train with the codes of the weight on its grid"
        if problem:
            raise UnsupportedConfigError(f"{quantizer.subject}: {self.name}", problem)


class OscillationDampening(_OnOscillations):
    """Draws weights to the centres of their codes, so that codes stop changing back and forth.

    Parameters
    ----------
    strength : float or schedule
        Factor of the term for the loss, >= 0; in the paper a cosine from 0 to between 1e-4 and 0.1.
    momentum : float
        Of the moving average that counts oscillations, in (0, 1].
    """

    name = "oscillation_dampening"

    strength: Schedule

    @field_validator("strength")
    @classmethod
    def _not_negative(cls, strength: Any) -> Any:
        if ends_of(strength)[0] < 0:
            message = f"must not be negative, got {_schedule_document(strength)!r}"
            raise ValueError(message)
        return strength


class OscillationFreezing(_OnOscillations):
    """Freezes the code of each weight that oscillates more often than a threshold.

    Parameters
    ----------
    threshold : float or schedule
        Frequency from which on a code is frozen, >= 0; in the paper a cosine from 0.1 to 0.01. Before the schedule's
        `t_start` nothing is frozen.
    momentum : float
        Of the moving averages of frequency and code, in (0, 1].
    """

    name = "oscillation_freezing"
    changes_values = True
    deploys_values = True

    threshold: Schedule

    @field_validator("threshold")
    @classmethod
    def _not_negative(cls, threshold: Any) -> Any:
        if ends_of(threshold)[0] < 0:
            message = f"must not be negative, got {_schedule_document(threshold)!r}"
            raise ValueError(message)
        return threshold


class GradualQuantization(Modifier):
    """Quantizes a growing share of the values while training; see `trainable_core.reference.gradual`.

    Parameters
    ----------
    share : float or schedule
        Share of the values that stay float in training, from 0 to 1; usually a schedule from 1 to 0.
    """

    name = "gradual_quantization"
    changes_values = True
    counts_steps = True

    share: Schedule

    @field_validator("share")
    @classmethod
    def _is_a_share(cls, share: Any) -> Any:
        low, high = ends_of(share)
        if low < 0 or high > 1:
            message = f"must be from 0 to 1, got {_schedule_document(share)!r}"
            raise ValueError(message)
        return share

    def check(self, quantizer: Any) -> None:
        """Refuse weights."""
        if quantizer.quantization_config.target is not QuantizationTarget.Activation:
            raise UnsupportedConfigError(f"{quantizer.subject}: {self.name}", "it is for activations")


BUILT_IN: dict[str, type[Modifier]] = {
    each.name: each for each in (OscillationDampening, OscillationFreezing, GradualQuantization)
}
"""The built-in modifiers by name, as every backend has them."""


def checked_modifiers(value: object) -> object:
    """Return the modifiers of a recipe's section: arguments by name, those of the built-in ones checked.

    Raises
    ------
    ValueError
        When it is no mapping from names to mappings.
    pydantic.ValidationError
        When a built-in's argument is wrong; names it.
    """
    value = plain(value)
    if not isinstance(value, dict):
        message = f"must map names of modifiers to their arguments, got {value!r}"
        raise ValueError(message)  # noqa: TRY004 - pydantic turns a ValueError into the field's error
    checked = {}
    for name, arguments in value.items():
        if not isinstance(name, str) or not name.isidentifier():
            message = f"{name!r} is not the name of a modifier"
            raise ValueError(message)
        given = {} if arguments is None else arguments
        if not isinstance(given, dict):
            message = f"{name}: arguments must be a mapping, got {arguments!r}"
            raise ValueError(message)  # noqa: TRY004 - as above
        if name in BUILT_IN:
            BUILT_IN[name].model_validate(given)
        checked[name] = given
    return checked


def unknown_modifier(name: str, known: Mapping[str, Any]) -> str:
    """Return what is wrong with the name of a modifier that nobody has, and which one may be meant."""
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"no modifier is called {name!r}; there are {', '.join(sorted(known)) or 'none'}{hint}"
