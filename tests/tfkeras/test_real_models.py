"""Models that people use: wrapped, calibrated, trained a step, finalized, saved and loaded, all to the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import trainable_tfkeras
from tests.tfkeras.tensors import numpy, tensor

kl = tf.keras.layers

RECIPE = {
    "schema_version": 1,
    "weights": {"method": "SYMMETRIC", "n_bits": 4, "training_method": "LSQ"},
    "activations": {"method": "UNIFORM", "n_bits": 8, "training_method": "LSQ"},
    "calibration": {"weights": "minmax", "activations": "minmax"},
}


def transformer_block() -> tf.keras.Model:
    given = tf.keras.Input((6, 8))
    attended = kl.MultiHeadAttention(2, 4, name="attention")(given, given)
    x = kl.LayerNormalization()(given + attended)
    hidden = kl.Dense(8, name="down")(kl.Dense(16, activation="gelu", name="up")(x))
    return tf.keras.Model(given, kl.LayerNormalization()(x + hidden))


def application(name: str) -> tf.keras.Model:
    return getattr(tf.keras.applications, name)(weights=None, input_shape=(32, 32, 3), classes=4)


MODELS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "transformer block": (transformer_block, (6, 8)),
    **{
        name: (lambda name=name: application(name), (32, 32, 3))
        for name in ("MobileNetV2", "ResNet50", "EfficientNetB0", "DenseNet121")
    },
}


@pytest.mark.parametrize("name", list(MODELS))
def test_a_model_goes_the_whole_way(name: str, tmp_path: Path) -> None:
    tf.keras.utils.set_random_seed(4)
    make, shape = MODELS[name]
    model = make()
    x = np.random.default_rng(0).normal(size=(4, *shape)).astype("float32")
    qmodel = trainable_tfkeras.calibrate(trainable_tfkeras.wrap(model, RECIPE), [x])
    described = trainable_tfkeras.describe(qmodel)
    with_weights = [layer for layer in model.layers if getattr(layer, "kernel", None) is not None]
    assert len([row for row in described.rows if row.target == "Weights"]) >= len(with_weights)
    qmodel.compile("sgd", "mse")
    qmodel.fit(x, np.zeros_like(model.predict(x, verbose=0)), batch_size=4, verbose=0)
    deployed = trainable_tfkeras.finalize(qmodel)
    expected = numpy(qmodel(tensor(x), training=False))
    assert np.isfinite(expected).all()
    assert np.array_equal(numpy(deployed(tensor(x), training=False)), expected)
    deployed.save(tmp_path / "deployed.keras")
    loaded = tf.keras.models.load_model(tmp_path / "deployed.keras")
    assert np.array_equal(numpy(loaded(tensor(x), training=False)), expected)
