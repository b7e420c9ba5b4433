"""The seed's three configs: which grid a quantizer trains on. Frozen, checked against the method, JSON without loss.

What the fields of the weights config and of the activation config mean is the same; the seed names them with a prefix.
Code that treats both alike reads the neutral properties: `n_bits`, `quantization_method`, `quantization_params` …
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from enum import Enum
from numbers import Real
from typing import Annotated, Any, ClassVar, Literal, TypeVar, cast

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema, model_validator

from trainable_core.constants import LUT_VALUES, MIN_THRESHOLD, RANGE_MAX, RANGE_MIN, SIGNED, THRESHOLD
from trainable_core.enums import QuantizationMethod, QuantizationTarget

SCHEMA_VERSION = 1

MAX_THRESHOLD = 2.0**100
"""Largest threshold and range end: with 16 bits its grid and the inverse of its scale stay inside float32."""

LUT_METHODS = (QuantizationMethod.LUT_POT_QUANTIZER, QuantizationMethod.LUT_SYM_QUANTIZER)

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


def _plain(value: object) -> object:
    """Return NumPy numbers and arrays as Python numbers and lists; leave everything else alone."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, tuple):
        return list(value)
    return value


def _plain_params(value: object) -> object:
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, Mapping) else value


Params = Annotated[dict[str, Any], BeforeValidator(_plain_params)]


def _numbers(key: str, value: object) -> list[float]:
    """Return the parameter's numbers, one per channel, all finite."""
    items = list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
    if not items:
        message = f"{key!r} must not be empty"
        raise ValueError(message)
    for item in items:
        if isinstance(item, bool) or not isinstance(item, Real):
            message = f"{key!r} must be a number or a list of numbers, got {value!r}"
            raise ValueError(message)  # noqa: TRY004 - pydantic turns a ValueError into the field's error
        number = float(cast("float", item))
        if not math.isfinite(number) or abs(number) > MAX_THRESHOLD:
            message = f"{key!r} must be finite and at most 2**100 in magnitude, got {item!r}"
            raise ValueError(message)
    return [float(cast("float", item)) for item in items]


def _known_keys(method: QuantizationMethod) -> tuple[str, ...]:
    if method is QuantizationMethod.UNIFORM:
        return (RANGE_MIN, RANGE_MAX, THRESHOLD, SIGNED)
    if method in LUT_METHODS:
        return (THRESHOLD, SIGNED, LUT_VALUES)
    return (THRESHOLD, SIGNED)


def _check_threshold(params: Mapping[str, Any]) -> list[float]:
    thresholds = _numbers(THRESHOLD, params[THRESHOLD])
    if min(thresholds) <= 0:
        message = f"{THRESHOLD!r} must be positive, got {min(thresholds)!r}"
        raise ValueError(message)
    return thresholds


def _check_range(params: Mapping[str, Any]) -> list[float]:
    if THRESHOLD in params:
        if RANGE_MIN in params or RANGE_MAX in params:
            message = f"give either {THRESHOLD!r} or {RANGE_MIN!r} and {RANGE_MAX!r}, not both"
            raise ValueError(message)
        return _check_threshold(params)
    missing = [key for key in (RANGE_MIN, RANGE_MAX) if key not in params]
    if missing:
        message = f"UNIFORM needs {RANGE_MIN!r} and {RANGE_MAX!r} (or {THRESHOLD!r}); missing: {', '.join(missing)}"
        raise ValueError(message)
    if SIGNED in params:
        message = f"{SIGNED!r} goes with {THRESHOLD!r}; a range says by its ends whether it is signed"
        raise ValueError(message)
    lows, highs = _numbers(RANGE_MIN, params[RANGE_MIN]), _numbers(RANGE_MAX, params[RANGE_MAX])
    if len(lows) != len(highs):
        message = f"{RANGE_MIN!r} has {len(lows)} values, {RANGE_MAX!r} has {len(highs)}"
        raise ValueError(message)
    for low, high in zip(lows, highs, strict=True):
        if not low < high:
            message = f"{RANGE_MIN!r} must be less than {RANGE_MAX!r}, got [{low!r}, {high!r}]"
            raise ValueError(message)
    return lows


def _check_lut(params: Mapping[str, Any], n_bits: int) -> None:
    if LUT_VALUES not in params:
        message = f"a LUT method needs {LUT_VALUES!r}"
        raise ValueError(message)
    values = _numbers(LUT_VALUES, params[LUT_VALUES])
    if any(value != round(value) for value in values) or len(set(values)) > 2**n_bits:
        message = f"{LUT_VALUES!r} must be at most {2**n_bits} different integers, got {params[LUT_VALUES]!r}"
        raise ValueError(message)


def check_params(
    params: Mapping[str, Any], method: QuantizationMethod, n_bits: int, target: QuantizationTarget | None
) -> int | None:
    """Check quantization params against their method and return how many channels they are for.

    Parameters
    ----------
    params : mapping
        ``{}`` means not calibrated yet and is legal.
    method : QuantizationMethod
        The grid.
    n_bits : int
        Width of the grid's codes.
    target : QuantizationTarget or None
        What the params are for; None checks what holds for both.

    Returns
    -------
    int or None
        Number of channels, or None when the params hold plain numbers.

    Raises
    ------
    ValueError
        With the key, what is wrong with it and what was given.
    """
    if not params:
        return None
    known = _known_keys(method)
    for key in params:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.4)
            hint = f"did you mean {close[0]!r}?" if close else f"{method.name} takes {', '.join(map(repr, known))}"
            message = f"unknown quantization parameter {key!r}; {hint}"
            raise ValueError(message)
    if SIGNED in params and not isinstance(params[SIGNED], bool):
        message = f"{SIGNED!r} must be true or false, got {params[SIGNED]!r}"
        raise ValueError(message)
    if target is QuantizationTarget.Activation and set(params) == {SIGNED} and method is not QuantizationMethod.UNIFORM:
        return None  # the sign is decided, the threshold waits for calibration
    if method is QuantizationMethod.UNIFORM:
        per_item = _check_range(params)
        first = params.get(THRESHOLD, params.get(RANGE_MIN))
    else:
        if THRESHOLD not in params:
            message = f"{method.name} needs {THRESHOLD!r}"
            raise ValueError(message)
        per_item = _check_threshold(params)
        first = params[THRESHOLD]
        if method in LUT_METHODS:
            _check_lut(params, n_bits)
        if target is QuantizationTarget.Weights and params.get(SIGNED) is False:
            message = f"{SIGNED!r} can't be false: a {method.name} weights grid is signed; UNIFORM takes any range"
            raise ValueError(message)
    return len(per_item) if isinstance(first, list) else None


class Document(BaseModel):
    """Base of every document of the library: frozen, no unknown fields, versioned."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    schema_version: Literal[1] = 1


NBits = Annotated[int, BeforeValidator(_plain), Field(ge=1, le=16, strict=True)]
MinThreshold = Annotated[float, BeforeValidator(_plain), Field(ge=0, le=MAX_THRESHOLD)]
StrictBool = Annotated[bool, BeforeValidator(_plain), Field(strict=True)]


class TrainableQuantizerCandidateConfig(Document):
    """One bit width, with its own params, that a quantizer may choose.

    Parameters
    ----------
    n_bits : int
        Width of the codes, 1 to 16.
    quantization_params : dict
        As in the configs; ``{}`` takes the config's own params.
    """

    n_bits: NBits
    quantization_params: Params = Field(default_factory=dict)


class _QuantizerConfig(Document):
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
    def channels_axis(self) -> int | None:
        """Channel axis when there is one threshold per channel, else None."""
        return None

    @property
    def signed(self) -> bool:
        """Whether a symmetric grid reaches below zero; weights and params that don't say are signed."""
        return bool(self.quantization_params.get(SIGNED, True))

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
        if self.candidates is not None and not self.candidates:
            message = f"{self.prefix}_quantization_candidates: an empty list offers no bit width; leave it out instead"
            raise ValueError(message)
        return self


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
        of the weights. ``{}`` means not calibrated yet.
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
    """

    target: ClassVar[QuantizationTarget] = QuantizationTarget.Weights
    prefix: ClassVar[str] = "weights"

    weights_quantization_method: MethodField
    weights_n_bits: NBits
    weights_quantization_params: Params
    enable_weights_quantization: StrictBool = True
    weights_channels_axis: Annotated[int, BeforeValidator(_plain), Field(strict=True)] | None = None
    weights_per_channel_threshold: StrictBool = False
    weights_quantization_candidates: list[TrainableQuantizerCandidateConfig] | None = None

    @property
    def channels_axis(self) -> int | None:
        """Channel axis when there is one threshold per channel, else None."""
        return self.weights_channels_axis if self.weights_per_channel_threshold else None

    @model_validator(mode="after")
    def _check_axis(self) -> "TrainableQuantizerWeightsConfig":
        if self.weights_per_channel_threshold and self.weights_channels_axis is None:
            message = "weights_channels_axis: needed when weights_per_channel_threshold is true"
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

    activation_quantization_method: MethodField
    activation_n_bits: NBits
    activation_quantization_params: Params
    enable_activation_quantization: StrictBool = True
    activation_quantization_candidates: list[TrainableQuantizerCandidateConfig] | None = None


TrainableQuantizerConfig = TrainableQuantizerWeightsConfig | TrainableQuantizerActivationConfig
