# ruff: noqa: D103, PLR2004, S101 - a test's name says what it checks
"""A recipe chooses the method by its name, and it trains in Keras."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from trainable_core import QuantizationRecipe

keras = pytest.importorskip("keras", reason="needs Keras 3")
trainable_keras = pytest.importorskip("trainable_keras", reason="needs trainable-keras")

RECIPE = {
    "weights": {"method": "SYMMETRIC", "n_bits": 3, "training_method": "EWGS", "arguments": {"delta": 0.1}},
    "activations": {"method": "UNIFORM", "n_bits": 4, "training_method": "EWGS"},
}


def test_a_recipe_trains_with_ewgs_on_digits() -> None:
    keras.utils.set_random_seed(0)
    digits = load_digits()
    images, labels = (digits.data / 16).astype(np.float32), digits.target
    layers = [keras.Input((64,)), keras.layers.Dense(32, activation="relu"), keras.layers.Dense(10)]
    qmodel = trainable_keras.wrap(keras.Sequential(layers), QuantizationRecipe.model_validate(RECIPE))
    trainable_keras.calibrate(qmodel, [images[:256]])
    thresholds = [variable for variable in qmodel.trainable_variables if "threshold" in variable.path]
    before = [np.array(variable) for variable in thresholds]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    qmodel.compile(optimizer=keras.optimizers.Adam(1e-2), loss=loss)
    qmodel.fit(images[:1500], labels[:1500], batch_size=500, epochs=20, verbose=0)
    assert before
    assert all((np.array(variable) != old).any() for variable, old in zip(thresholds, before, strict=True))
    deployed = trainable_keras.finalize(qmodel)
    logits = np.array(deployed(images[1500:], training=False))
    np.testing.assert_array_equal(logits, np.array(qmodel(images[1500:], training=False)))
    assert (logits.argmax(1) == labels[1500:]).mean() > 0.8  # chance is 0.1
