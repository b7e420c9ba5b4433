"""The deployed model gives bit for bit what was trained, and is made of mctq's classes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from mct_quantizers import KerasActivationQuantizationHolder, KerasQuantizationWrapper
from mct_quantizers.keras.quantizers import BaseKerasInferableQuantizer

import trainable_keras.keras2
from tests.tfkeras.models import LSQ, calibrated, dqa, kl, output, small, train
from trainable_core.errors import ModelError, QuantizerStateError
from trainable_keras.keras2.tracing import layers_within

GRIDS = ["SYMMETRIC", "POWER_OF_TWO", "UNIFORM"]


def recipe(method: str, training_method: str) -> dict[str, Any]:
    spec = {"method": method, "n_bits": 3, "training_method": training_method}
    return {**LSQ, "weights": spec, "activations": spec}


@pytest.mark.parametrize("method", GRIDS)
@pytest.mark.parametrize("training_method", ["STE", "LSQ", "DQA"])
def test_what_is_trained_is_what_is_deployed(method: str, training_method: str) -> None:
    qmodel, x = calibrated(recipe(method, training_method))
    train(qmodel, x)
    deployed = trainable_keras.keras2.finalize(qmodel)
    assert np.array_equal(output(deployed, x), output(qmodel, x))  # eager
    assert np.array_equal(deployed.predict(x, verbose=0), qmodel.predict(x, verbose=0))  # graph
    assert np.array_equal(deployed.predict(x, verbose=0), output(deployed, x))


@pytest.mark.parametrize("method", GRIDS)
def test_in_training_mode_too(method: str) -> None:
    qmodel, x = calibrated(recipe(method, "LSQ"))
    train(qmodel, x)
    assert np.array_equal(output(qmodel, x, training=True), output(trainable_keras.keras2.finalize(qmodel), x))


def test_everything_in_it_is_mctqs() -> None:
    qmodel, _ = calibrated()
    deployed = trainable_keras.keras2.finalize(qmodel)
    assert isinstance(deployed.get_layer("conv"), KerasQuantizationWrapper)
    holders = [each for each in layers_within(deployed) if isinstance(each, KerasActivationQuantizationHolder)]
    assert len(holders) == 2
    quantizers = [*(each.activation_holder_quantizer for each in holders)]
    quantizers += deployed.get_layer("conv").weights_quantizers.values()
    assert all(isinstance(each, BaseKerasInferableQuantizer) for each in quantizers)


def test_it_is_idempotent_and_leaves_the_trained_model_alone() -> None:
    qmodel, x = calibrated()
    deployed = trainable_keras.keras2.finalize(qmodel)
    again = trainable_keras.keras2.finalize(deployed)
    assert again is not deployed
    assert np.array_equal(output(again, x), output(deployed, x))
    before = output(qmodel, x)
    train(qmodel, x)  # still trains
    assert not np.array_equal(output(qmodel, x), before)
    assert np.array_equal(output(deployed, x), before)


def test_nothing_in_it_learns_but_the_weights() -> None:
    qmodel, _ = calibrated()
    deployed = trainable_keras.keras2.finalize(qmodel)
    assert {each.name.rpartition("/")[2] for each in deployed.trainable_variables} == {"kernel:0", "bias:0"}


def test_quantizers_without_numbers_are_named() -> None:
    qmodel = trainable_keras.keras2.wrap(small(), LSQ)
    with pytest.raises(QuantizerStateError, match=r"conv.kernel, conv: inputs, head.kernel, head: inputs"):
        trainable_keras.keras2.finalize(qmodel)


def test_a_float_model_is_refused() -> None:
    with pytest.raises(ModelError, match=r"was not made by trainable_keras.keras2\.wrap"):
        trainable_keras.keras2.finalize(small())


def test_a_served_function_gives_the_same_bits(tmp_path: Any) -> None:
    qmodel, x = calibrated(dqa())
    deployed = trainable_keras.keras2.finalize(qmodel)
    tf.saved_model.save(deployed, str(tmp_path / "served"))
    served = tf.saved_model.load(str(tmp_path / "served")).signatures["serving_default"]
    (result,) = served(tf.constant(x)).values()
    assert np.array_equal(result.numpy(), output(deployed, x))


def test_a_wrapped_single_layer_model_is_deployed() -> None:
    model = tf.keras.Sequential([tf.keras.Input((3,)), kl.Dense(2)])
    x = np.ones((2, 3), np.float32)
    qmodel = trainable_keras.keras2.calibrate(trainable_keras.keras2.wrap(model, LSQ), [x])
    assert np.array_equal(output(trainable_keras.keras2.finalize(qmodel), x), output(qmodel, x))
