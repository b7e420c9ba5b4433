"""Following a training in Keras: bit for bit the same training, with the gradients that the optimizer is given."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.keras.framework import ENGINE, KERAS_VERSION, keras, kl, tf
from tests.keras.models import images, network, ready, recipe, state
from trainable_core.errors import CalibrationError, GradientMissingWarning, InvalidArgumentError, ModelError
from trainable_core.tracking.writers import read_csv
from trainable_keras import finalize, track
from trainable_keras.training import quantizers_of

BATCHES = [images(8), images(5)]
TARGETS = np.eye(3, dtype=np.float32)[np.arange(8) % 3]


def model() -> Any:
    """Return a compiled model with what looking could change: batch norm and dropout."""
    net = network()
    net = keras.Sequential([*net.layers[:-1], kl.Dropout(0.5, seed=3), net.layers[-1]])
    net.build((None, 6, 6, 1))
    qmodel = ready(net, recipe("LSQ", fold_batch_norm="after"), images())
    qmodel.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse")
    return qmodel


def fit(qmodel: Any, epochs: int, *callbacks: Any) -> Any:
    keras.utils.set_random_seed(7)
    qmodel.fit(images(), TARGETS, batch_size=4, epochs=epochs, shuffle=False, verbose=0, callbacks=list(callbacks))
    return qmodel


def sees_gradients(*, fitted: bool) -> bool:
    """Return whether gradients are seen: a new trace would restart the random numbers of Keras 2."""
    return ENGINE != "jax" and not (fitted and KERAS_VERSION == 2)


def numbers(path: Path, quantity: str) -> dict[tuple[int, str], float]:
    return {(each.step, each.tensor): each.value for each in read_csv(path) if each.quantity == quantity}


@pytest.mark.parametrize("before", [0, 1])
def test_tracking_changes_nothing_to_the_bit(tmp_path: Path, before: int) -> None:
    plain, tracked = model(), model()
    callback = track(tracked, tmp_path / "run.csv", every=3, batches=BATCHES)
    for qmodel, callbacks in ((plain, ()), (tracked, (callback,))):
        if before:
            fit(qmodel, before)
        fit(qmodel, 3 - before, *callbacks)
        fit(qmodel, 1, *callbacks)  # goes on
    assert state(plain) == state(tracked)
    ends = {2, 3, 6, 8} if before else {0, 3, 6, 8}
    assert {step for step, _ in numbers(tmp_path / "run.csv", "low")} == ends
    assert bool(numbers(tmp_path / "run.csv", "gradient")) is sees_gradients(fitted=before > 0)
    found = numbers(tmp_path / "run.csv", "clipped")
    assert {tensor for _, tensor in found} == set(quantizers_of(tracked))


@pytest.mark.skipif(ENGINE == "jax", reason="on other engines than JAX only: gradients are not seen there")
def test_gradients_are_those_that_the_optimizer_is_given(tmp_path: Path) -> None:
    qmodel, seen = model(), {}
    optimizer = qmodel.optimizer
    name = "apply_gradients" if KERAS_VERSION == 2 else "apply"
    apply = getattr(optimizer, name)

    def spied(gradients: Any, *args: Any) -> Any:
        pairs = list(gradients) if KERAS_VERSION == 2 else list(zip(gradients, args[0], strict=True))
        seen.update({id(variable): np.asarray(gradient) for gradient, variable in pairs})
        return apply(pairs if KERAS_VERSION == 2 else [pair[0] for pair in pairs], *args)

    callback = track(qmodel, tmp_path / "run.csv", every=1)
    vars(optimizer)[name] = spied
    qmodel.run_eagerly = True
    qmodel.fit(images(), TARGETS, batch_size=8, epochs=1, shuffle=False, verbose=0, callbacks=[callback])
    found = numbers(tmp_path / "run.csv", "gradient")
    assert len(found) == len(quantizers_of(qmodel))
    for subject, quantizer in quantizers_of(qmodel).items():
        expected = np.linalg.norm(seen[id(quantizer.threshold)].astype(np.float64))
        # a norm of a few numbers: a few roundings of float32
        assert found[1, subject] == pytest.approx(expected, rel=1e-5)


@pytest.mark.skipif(KERAS_VERSION == 3 and ENGINE != "tensorflow", reason="a loop with TensorFlow's tape")
def test_a_loop_of_one_s_own(tmp_path: Path) -> None:
    qmodel = model()
    callback = track(qmodel, tmp_path / "run.csv", every=2)
    callback.start()
    for _ in range(3):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(qmodel(images(), training=True)))
        variables = qmodel.trainable_variables
        qmodel.optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        callback.step_end()
    callback.end()
    assert {step for step, _ in numbers(tmp_path / "run.csv", "gradient")} == {2}
    assert {step for step, _ in numbers(tmp_path / "run.csv", "low")} == {0, 2, 3}
    assert not {"apply", "apply_gradients"} & vars(qmodel.optimizer).keys()


def test_thresholds_that_stand_still_are_told(tmp_path: Path) -> None:
    qmodel = model()
    qmodel.optimizer.learning_rate = 0.0
    callback = track(qmodel, tmp_path / "run.csv", every=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(qmodel, 3, callback)
    told = [each.category for each in caught if each.category is GradientMissingWarning]
    # gradients are seen and are not zero, but on JAX, where standing still is all that is seen
    assert told == ([GradientMissingWarning] if ENGINE == "jax" else [])
    assert set(callback.problems) == ({"GradientMissingWarning"} if ENGINE == "jax" else set())


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"every": 0}, InvalidArgumentError),
        ({"batches": images()}, CalibrationError),
        ({"batches": iter(())}, InvalidArgumentError),
    ],
)
def test_wrong_arguments_are_refused(tmp_path: Path, options: Any, error: type) -> None:
    with pytest.raises(error):
        track(model(), tmp_path / "run.csv", **options)


def test_models_that_do_not_train_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        track(network(), tmp_path / "run.csv")
    with pytest.raises(ModelError, match="no trainable quantizer"):
        track(finalize(model()), tmp_path / "run.csv")
