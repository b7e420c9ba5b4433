"""What a DQA quantizer's arguments may be."""

import math

import pytest

from trainable_core import LinearAnnealingScheduler, TrainableQuantizerWeightsConfig
from trainable_core.backend.dqa_options import (
    TEMPERATURE,
    bit_cost,
    candidate_widths,
    schedule_end,
    temperature_schedule,
)
from trainable_core.errors import UnsupportedConfigError


def test_without_a_temperature_the_default_is_taken():
    assert temperature_schedule(LinearAnnealingScheduler, None, "q").to_dict() == TEMPERATURE


@pytest.mark.parametrize(
    ("given", "fact"),
    [
        (3, "mapping"),
        ({"t_start": 0}, "missing"),
        ({**TEMPERATURE, "t_stop": 1}, "t_stop"),
        ({**TEMPERATURE, "t_end": 0}, "t_end"),
        ({**TEMPERATURE, "target_val": 0.0}, "positive"),
        ({**TEMPERATURE, "initial_val": -1.0}, "positive"),
    ],
)
def test_a_wrong_temperature_names_quantizer_and_argument(given, fact):
    with pytest.raises(UnsupportedConfigError, match=fact) as caught:
        temperature_schedule(LinearAnnealingScheduler, given, "fc.weight")
    assert caught.value.subject == "fc.weight: temperature"


@pytest.mark.parametrize("weight", [0, 0.5, 3e38])
def test_a_bit_cost_is_a_float(weight):
    assert isinstance(bit_cost(weight, "q"), float)
    assert bit_cost(weight, "q") == weight


@pytest.mark.parametrize("weight", [-1, math.nan, math.inf, 1e39, True, "much", None])
def test_a_wrong_bit_cost_is_refused(weight):
    with pytest.raises(UnsupportedConfigError, match="bit_cost_weight"):
        bit_cost(weight, "q")


def config(**more):
    return TrainableQuantizerWeightsConfig(
        weights_quantization_method="SYMMETRIC", weights_n_bits=4, weights_quantization_params={}, **more
    )


def test_widths_ascend_and_have_a_default():
    assert candidate_widths(config()) == (4, 8, 16)
    candidates = [{"n_bits": width} for width in (8, 2)]
    assert candidate_widths(config(weights_quantization_candidates=candidates)) == (2, 8)


def test_the_schedule_ends_one_step_after_its_last():
    assert schedule_end(LinearAnnealingScheduler(0, 2.5, 1.0, 0.1)) == 3
