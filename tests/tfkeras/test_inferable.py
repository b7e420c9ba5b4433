"""The deployed quantizers: mctq's classes, and where mctq's own fall short of what ours give."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from mct_quantizers.keras import quantizers as mctq

from tests.tfkeras.tensors import call, numpy, tensor
from trainable_core import TrainableQuantizerActivationConfig, TrainableQuantizerWeightsConfig
from trainable_core.enums import QuantizationMethod, QuantizationTarget, TieRule
from trainable_core.errors import ModelError
from trainable_core.qparams import from_params
from trainable_core.reference import affine
from trainable_keras.keras2 import inferable
from trainable_keras.keras2.quantizers import LsqActivationQuantizer, LsqWeightsQuantizer

WEIGHTS, ACTIVATION = QuantizationTarget.Weights, QuantizationTarget.Activation
SYMMETRIC, POWER_OF_TWO, UNIFORM = (
    QuantizationMethod.SYMMETRIC,
    QuantizationMethod.POWER_OF_TWO,
    QuantizationMethod.UNIFORM,
)
PARAMS: dict[QuantizationMethod, dict[str, Any]] = {
    SYMMETRIC: {"threshold": 0.7},
    POWER_OF_TWO: {"threshold": 2.0},
    UNIFORM: {"range_min": -0.3, "range_max": 1.1},
}
every_class = pytest.mark.parametrize(
    ("target", "method"),
    [(target, method) for target in (WEIGHTS, ACTIVATION) for method in PARAMS],
    ids=lambda each: each.name,
)


def deployed(target: QuantizationTarget, method: QuantizationMethod, n_bits: int = 4, **more: Any) -> Any:
    qparams = from_params(method, n_bits, signed=True, params={**PARAMS[method], **more})
    return inferable.build(target, method, n_bits, qparams, 0)


@every_class
def test_each_is_an_instance_of_mctqs_class_and_marked_like_it(target: Any, method: Any) -> None:
    quantizer = deployed(target, method)
    stock = getattr(mctq, type(quantizer).__name__)
    assert isinstance(quantizer, stock)
    assert quantizer.quantization_target is stock.quantization_target
    assert quantizer.quantization_method == stock.quantization_method
    assert quantizer.identifier is stock.identifier


@every_class
def test_mctqs_own_takes_the_config_and_gives_the_same_but_next_to_ties(target: Any, method: Any) -> None:
    quantizer = deployed(target, method, 8)
    stock = type(quantizer).mctq_class.from_config(quantizer.get_config())
    steps = np.linspace(-140, 280, 4201) + 0.03  # at least 0.02 steps from every tie
    x = (steps * quantizer.qparams.scale).astype(np.float32)
    ours, theirs = call(quantizer, x), numpy(stock(tensor(x)))
    # the same codes; mctq's values carry a few roundings of its own
    assert np.abs(ours - theirs).max() < 1e-3 * quantizer.qparams.scale
    assert type(quantizer.to_mctq()) is type(quantizer).mctq_class


@every_class
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_every_floating_dtype_is_taken_and_given_back_and_mctqs_own_refuses(
    target: Any, method: Any, dtype: str
) -> None:
    quantizer = deployed(target, method)
    x = tensor([0.3, -0.2], dtype)
    assert quantizer(x).dtype.name == dtype
    with pytest.raises(AssertionError, match="float"):
        quantizer.to_mctq()(x)


@every_class
def test_one_bit_works_and_mctqs_own_fails(target: Any, method: Any) -> None:
    quantizer = deployed(target, method, 1)
    x = np.array([-9.0, -0.1, 0.1, 9.0], np.float32)
    assert np.array_equal(call(quantizer, x), affine.fake_quantize(x, quantizer.qparams, tie_rule=TieRule.HALF_UP))
    with pytest.raises(ModelError, match="2 to 16 bits"):
        quantizer.to_mctq()
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError)):
        type(quantizer).mctq_class(**quantizer.mctq_arguments())(tensor(x))


def test_values_are_the_references_next_to_ties_where_mctqs_own_are_a_step_off() -> None:
    # threshold 0.7, 4 bits: the float32 numbers around each tie
    quantizer = deployed(ACTIVATION, SYMMETRIC)
    ties = ((np.arange(-8, 7) + 0.5) * np.float64(quantizer.qparams.scale)).astype(np.float32)
    x = np.concatenate([ties, np.nextafter(ties, np.float32(9)), np.nextafter(ties, np.float32(-9))])
    reference = affine.fake_quantize(x, quantizer.qparams, tie_rule=TieRule.HALF_UP)
    assert np.array_equal(call(quantizer, x), reference)
    off = np.abs(numpy(quantizer.to_mctq()(tensor(x))) - reference) > quantizer.qparams.scale / 2
    assert off.any()


@every_class
def test_config_is_json_clean_whatever_the_numbers_came_from(target: Any, method: Any) -> None:
    quantizer = deployed(target, method)
    again = type(quantizer).from_config(json.loads(json.dumps(quantizer.get_config())))
    assert again.get_config() == quantizer.get_config()


def test_mctqs_own_config_is_not_json_clean() -> None:
    stock = mctq.WeightsSymmetricInferableQuantizer(num_bits=4, threshold=[np.float32(0.7)], per_channel=False)
    with pytest.raises(TypeError, match="float32"):
        json.dumps(stock.get_config())


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
@pytest.mark.parametrize("method", list(PARAMS), ids=str)
def test_any_channel_axis(method: Any, axis: int) -> None:
    shape = (3, 2, 4)
    sizes = np.arange(1, shape[axis] + 1)
    params = {key: (value * (2.0**sizes)).tolist() for key, value in PARAMS[method].items()}
    qparams = from_params(method, 4, signed=True, params=params, channels_axis=axis)
    quantizer = inferable.build(WEIGHTS, method, 4, qparams, 3)
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32) * 4
    moved = np.moveaxis(x, axis, 0)
    one_by_one = [
        affine.fake_quantize(
            each,
            from_params(method, 4, signed=True, params={key: value[index] for key, value in params.items()}),
            tie_rule=TieRule.HALF_UP,
        )
        for index, each in enumerate(moved)
    ]
    assert np.array_equal(np.moveaxis(call(quantizer, x), axis, 0), np.stack(one_by_one))
    assert quantizer.get_config()["channel_axis"] == axis % 3


def test_numbers_are_weights_that_do_not_train() -> None:
    quantizer = deployed(WEIGHTS, UNIFORM)
    assert len(quantizer.weights) == 2
    assert quantizer.trainable_weights == []


@every_class
def test_a_graph_that_multiplies_around_it_treats_trained_and_deployed_alike(target: Any, method: Any) -> None:
    # how a graph compiler orders the multiplications around is its own business
    prefix, cls = ("weights", LsqWeightsQuantizer) if target is WEIGHTS else ("activation", LsqActivationQuantizer)
    fields = {f"{prefix}_quantization_method": method, f"{prefix}_n_bits": 4}
    fields[f"{prefix}_quantization_params"] = PARAMS[method]
    config = TrainableQuantizerWeightsConfig if target is WEIGHTS else TrainableQuantizerActivationConfig
    trained = cls(config(**fields))
    trained.initialize_quantization((64, 64), "x", None)
    x = tensor(np.random.default_rng(1).normal(size=(64, 64)))
    runs = [tf.function(lambda x, q=each: q(x * 3.0) * 0.1) for each in (trained, trained.convert2inferable())]
    assert np.array_equal(*(numpy(run(x)) for run in runs))


def test_nan_stays_and_infinities_saturate() -> None:
    quantizer = deployed(ACTIVATION, UNIFORM)
    y = call(quantizer, np.array([np.nan, np.inf, -np.inf], np.float32))
    low, high = quantizer.params["range_min"], quantizer.params["range_max"]
    assert np.isnan(y[0])
    assert y[1:].tolist() == [high, low]
