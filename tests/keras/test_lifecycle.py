"""What Keras users do with a model, done to a wrapped one: loops, callbacks, clones, policies, strategies."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trainable_keras
from tests.keras.callbacks import backed_up, stopped_early
from tests.keras.callbacks import same as same_weights
from tests.keras.framework import ENGINE, dtype_name, dtype_policy, keras, kl, numpy, only_tensorflow, tensor, tf
from tests.keras.models import (
    MODELS,
    call,
    dense,
    images,
    moved,
    network,
    ready,
    recipe,
    same,
    spec,
    state,
    train,
    vectors,
)
from tests.keras.workers import run_workers
from trainable_keras.training import quantizers_of

LSQ = recipe("LSQ", "UNIFORM")
TARGET = np.zeros((8, 3), np.float32)


# ---- fit ------------------------------------------------------------------------------------------------------------


class Seen(keras.callbacks.Callback):
    """Counts what Keras tells."""

    def __init__(self) -> None:
        super().__init__()
        self.batches = self.epochs = 0
        self.losses: list[float] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Count."""
        self.batches += 1
        self.losses.append(logs["loss"])

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Count."""
        self.epochs += 1


def test_callbacks_metrics_and_validation_work(tmp_path: Path) -> None:
    qmodel = ready(dense(), LSQ, vectors(8, 4))
    qmodel.compile("adam", "mse", metrics=["mae"])
    seen = Seen()
    callbacks = [
        seen,
        keras.callbacks.ModelCheckpoint(tmp_path / "best.keras", monitor="val_loss", save_best_only=True),
        keras.callbacks.EarlyStopping(patience=5),
        keras.callbacks.CSVLogger(tmp_path / "log.csv"),
    ]
    history = qmodel.fit(
        vectors(8, 4), TARGET, batch_size=4, epochs=2, verbose=0, validation_split=0.5, callbacks=callbacks
    )
    assert (seen.batches, seen.epochs) == (2, 2)
    assert set(history.history) == {"loss", "mae", "val_loss", "val_mae"}
    best = keras.models.load_model(tmp_path / "best.keras")
    assert trainable_keras.describe(best).rows[0].state == "trainable"
    assert (tmp_path / "log.csv").read_text().count("\n") == 3


def test_the_progress_bar_of_fit_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    qmodel = ready(dense(), LSQ, vectors(8, 4))
    qmodel.compile("sgd", "mse")
    qmodel.fit(vectors(8, 4), TARGET, batch_size=4, verbose=1)
    assert "2/2" in capsys.readouterr().out


def test_a_summary_can_be_printed() -> None:
    lines: list[str] = []
    ready(network(), LSQ, images()).summary(print_fn=lines.append)
    assert "QuantizationWrapper" in "\n".join(lines)


@pytest.mark.skipif(ENGINE == "torch", reason="no compiler of Keras's own")
def test_a_compiled_fit_trains_and_deploys_what_it_trained() -> None:
    qmodel = ready(network(), LSQ, images())
    qmodel.compile(keras.optimizers.SGD(0.05), "mse", jit_compile=True)
    losses = qmodel.fit(images(), TARGET + 1, epochs=4, batch_size=8, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert same(call(trainable_keras.finalize(qmodel), images()), call(qmodel, images()))


@only_tensorflow("TensorFlow's gradient tape")
def test_a_custom_loop_gives_what_fit_gives() -> None:
    fitted, looped = (ready(dense(), LSQ, vectors(8, 4)) for _ in range(2))
    optimizer = keras.optimizers.SGD(0.05)
    x, target = tensor(vectors(8, 4)), tensor(TARGET)
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((looped(x, training=True) - target) ** 2)
        loss = loss + trainable_keras.regularization(looped)
    optimizer.apply(tape.gradient(loss, looped.trainable_variables), looped.trainable_variables)
    train(fitted, vectors(8, 4))
    for one, other in zip(looped.variables, fitted.variables, strict=True):
        # the same sums in a graph and eagerly: a few units in the last place of numbers below 4
        assert np.abs(numpy(one) - numpy(other)).max(initial=0) <= 16 * 2.0**-24 * 4


def test_gradient_accumulation_steps_train() -> None:
    qmodel = ready(dense(), LSQ, vectors(8, 4))
    before = state(qmodel)
    qmodel.compile(keras.optimizers.SGD(0.5, gradient_accumulation_steps=2), "mse")
    qmodel.fit(vectors(8, 4), TARGET + 1, batch_size=4, verbose=0)
    assert state(qmodel) != before


def test_an_optimizers_moving_average_is_taken() -> None:
    qmodel = ready(dense(), LSQ, vectors(8, 4))
    qmodel.compile(keras.optimizers.SGD(0.5, use_ema=True, ema_momentum=0.5), "mse")
    qmodel.fit(vectors(8, 4), TARGET + 1, batch_size=4, epochs=2, verbose=0)
    assert same(call(trainable_keras.finalize(qmodel), vectors(8, 4)), call(qmodel, vectors(8, 4)))


def test_thresholds_stay_legal_whatever_the_optimizer_does() -> None:
    qmodel = ready(dense(), recipe("LSQ"), vectors(8, 4))
    for quantizer in quantizers_of(qmodel).values():
        quantizer.assign(quantizer.threshold, np.full(tuple(quantizer.threshold.shape), -5.0, np.float32))
    outputs = call(qmodel, vectors(8, 4))
    assert np.isfinite(outputs[0]).all()
    assert same(call(trainable_keras.finalize(qmodel), vectors(8, 4)), outputs)
    params = [np.min(row.params["threshold"]) for row in trainable_keras.describe(qmodel).rows]
    assert params == [2.0**-16, 2.0**-16]


SHORT = {"t_start": 0, "t_end": 6, "initial_val": 1.0, "target_val": 0.1}
DQA = {"weights": spec("DQA", n_bits=2, arguments={"temperature": SHORT}), "activations": spec("LSQ", "UNIFORM", 8)}
both_recipes = pytest.mark.parametrize("how", [LSQ, DQA], ids=["LSQ", "DQA"])


@both_recipes
def test_training_that_was_interrupted_goes_on_to_the_same_bits(how: Any, tmp_path: Path) -> None:
    def make() -> keras.Model:
        return ready(network(), how, images())

    whole, resumed = backed_up(keras, make, images(), TARGET + 1, tmp_path / "backup")
    assert same_weights(whole, resumed)


@both_recipes
def test_early_stopping_restores_the_best_weights_and_thresholds(how: Any) -> None:
    best, restored = stopped_early(keras, lambda: ready(network(), how, images()), images(), TARGET + 1)
    assert same_weights(best, restored)


# ---- copies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sequential", "functional"])
def test_a_clone_is_wrapped_too_and_takes_the_weights(name: str) -> None:
    make, batches = MODELS[name]
    qmodel = moved(ready(make(), LSQ, batches()))
    clone = keras.models.clone_model(qmodel)
    assert {id(v) for v in clone.variables} & {id(v) for v in qmodel.variables} == set()
    clone.set_weights(qmodel.get_weights())
    assert same(call(clone, batches()), call(qmodel, batches()))
    assert trainable_keras.describe(clone).to_dict() == trainable_keras.describe(qmodel).to_dict()


def test_a_config_is_json_and_makes_the_model_again() -> None:
    qmodel = moved(ready(network(), LSQ, images()))
    config = json.loads(json.dumps(qmodel.get_config()))
    again = keras.Sequential.from_config(config)
    again.set_weights(qmodel.get_weights())
    assert same(call(again, images()), call(qmodel, images()))


def test_a_scheduler_is_copied_with_what_holds_it() -> None:
    qmodel = ready(dense(), {"weights": spec("DQA")})
    (quantizer,) = quantizers_of(qmodel).values()
    assert copy.deepcopy(quantizer.temperature) == quantizer.temperature


# ---- dtypes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_a_mixed_policy_trains_in_float32_and_deploys_the_same_bits(policy: str, tmp_path: Path) -> None:
    with dtype_policy(policy):
        qmodel = train(ready(network(), LSQ, images()), images())
        deployed = trainable_keras.finalize(qmodel)
        trainable_keras.save(qmodel, tmp_path / "model")
        loaded = trainable_keras.load(tmp_path / "model", network())
    found = {dtype_name(each) for each in qmodel.trainable_variables}
    assert found == {"float32"}
    outputs = [numpy(model(tensor(images()))) for model in (qmodel, deployed, loaded)]
    assert dtype_name(qmodel(tensor(images()))) == policy.removeprefix("mixed_")
    assert np.array_equal(outputs[0], outputs[1])
    assert np.array_equal(outputs[0], outputs[2])


# ---- batch norm, dropout, state -------------------------------------------------------------------------------------


def test_batch_norm_that_is_not_folded_learns_its_statistics() -> None:
    qmodel = ready(network(), recipe("LSQ", fold_batch_norm=False), images())
    (norm,) = [layer for layer in qmodel.get_layer("stem").layers if isinstance(layer, kl.BatchNormalization)]
    before = numpy(norm.moving_mean).copy()
    train(qmodel, images())
    assert not np.array_equal(numpy(norm.moving_mean), before)


# ---- several devices ------------------------------------------------------------------------------------------------

MIRRORED = """
import json, sys
import numpy as np
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import trainable_keras
from tests.keras.models import call, dense, same, spec, vectors

temperature = {"t_start": 0, "t_end": 8, "initial_val": 1.0, "target_val": 0.1}
how = {
    "weights": spec("DQA", n_bits=2, arguments={"temperature": temperature}),
    "activations": spec("LSQ", "UNIFORM", 8),
}
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
with strategy.scope():
    qmodel = trainable_keras.calibrate(trainable_keras.wrap(dense(), how), [vectors(8, 4)])
    qmodel.compile(keras.optimizers.SGD(0.5), "mse")
before = [variable.numpy().copy() for variable in qmodel.trainable_variables]
qmodel.fit(vectors(8, 4), np.ones((8, 3), np.float32), batch_size=4, epochs=2, verbose=0)
with strategy.scope():
    deployed = trainable_keras.finalize(qmodel)


def learned(strategy):  # how far one step on eight rows moves each variable of LSQ on activations
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = trainable_keras.calibrate(trainable_keras.wrap(dense(), how), [vectors(8, 4)])
        model.compile(keras.optimizers.SGD(0.5), "mse")
    ranges = [v for v in model.trainable_variables if "range" in v.path]
    start = [np.float64(v.numpy()) for v in ranges]
    model.fit(vectors(8, 4), np.ones((8, 3), np.float32), batch_size=8, verbose=0)
    return [float(v.numpy() - old) for v, old in zip(ranges, start, strict=True)]


print("FOUND", json.dumps({
    "on two": learned(strategy),
    "on one": learned(tf.distribute.get_strategy()),
    "replicas": strategy.num_replicas_in_sync,
    "moved": [bool((v.numpy() != old).any()) for v, old in zip(qmodel.trainable_variables, before)],
    "mirrored": type(qmodel.trainable_variables[0].value).__name__,
    "steps": [int(q.step.numpy()) for q in quantizers_of(qmodel).values() if hasattr(q, "step")],
    "same": same(call(deployed, vectors(8, 4)), call(qmodel, vectors(8, 4))),
}))
"""


@only_tensorflow("a strategy of TensorFlow's")
def test_a_mirrored_strategy_trains_on_two_devices() -> None:
    # In a process of its own: virtual devices are set before TensorFlow starts.
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MIRRORED],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    found = json.loads(finished.stdout.partition("FOUND ")[2])
    assert found["replicas"] == 2
    # A gradient is a float32 sum of 32 terms, in halves or whole, and a range near 2 is rounded when it moves.
    assert found["on two"] == pytest.approx(found["on one"], rel=32 * 2.0**-24, abs=2 * 2.0**-23)
    assert any(abs(moved) > 1000 * 2.0**-23 for moved in found["on one"])  # far more than what is allowed
    assert all(found["moved"])
    assert "Mirrored" in found["mirrored"]
    assert found["steps"] == [4]  # two epochs of two batches, counted once for both replicas
    assert found["same"] is True


WORKER = """
import json, os, sys
ports = sys.argv[3:]
cluster = {"worker": ["127.0.0.1:" + port for port in ports]}
os.environ["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": {"type": "worker", "index": int(sys.argv[2])}})
import numpy as np
import tensorflow as tf
from tests.keras.framework import ENGINE, functions, keras, kl, numpy, quantizers_of, tensor
strategy = tf.distribute.MultiWorkerMirroredStrategy()
with strategy.scope():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    model.compile("sgd", "mse")
batches = tf.data.Dataset.from_tensor_slices((np.ones((8, 4), "f"), np.ones((8, 3), "f"))).batch(4)
model.fit(batches, verbose=0)
"""


@only_tensorflow("a strategy of TensorFlow's")
def test_keras_3_itself_does_not_fit_on_several_workers(tmp_path: Path) -> None:
    """A model of plain Keras fails too: its trainer passes one worker's losses to TensorFlow as if they were a tensor.

    When this fails, Keras has mended it, and what `tests/tfkeras/test_workers.py` checks is to be checked here.
    """
    ended = run_workers(["-c", WORKER], tmp_path, 2)
    assert all(status != 0 for status, _ in ended)
    assert any("PerReplica" in messages for _, messages in ended), ended
