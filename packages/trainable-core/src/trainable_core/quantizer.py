"""What every trainable quantizer is, before any framework: its key, its config, its variables."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from trainable_core.config import TrainableQuantizerActivationConfig, TrainableQuantizerWeightsConfig
from trainable_core.enums import QuantizationMethod, QuantizationTarget, VariableGroup
from trainable_core.errors import QuantizerDefinitionError, QuantizerStateError, UnsupportedConfigError, nearest

Config = TrainableQuantizerWeightsConfig | TrainableQuantizerActivationConfig


class Key(NamedTuple):
    """What a quantizer class is looked up by."""

    backend: str
    target: QuantizationTarget
    quantizer_id: str
    method: QuantizationMethod

    def __str__(self) -> str:
        return f"{self.backend}/{self.target}/{self.quantizer_id}/{self.method}"


def identifier_text(quantizer_id: object) -> str:
    """Return the string a training method is registered under: an enum member gives its name, anything else ``str()``.

    Examples
    --------
    >>> from trainable_core.enums import TrainingMethod
    >>> identifier_text(TrainingMethod.LSQ), identifier_text("EWGS")
    ('LSQ', 'EWGS')
    """
    name = getattr(quantizer_id, "name", None)
    return name if isinstance(name, str) else str(quantizer_id)


def keys_of(cls: type, backend: str) -> list[Key]:
    """Return every key that a class marked with ``@mark_quantizer`` answers to in a backend.

    Enum members of `mct_quantizers` are read by name, so core needs no import of it.

    Raises
    ------
    QuantizerDefinitionError
        When the marks are missing or unknown, or when an argument after the config has no default.
    """
    if not isinstance(cls, type):
        raise QuantizerDefinitionError(cls, "it is not a class")
    target = getattr(cls, "quantization_target", None)
    methods = getattr(cls, "quantization_method", None)
    identifier = getattr(cls, "identifier", None)
    if target is None or not methods or identifier is None:
        raise QuantizerDefinitionError(cls, "it is not marked with @mark_quantizer")
    for verb in ("initialize_quantization", "convert2inferable"):
        if not callable(getattr(cls, verb, None)):
            raise QuantizerDefinitionError(cls, f"it has no method {verb!r}")
    first, *rest = [p for p in inspect.signature(cls).parameters.values()] or [None]
    if first is None or first.kind is inspect.Parameter.KEYWORD_ONLY:
        raise QuantizerDefinitionError(cls, "its first argument must be the config")
    for parameter in rest:
        variadic = parameter.kind in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        if parameter.default is parameter.empty and not variadic:
            raise QuantizerDefinitionError(cls, f"argument {parameter.name!r} has no default")
    try:
        target = QuantizationTarget[target.name]
        methods = [QuantizationMethod[method.name] for method in methods]
    except (KeyError, AttributeError, TypeError) as error:
        raise QuantizerDefinitionError(cls, f"target {target!r} or methods {methods!r} are unknown") from error
    return [Key(backend, target, identifier_text(identifier), method) for method in methods]


class BaseTrainableQuantizer:
    """Framework-free part of every trainable quantizer: config checks, variables by group, the seed's method names.

    A backend's base class adds the framework's module type, parameters and conversion; a method adds how a tensor is
    fake-quantized.

    Parameters
    ----------
    quantization_config : TrainableQuantizerWeightsConfig or TrainableQuantizerActivationConfig
        What to quantize and how. mctq's enum members are accepted in it.
    freeze_quant_params : bool
        Whether the quantizer's own parameters stay as they are while the model trains.

    Raises
    ------
    UnsupportedConfigError
        When the config is for the other target or for a method that the class is not marked with.
    """

    backend: ClassVar[str]
    """Name of the backend the class belongs to; set by the backend's base class."""

    quantization_target: ClassVar[Any] = None
    quantization_method: ClassVar[Any] = None
    identifier: ClassVar[Any] = None

    def __init__(self, quantization_config: Config, freeze_quant_params: bool = False) -> None:
        self._check_config(quantization_config)
        self.quantization_config = quantization_config
        self.freeze_quant_params = freeze_quant_params
        self._variable_groups: dict[str, VariableGroup] = {}

    @classmethod
    def _check_config(cls, config: Config) -> None:
        keys = keys_of(cls, cls.backend)
        if not isinstance(config, TrainableQuantizerWeightsConfig | TrainableQuantizerActivationConfig):
            raise UnsupportedConfigError(
                cls.__name__,
                f"the first argument must be a trainable quantizer config, got {type(config).__name__}",
                "build a TrainableQuantizerWeightsConfig or TrainableQuantizerActivationConfig.",
            )
        if config.target is not keys[0].target:
            raise UnsupportedConfigError(cls.__name__, f"it quantizes {keys[0].target}, the config is for {config.target}")
        if config.quantization_method not in {key.method for key in keys}:
            offered = ", ".join(str(key.method) for key in keys)
            raise UnsupportedConfigError(
                cls.__name__, f"quantization method {config.quantization_method} is not one of: {offered}"
            )

    @property
    def training_method(self) -> str:
        """Name of the training method the class is registered under."""
        return identifier_text(self.identifier)

    def activation_quantization(self) -> bool:
        """Return whether this quantizer is for activations."""
        return self.quantization_config.target is QuantizationTarget.Activation

    def weights_quantization(self) -> bool:
        """Return whether this quantizer is for weights."""
        return self.quantization_config.target is QuantizationTarget.Weights

    @property
    def variable_names(self) -> tuple[str, ...]:
        """Names of the quantizer's variables, in the order they were added."""
        return tuple(self._variable_groups)

    def get_quantizer_variable(self, name: str) -> Any:
        """Return the variable added under `name`.

        Raises
        ------
        QuantizerStateError
            When there is none.
        """
        if name not in self._variable_groups:
            known = ", ".join(self._variable_groups) or "none; initialize_quantization was not called"
            raise QuantizerStateError(
                type(self).__name__, f"no variable {name!r}; variables: {known}" + nearest(name, self._variable_groups)
            )
        return getattr(self, name)

    @abstractmethod
    def add_quantizer_variable(self, name: str, variable: Any, group: VariableGroup = VariableGroup.QPARAMS) -> None:
        """Register a tensor under `name`, owned by the quantizer and found again by `get_quantizer_variable`."""

    @abstractmethod
    def get_trainable_variables(self, group: VariableGroup) -> Sequence[Any]:
        """Return the variables of one group that an optimizer may change."""

    @abstractmethod
    def initialize_quantization(self, tensor_shape: Any, name: str, layer: Any) -> dict[str, Any]:
        """Create the quantizer's variables for a tensor of `tensor_shape`; called once by wrapper or holder."""

    @abstractmethod
    def convert2inferable(self) -> Any:
        """Return the inferable quantizer that gives bit for bit what this one gives in eval mode."""
