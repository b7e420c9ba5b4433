"""From a float model to a deployed 4-bit one in Keras 3 or Keras 2, on real digits, in two minutes.

Trains a small convolutional network in float, wraps it with a recipe, calibrates it, trains it quantized, finalizes it,
and shows that the deployed model gives bit for bit what was trained.

    KERAS_BACKEND=tensorflow python examples/quickstart_keras.py [--recipe FILE] [--epochs N] [--seed S] [--out FILE]

TF_USE_LEGACY_KERAS=1 in place of KERAS_BACKEND runs it on Keras 2.
"""

from __future__ import annotations

import os
import time
from typing import Any

import digits
import numpy as np
from numpy.typing import NDArray

if os.environ.get("TF_USE_LEGACY_KERAS") == "1":
    import tf_keras as keras
else:
    import keras

import trainable_keras

layers = keras.layers


def block(name: str, shape: tuple[int, int, int], outputs: int, stride: int = 1) -> Any:
    """Return convolution, batch norm and ReLU."""
    return keras.Sequential(
        [
            keras.Input(shape),
            layers.ZeroPadding2D(1, name="pad"),  # on all sides, also where the stride is 2: PyTorch's padding=1
            layers.Conv2D(outputs, 3, stride, padding="valid", use_bias=False, name="conv"),
            layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name="norm"),
            layers.ReLU(name="relu"),
        ],
        name=name,
    )


def network() -> Any:
    """Return the float model."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            block("stem", (8, 8, 1), 16),
            block("body1", (8, 8, 16), 32, stride=2),
            block("body2", (4, 4, 32), 32),
            layers.GlobalAveragePooling2D(name="pool"),
            layers.Flatten(name="flatten"),
            layers.Dense(10, name="head"),
        ]
    )


def train(model: Any, data: digits.Digits, *, epochs: int, lr: float, seed: int) -> None:
    """Train with Adam and a cosine schedule."""
    steps = digits.batches_per_epoch(data.train_x)
    schedule = keras.optimizers.schedules.CosineDecay(lr, epochs * steps)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(schedule), loss)
    batches = digits.batches(data.train_x, data.train_y, epochs=epochs, seed=seed)
    with_channels = ((images[..., np.newaxis], labels) for images, labels in batches)
    model.fit(with_channels, steps_per_epoch=steps, epochs=epochs, shuffle=False, verbose=0)  # shuffled already


def outputs(model: Any, x: digits.Images) -> NDArray[np.float32]:
    """Return what a model gives when it is called directly.

    On JAX, `predict` compiles the whole model, and the compiler may round a value that lies between two steps of a grid
    to the other one.
    """
    y = model(x, training=False)
    return keras.ops.convert_to_numpy(y) if hasattr(keras, "ops") else y.numpy()


def accuracy(model: Any, x: digits.Images, y: digits.Labels) -> float:
    """Return the share of images that a model gets right."""
    return float((outputs(model, x).argmax(1) == y).mean())


def main() -> None:
    """Run the six steps and report."""
    options = digits.options(__doc__, "quickstart_keras.json", "w4a4_lsq.yaml")
    started = time.perf_counter()
    keras.utils.set_random_seed(options.seed)
    data = digits.load(options.seed)
    train_x, test_x, test_y = data.train_x[..., np.newaxis], data.test_x[..., np.newaxis], data.test_y

    model = network()
    train(model, data, epochs=digits.FLOAT_EPOCHS, lr=5e-3, seed=options.seed)

    qmodel = trainable_keras.wrap(model, options.recipe)
    trainable_keras.calibrate(qmodel, np.array_split(train_x, -(-len(train_x) // 256)))
    calibrated_accuracy = accuracy(qmodel, test_x, test_y)
    train(qmodel, data, epochs=options.epochs, lr=1e-3, seed=options.seed + 1)
    deployed = trainable_keras.finalize(qmodel)

    difference = float(np.abs(outputs(deployed, test_x) - outputs(qmodel, test_x)).max())
    figures = {
        "float_accuracy": accuracy(model, test_x, test_y),
        "calibrated_accuracy": calibrated_accuracy,
        "trained_accuracy": accuracy(qmodel, test_x, test_y),
        "deployed_accuracy": accuracy(deployed, test_x, test_y),
        "max_abs_difference": difference,
        "seed": options.seed,
    }
    digits.report(figures, trainable_keras.describe(deployed), options.out, time.perf_counter() - started)


if __name__ == "__main__":
    main()
