"""The single quantizers in the artifacts: every built-in method on every grid that it has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.artifacts.model import Array, numbers
from trainable_core import (
    QuantizationMethod,
    QuantizationTarget,
    TrainableQuantizerActivationConfig,
    TrainableQuantizerWeightsConfig,
    TrainingMethod,
    list_quantizers,
)
from trainable_core.enums import LUT_METHODS

TENSOR = 3 * numbers(4, 9)
"""What they quantize; a weight has its channels on the first axis."""
THRESHOLDS = (0.7, 1.3, 2.1, 1.0)
RANGES = ((-0.7, -1.3, -0.2, 0.0), (1.1, 0.9, 2.5, 1.0))


def configs(method: QuantizationMethod, training_method: str) -> Iterator[Any]:
    """Yield a config for weights and one for activations; DQA chooses between two widths."""
    uniform = method is QuantizationMethod.UNIFORM
    per_channel = {"range_min": RANGES[0], "range_max": RANGES[1]} if uniform else {"threshold": THRESHOLDS}
    params = {name: list(values) for name, values in per_channel.items()}
    single = {name: values[1] for name, values in per_channel.items()}
    widths = [{"n_bits": 3}, {"n_bits": 6}] if training_method == "DQA" else None
    weights = {
        "weights_quantization_method": method,
        "weights_n_bits": 4,
        "weights_quantization_params": params,
        "weights_per_channel_threshold": True,
        "weights_channels_axis": 0,
        "weights_quantization_candidates": widths,
    }
    activation = {
        "activation_quantization_method": method,
        "activation_n_bits": 4,
        "activation_quantization_params": single if uniform else {**single, "is_signed": True},
        "activation_quantization_candidates": widths,
    }
    for cls, fields in ((TrainableQuantizerWeightsConfig, weights), (TrainableQuantizerActivationConfig, activation)):
        yield cls.model_validate({name: value for name, value in fields.items() if value is not None})


def built_in(backend: str) -> Iterator[tuple[list[str], Any]]:
    """Yield the key of every built-in quantizer of a backend, and the quantizer, initialized."""
    methods = {method.value for method in TrainingMethod}
    for row in list_quantizers(backend):
        if row.training_method not in methods:
            continue
        for method in (each for each in row.methods if each not in LUT_METHODS):  # their params name a table
            weights, activation = configs(method, row.training_method)
            config = weights if row.target is QuantizationTarget.Weights else activation
            quantizer = row.cls(config)
            quantizer.initialize_quantization(TENSOR.shape, "tensor", None)
            yield [row.target.name, row.training_method, method.name], quantizer


def listed(values: Array) -> list[Any]:
    """Return an array as JSON holds it; float32 survives the round trip."""
    found: list[Any] = np.asarray(values, np.float64).tolist()
    return found
