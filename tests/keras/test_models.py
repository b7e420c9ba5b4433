"""Models that people use: wrapped, calibrated, trained a step, finalized, saved and loaded, all to the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as kl

import trainable_keras
from tests.keras.engines import ENGINE, numpy, tensor

RECIPE = {
    "schema_version": 1,
    "weights": {"method": "SYMMETRIC", "n_bits": 4, "training_method": "LSQ"},
    "activations": {"method": "UNIFORM", "n_bits": 8, "training_method": "LSQ"},
    "calibration": {"weights": "minmax", "activations": "minmax"},
}


def transformer_block() -> keras.Model:
    given = keras.Input((6, 8))
    attended = kl.MultiHeadAttention(2, 4, name="attention")(given, given)
    x = kl.LayerNormalization()(given + attended)
    hidden = kl.Dense(8, name="down")(kl.Dense(16, activation="gelu", name="up")(x))
    return keras.Model(given, kl.LayerNormalization()(x + hidden))


def application(name: str) -> keras.Model:
    return getattr(keras.applications, name)(weights=None, input_shape=(32, 32, 3), classes=4)


MODELS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "transformer block": (transformer_block, (6, 8)),
    **{
        name: (lambda name=name: application(name), (32, 32, 3))
        for name in ("MobileNetV2", "ResNet50", "EfficientNetB0", "DenseNet121")
    },
}


@pytest.mark.skipif(ENGINE != "tensorflow", reason="eager JAX compiles every operation of every shape: minutes a model")
@pytest.mark.parametrize("name", list(MODELS))
def test_a_model_goes_the_whole_way(name: str, tmp_path: Path) -> None:
    keras.utils.set_random_seed(4)
    make, shape = MODELS[name]
    model = make()
    x = np.random.default_rng(0).normal(size=(4, *shape)).astype("float32")
    qmodel = trainable_keras.calibrate(trainable_keras.wrap(model, RECIPE), [x])
    described = trainable_keras.describe(qmodel)
    with_weights = [layer for layer in model.layers if getattr(layer, "kernel", None) is not None]
    assert len([row for row in described.rows if row.target == "Weights"]) >= len(with_weights)
    qmodel.compile("sgd", "mse")
    qmodel.fit(x, np.zeros_like(model.predict(x, verbose=0)), batch_size=4, verbose=0)
    deployed = trainable_keras.finalize(qmodel)
    expected = numpy(qmodel(tensor(x), training=False))
    assert np.isfinite(expected).all()
    assert np.array_equal(numpy(deployed(tensor(x), training=False)), expected)
    deployed.save(tmp_path / "deployed.keras")
    loaded = keras.models.load_model(tmp_path / "deployed.keras")
    assert np.array_equal(numpy(loaded(tensor(x), training=False)), expected)
