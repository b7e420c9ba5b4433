# ruff: noqa: ANN001, ANN201, D103, PLR2004, S101 - a test's name says what it checks
"""A recipe chooses the methods by their names, and they train in Keras."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from trainable_core import QuantizationRecipe

keras = pytest.importorskip("keras", reason="needs Keras 3")
trainable_keras = pytest.importorskip("trainable_keras", reason="needs trainable-keras")

METHODS = {
    "LOG_THRESHOLD": {"method": "POWER_OF_TWO", "training_method": "LOG_THRESHOLD"},
    "DSQ": {"method": "SYMMETRIC", "training_method": "DSQ", "arguments": {"soft_steps": 40, "alpha_weight": 0.1}},
}


@pytest.mark.parametrize("name", METHODS)
def test_a_recipe_trains_on_digits(name):
    keras.utils.set_random_seed(0)
    digits = load_digits()
    images, labels = (digits.data / 16).astype(np.float32), digits.target
    layers = [keras.Input((64,)), keras.layers.Dense(32, activation="relu"), keras.layers.Dense(10)]
    recipe = {"weights": {**METHODS[name], "n_bits": 3}, "activations": {**METHODS[name], "n_bits": 4}}
    qmodel = trainable_keras.wrap(keras.Sequential(layers), QuantizationRecipe.model_validate(recipe))
    trainable_keras.calibrate(qmodel, [images[:256]])
    own = "log2_threshold" if name == "LOG_THRESHOLD" else "alpha"
    learned = [variable for variable in qmodel.trainable_variables if variable.path.endswith(own)]
    before = [np.array(variable) for variable in learned]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    qmodel.compile(optimizer=keras.optimizers.Adam(1e-2), loss=loss)
    qmodel.fit(images[:1500], labels[:1500], batch_size=500, epochs=20, verbose=0)
    assert before
    assert all((np.array(variable) != old).any() for variable, old in zip(learned, before, strict=True))
    deployed = trainable_keras.finalize(qmodel)
    logits = np.array(deployed(images[1500:], training=False))
    np.testing.assert_array_equal(logits, np.array(qmodel(images[1500:], training=False)))
    assert (logits.argmax(1) == labels[1500:]).mean() > 0.8  # chance is 0.1
