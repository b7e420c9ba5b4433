"""One callback in `fit` and in a loop of one's own: it freezes, estimates, logs and goes on."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from tests.keras.framework import ENGINE, keras, kl, numpy, tensor
from tests.keras.models import flat, images, quantizer_at, ready, recipe, spec, state
from trainable_core.errors import InvalidArgumentError, ModelError, UnsupportedConfigError
from trainable_keras import describe, reestimate_batch_norm, training_callback
from trainable_keras.training import quantizers_of

BATCHES = [images(8), images(5)]
TARGETS = np.eye(3, dtype=np.float32)[np.arange(8) % 3]


def kept(**more: Any) -> Any:
    qmodel = ready(flat(), recipe("LSQ", fold_batch_norm="after", **more), images())
    qmodel.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse")
    return qmodel


def thresholds(qmodel: Any) -> list[np.ndarray]:
    return [numpy(q.threshold).copy() for q in quantizers_of(qmodel).values()]


def fit(qmodel: Any, epochs: int, **options: Any) -> Any:
    qmodel.fit(images(), TARGETS, batch_size=4, epochs=epochs, shuffle=False, verbose=0, **options)
    return qmodel


@pytest.mark.skipif(ENGINE == "jax", reason="on other engines than JAX only: its trainer can't go on with less")
def test_fit_freezes_in_the_middle_of_an_epoch() -> None:
    qmodel, free, told = kept(), kept(), []
    fit(qmodel, 2, callbacks=[training_callback(qmodel, freeze_at=3, log=told.append, log_every=2)])
    fit(free, 1)
    free.train_on_batch(images()[:4], TARGETS[:4])
    assert {row.state for row in describe(qmodel).rows} == {"frozen"}
    assert all(np.array_equal(*pair) for pair in zip(thresholds(qmodel), thresholds(free), strict=True))
    assert not np.array_equal(numpy(qmodel.get_layer("head").kernel), numpy(free.get_layer("head").kernel))
    assert len(told) == 2
    assert told[1]["head.kernel/threshold"] == pytest.approx(
        float(numpy(quantizer_at(qmodel, "head.kernel").threshold).mean())
    )
    last = thresholds(qmodel)
    fit(qmodel, 1, callbacks=[training_callback(qmodel, freeze_at=3)])  # a later fit goes on
    assert all(np.array_equal(*pair) for pair in zip(thresholds(qmodel), last, strict=True))


@pytest.mark.skipif(ENGINE == "jax", reason="on other engines than JAX only: its trainer can't go on with less")
def test_thresholds_freeze_one_after_another_and_oscillate_no_more() -> None:
    sections = {"method": "POWER_OF_TWO", "training_method": "TQT", "n_bits": 3}
    random = np.random.default_rng(1)
    x = random.normal(size=(256, 16)).astype(np.float32)

    def trained(*epochs: int, **freezing: Any) -> tuple[Any, list[list[int]], Any]:
        """Return a model after some steps, one an epoch, the exponents after each, and the last callback."""
        keras.utils.set_random_seed(0)
        layers = [keras.Input((16,)), kl.Dense(16, activation="relu"), kl.Dense(16)]
        model = keras.Sequential(layers)
        target = numpy(model(tensor(x)))
        qmodel = ready(model, {"weights": {**sections, "per_channel": False}, "activations": sections}, x)
        qmodel.compile(keras.optimizers.Adam(0.02), "mse")
        quantizers, found = quantizers_of(qmodel), []
        callback = training_callback(qmodel, **freezing)

        class Look(keras.callbacks.Callback):
            def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
                found.append([int(np.ceil(numpy(q.log2_threshold))) for q in quantizers.values()])

        for count in epochs:
            qmodel.fit(x, target, batch_size=256, epochs=count, shuffle=False, verbose=0, callbacks=[callback, Look()])
        return qmodel, found, callback

    _, free, _ = trained(80)
    qmodel, found, callback = trained(42, 38, freeze_at=40, freeze_every=4)  # the second fit goes on
    assert found[:39] == free[:39]
    assert all(one == other for one, other in pairwise(found[60:]))
    frozen = callback.state_dict()["freezing"]["frozen"]
    assert sorted(frozen) == sorted(quantizers_of(qmodel))
    assert {row.state for row in describe(qmodel).rows} == {"frozen"}
    assert json.loads(json.dumps(callback.state_dict())) == callback.state_dict()
    changes = sum(one != other for one, other in pairwise(free[40:]))
    assert changes > 3


def test_statistics_are_estimated_before_evaluations_and_at_the_end() -> None:
    qmodel, seen = kept(), []

    class Look(keras.callbacks.Callback):
        def on_test_begin(self, logs: Any = None) -> None:
            seen.append(numpy(qmodel.get_layer("norm").moving_mean).copy())

    callback = training_callback(qmodel, batches=BATCHES)
    fit(qmodel, 2, callbacks=[callback, Look()], validation_data=(images(), TARGETS))
    at_the_end = state(qmodel)
    assert state(reestimate_batch_norm(qmodel, BATCHES)) == at_the_end
    assert np.array_equal(seen[-1], numpy(qmodel.get_layer("norm").moving_mean))
    assert not np.array_equal(seen[0], seen[-1])


def test_a_loop_of_one_s_own_calls_it() -> None:
    qmodel, told = kept(weights=spec("DQA")), []
    callback = training_callback(qmodel, log=told.append, log_every=1)
    callback.start()
    for _ in range(2):
        callback.step_end()  # no call of the model counted: it does
    assert len(told) == 2
    assert all(q.counted_steps == 2 for q in quantizers_of(qmodel).values() if q.has_schedule)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"freeze_at": -1}, "freeze_at"),
        ({"freeze_every": 3}, "give freeze_at too"),
        ({"log": 3}, "log must be callable"),
        ({"batches": iter(())}, "only once"),
    ],
)
def test_wrong_arguments_are_refused(options: Any, told: str) -> None:
    with pytest.raises(InvalidArgumentError, match=told):
        training_callback(kept(), **options)


def test_what_it_can_t_do_is_refused() -> None:
    with pytest.raises(ModelError, match="fold_batch_norm: after"):
        training_callback(ready(flat(), recipe("LSQ"), images()), batches=BATCHES)
    if ENGINE == "jax":
        with pytest.raises(UnsupportedConfigError, match="JAX"):
            training_callback(kept(), freeze_at=3)
