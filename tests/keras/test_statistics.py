"""Batch-norm statistics estimated anew: averages of the batches, of the quantized model, and nothing else changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.keras.framework import keras, kl, numpy, tensor
from tests.keras.models import call, flat, images, network, ready, recipe, state
from trainable_core.errors import CalibrationError, ModelError
from trainable_keras import reestimate_batch_norm

BATCHES = [images(8), images(5), images(16)]


def kept(model: Any = None) -> Any:
    return ready(flat() if model is None else model, recipe("LSQ", fold_batch_norm=False), images())


def test_statistics_are_the_averages_over_the_batches_of_the_quantized_model() -> None:
    qmodel = kept()
    assert reestimate_batch_norm(qmodel, [(tensor(batch), "labels") for batch in BATCHES]) is qmodel
    expected = [call(qmodel.get_layer("conv"), batch)[0] for batch in BATCHES]
    # TensorFlow's fused kernel estimates the variance of all data, other engines that of the batch
    sizes = [each[..., 0].size for each in expected]
    means = np.mean([each.mean((0, 1, 2)) for each in expected], 0)
    variances = np.mean([each.var((0, 1, 2)) for each in expected], 0)
    unbiased = np.mean([each.var((0, 1, 2)) * n / (n - 1) for each, n in zip(expected, sizes, strict=True)], 0)
    norm = qmodel.get_layer("norm")
    # averages of up to 256 float32 numbers below 8, in another order
    np.testing.assert_allclose(numpy(norm.moving_mean), means, rtol=1e-4, atol=1e-5)
    found = numpy(norm.moving_variance)
    assert np.allclose(found, variances, rtol=1e-4) or np.allclose(found, unbiased, rtol=1e-4)


def test_nothing_else_changes() -> None:
    qmodel, other = kept(network()), kept(network())
    reestimate_batch_norm(qmodel, BATCHES)
    norm = next(layer for layer in qmodel.get_layer("stem").layers if layer.name == "norm")
    changed = {id(norm.moving_mean), id(norm.moving_variance)}
    for one, two in zip(qmodel.variables, other.variables, strict=True):
        assert np.array_equal(numpy(one), numpy(two)) is (id(one) not in changed)
    assert norm.momentum == 0.99
    call(qmodel, images(), training=True)  # as before
    qmodel.compile("sgd", "mse")
    qmodel.fit(images(), np.zeros((8, 3)), verbose=0)


@pytest.mark.parametrize(("batches", "told"), [([], "batches are empty"), (images(), r"pass \[batch\]")])
def test_without_batches_everything_stays(batches: Any, told: str) -> None:
    qmodel = kept()
    before = state(qmodel)
    with pytest.raises(CalibrationError, match=f"(?s)reestimate_batch_norm.*{told}"):
        reestimate_batch_norm(qmodel, batches)
    assert state(qmodel) == before


def test_a_failure_in_the_middle_puts_everything_back() -> None:
    qmodel = kept()
    before = state(qmodel)

    def forward(model: Any, batch: Any) -> None:
        model(tensor(batch))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        reestimate_batch_norm(qmodel, BATCHES, forward=forward)
    assert state(qmodel) == before
    assert qmodel.get_layer("norm").momentum == 0.99


def test_one_that_does_not_train_keeps_its_statistics() -> None:
    model = keras.Sequential([keras.Input((6, 6, 1)), kl.Conv2D(2, 3), kl.BatchNormalization(trainable=False)])
    with pytest.raises(ModelError, match="fold_batch_norm: after"):
        reestimate_batch_norm(kept(model), BATCHES)
