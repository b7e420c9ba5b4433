"""Models, recipes and batches that several test modules use."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

import trainable_keras.keras2

kl = tf.keras.layers

LSQ: dict[str, Any] = {
    "schema_version": 1,
    "weights": {"method": "SYMMETRIC", "n_bits": 4, "training_method": "LSQ"},
    "activations": {"method": "UNIFORM", "n_bits": 8, "training_method": "LSQ"},
    "calibration": {"weights": "minmax", "activations": "minmax"},
}
WEIGHTS: dict[str, Any] = {key: value for key, value in LSQ.items() if key != "activations"}


def dqa(**arguments: Any) -> dict[str, Any]:
    """Return a recipe of DQA weights with these arguments."""
    spec = {"method": "SYMMETRIC", "n_bits": 2, "training_method": "DQA", "arguments": arguments}
    return {**LSQ, "weights": spec}


def values(*shape: int) -> np.ndarray:
    return np.random.default_rng(5).normal(size=shape).astype("float32")


def small() -> Any:
    """Return a convolution with batch norm and a dense layer, on 6x6 images of two channels."""
    tf.keras.utils.set_random_seed(11)
    return tf.keras.Sequential(
        [
            tf.keras.Input((6, 6, 2)),
            kl.Conv2D(4, 3, use_bias=False, name="conv"),
            kl.BatchNormalization(name="norm"),
            kl.ReLU(name="relu"),
            kl.Flatten(name="flatten"),
            kl.Dense(3, name="head"),
        ]
    )


def calibrated(recipe: Any = LSQ, model: Any = None) -> tuple[Any, np.ndarray]:
    """Return a wrapped and calibrated model, the small one by default, and a batch for it."""
    x = values(16, 6, 6, 2)
    return trainable_keras.keras2.calibrate(trainable_keras.keras2.wrap(model or small(), recipe), [x]), x


def output(model: Any, x: Any, *, training: bool = False) -> np.ndarray:
    return np.array(model(x, training=training).numpy())


def train(model: Any, x: np.ndarray, *, epochs: int = 2, **options: Any) -> Any:
    """Train towards zeros with `fit` and return its history."""
    model.compile("sgd", "mse", **options)
    return model.fit(x, np.zeros((len(x), 3), np.float32), epochs=epochs, batch_size=8, verbose=0).history
