"""Calibration: what thresholds come from, what is left untouched, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import trainable_keras.keras2
from tests.tfkeras.models import LSQ, calibrated, kl, output, small, values
from trainable_core.errors import CalibrationError, QuantizerStateError

X = values(16, 6, 6, 2)


def rows(qmodel: Any) -> dict[str, Any]:
    return {f"{row.layer}.{row.tensor}": row.params for row in trainable_keras.keras2.describe(qmodel).rows}


def fresh(recipe: Any = LSQ) -> Any:
    return trainable_keras.keras2.wrap(small(), {**recipe, "fold_batch_norm": False})


def test_minmax_takes_the_extremes_of_inputs_and_weights() -> None:
    qmodel = trainable_keras.keras2.calibrate(fresh(), [X[:8], X[8:]])
    found = rows(qmodel)
    quantizer = qmodel.get_layer("conv").input_holders["inputs"].activation_holder_quantizer
    assert (float(quantizer.range_min), float(quantizer.range_max)) == (X.min(), X.max())
    kernel = np.abs(qmodel.get_layer("conv").kernel.numpy()).max(axis=(0, 1, 2))
    assert np.allclose(found["conv.kernel"]["threshold"], kernel, rtol=0)


def test_later_layers_are_seen_with_float_weights() -> None:
    model = small()
    qmodel = trainable_keras.keras2.calibrate(
        trainable_keras.keras2.wrap(model, {**LSQ, "fold_batch_norm": False}), [X]
    )
    quantizer = qmodel.get_layer("head").input_holders["inputs"].activation_holder_quantizer
    seen = tf.keras.Model(model.inputs, model.get_layer("flatten").output)(X)
    assert float(quantizer.range_max) == float(tf.reduce_max(seen))


@pytest.mark.parametrize(
    "batches",
    [
        lambda: [X],
        lambda: [(X, np.zeros(16))],
        lambda: (each for each in [tf.constant(X)]),
        lambda: tf.data.Dataset.from_tensor_slices((X, np.zeros(16))).batch(4),
        lambda: [[X, "label"]],
    ],
    ids=["arrays", "pairs", "generator", "dataset", "lists"],
)
def test_batches_come_in_many_forms(batches: Any) -> None:
    expected = rows(trainable_keras.keras2.calibrate(fresh(), [X]))
    assert rows(trainable_keras.keras2.calibrate(fresh(), batches())) == expected


def test_named_inputs_and_a_call_of_ones_own() -> None:
    given = {"a": tf.keras.Input((3,), name="a"), "b": tf.keras.Input((3,), name="b")}
    model = tf.keras.Model(given, kl.Dense(2, name="dense")(given["a"] + given["b"]))
    batch = {"a": values(4, 3), "b": values(4, 3)}
    first = trainable_keras.keras2.calibrate(trainable_keras.keras2.wrap(model, LSQ), [batch])
    second = trainable_keras.keras2.calibrate(
        trainable_keras.keras2.wrap(model, LSQ), [(1, batch)], forward=lambda model, batch: model(batch[1])
    )
    assert rows(first) == rows(second)


def test_a_call_that_is_compiled_shows_its_values_too() -> None:
    @tf.function
    def compiled(x: Any) -> Any:
        return qmodel(x, training=False)

    qmodel = fresh()
    trainable_keras.keras2.calibrate(qmodel, [X], forward=lambda _, batch: compiled(batch))
    assert rows(qmodel) == rows(trainable_keras.keras2.calibrate(fresh(), [X]))
    assert not tf.config.functions_run_eagerly()


def test_batch_statistics_and_everything_else_stay() -> None:
    qmodel = fresh()
    before = [weight.numpy() for weight in qmodel.get_layer("norm").weights]
    trainable_keras.keras2.calibrate(qmodel, [X])
    assert all(
        np.array_equal(old, new.numpy()) for old, new in zip(before, qmodel.get_layer("norm").weights, strict=True)
    )
    wrapper = qmodel.get_layer("conv")
    assert wrapper.quantizes_weights
    assert all(holder.observer is None for holder in wrapper.holders)


def test_when_it_fails_nothing_has_changed() -> None:
    qmodel = fresh()
    with pytest.raises(CalibrationError, match="NaN") as caught:
        trainable_keras.keras2.calibrate(qmodel, [X, np.full_like(X, np.nan)])
    assert caught.value.subject == "conv: inputs"
    assert {row.state for row in trainable_keras.keras2.describe(qmodel).rows} == {"not calibrated"}
    assert all(holder.observer is None for holder in qmodel.get_layer("conv").holders)
    assert not tf.config.functions_run_eagerly()
    trainable_keras.keras2.calibrate(qmodel, [X])


def test_trained_thresholds_are_kept_unless_forced() -> None:
    qmodel, x = calibrated()
    before = rows(qmodel)
    with pytest.raises(QuantizerStateError, match="force=True"):
        trainable_keras.keras2.calibrate(qmodel, [x * 2])
    assert rows(qmodel) == before
    trainable_keras.keras2.calibrate(qmodel, [x * 2], force=True)
    assert rows(qmodel) != before


def test_traced_functions_are_made_anew() -> None:
    qmodel, x = calibrated()
    first = qmodel.predict(x, verbose=0)
    trainable_keras.keras2.calibrate(qmodel, [x / 4], force=True)
    assert not np.array_equal(qmodel.predict(x, verbose=0), first)
    assert np.array_equal(qmodel.predict(x, verbose=0), output(qmodel, x))


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (None, "need batches"),
        ([], "are empty"),
        (X, "iterable of batches"),
        (tf.constant(X), "iterable of batches"),
        ({"a": X}, "iterable of batches"),
        (3, "iterable of batches"),
        ([()], "empty tuple"),
    ],
)
def test_what_is_no_batches_is_refused(batches: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        trainable_keras.keras2.calibrate(fresh(), batches)


def test_a_forward_that_is_no_function_is_refused() -> None:
    with pytest.raises(CalibrationError, match="callable"):
        trainable_keras.keras2.calibrate(fresh(), [X], forward=3)


def test_a_finalized_model_is_refused() -> None:
    qmodel, x = calibrated()
    with pytest.raises(QuantizerStateError, match="finalized"):
        trainable_keras.keras2.calibrate(trainable_keras.keras2.finalize(qmodel), [x])


def test_a_layer_that_no_batch_reaches_is_named() -> None:
    given, other = tf.keras.Input((3,)), tf.keras.Input((3,))
    model = tf.keras.Model([given, other], [kl.Dense(2, name="used")(given), kl.Dense(2, name="unused")(other)])
    qmodel = trainable_keras.keras2.wrap(model, LSQ)
    used = qmodel.get_layer("used")
    with pytest.raises(CalibrationError, match="no batch reached it") as caught:
        trainable_keras.keras2.calibrate(qmodel, [values(4, 3)], forward=lambda _, batch: used(batch))
    assert caught.value.subject.startswith("unused")
