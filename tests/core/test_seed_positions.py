"""The seed's configs as code of the ancestor builds them: arguments by position, thresholds shaped to broadcast."""

from __future__ import annotations

from enum import Enum
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from trainable_core import (
    QuantizationMethod,
    QuantizationTarget,
    TrainableQuantizerActivationConfig,
    TrainableQuantizerCandidateConfig,
    TrainableQuantizerWeightsConfig,
)
from trainable_core.constants import MIN_THRESHOLD, RANGE_MAX, RANGE_MIN, SIGNED, THRESHOLD
from trainable_core.errors import InvalidArgumentError
from trainable_core.qparams import from_params

SYMMETRIC, UNIFORM = QuantizationMethod.SYMMETRIC, QuantizationMethod.UNIFORM
CANDIDATES = [TrainableQuantizerCandidateConfig(4, {THRESHOLD: 1.0}), TrainableQuantizerCandidateConfig(2, {})]


def test_arguments_come_in_the_seeds_order() -> None:
    assert CANDIDATES[0] == TrainableQuantizerCandidateConfig(n_bits=4, quantization_params={THRESHOLD: 1.0})
    weights = TrainableQuantizerWeightsConfig(SYMMETRIC, 8, {THRESHOLD: 2.0}, True, 3, False, MIN_THRESHOLD, CANDIDATES)
    assert weights == TrainableQuantizerWeightsConfig(
        weights_quantization_method=SYMMETRIC,
        weights_n_bits=8,
        weights_quantization_params={THRESHOLD: 2.0},
        enable_weights_quantization=True,
        weights_channels_axis=3,
        weights_per_channel_threshold=False,
        min_threshold=MIN_THRESHOLD,
        weights_quantization_candidates=CANDIDATES,
    )
    activation = TrainableQuantizerActivationConfig(UNIFORM, 8, {THRESHOLD: 2.0}, False, 0.5, CANDIDATES)
    assert activation == TrainableQuantizerActivationConfig(
        activation_quantization_method=UNIFORM,
        activation_n_bits=8,
        activation_quantization_params={THRESHOLD: 2.0},
        enable_activation_quantization=False,
        min_threshold=0.5,
        activation_quantization_candidates=CANDIDATES,
    )
    for config in (weights, activation):
        assert type(config).model_validate_json(config.model_dump_json()) == config
    some = TrainableQuantizerWeightsConfig(SYMMETRIC, 8, weights_quantization_params={})
    assert some.weights_n_bits == 8


def test_too_many_arguments_and_double_ones_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="6 arguments by position"):
        TrainableQuantizerActivationConfig(SYMMETRIC, 8, {}, True, 0.0, None, None)
    with pytest.raises(InvalidArgumentError, match="n_bits: given by position and by name"):
        TrainableQuantizerCandidateConfig(4, n_bits=4)


SHAPES = [(3,), (3, 1, 1, 1), (1, 3, 1, 1), (1, 1, 1, 3)]


def config(params: dict[str, Any], axis: int | None, method: QuantizationMethod = SYMMETRIC) -> Any:
    return TrainableQuantizerWeightsConfig(method, 4, params, True, axis, axis is not None, 0.0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("as_list", [False, True], ids=["array", "lists"])
def test_thresholds_shaped_to_broadcast_are_those_of_a_list(shape: tuple[int, ...], as_list: bool) -> None:
    thresholds = np.float32([0.5, 1.0, 2.0])
    axis = int(np.argmax(shape))
    given = thresholds.reshape(shape)
    shaped = config({THRESHOLD: given.tolist() if as_list else given, SIGNED: True}, axis)
    assert np.shape(shaped.quantization_params[THRESHOLD]) == shape  # as the quantizer's code expects it
    assert type(shaped).model_validate_json(shaped.model_dump_json()) == shaped
    ours, listed = (
        from_params(SYMMETRIC, 4, True, params, channels_axis=axis)
        for params in (shaped.quantization_params, {THRESHOLD: [0.5, 1.0, 2.0]})
    )
    np.testing.assert_array_equal(ours.scale, [0.0625, 0.125, 0.25])
    np.testing.assert_array_equal(ours.scale, listed.scale)


@pytest.mark.parametrize("signed", [True, False, None])
def test_ranges_shaped_to_broadcast_may_say_their_sign(signed: bool | None) -> None:
    low, high = np.zeros((3, 1, 1)), np.float64([1.5, 3.0, 6.0]).reshape(3, 1, 1)
    params = {RANGE_MIN: low, RANGE_MAX: high} | ({} if signed is None else {SIGNED: signed})
    shaped = config(params, 0, UNIFORM)
    qparams = from_params(UNIFORM, 4, shaped.signed, shaped.quantization_params, channels_axis=0)
    np.testing.assert_allclose(qparams.scale, [0.1, 0.2, 0.4], rtol=2**-19)  # shortened to 20 significant bits
    assert not qparams.zero_point.any()
    with pytest.raises(ValidationError, match="reaches down to -1"):
        config({**params, RANGE_MIN: low - 1, SIGNED: False}, 0, UNIFORM)


def test_one_value_is_of_any_shape() -> None:
    one = config({THRESHOLD: np.full((1, 1, 1, 1), 2.0)}, None)
    qparams = from_params(SYMMETRIC, 4, True, one.quantization_params)
    assert qparams.scale.size == 1
    assert float(qparams.scale.reshape(())) == 0.25


def test_values_along_another_axis_than_the_channels_are_refused() -> None:
    with pytest.raises(ValidationError, match="axis 1, the channel axis is 0"):
        config({THRESHOLD: np.ones((1, 3, 1, 1))}, 0)
    with pytest.raises(ValidationError, match="axis 0, the channel axis is 4"):
        config({THRESHOLD: np.ones((3, 1))}, 4)
    assert config({THRESHOLD: np.ones((1, 3, 1, 1))}, -3).channels_axis == -3


def test_members_equal_mctqs() -> None:
    """What a config holds is compared by code of the ancestor with mctq's own members."""

    class Foreign(Enum):
        SYMMETRIC = 2

    for ours in (QuantizationMethod, QuantizationTarget):
        theirs = Enum(ours.__name__, {member.name: member.value for member in ours})  # type: ignore[misc] # made here
        for one in ours:
            for other in theirs:
                same = one.name == other.name
                assert (one == other) is same
                assert (other == one) is same
                assert (one != other) is not same
                assert len({one, other}) == 2 - same  # equal hashes too
        assert [one for one in ours if one == next(iter(ours))] == [next(iter(ours))]
    assert QuantizationMethod.SYMMETRIC != Foreign.SYMMETRIC
    assert QuantizationMethod.SYMMETRIC != 2
    assert QuantizationMethod.SYMMETRIC != "SYMMETRIC"
