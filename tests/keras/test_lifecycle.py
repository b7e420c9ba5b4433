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
from tests.keras.framework import (
    ENGINE,
    KERAS_VERSION,
    apply_gradients,
    dtype_name,
    dtype_policy,
    keras,
    kl,
    needs_two_devices,
    numpy,
    only_keras,
    only_tensorflow,
    tensor,
    tf,
    value_of,
)
from tests.keras.models import (
    MODELS,
    call,
    dense,
    flat,
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
from trainable_keras import wrap
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
        keras.callbacks.ModelCheckpoint(str(tmp_path / "best.keras"), monitor="val_loss", save_best_only=True),
        keras.callbacks.EarlyStopping(patience=5),
        keras.callbacks.ReduceLROnPlateau(monitor="loss"),
        keras.callbacks.CSVLogger(tmp_path / "log.csv"),
    ]
    history = qmodel.fit(
        vectors(8, 4), TARGET, batch_size=4, epochs=2, verbose=0, validation_split=0.5, callbacks=callbacks
    )
    assert (seen.batches, seen.epochs) == (2, 2)
    assert set(history.history) - {"lr", "learning_rate"} == {"loss", "mae", "val_loss", "val_mae"}
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
    assert all(name in "\n".join(lines) for name in ("stem", "body", "head"))


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
    found = tape.gradient(loss, [value_of(variable) for variable in looped.trainable_variables])
    apply_gradients(optimizer, found, looped.trainable_variables)
    train(fitted, vectors(8, 4))
    for one, other in zip(looped.variables, fitted.variables, strict=True):
        # the same sums in a graph and eagerly: a few units in the last place of numbers below 4
        assert np.abs(numpy(one) - numpy(other)).max(initial=0) <= 16 * 2.0**-24 * 4


@only_keras(3, "an optimizer can accumulate gradients")
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


def test_a_quantizer_is_copied_with_variables_of_its_own() -> None:
    quantizer = quantizers_of(moved(ready(dense(), LSQ, vectors(8, 4))))["fc.kernel"]
    twin = copy.deepcopy(quantizer)
    before = numpy(quantizer.range_max).copy()
    assert np.array_equal(numpy(twin.range_max), before)
    twin.range_max.assign(before + 1)
    assert np.array_equal(numpy(quantizer.range_max), before)
    assert twin.quantization_config == quantizer.quantization_config


def test_parts_of_a_wrapped_model_go_into_another_model() -> None:
    qmodel = ready(network(), LSQ, images())
    both = keras.Model(qmodel.inputs, [qmodel.outputs[0], qmodel.get_layer("flatten").output])
    assert np.array_equal(call(both, images())[0], call(qmodel, images())[0])


def test_a_float_checkpoint_fits_the_wrapped_model_layer_by_layer() -> None:
    model, qmodel = flat(), wrap(flat(), {**LSQ, "fold_batch_norm": False})
    model.get_layer("head").kernel.assign(np.ones((64, 3)))
    for layer in model.layers:
        own = qmodel.get_layer(layer.name)
        own.set_weights([*layer.get_weights(), *own.get_weights()[len(layer.get_weights()) :]])
    assert np.array_equal(numpy(qmodel.get_layer("head").kernel), np.ones((64, 3)))


def test_an_average_of_weights_is_a_model_of_its_own() -> None:
    qmodel = ready(network(), LSQ, images())
    average = keras.models.clone_model(qmodel)
    average.set_weights(qmodel.get_weights())
    first = call(qmodel, images())
    train(qmodel, images(), lr=0.5)
    assert same(call(average, images()), first)
    pairs = zip(average.get_weights(), qmodel.get_weights(), strict=True)
    average.set_weights([0.5 * one + 0.5 * other for one, other in pairs])
    assert same(call(trainable_keras.finalize(average), images()), call(average, images()))


@only_tensorflow("TensorFlow's gradient tape")
def test_gradients_of_parts_of_a_batch_add_up_to_those_of_the_batch() -> None:
    qmodel = ready(network(), LSQ, images())
    head = qmodel.get_layer("head")
    weights = [head.kernel, head.bias]  # the gradients of thresholds are scaled by the size of a batch

    def gradients(x: np.ndarray) -> list[np.ndarray]:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(qmodel(tensor(x), training=True) ** 2)
        return [numpy(each) for each in tape.gradient(loss, [value_of(each) for each in weights])]

    parts = [sum(each) for each in zip(gradients(images()[:4]), gradients(images()[4:]), strict=True)]
    for whole, summed in zip(gradients(images()), parts, strict=True):
        # float32 sums of 8 terms in another order
        assert np.allclose(whole, summed, rtol=0, atol=8 * 2.0**-24 * 8 * np.abs(whole).max())


def test_a_model_with_unknown_spatial_size_is_wrapped_and_trained() -> None:
    given = keras.Input((None, None, 1))
    y = kl.Dense(3)(kl.GlobalAveragePooling2D()(kl.Conv2D(4, 3, name="conv")(given)))
    qmodel = train(ready(keras.Model(given, y), LSQ, images()), images())
    assert same(call(trainable_keras.finalize(qmodel), images()), call(qmodel, images()))


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


# ---- other processes ------------------------------------------------------------------------------------------------


def python(code: str, *arguments: str, **environment: str) -> str:
    """Run code in a new interpreter, with the settings of this one, and return what it printed."""
    settings = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    done = subprocess.run(command, env={**settings, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


LOADING = """
import sys
import numpy as np
{keras}
import trainable_keras
folder = sys.argv[1]
for name in ("model.keras", "model.h5"):
    model = keras.models.load_model(folder + "/" + name)
    np.save(folder + "/" + name + ".npy", model.predict(np.load(folder + "/x.npy"), verbose=0))
"""


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_files_load_in_a_process_that_lists_no_custom_objects(tmp_path: Path) -> None:
    qmodel = moved(ready(flat(), LSQ, images()))
    np.save(tmp_path / "x.npy", images())
    for name in ("model.keras", "model.h5"):
        qmodel.save(tmp_path / name)
    python(
        LOADING.format(keras="import tensorflow; keras = tensorflow.keras" if KERAS_VERSION == 2 else "import keras"),
        str(tmp_path),
    )
    for name in ("model.keras", "model.h5"):
        assert np.array_equal(np.load(tmp_path / f"{name}.npy"), qmodel.predict(images(), verbose=0))


# ---- several devices ------------------------------------------------------------------------------------------------

TEMPERATURE = {"t_start": 0, "t_end": 8, "initial_val": 1.0, "target_val": 0.1}
BOTH_LEARNED = {
    "weights": spec("DQA", n_bits=2, arguments={"temperature": TEMPERATURE}),
    "activations": spec("LSQ", "UNIFORM", 8),
}


def two_devices() -> Any:
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def made_under(strategy: Any) -> Any:
    """Return a model that was wrapped, calibrated and compiled under a strategy."""
    keras.utils.set_random_seed(0)
    with strategy.scope():
        qmodel = ready(dense(), BOTH_LEARNED, vectors(8, 4))
        qmodel.compile(keras.optimizers.SGD(0.5), "mse")
    return qmodel


@needs_two_devices
def test_a_mirrored_strategy_trains_and_deploys_on_two_devices() -> None:
    strategy = two_devices()
    assert strategy.num_replicas_in_sync == 2
    qmodel = made_under(strategy)
    before = [numpy(variable).copy() for variable in qmodel.trainable_variables]
    qmodel.fit(vectors(8, 4), np.ones((8, 3), np.float32), batch_size=4, epochs=2, verbose=0)
    for variable, old in zip(qmodel.trainable_variables, before, strict=True):
        first, second = (numpy(each) for each in strategy.experimental_local_results(value_of(variable)))
        assert np.array_equal(first, second)
        assert (first != old).any()
    # two epochs of two batches, counted once for both replicas
    assert [int(numpy(q.step)) for q in quantizers_of(qmodel).values() if hasattr(q, "step")] == [4]
    with strategy.scope():
        deployed = trainable_keras.finalize(qmodel)
    assert same(call(deployed, vectors(8, 4)), call(qmodel, vectors(8, 4)))


@needs_two_devices
def test_replicas_learn_the_ranges_that_one_device_learns() -> None:
    moves = []
    for strategy in (two_devices(), tf.distribute.get_strategy()):
        qmodel = made_under(strategy)
        ranges = [variable for variable in qmodel.trainable_variables if "range" in variable.name]
        start = [np.float64(numpy(variable)) for variable in ranges]
        qmodel.fit(vectors(8, 4), np.ones((8, 3), np.float32), batch_size=8, verbose=0)
        moves.append([float(numpy(v) - old) for v, old in zip(ranges, start, strict=True)])
    on_two, on_one = moves
    # A gradient is a float32 sum of 32 terms, in halves or whole, and a range near 2 is rounded when it moves.
    assert on_two == pytest.approx(on_one, rel=32 * 2.0**-24, abs=2 * 2.0**-23)
    assert any(abs(moved) > 1000 * 2.0**-23 for moved in on_one)  # far more than what is allowed


@only_keras(2, "a model of Keras 3 does not know the strategy it was made under")
@needs_two_devices
def test_a_model_is_wrapped_under_the_strategy_it_was_made_under() -> None:
    strategy = two_devices()
    with strategy.scope():
        model = dense()
    qmodel = ready(model, BOTH_LEARNED, vectors(8, 4))  # outside of the scope: the model knows its strategy
    assert qmodel.distribute_strategy is strategy
    with strategy.scope():
        qmodel.compile("sgd", "mse")
    qmodel.fit(vectors(8, 4), np.ones((8, 3), np.float32), batch_size=4, verbose=0)


WORKER = """
import json, os, sys
ports = sys.argv[3:]
cluster = {"worker": ["127.0.0.1:" + port for port in ports]}
os.environ["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": {"type": "worker", "index": int(sys.argv[2])}})
import numpy as np
import tensorflow as tf
import keras
strategy = tf.distribute.MultiWorkerMirroredStrategy()
with strategy.scope():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    model.compile("sgd", "mse")
batches = tf.data.Dataset.from_tensor_slices((np.ones((8, 4), "f"), np.ones((8, 3), "f"))).batch(4)
model.fit(batches, verbose=0)
"""


@only_keras(3, "what it does not do")
@only_tensorflow("a strategy of TensorFlow's")
def test_keras_3_itself_does_not_fit_on_several_workers(tmp_path: Path) -> None:
    """A model of plain Keras fails too: its trainer passes one worker's losses to TensorFlow as if they were a tensor.

    When this fails, Keras has mended it, and `tests/keras/test_workers.py` is to run on Keras 3 too.
    """
    ended = run_workers(["-c", WORKER], tmp_path, 2)
    assert all(status != 0 for status, _ in ended)
    assert any("PerReplica" in messages for _, messages in ended), ended
