"""Reads what a quantizer's `get_config` wrote, and says what is wrong with anything else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainable_core.config import (
    TrainableQuantizerActivationConfig,
    TrainableQuantizerConfig,
    TrainableQuantizerWeightsConfig,
)
from trainable_core.errors import InvalidArgumentError
from trainable_core.validation import plain

_CONFIGS: dict[str, type[TrainableQuantizerConfig]] = {
    "weights": TrainableQuantizerWeightsConfig,
    "activation": TrainableQuantizerActivationConfig,
}
MAX_NDIM = 64  # NumPy's limit


@dataclass(frozen=True)
class QuantizerDocument:
    """The parts of a quantizer's document, checked."""

    quantization_config: TrainableQuantizerConfig
    freeze_quant_params: bool
    arguments: dict[str, Any]
    tensor_ndim: int
    signed: bool
    variables: dict[str, NDArray[Any]]


def read_document(config: object, subject: str) -> QuantizerDocument:
    """Return the parts of a quantizer's document.

    Raises
    ------
    InvalidArgumentError
        When a part is missing or of the wrong kind; names it.
    pydantic.ValidationError
        When its quantization config is wrong; names the field.
    """
    try:
        plain(config)
    except ValueError as error:
        raise InvalidArgumentError(subject, str(error)) from None
    if not isinstance(config, Mapping):
        raise InvalidArgumentError(subject, f"a quantizer's config is a mapping, got {type(config).__name__}")
    kinds: dict[str, type | tuple[type, ...]] = {
        "quantization_config": Mapping,
        "freeze_quant_params": bool,
        "arguments": Mapping,
        "tensor_ndim": int,
        "signed": bool,
        "variables": Mapping,
    }
    for key, kind in kinds.items():
        value = config.get(key)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise InvalidArgumentError(subject, f"not a quantizer's config: {key!r} is {value!r}")
    if not 0 <= config["tensor_ndim"] <= MAX_NDIM:
        raise InvalidArgumentError(subject, f"tensor_ndim can't be {config['tensor_ndim']!r}")
    fields = dict(config["quantization_config"])
    target = fields.pop("target", None)
    if not isinstance(target, str) or target not in _CONFIGS:
        raise InvalidArgumentError(subject, f"quantization_config: target {target!r} is not one of {list(_CONFIGS)}")
    variables = {}
    for name, value in config["variables"].items():
        try:
            with np.errstate(over="raise"):  # a number beyond float32 is no value of a variable
                variables[str(name)] = np.asarray(value, np.float32)
        except (TypeError, ValueError, ArithmeticError) as error:
            raise InvalidArgumentError(subject, f"variables.{name}: {error}") from error
    return QuantizerDocument(
        _CONFIGS[target].model_validate(fields),
        config["freeze_quant_params"],
        dict(config["arguments"]),
        config["tensor_ndim"],
        config["signed"],
        variables,
    )
