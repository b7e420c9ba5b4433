"""The sections of a recipe: how weights and activations are quantized, and how thresholds are found."""

import difflib
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, JsonValue, model_validator
from pydantic.json_schema import SkipJsonSchema

from trainable_core.config import (
    Document,
    GroupSize,
    MethodField,
    MinThreshold,
    NBits,
    StrictBool,
    TrainableQuantizerCandidateConfig,
    number,
)
from trainable_core.constants import MIN_THRESHOLD
from trainable_core.enums import CalibrationMethod, QuantizationMethod
from trainable_core.key import identifier_text
from trainable_core.modifier import checked_modifiers
from trainable_core.validation import check_text, check_widths, plain


class Section(Document):
    """A section of a recipe: the recipe as a whole has a version, so a section has none."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    schema_version: SkipJsonSchema[Literal[1]] = Field(default=1, exclude=True, repr=False)


def _identifier(value: object) -> object:
    return identifier_text(value) if isinstance(value, Enum) else check_text(value)


def one_of(*names: str) -> Callable[[Any], Any]:
    """Return a check that a value is one of some names; its ValueError says which name is closest."""

    def check(value: Any) -> Any:
        if value in names and isinstance(value, str):
            return value
        close = difflib.get_close_matches(str(value), names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        message = f"{value!r} is not one of {', '.join(map(repr, names))}{hint}"
        raise ValueError(message)

    return check


GRANULARITIES = ("tensor", "channel", "group")
"""What weights may have thresholds for."""

GROUP_SIZE = 32
"""Number of inputs in a group where a recipe leaves it out: what most 4-bit formats have."""

FOLDING = ("before", "after", "training")
"""When batch norm may be folded into the layer before it: before the model trains, after, or simulated in training."""


def _folding(value: Any) -> Any:
    value = plain(value)
    if isinstance(value, str):
        return one_of(*FOLDING)(value)
    if not isinstance(value, bool):
        message = f"{value!r} is not one of {', '.join(map(repr, FOLDING))}, true or false"
        raise ValueError(message)  # noqa: TRY004 - pydantic turns a ValueError into the field's error
    return value


FoldingField = Annotated[Literal["before", "after", "training"] | bool, BeforeValidator(_folding)]
BiasField = Annotated[Literal["float", "int32"], BeforeValidator(one_of("float", "int32"))]
Identifier = Annotated[str, Field(min_length=1), BeforeValidator(_identifier)]
Arguments = Annotated[dict[str, JsonValue], BeforeValidator(plain)]
Modifiers = Annotated[dict[str, dict[str, JsonValue]], BeforeValidator(checked_modifiers)]


class TensorSection(Section):
    """How one kind of tensor is quantized."""

    method: MethodField
    n_bits: NBits
    training_method: Identifier
    enabled: StrictBool = True
    min_threshold: MinThreshold = MIN_THRESHOLD
    candidates: Annotated[list[NBits], AfterValidator(check_widths)] | None = None
    arguments: Arguments = Field(default_factory=dict)
    modifiers: Modifiers = Field(default_factory=dict)

    def candidate_configs(self) -> list[TrainableQuantizerCandidateConfig] | None:
        """Return the candidate widths as the configs hold them, their params left to calibration."""
        if self.candidates is None:
            return None
        return [TrainableQuantizerCandidateConfig(n_bits=width) for width in self.candidates]


class WeightsSection(TensorSection):
    """How weights are quantized.

    Parameters
    ----------
    method : QuantizationMethod
        The grid.
    n_bits : int
        Width of the codes, 1 to 16.
    training_method : TrainingMethod or str
        How the quantizer learns: a built-in's name or a plugin's.
    enabled : bool
        False leaves the weights alone.
    min_threshold : float
        Lower bound of thresholds and range widths.
    candidates : list of int, optional
        Bit widths for methods that choose among several.
    arguments : dict
        Further arguments of the quantizer class, by name.
    modifiers : dict
        What stands on top of the training method: arguments by the name of the modifier.
    per_channel : bool
        One threshold per output channel instead of one per tensor; what ``granularity`` says with a word.
    granularity : {"tensor", "channel", "group"}, optional
        What has a threshold of its own: the tensor, each output channel, or each group of `group_size` inputs of each
        output channel. By default what `per_channel` says.
    group_size : int, optional
        Number of inputs in a group, 32 if it is left out; it makes the granularity ``group``. A layer with no more
        inputs has one group per channel; otherwise it must divide the number of the layer's inputs.
    """

    per_channel: StrictBool = True
    granularity: Annotated[Literal["tensor", "channel", "group"], BeforeValidator(one_of(*GRANULARITIES))] | None = None
    group_size: GroupSize | None = None

    @model_validator(mode="after")
    def _granularity_is_said_once(self) -> "WeightsSection":
        if self.granularity in {"tensor", "channel"} and self.group_size is not None:
            message = f"group_size: granularity {self.granularity!r} has no groups; leave one of the two out"
            raise ValueError(message)
        if "per_channel" in self.model_fields_set and self.per_channel == (self.grouping == "tensor"):
            message = (
                f"per_channel: it is {self.per_channel}, and granularity is {self.grouping!r}; give one of the two"
            )
            raise ValueError(message)
        return self

    @property
    def grouping(self) -> str:
        """What has a threshold of its own: ``tensor``, ``channel`` or ``group``, however the section says it."""
        if self.granularity is not None:
            return self.granularity
        if self.group_size is not None:
            return "group"
        return "channel" if self.per_channel else "tensor"

    @property
    def inputs_of_a_group(self) -> int | None:
        """Number of inputs in a group; None where there are no groups."""
        if self.grouping != "group":
            return None
        return GROUP_SIZE if self.group_size is None else self.group_size


def with_changes(fields: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section's fields with those of a rule in their place.

    Granularity has several fields. What a rule says of it replaces all that was said before, except that a rule which
    says ``granularity: group`` alone keeps the size.

    Examples
    --------
    >>> with_changes({"n_bits": 4, "granularity": "group", "group_size": 64}, {"per_channel": True})
    {'n_bits': 4, 'per_channel': True}
    """
    said = [name for name in _OF_GRANULARITY if name in changes]
    dropped = set(_OF_GRANULARITY if said else ())
    if said == ["granularity"] and changes["granularity"] == "group":
        dropped.remove("group_size")
    return {**{name: value for name, value in fields.items() if name not in dropped}, **changes}


_OF_GRANULARITY = ("per_channel", "granularity", "group_size")


class ActivationsSection(TensorSection):
    """How activations are quantized; the fields of `WeightsSection` except `per_channel`, and two more.

    Parameters
    ----------
    signed : bool, optional
        Whether a symmetric grid reaches below zero; by default calibration looks.
    placement : {"inputs", "outputs", "integer"}
        At the inputs of layers with weights; or at the outputs of all layers and, where the model can be traced,
        functional operations; or, for a model that is to run in integers, at these outputs and at every input of a
        layer or operation that no quantizer reaches, such as the model's.
    """

    signed: StrictBool | None = None
    placement: Literal["inputs", "outputs", "integer"] = "inputs"

    @model_validator(mode="after")
    def _sign_goes_with_threshold(self) -> "ActivationsSection":
        if self.signed is not None and self.method is QuantizationMethod.UNIFORM:
            message = "signed: a UNIFORM range says by its ends whether it is signed; leave it out"
            raise ValueError(message)
        return self


class CalibrationSection(Section):
    """How values seen become thresholds.

    Parameters
    ----------
    weights, activations : CalibrationMethod
        ``minmax``, ``percentile``, ``mse``, ``mae``, ``lp``, ``kl``, ``lsq``, ``lsq_plus`` or ``sawb``.
    percentile : float
        For ``percentile``: how much of the values stays inside, in percent.
    p : float
        For ``lp``: the norm's exponent.
    """

    weights: CalibrationMethod = CalibrationMethod.MSE
    activations: CalibrationMethod = CalibrationMethod.PERCENTILE
    percentile: Annotated[float, Field(gt=0, le=100), BeforeValidator(number)] = 99.99
    p: Annotated[float, Field(gt=0), BeforeValidator(number)] = 2.0
