"""The two examples of the document this library grew from: they run, with only their import lines changed."""

from __future__ import annotations

import pytest

from tests.core.seed import ACTIVATION, WEIGHTS, run
from trainable_core.config import TrainableQuantizerActivationConfig, TrainableQuantizerWeightsConfig
from trainable_core.constants import MIN_THRESHOLD, RANGE_MAX, RANGE_MIN, THRESHOLD
from trainable_core.enums import QuantizationMethod
from trainable_core.qparams import variables_from_params

NEW_IMPORTS = """\
from trainable_core import QuantizationMethod, TrainableQuantizerActivationConfig, TrainableQuantizerWeightsConfig
from trainable_core.constants import THRESHOLD, MIN_THRESHOLD
"""


def test_the_weights_example_runs():
    config = run(WEIGHTS, NEW_IMPORTS)
    assert isinstance(config, TrainableQuantizerWeightsConfig)
    assert config.weights_quantization_method is QuantizationMethod.SYMMETRIC
    assert (config.weights_n_bits, config.weights_quantization_params) == (8, {THRESHOLD: 2.0})
    assert (config.enable_weights_quantization, config.weights_channels_axis) == (True, 3)
    assert (config.weights_per_channel_threshold, config.min_threshold) == (True, MIN_THRESHOLD)


def test_the_activation_example_runs():
    config = run(ACTIVATION, NEW_IMPORTS)
    assert isinstance(config, TrainableQuantizerActivationConfig)
    assert config.activation_quantization_method is QuantizationMethod.UNIFORM
    assert (config.activation_n_bits, config.activation_quantization_params) == (8, {THRESHOLD: 2.0})
    assert (config.enable_activation_quantization, config.min_threshold) == (True, MIN_THRESHOLD)


def test_the_activation_example_means_a_range_around_zero():
    config = run(ACTIVATION, NEW_IMPORTS)
    variables = variables_from_params(config.quantization_params, config.quantization_method)
    assert {name: value.tolist() for name, value in variables.items()} == {RANGE_MIN: -2.0, RANGE_MAX: 2.0}


@pytest.mark.parametrize("example", [WEIGHTS, ACTIVATION], ids=["weights", "activation"])
def test_an_example_comes_back_from_its_json(example: str):
    config = run(example, NEW_IMPORTS)
    assert type(config).model_validate_json(config.model_dump_json()) == config
