"""Batch norms that are simulated as folded: what is quantized in training is what `finalize` deploys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.keras.framework import keras, kl, numpy
from tests.keras.models import call, images, ready, same, spec, state, train
from trainable_core.errors import ModelError, StatisticsMissingWarning
from trainable_core.reference import batch_norm as reference
from trainable_keras import (
    calibrate,
    describe,
    finalize,
    freeze_batch_norm,
    load,
    reestimate_batch_norm,
    save,
    training_callback,
    wrap,
)

NORMS = ("norm_1", "norm_2", "norm_3", "norm_4", "norm_5")


def simulated(grid: str = "SYMMETRIC", rule: str = "LSQ", n_bits: int = 4, **more: Any) -> dict[str, Any]:
    return {"weights": spec(rule, grid, n_bits, **more), "fold_batch_norm": "training"}


def quantized_inputs(how: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {**how, "activations": spec("LSQ", "UNIFORM", 8, **more)}


def network(*, seen: bool = True, sequential: bool = False) -> Any:
    """Return layers of every kind, with batch norms that have seen batches, for images of shape (6, 6, 1)."""
    keras.utils.set_random_seed(0)
    layers = [
        kl.Conv2D(4, 3, use_bias=False, name="conv"), kl.BatchNormalization(name="norm_1"), kl.ReLU(name="relu"),
        kl.DepthwiseConv2D(2, depth_multiplier=2, name="depthwise"), kl.BatchNormalization(name="norm_2"),
        kl.Conv2DTranspose(3, 2, name="transpose"), kl.BatchNormalization(scale=False, name="norm_3"),
        kl.SeparableConv2D(5, 2, name="separable"), kl.BatchNormalization(center=False, name="norm_4"),
        kl.Flatten(name="flatten"),
        kl.Dense(6, name="dense"), kl.BatchNormalization(name="norm_5"),
        kl.Dense(3, name="head"),
    ]  # fmt: skip
    if sequential:
        model = keras.Sequential([keras.Input((6, 6, 1)), *layers])
    else:
        inputs = x = keras.Input((6, 6, 1))
        for layer in layers:
            x = layer(x)
        model = keras.Model(inputs, x)
    rng = np.random.default_rng(0)
    for name in NORMS if seen else ():
        norm = model.get_layer(name)
        norm.moving_mean.assign(rng.normal(0, 0.3, norm.moving_mean.shape).astype(np.float32))
        norm.moving_variance.assign(rng.uniform(0.3, 2, norm.moving_variance.shape).astype(np.float32))
        if norm.gamma is not None:
            norm.gamma.assign(rng.uniform(-1.5, 1.5, norm.gamma.shape).astype(np.float32))
    return model


def statistics(model: Any) -> list[np.ndarray]:
    norms = [model.get_layer(name) for name in NORMS]
    return [numpy(variable) for norm in norms for variable in (norm.moving_mean, norm.moving_variance)]


def float_copy(model: Any) -> Any:
    other = network()
    other.set_weights([numpy(weight) for weight in model.weights])
    return other


@pytest.mark.parametrize("grid", ["POWER_OF_TWO", "SYMMETRIC", "UNIFORM"])
def test_at_16_bits_it_is_the_float_model_in_training(grid: str) -> None:
    model = network()
    for name in NORMS if grid == "UNIFORM" else ():  # whose ranges have no lower bound: the statistics don't move
        model.get_layer(name).momentum = 1.0
    how = {**simulated(grid, "STE", 16, min_threshold=8.0), "calibration": {"weights": "minmax"}}
    qmodel = calibrate(wrap(model, how))
    twin = float_copy(model)
    for name in NORMS:
        twin.get_layer(name).momentum = model.get_layer(name).momentum
    (one,), (other,) = call(twin, images(16), training=True), call(qmodel, images(16), training=True)
    # half a step of 2**-12 (the range is [-8, 8]) in each weight; sums of up to 54 products of numbers below 4, through
    # 5 layers, each of which may double it
    assert np.abs(one - other).max() < 2.0**-13 * 54 * 4 * 5
    for found, wanted in zip(statistics(qmodel), statistics(twin), strict=True):
        # a hundredth of the batch's statistics, which have the difference above
        np.testing.assert_allclose(found, wanted, rtol=2.0**-13, atol=2.0**-13)


def test_forward_is_the_reference_s() -> None:
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((6,)), kl.Dense(4, name="fc"), kl.BatchNormalization(name="norm")])
    rng = np.random.default_rng(2)
    fc, norm = model.layers[-2:]
    norm.gamma.assign(np.array([1.0, -0.5, 0.0, 2.0], np.float32))
    norm.beta.assign(np.array([0.0, 1.0, 2.0, -1.0], np.float32))
    norm.moving_variance.assign(rng.uniform(0.5, 2, 4).astype(np.float32))
    fc.bias.assign(rng.normal(size=4).astype(np.float32))
    qmodel = calibrate(wrap(model, simulated()))
    fc, norm = qmodel.layers[-2:]
    rows = rng.normal(size=(16, 6)).astype(np.float32)
    before, weight = numpy(norm.moving_variance), numpy(fc.get_weights_vars()[0][1])
    (found,) = call(qmodel, rows, training=True)
    products = rows.astype(np.float64) @ weight
    of_batch = reference.batch_statistics(products)
    # float32 sums of 6 products and of 16 rows, of numbers below 10: 2**-24 * 10 * (6 + 16), and as much again
    bound: dict[str, Any] = {"rtol": 2.0**-18, "atol": 2.0**-15}
    running = numpy(norm.moving_variance)
    np.testing.assert_allclose(running, reference.updated(before, of_batch.variance, 1 - norm.momentum), **bound)
    values = numpy(fc.get_quantized_weights()["kernel"]).astype(np.float64)
    layer = reference.Layer(
        numpy(fc.bias), numpy(norm.gamma), numpy(norm.beta), running.astype(np.float64), norm.epsilon
    )
    np.testing.assert_allclose(found, reference.training_output(rows @ values, products, layer), **bound)


@pytest.mark.parametrize("rule", ["STE", "LSQ", "DQA", "ADAROUND"])
@pytest.mark.parametrize("grid", ["SYMMETRIC", "POWER_OF_TWO", "UNIFORM"])
def test_what_is_trained_is_deployed_bit_for_bit(rule: str, grid: str) -> None:
    qmodel = train(ready(network(), quantized_inputs(simulated(grid, rule)), images()), images(), lr=0.01)
    deployed = finalize(qmodel)
    for given in (images(), images(3)):
        assert same(call(qmodel, given), call(deployed, given))
        assert np.array_equal(qmodel.predict(given, verbose=0), deployed.predict(given, verbose=0))
    assert set(describe(deployed).folded) == set(NORMS)
    assert not any(isinstance(layer, kl.BatchNormalization) and layer.weights for layer in deployed.layers)


@pytest.mark.parametrize("placement", ["inputs", "outputs"])
def test_one_threshold_per_tensor_and_integer_biases(placement: str) -> None:
    how = {**quantized_inputs(simulated(per_channel=False), placement=placement), "bias": "int32"}
    how["rules"] = [{"match": {"name": "separable"}, "skip": True}]
    if placement == "outputs":
        how["rules"].append({"match": {"name": "conv"}, "bias": "float"})
        how["rules"].append({"match": {"name": "dense"}, "bias": "float"})
    qmodel = train(ready(network(), how, images()), images(), lr=0.01)
    deployed = finalize(qmodel)
    assert "as training simulates" not in describe(qmodel).left_out["norm_4"]
    freeze_batch_norm(qmodel)
    # the skipped layer and its batch norm are float, and are folded by `finalize`
    np.testing.assert_allclose(call(qmodel, images())[0], call(deployed, images())[0], rtol=0, atol=0.05)
    assert set(describe(deployed).folded) == set(NORMS)


def test_frozen_statistics_train_what_is_deployed() -> None:
    qmodel = train(ready(network(), quantized_inputs(simulated()), images()), images(), lr=0.01)
    freeze_batch_norm(qmodel)
    before, deployed = statistics(qmodel), finalize(qmodel)
    assert same(call(qmodel, images(), training=True), call(deployed, images()))
    gamma = numpy(qmodel.get_layer("norm_1").gamma)
    train(qmodel, images(), lr=0.01)
    assert same(statistics(qmodel), before)
    assert not np.array_equal(numpy(qmodel.get_layer("norm_1").gamma), gamma)
    assert (numpy(qmodel.get_layer("conv").bias) == 0).all()
    freeze_batch_norm(qmodel, frozen=False)
    train(qmodel, images(), lr=0.01)
    assert not same(statistics(qmodel), before)


def test_a_callback_freezes_within_fit() -> None:
    qmodel = ready(network(), simulated(), images())
    qmodel.compile("sgd", "mse")
    seen: list[list[np.ndarray]] = []

    class Watch(keras.callbacks.Callback):  # type: ignore[misc] # Keras is untyped
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            sync = getattr(qmodel, "jax_state_sync", None)
            if sync is not None:
                sync()
            seen.append(statistics(qmodel))

    callback = training_callback(qmodel, freeze_batch_norm_at=2)
    x = images(8)
    qmodel.fit(x, np.zeros((8, 3), np.float32), batch_size=2, epochs=1, verbose=0, callbacks=[callback, Watch()])
    assert not same(seen[0], seen[1])
    assert same(seen[1], seen[2])
    assert same(seen[2], seen[3])
    with pytest.raises(ModelError, match="no batch norm whose folding is simulated"):
        training_callback(wrap(network(), {**simulated(), "fold_batch_norm": "after"}), freeze_batch_norm_at=2)


def test_statistics_are_estimated_anew() -> None:
    qmodel = freeze_batch_norm(ready(network(), simulated(), images()))
    reestimate_batch_norm(qmodel, [images(8), images(9)])
    conv = qmodel.get_layer("conv")
    float_conv = kl.Conv2D(4, 3, use_bias=False)
    float_conv.build((None, 6, 6, 1))
    float_conv.set_weights([numpy(conv.get_weights_vars()[0][1])])
    means = [numpy(float_conv(images(n))).mean((0, 1, 2)) for n in (8, 9)]
    np.testing.assert_allclose(numpy(qmodel.get_layer("norm_1").moving_mean), np.mean(means, 0), rtol=0, atol=2.0**-18)


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_files_hold_models_before_and_after(sequential: bool, frozen: bool, tmp_path: Path) -> None:
    float_model = network(sequential=sequential)
    two_weights = {"match": {"name": "separable"}, "bias": "float"}
    recipe = {**quantized_inputs(simulated()), "bias": "int32", "rules": [two_weights]}
    qmodel = train(ready(float_model, recipe, images()), images(), lr=0.01)
    if frozen:
        freeze_batch_norm(qmodel)
    for each in (qmodel, finalize(qmodel)):
        expected = call(each, images())
        save(each, tmp_path / "model.npz")
        each.save(tmp_path / "model.keras")
        told = describe(each).left_out
        for again in (load(tmp_path / "model.npz", float_model), keras.models.load_model(tmp_path / "model.keras")):
            assert same(call(again, images()), expected)
            assert describe(again).left_out == told
            assert state(again) == state(each)
    qmodel.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert same(call(again, images(), training=True), call(qmodel, images(), training=True))
    assert same(statistics(again), statistics(qmodel))


def test_what_is_not_known_to_be_right_is_left_alone() -> None:
    inputs = keras.Input((4, 3))
    x = kl.Masking()(inputs)
    x = kl.BatchNormalization(name="masked")(kl.Dense(4, name="fc")(x))
    shared = kl.Dense(4, name="shared")
    one = kl.BatchNormalization(name="one")(shared(x))
    other = kl.BatchNormalization(name="other")(shared(one))
    told = describe(wrap(keras.Model(inputs, other), simulated())).left_out
    assert "may be given a mask" in told["masked"]
    assert "more than once" in told["one"]


def test_it_is_told_of_and_warned_of() -> None:
    with pytest.warns(StatisticsMissingWarning, match="calibrate: norm_1, norm_2"):
        qmodel = calibrate(wrap(network(seen=False), simulated()))
    assert describe(qmodel).left_out["norm_1"] == "batch norm that finalize folds into conv, as training simulates"
    assert isinstance(qmodel.get_layer("norm_1"), kl.BatchNormalization)


def test_a_batch_norm_that_does_not_train_uses_its_moving_statistics() -> None:
    model = network()
    for name in NORMS:
        model.get_layer(name).trainable = False
        model.get_layer(name.replace("norm_1", "conv")).trainable = False
    qmodel = calibrate(wrap(model, simulated(rule="STE", n_bits=8)))
    before = statistics(qmodel)
    call(qmodel, images(), training=True)
    assert same(statistics(qmodel), before)
