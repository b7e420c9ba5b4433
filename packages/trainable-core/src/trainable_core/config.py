"""The seed's three configs: which grid a quantizer trains on. Frozen, checked against the method, JSON without loss.

What the fields of the weights config and of the activation config mean is the same; the seed names them with a prefix.
Code that treats both alike reads the neutral properties: `n_bits`, `quantization_method`, `quantization_params` …
"""

import difflib
from collections.abc import Mapping
from enum import Enum
from typing import Annotated, Any, ClassVar, Literal, TypeVar, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    WithJsonSchema,
    model_validator,
)

from trainable_core.constants import MIN_THRESHOLD, RANGE_MIN, SIGNED
from trainable_core.enums import LUT_METHODS, QuantizationMethod, QuantizationTarget
from trainable_core.errors import InvalidArgumentError
from trainable_core.granularity import Blocks
from trainable_core.validation import MAX_THRESHOLD, check_params, check_widths, plain, shape_of

SCHEMA_VERSION = 1

E = TypeVar("E", bound=Enum)


def member(enum: type[E], value: object) -> E:
    """Return the member of `enum` that `value` names: a member of it, a foreign member of that name, a name or a value.

    Raises
    ------
    ValueError
        When there is none; the message lists the names.

    Examples
    --------
    >>> member(QuantizationMethod, "SYMMETRIC") is member(QuantizationMethod, 2)
    True
    """
    if isinstance(value, enum):
        return value
    name = value.name if isinstance(value, Enum) else value
    if isinstance(name, str) and name in enum.__members__:
        return enum[name]
    if not isinstance(value, Enum | bool):
        for candidate in enum:
            if type(candidate.value) is type(value) and candidate.value == value:
                return candidate
    close = difflib.get_close_matches(str(name), enum.__members__, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    message = f"{value!r} is not one of {', '.join(enum.__members__)}{hint}"
    raise ValueError(message)


MethodField = Annotated[
    QuantizationMethod,
    BeforeValidator(lambda value: member(QuantizationMethod, value)),
    PlainSerializer(lambda value: value.name, return_type=str, when_used="json"),
    WithJsonSchema({"type": "string", "enum": list(QuantizationMethod.__members__)}),
]


def number(value: object) -> object:
    """Return a plain number; refuse True and False, which Python counts among them."""
    value = plain(value)
    if isinstance(value, bool):
        message = f"must be a number, got {value!r}"
        raise ValueError(message)  # noqa: TRY004 - pydantic turns a ValueError into the field's error
    return value


Params = Annotated[dict[str, Any], BeforeValidator(plain)]


class Document(BaseModel):
    """Base of every document of the library: frozen, no unknown fields, versioned."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    schema_version: Literal[1] = 1

    @model_validator(mode="before")
    @classmethod
    def _can_be_shown(cls, document: Any) -> Any:
        """Refuse what no error message could show; see `plain`."""
        plain(document)
        return document


# Bounds stand before validators: after one, pydantic checks them all the same but leaves them out of the JSON schema.
NBits = Annotated[int, Field(ge=1, le=16, strict=True), BeforeValidator(plain)]
MinThreshold = Annotated[float, Field(ge=0, le=MAX_THRESHOLD), BeforeValidator(number)]
StrictBool = Annotated[bool, Field(strict=True), BeforeValidator(plain)]
Axis = Annotated[int, Field(strict=True), BeforeValidator(plain)]
GroupSize = Annotated[int, Field(ge=1, strict=True), BeforeValidator(plain)]


class _SeedConfig(Document):
    """A config whose fields may be given by position, in the seed's order."""

    positional: ClassVar[tuple[str, ...]]

    def __init__(self, *arguments: Any, **fields: Any) -> None:
        names = type(self).positional
        if len(arguments) > len(names):
            problem = f"takes {len(names)} arguments by position, {', '.join(names)}; got {len(arguments)}"
            raise InvalidArgumentError(type(self).__name__, problem)
        given = dict(zip(names, arguments, strict=False))
        twice = [name for name in given if name in fields]
        if twice:
            raise InvalidArgumentError(type(self).__name__, f"{', '.join(twice)}: given by position and by name")
        super().__init__(**given, **fields)


class TrainableQuantizerCandidateConfig(_SeedConfig):
    """One bit width, with its own params, that a quantizer may choose.

    Parameters
    ----------
    n_bits : int
        Width of the codes, 1 to 16.
    quantization_params : dict
        As in the configs; ``{}`` takes the config's own params.
    """

    positional: ClassVar[tuple[str, ...]] = ("n_bits", "quantization_params")

    n_bits: NBits
    quantization_params: Params = Field(default_factory=dict)


def _check_candidates(found: list[TrainableQuantizerCandidateConfig]) -> list[TrainableQuantizerCandidateConfig]:
    check_widths([candidate.n_bits for candidate in found])
    return found


Candidates = Annotated[list[TrainableQuantizerCandidateConfig], AfterValidator(_check_candidates)]


class _QuantizerConfig(_SeedConfig):
    """What weights and activation configs share: neutral names and the checks."""

    target: ClassVar[QuantizationTarget]
    prefix: ClassVar[str]

    min_threshold: MinThreshold = MIN_THRESHOLD

    @property
    def quantization_method(self) -> QuantizationMethod:
        """The grid."""
        return cast("QuantizationMethod", self._prefixed("quantization_method"))

    @property
    def n_bits(self) -> int:
        """Width of the codes."""
        return cast("int", self._prefixed("n_bits"))

    @property
    def quantization_params(self) -> dict[str, Any]:
        """Threshold or range; ``{}`` before calibration."""
        return cast("dict[str, Any]", self._prefixed("quantization_params"))

    @property
    def candidates(self) -> list[TrainableQuantizerCandidateConfig] | None:
        """Bit widths to choose from."""
        return cast("list[TrainableQuantizerCandidateConfig] | None", self._prefixed("quantization_candidates"))

    @property
    def enabled(self) -> bool:
        """Whether the tensor is quantized at all."""
        return bool(getattr(self, f"enable_{self.prefix}_quantization"))

    @property
    def blocks(self) -> Blocks | None:
        """What shares a threshold where it is finer than one axis of channels, else None."""
        return None

    @property
    def channels_axis(self) -> int | None:
        """Axis of what is quantized that the thresholds go along, None for one threshold.

        It is the tensor's channel axis, or 0 where the tensor is laid out with one of its `blocks` per row.
        """
        return None

    @property
    def signed(self) -> bool:
        """Whether a symmetric grid reaches below zero; ranges, and params that don't say, count as signed."""
        params = self.quantization_params
        return RANGE_MIN in params or bool(params.get(SIGNED, True))

    def _prefixed(self, name: str) -> Any:
        return getattr(self, f"{self.prefix}_{name}")

    @property
    def calibrated(self) -> bool:
        """Whether the params hold the grid's numbers."""
        return bool(set(self.quantization_params) - {SIGNED})

    def with_params(self, params: Mapping[str, Any]) -> "TrainableQuantizerConfig":
        """Return a copy with other quantization params, checked like a new config."""
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self)(**{**fields, f"{self.prefix}_quantization_params": dict(params)})  # type: ignore[return-value]

    @model_validator(mode="after")
    def _check(self) -> "_QuantizerConfig":
        checked = [(f"{self.prefix}_quantization_params", self.n_bits, self.quantization_params)]
        for index, candidate in enumerate(self.candidates or []):
            where = f"{self.prefix}_quantization_candidates.{index}.quantization_params"
            checked.append((where, candidate.n_bits, candidate.quantization_params))
        lengths: dict[str, int] = {}
        for where, n_bits, params in checked:
            try:
                channels = check_params(params, self.quantization_method, n_bits, self.target)
                self._check_axes(params)
            except ValueError as error:
                message = f"{where}: {error}"
                raise ValueError(message) from None
            if channels is not None:
                lengths[where] = channels
        if self.channels_axis is None:
            for where, channels in lengths.items():
                if channels != 1:
                    message = f"{where}: {channels} values for a quantizer with one threshold per tensor"
                    raise ValueError(message)
        elif len(set(lengths.values())) > 1:
            message = "per-channel params differ in length: " + ", ".join(f"{k}: {v}" for k, v in lengths.items())
            raise ValueError(message)
        return self

    def _check_axes(self, params: Mapping[str, Any]) -> None:
        """Raise ValueError for params that are shaped to broadcast along another axis than the channels'."""
        axis = None if self.blocks is not None else self.channels_axis  # those of blocks are plain lists
        for key, value in params.items():
            shape = shape_of(value)
            several = [index for index, size in enumerate(shape) if size > 1]
            if len(shape) <= 1 or not several or axis is None:
                continue
            if not -len(shape) <= axis < len(shape) or axis % len(shape) != several[0]:
                message = f"{key!r} of shape {shape} has its values along axis {several[0]}, the channel axis is {axis}"
                raise ValueError(message)


class TrainableQuantizerWeightsConfig(_QuantizerConfig):
    """How a weights tensor is quantized.

    Parameters
    ----------
    weights_quantization_method : QuantizationMethod
        The grid; mctq's members and plain names are accepted.
    weights_n_bits : int
        Width of the codes, 1 to 16.
    weights_quantization_params : dict
        ``{THRESHOLD: t}`` for SYMMETRIC and POWER_OF_TWO, ``{RANGE_MIN: a, RANGE_MAX: b}`` or ``{THRESHOLD: t}`` (the
        range ``[-t, t]``, or ``[0, t]`` with ``SIGNED: False``) for UNIFORM; numbers, or one per channel, in the units
        of the weights; per channel also shaped to broadcast, such as (C, 1, 1, 1). ``{}`` means not calibrated yet.
    enable_weights_quantization : bool
        Whether to quantize at all.
    weights_channels_axis : int or None
        Channel axis of the tensor; negative counts from the end.
    weights_per_channel_threshold : bool
        One threshold per channel instead of one per tensor.
    min_threshold : float
        Lower bound of thresholds and range widths, >= 0.
    weights_quantization_candidates : list of TrainableQuantizerCandidateConfig, optional
        Bit widths for methods that choose among several.
    weights_group_size : int, optional
        One threshold per channel and group of so many neighbours along `weights_group_axis`. Params are lists with one
        number per group, those of a channel side by side.
    weights_group_axis : int, optional
        Axis of the tensor's inputs, which groups are formed along; negative counts from the end.
    weights_expert_axis : int, optional
        Axis of the experts of a tensor that holds a matrix for each of several; each has thresholds of its own.
    """

    target: ClassVar[QuantizationTarget] = QuantizationTarget.Weights
    prefix: ClassVar[str] = "weights"
    positional: ClassVar[tuple[str, ...]] = (
        "weights_quantization_method",
        "weights_n_bits",
        "weights_quantization_params",
        "enable_weights_quantization",
        "weights_channels_axis",
        "weights_per_channel_threshold",
        "min_threshold",
        "weights_quantization_candidates",
    )

    weights_quantization_method: MethodField
    weights_n_bits: NBits
    weights_quantization_params: Params
    enable_weights_quantization: StrictBool = True
    weights_channels_axis: Axis | None = None
    weights_per_channel_threshold: StrictBool = False
    weights_quantization_candidates: Candidates | None = None
    weights_group_size: GroupSize | None = None
    weights_group_axis: Axis | None = None
    weights_expert_axis: Axis | None = None

    @property
    def blocks(self) -> Blocks | None:
        """What shares a threshold where it is finer than one axis of channels, else None."""
        if self.weights_group_size is None and self.weights_expert_axis is None:
            return None
        channels = self.weights_channels_axis if self.weights_per_channel_threshold else None
        axes = tuple(axis for axis in (self.weights_expert_axis, channels) if axis is not None)
        return Blocks(axes, self.weights_group_axis, self.weights_group_size)

    @property
    def channels_axis(self) -> int | None:
        """Axis of what is quantized that the thresholds go along, None for one threshold.

        It is the tensor's channel axis, or 0 where the tensor is laid out with one of its `blocks` per row.
        """
        if self.blocks is not None:
            return 0
        return self.weights_channels_axis if self.weights_per_channel_threshold else None

    @model_validator(mode="after")
    def _check_axis(self) -> "TrainableQuantizerWeightsConfig":
        if self.weights_per_channel_threshold and self.weights_channels_axis is None:
            message = "weights_channels_axis: needed when weights_per_channel_threshold is true"
            raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _check_blocks(self) -> "TrainableQuantizerWeightsConfig":
        if (self.weights_group_size is None) != (self.weights_group_axis is None):
            missing = "weights_group_axis" if self.weights_group_axis is None else "weights_group_size"
            message = f"{missing}: groups need both weights_group_size and weights_group_axis"
            raise ValueError(message)
        if self.weights_group_size is not None and not self.weights_per_channel_threshold:
            message = "weights_group_size: groups are parts of channels; set weights_per_channel_threshold"
            raise ValueError(message)
        if self.blocks is not None and self.weights_quantization_method in LUT_METHODS:
            message = f"{self.weights_quantization_method} has one threshold per tensor or channel, and no groups"
            raise ValueError(message)
        return self


class TrainableQuantizerActivationConfig(_QuantizerConfig):
    """How an activation tensor is quantized: always one threshold or range per tensor, as mctq deploys it.

    Parameters
    ----------
    activation_quantization_method : QuantizationMethod
        The grid; mctq's members and plain names are accepted.
    activation_n_bits : int
        Width of the codes, 1 to 16.
    activation_quantization_params : dict
        ``{THRESHOLD: t, SIGNED: bool}`` or ``{RANGE_MIN: a, RANGE_MAX: b}`` as for weights; ``{}`` before
        calibration, or ``{SIGNED: bool}`` when only the sign is decided.
    enable_activation_quantization : bool
        Whether to quantize at all.
    min_threshold : float
        Lower bound of threshold and range width, >= 0.
    activation_quantization_candidates : list of TrainableQuantizerCandidateConfig, optional
        Bit widths for methods that choose among several.
    """

    target: ClassVar[QuantizationTarget] = QuantizationTarget.Activation
    prefix: ClassVar[str] = "activation"
    positional: ClassVar[tuple[str, ...]] = (
        "activation_quantization_method",
        "activation_n_bits",
        "activation_quantization_params",
        "enable_activation_quantization",
        "min_threshold",
        "activation_quantization_candidates",
    )

    activation_quantization_method: MethodField
    activation_n_bits: NBits
    activation_quantization_params: Params
    enable_activation_quantization: StrictBool = True
    activation_quantization_candidates: Candidates | None = None


TrainableQuantizerConfig = TrainableQuantizerWeightsConfig | TrainableQuantizerActivationConfig

_BY_PREFIX: dict[str, type[TrainableQuantizerConfig]] = {
    each.prefix: each for each in (TrainableQuantizerWeightsConfig, TrainableQuantizerActivationConfig)
}


def config_document(config: TrainableQuantizerConfig) -> dict[str, Any]:
    """Return a config as a JSON-clean document that says which of the two configs it is."""
    return {"target": config.prefix, **config.model_dump(mode="json")}


def config_from_document(document: Mapping[str, Any], subject: str) -> TrainableQuantizerConfig:
    """Return the config that `config_document` was called on.

    Raises
    ------
    InvalidArgumentError
        When it does not say which config it is.
    pydantic.ValidationError
        When a field is wrong; names it.
    """
    fields = dict(document)
    target = fields.pop("target", None)
    if not isinstance(target, str) or target not in _BY_PREFIX:
        raise InvalidArgumentError(subject, f"target {target!r} is not one of {list(_BY_PREFIX)}")
    return _BY_PREFIX[target].model_validate(fields)
