"""The activation holder: mctq's class, and where mctq's own falls short of ours."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from mct_quantizers import KerasActivationQuantizationHolder
from mct_quantizers.keras import quantizers as mctq

from tests.tfkeras.tensors import numpy, tensor
from trainable_core import TrainableQuantizerActivationConfig, TrainableQuantizerWeightsConfig
from trainable_core.calibration import Observer
from trainable_core.errors import CalibrationError, InvalidArgumentError
from trainable_keras.keras2 import ActivationQuantizationHolder
from trainable_keras.keras2.engine import untracked
from trainable_keras.keras2.quantizers import LsqActivationQuantizer, SteWeightsQuantizer

X = np.linspace(-3, 3, 25, dtype=np.float32)


def quantizer(**params: Any) -> Any:
    config = TrainableQuantizerActivationConfig(
        activation_quantization_method="SYMMETRIC",
        activation_n_bits=4,
        activation_quantization_params=params or {"threshold": 2.0, "is_signed": True},
    )
    return LsqActivationQuantizer(config)


def stock() -> Any:
    inferable = mctq.ActivationSymmetricInferableQuantizer(num_bits=4, threshold=[2.0], signed=True)
    return KerasActivationQuantizationHolder(inferable)


def test_it_is_mctqs_and_quantizes() -> None:
    holder = ActivationQuantizationHolder(quantizer())
    assert isinstance(holder, KerasActivationQuantizationHolder)
    assert np.array_equal(numpy(holder(tensor(X))), numpy(quantizer_of(holder)(tensor(X))))


def quantizer_of(holder: Any) -> Any:
    return holder.activation_holder_quantizer


def test_conversion_is_idempotent_and_in_place_where_mctqs_own_returns_another_layer_once() -> None:
    holder = ActivationQuantizationHolder(quantizer())
    before = numpy(holder(tensor(X)))
    for _ in range(2):
        assert holder.convert_to_inferable_quantizers() is None
        assert isinstance(quantizer_of(holder), mctq.ActivationSymmetricInferableQuantizer)
        assert np.array_equal(numpy(holder(tensor(X))), before)
    own = KerasActivationQuantizationHolder(quantizer())
    own(tensor(X))
    assert own.convert_to_inferable_quantizers() is not own


def test_it_adds_no_weights_of_its_own_where_mctqs_own_counts_steps() -> None:
    holder, own = ActivationQuantizationHolder(quantizer()), stock()
    own(tensor(X))
    assert {weight.name.rpartition("/")[2] for weight in holder.weights} == {"threshold:0", "is_signed:0"}
    assert [weight.dtype for weight in own.weights] == [tf.int32]


def test_masks_pass_where_mctqs_own_loses_them() -> None:
    x = np.ones((1, 4, 2), np.float32)
    x[0, 2:] = 0.0  # masked
    masked, pooled = tf.keras.layers.Masking()(tensor(x)), tf.keras.layers.GlobalAveragePooling1D()
    assert numpy(pooled(ActivationQuantizationHolder(quantizer())(masked))).tolist() == [[1.0, 1.0]]
    assert numpy(pooled(stock()(masked))).tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_half_precision_stays_half_where_mctqs_own_fails(dtype: str) -> None:
    tf.keras.mixed_precision.set_global_policy("mixed_float16")
    try:
        assert ActivationQuantizationHolder(quantizer())(tensor(X, dtype)).dtype.name == dtype
        with pytest.raises(AssertionError, match="float tensor"):
            stock()(tensor(X, dtype))
    finally:
        tf.keras.mixed_precision.set_global_policy("float32")


def test_integers_pass_untouched_where_mctqs_own_fails() -> None:
    x = tf.constant([1, 2, 3])
    assert ActivationQuantizationHolder(quantizer())(x) is not None
    assert np.array_equal(numpy(ActivationQuantizationHolder(quantizer())(x)), [1, 2, 3])
    with pytest.raises(AssertionError, match="float tensor"):
        stock()(x)


def test_an_observer_sees_what_passes() -> None:
    holder = ActivationQuantizationHolder(quantizer())
    with untracked(holder):
        holder.observer = Observer()
    assert np.array_equal(numpy(holder(tensor(X))), X)
    assert (holder.observer.minimum, holder.observer.maximum) == (-3.0, 3.0)
    with pytest.raises(CalibrationError, match="NaN") as caught:
        holder(tensor([np.nan]))
    assert caught.value.subject == "LsqActivationQuantizer"


def test_config_round_trip_keeps_the_quantizer() -> None:
    holder = ActivationQuantizationHolder(quantizer(), name="here")
    quantizer_of(holder).threshold.assign(1.25)
    again = ActivationQuantizationHolder.from_config(json.loads(json.dumps(holder.get_config())))
    assert again.name == "here"
    assert np.array_equal(numpy(again(tensor(X))), numpy(holder(tensor(X))))


@pytest.mark.parametrize("training", [True, False, None])
def test_training_may_be_a_tensor(training: Any) -> None:
    holder = ActivationQuantizationHolder(quantizer())
    given = None if training is None else tf.constant(training)
    run = tf.function(lambda x, flag: holder(x, training=flag))
    assert np.array_equal(numpy(run(tensor(X), given)), numpy(holder(tensor(X))))


def test_what_is_no_activation_quantizer_is_refused() -> None:
    config = TrainableQuantizerWeightsConfig(
        weights_quantization_method="SYMMETRIC", weights_n_bits=4, weights_quantization_params={"threshold": 1.0}
    )
    for wrong in (3, SteWeightsQuantizer(config)):
        with pytest.raises(InvalidArgumentError, match="ActivationQuantizationHolder"):
            ActivationQuantizationHolder(wrong)
