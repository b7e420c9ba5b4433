"""Models that people use: wrapped, calibrated, trained a step, finalized, saved and loaded, all to the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as kl

import trainable_keras
from tests.keras.engines import ENGINE
from tests.keras.models import call, same, state

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


def application(name: str, **arguments: Any) -> keras.Model:
    return getattr(keras.applications, name)(weights=None, input_shape=(32, 32, 3), classes=4, **arguments)


# model, input shape, number of quantized weights and of folded batch norms, counted by hand from the architecture
MODELS: dict[str, tuple[Any, tuple[int, ...], int, int]] = {
    # query, key, value, output; up, down
    "transformer block": (transformer_block, (6, 8), 6, 0),
    # stem; 16 blocks of depthwise and projection convolutions, 15 of them with an expansion; last; classifier:
    # 1 + 16 * 2 + 15 + 1 + 1; each convolution is followed by its batch norm
    "MobileNetV2": (lambda: application("MobileNetV2", alpha=0.35), (32, 32, 3), 53, 52),
    # stem; 16 bottlenecks of three convolutions; four shortcuts; classifier: 1 + 16 * 3 + 4 + 1
    "ResNet50": (lambda: application("ResNet50"), (32, 32, 3), 54, 53),
    # stem; 16 blocks of depthwise, two squeeze-and-excite and projection convolutions, 15 with an expansion; last;
    # classifier: 1 + 16 * 4 + 15 + 1 + 1; squeeze and excite have no batch norm
    "EfficientNetB0": (lambda: application("EfficientNetB0"), (32, 32, 3), 82, 49),
    # stem; 58 dense layers of two convolutions; three transitions; classifier: 1 + 58 * 2 + 3 + 1; the stem's and each
    # dense layer's inner batch norm directly follow a convolution, the others follow a concatenation or a pooling
    "DenseNet121": (lambda: application("DenseNet121"), (32, 32, 3), 121, 59),
}


@pytest.mark.skipif(ENGINE != "tensorflow", reason="eager JAX compiles every operation of every shape: minutes a model")
@pytest.mark.parametrize("name", list(MODELS))
def test_a_model_goes_the_whole_way(name: str, tmp_path: Path) -> None:
    keras.utils.set_random_seed(4)
    make, shape, weights, folded = MODELS[name]
    model = make()
    x = np.random.default_rng(0).normal(size=(4, *shape)).astype("float32")
    qmodel = trainable_keras.calibrate(trainable_keras.wrap(model, RECIPE), [x])
    described = trainable_keras.describe(qmodel)
    assert len([row for row in described.rows if row.target == "Weights"]) == weights
    assert len(described.folded) == folded
    before = state(qmodel)
    qmodel.compile("sgd", "mse")
    # targets that differ by class: softmax passes no gradient that is the same for all of them
    target = np.random.default_rng(1).normal(size=model.compute_output_shape((4, *shape)))
    qmodel.fit(x, target, batch_size=4, verbose=0)
    assert state(qmodel) != before
    deployed = trainable_keras.finalize(qmodel)
    expected = call(qmodel, x)
    assert np.isfinite(expected[0]).all()
    assert same(call(deployed, x), expected)
    trainable_keras.save(deployed, tmp_path / "deployed")
    assert same(call(trainable_keras.load(tmp_path / "deployed", model), x), expected)
    deployed.save(tmp_path / "deployed.keras")
    assert same(call(keras.models.load_model(tmp_path / "deployed.keras"), x), expected)
