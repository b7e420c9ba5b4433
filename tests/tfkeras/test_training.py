"""What a training loop needs: groups, losses, schedules, freezing; loops of one's own, callbacks, strategies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import trainable_keras.keras2
from tests.tfkeras.models import LSQ, calibrated, dqa, output, small, train
from trainable_core.errors import InvalidArgumentError
from trainable_core.reference import dqa as reference

TEMPERATURE = {"t_start": 0, "t_end": 2, "initial_val": 1.0, "target_val": 0.1}


def learned(qmodel: Any) -> list[np.ndarray]:
    (group,) = [group for group in trainable_keras.keras2.parameter_groups(qmodel) if group["name"] == "QPARAMS"]
    return [variable.numpy() for variable in group["params"]]


def test_groups_split_the_trainable_variables() -> None:
    qmodel, _ = calibrated()
    weights, qparams = trainable_keras.keras2.parameter_groups(qmodel, weights={"lr": 1.0}, qparams={"lr": 0.1})
    assert (weights["name"], weights["lr"], qparams["name"], qparams["lr"]) == ("WEIGHTS", 1.0, "QPARAMS", 0.1)
    assert qparams["weight_decay"] == 0.0
    ids = [id(variable) for group in (weights, qparams) for variable in group["params"]]
    assert sorted(ids) == sorted(id(variable) for variable in qmodel.trainable_variables)
    assert len(qparams["params"]) == 2 + 2 * 2  # a threshold and two range ends in both layers


@pytest.mark.parametrize("options", [{"params": []}, {"name": "x"}, 3])
def test_options_that_are_none_are_refused(options: Any) -> None:
    qmodel, _ = calibrated()
    with pytest.raises(InvalidArgumentError, match="parameter_groups: qparams"):
        trainable_keras.keras2.parameter_groups(qmodel, qparams=options)


def test_a_loop_of_ones_own_trains() -> None:
    qmodel, x = calibrated()
    groups = trainable_keras.keras2.parameter_groups(qmodel)
    optimizers = [tf.keras.optimizers.SGD(0.1), tf.keras.optimizers.SGD(0.01)]

    @tf.function
    def step(x: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(qmodel(x, training=True) ** 2) + trainable_keras.keras2.regularization(qmodel)
        found = tape.gradient(loss, [group["params"] for group in groups])
        for optimizer, group, gradients in zip(optimizers, groups, found, strict=True):
            optimizer.apply_gradients(zip(gradients, group["params"], strict=True))
        return loss

    before = learned(qmodel)
    losses = [float(step(tf.constant(x))) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert any(not np.array_equal(old, new) for old, new in zip(before, learned(qmodel), strict=True))


def test_dqa_counts_a_step_per_training_call_and_deploys_the_winner() -> None:
    qmodel, x = calibrated(dqa(temperature=TEMPERATURE, bit_cost_weight=0.5))
    train(qmodel, x)
    steps = [int(weight.numpy()) for weight in qmodel.weights if weight.name.endswith("/step:0")]
    assert steps == [4, 4]  # two epochs of two batches, in both layers
    output(qmodel, x)
    assert [int(weight.numpy()) for weight in qmodel.weights if weight.name.endswith("/step:0")] == steps
    assert np.array_equal(output(trainable_keras.keras2.finalize(qmodel), x), output(qmodel, x))


def test_the_bit_cost_is_a_loss_and_what_regularization_says() -> None:
    qmodel, x = calibrated(dqa(bit_cost_weight=0.5))
    assert qmodel.losses == []
    output(qmodel, x, training=True)
    expected = 2 * 0.5 * reference.bit_cost(np.zeros(3), 1.0, [2, 4, 8])  # two layers, equal logits
    # a softmax of three and the sum: ten operations
    assert float(sum(qmodel.losses)) == pytest.approx(expected, rel=10 * 2.0**-24)
    assert float(trainable_keras.keras2.regularization(qmodel)) == pytest.approx(expected, rel=10 * 2.0**-24)


def test_without_such_methods_it_is_zero() -> None:
    assert float(trainable_keras.keras2.regularization(calibrated()[0])) == 0.0


def test_advance_schedules_skips_a_step() -> None:
    qmodel, _ = calibrated(dqa(temperature=TEMPERATURE))
    trainable_keras.keras2.advance_schedules(qmodel)
    assert {int(weight.numpy()) for weight in qmodel.weights if weight.name.endswith("/step:0")} == {1}


def test_freezing_takes_thresholds_out_of_training_and_back() -> None:
    qmodel, x = calibrated()
    everything = len(qmodel.trainable_variables)
    trainable_keras.keras2.freeze_quant_params(qmodel)
    qmodel.trainable = False
    qmodel.trainable = True  # Keras sets every layer's
    assert [group["name"] for group in trainable_keras.keras2.parameter_groups(qmodel)] == ["WEIGHTS"]
    before = [row.params for row in trainable_keras.keras2.describe(qmodel).rows]
    train(qmodel, x)
    assert [row.params for row in trainable_keras.keras2.describe(qmodel).rows] == before
    assert {row.state for row in trainable_keras.keras2.describe(qmodel).rows} == {"frozen"}
    trainable_keras.keras2.freeze_quant_params(qmodel, frozen=False)
    assert len(qmodel.trainable_variables) == everything


@pytest.mark.parametrize("options", [{}, {"jit_compile": True}, {"run_eagerly": True}], ids=["graph", "xla", "eager"])
def test_fit_trains(options: Any) -> None:
    qmodel, x = calibrated()
    before = learned(qmodel)
    history = train(qmodel, x, epochs=4, **options)
    assert history["loss"][-1] < history["loss"][0]
    assert any(not np.array_equal(old, new) for old, new in zip(before, learned(qmodel), strict=True))


def test_xla_differs_by_no_more_than_a_step_next_to_ties() -> None:
    qmodel, _ = calibrated({**LSQ, "activations": None})
    quantizer = qmodel.get_layer("conv").weights_quantizers["kernel"]
    grid = quantizer.current_qparams().along(4)
    weight = np.random.default_rng(0).normal(size=(3, 3, 64, 4)).astype(np.float32) * 0.3
    compiled = tf.function(lambda x: quantizer(x, training=True), jit_compile=True)(tf.constant(weight)).numpy()
    codes, eager = (np.rint(each / grid.scale) for each in (compiled, quantizer(tf.constant(weight)).numpy()))
    steps = weight.astype(np.float64) / grid.scale
    distance = np.abs(steps - np.floor(steps) - 0.5)
    assert (np.abs(codes - eager) <= 1).all()
    assert (distance[codes != eager] <= 2.0**4 * 2.0**-24).all()


def test_callbacks_work(tmp_path: Any) -> None:
    qmodel, x = calibrated()
    callbacks = [
        tf.keras.callbacks.ModelCheckpoint(str(tmp_path / "best.keras"), monitor="loss", save_best_only=True),
        tf.keras.callbacks.EarlyStopping(monitor="loss", patience=0, restore_best_weights=True),
        tf.keras.callbacks.ReduceLROnPlateau(monitor="loss"),
        tf.keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: None),
    ]
    qmodel.compile("adam", "mse")
    qmodel.fit(x, np.zeros((16, 3)), epochs=2, verbose=0, callbacks=callbacks)
    loaded = tf.keras.models.load_model(tmp_path / "best.keras")
    assert np.isfinite(output(loaded, x)).all()


def test_progress_bars_show(capsys: Any) -> None:
    qmodel = trainable_keras.keras2.wrap(small(), LSQ)
    x = np.ones((4, 6, 6, 2), np.float32)
    trainable_keras.keras2.calibrate(qmodel, [x], progress=True)
    assert "calibrate" in capsys.readouterr().err
    qmodel.compile("sgd", "mse")
    qmodel.fit(x, np.zeros((4, 3)), verbose=1)
    assert "loss" in capsys.readouterr().out


def test_a_mirrored_strategy_on_two_cpus_trains_alike_on_both() -> None:
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        model = small()
    qmodel, x = calibrated(dqa(temperature=TEMPERATURE), model)  # outside of the scope: the model knows its strategy
    assert qmodel.distribute_strategy is strategy
    before = learned(qmodel)
    with strategy.scope():
        qmodel.compile("sgd", "mse")
    qmodel.fit(x, np.zeros((16, 3), np.float32), batch_size=8, epochs=2, verbose=0)
    assert any(not np.array_equal(old, new) for old, new in zip(before, learned(qmodel), strict=True))
    for variable in qmodel.trainable_variables:
        first, second = (each.numpy() for each in strategy.experimental_local_results(variable))
        assert np.array_equal(first, second)
    assert {int(w.numpy()) for w in qmodel.weights if w.name.endswith("/step:0")} == {4}
    with strategy.scope():
        deployed = trainable_keras.keras2.finalize(qmodel)
    assert np.array_equal(output(deployed, x), output(qmodel, x))


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_a_mixed_policy_trains(policy: str) -> None:
    tf.keras.mixed_precision.set_global_policy(policy)
    try:
        qmodel, x = calibrated(model=small())
        history = train(qmodel, x, epochs=3)
    finally:
        tf.keras.mixed_precision.set_global_policy("float32")
    assert history["loss"][-1] < history["loss"][0]
    deployed = trainable_keras.keras2.finalize(qmodel)
    assert np.array_equal(output(deployed, x).view("uint16"), output(qmodel, x).view("uint16"))
