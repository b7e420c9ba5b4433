"""Models that people use: wrapped, calibrated, trained a step, finalized, saved and loaded, all to the same bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import trainable_keras
from tests.keras.framework import BACKEND, keras, only_tensorflow
from tests.keras.models import call, same, state
from tests.keras.real_models import BATCH, MODELS, RECIPE

# The graphs of these two are the same in both Kerases, and they are tried on Keras 3; each takes half a minute.
ONCE = {"EfficientNet", "DenseNet"}


@only_tensorflow("eager JAX compiles every operation of every shape: minutes a model")
@pytest.mark.parametrize("name", [name for name in MODELS if BACKEND == "keras" or name not in ONCE])
def test_a_model_is_wrapped_trained_finalized_saved_and_loaded(name: str, tmp_path: Path) -> None:
    keras.utils.set_random_seed(4)
    real = MODELS[name]
    model, x = real.make(keras), real.batch()
    qmodel = trainable_keras.calibrate(trainable_keras.wrap(model, RECIPE), [x])
    described = trainable_keras.describe(qmodel)
    assert len([row for row in described.rows if row.target == "Weights"]) == real.weights
    assert len(described.folded) == real.folded
    before = state(qmodel)
    qmodel.compile("sgd", "mse")
    qmodel.fit(x, real.target(), batch_size=BATCH, verbose=0)
    assert state(qmodel) != before
    deployed = trainable_keras.finalize(qmodel)
    expected = call(qmodel, x)
    assert np.isfinite(expected[0]).all()
    assert same(call(deployed, x), expected)
    trainable_keras.save(deployed, tmp_path / "deployed")
    assert same(call(trainable_keras.load(tmp_path / "deployed", model), x), expected)
    deployed.save(tmp_path / "deployed.keras")
    assert same(call(keras.models.load_model(tmp_path / "deployed.keras"), x), expected)


@only_tensorflow("eager JAX compiles every operation of every shape: minutes a model")
def test_every_batch_norm_of_a_model_is_simulated() -> None:
    """In training it takes in the statistics of batches; what is evaluated then is deployed bit for bit."""
    keras.utils.set_random_seed(4)
    real = MODELS["ResNet"]
    model, x = real.make(keras), real.batch()
    model(x, training=True)  # a new batch norm has no statistics
    recipe = {**RECIPE, "fold_batch_norm": "training"}
    qmodel = trainable_keras.calibrate(trainable_keras.wrap(model, recipe), [x])
    assert str(trainable_keras.describe(qmodel)).count("as training simulates") == real.folded
    statistics = [layer.moving_variance for layer in qmodel.layers if hasattr(layer, "moving_variance")]
    before = [np.array(each) for each in statistics]
    assert len(before) == real.folded
    qmodel.compile("sgd", "mse")
    qmodel.fit(x, real.target(), batch_size=BATCH, verbose=0)
    assert all(not np.array_equal(old, np.array(new)) for old, new in zip(before, statistics, strict=True))
    deployed = trainable_keras.finalize(qmodel)
    assert same(call(deployed, x), call(qmodel, x))
    assert len(trainable_keras.describe(deployed).folded) == real.folded
