"""Models that people use: wrapped, calibrated, trained a step, finalized, saved and loaded, all to the same bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from tests.real_models import BATCH, MODELS, RECIPE

import trainable_keras.keras2
from tests.tfkeras.models import output


@pytest.mark.parametrize("name", list(MODELS))
def test_a_model_goes_the_whole_way(name: str, tmp_path: Path) -> None:
    tf.keras.utils.set_random_seed(4)
    real = MODELS[name]
    model, x = real.make(tf.keras), real.batch()
    qmodel = trainable_keras.keras2.calibrate(trainable_keras.keras2.wrap(model, RECIPE), [x])
    described = trainable_keras.keras2.describe(qmodel)
    assert len([row for row in described.rows if row.target == "Weights"]) == real.weights
    assert len(described.folded) == real.folded
    before = [each.tobytes() for each in qmodel.get_weights()]
    qmodel.compile("sgd", "mse")
    qmodel.fit(x, real.target(), batch_size=BATCH, verbose=0)
    assert [each.tobytes() for each in qmodel.get_weights()] != before
    deployed = trainable_keras.keras2.finalize(qmodel)
    expected = output(qmodel, x)
    assert np.isfinite(expected).all()
    assert np.array_equal(output(deployed, x), expected)
    trainable_keras.keras2.save(deployed, tmp_path / "deployed")
    assert np.array_equal(output(trainable_keras.keras2.load(tmp_path / "deployed", model), x), expected)
    deployed.save(tmp_path / "deployed.keras")
    assert np.array_equal(output(tf.keras.models.load_model(tmp_path / "deployed.keras"), x), expected)
