"""From a float model to a deployed 4-bit one, on real digits, in a few minutes.

Trains a small convolutional network on scikit-learn's digits (1,797 real 8x8 images), wraps it with a recipe,
calibrates, trains it quantized, finalizes it, and shows that the deployed model gives bit for bit what was trained.

    TF_USE_LEGACY_KERAS=1 python examples/quickstart_tfkeras.py [--recipe FILE] [--epochs N] [--seed S] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import trainable_keras.keras2

keras = tf.keras
layers = tf.keras.layers

HERE = Path(__file__).parent
BATCH = 64
Array = NDArray[np.float32]


def digits(seed: int) -> tuple[Array, Array, Array, Array]:
    """Return training images and labels, test images and labels; a quarter of the data is for testing."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16.0).astype("float32").reshape(-1, 8, 8, 1)
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, test_size=0.25, random_state=seed, stratify=labels
    )
    return train_x, train_y, test_x, test_y


def block(name: str, shape: tuple[int, int, int], outputs: int, stride: int = 1) -> keras.Sequential:
    """Return convolution, batch norm and ReLU."""
    convolution = layers.Conv2D(outputs, 3, stride, padding="valid", use_bias=False, name="conv")
    return keras.Sequential(
        [
            keras.Input(shape),
            layers.ZeroPadding2D(1, name="pad"),  # on both sides, also where the stride is 2: PyTorch's padding=1
            convolution,
            layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name="norm"),
            layers.ReLU(name="relu"),
        ],
        name=name,
    )


def network() -> keras.Sequential:
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


class ShiftedImages(keras.utils.Sequence):
    """Batches in a new order each epoch, the images of each shifted by up to one pixel."""

    def __init__(self, x: Array, y: Array, seed: int) -> None:
        self.x, self.y, self.random = x, y, np.random.default_rng(seed)
        self.on_epoch_end()

    def __len__(self) -> int:
        """Return how many batches there are."""
        return (len(self.x) + BATCH - 1) // BATCH

    def __getitem__(self, index: int) -> tuple[Array, Array]:
        """Return one batch."""
        chosen = self.order[index * BATCH : (index + 1) * BATCH]
        shift = self.random.integers(-1, 2, size=2)
        return np.roll(self.x[chosen], shift, axis=(1, 2)), self.y[chosen]

    def on_epoch_end(self) -> None:
        """Shuffle."""
        self.order = self.random.permutation(len(self.x))


def train(model: keras.Model, x: Array, y: Array, *, epochs: int, lr: float, seed: int) -> None:
    """Train with Adam and a cosine schedule; augments by shifting images up to one pixel."""
    data = ShiftedImages(x, y, seed)
    schedule = keras.optimizers.schedules.CosineDecay(lr, epochs * len(data))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(schedule), loss)
    model.fit(data, epochs=epochs, verbose=0)


def accuracy(model: keras.Model, x: Array, y: Array) -> float:
    """Return the share of images that a model gets right."""
    return float((model.predict(x, verbose=0).argmax(1) == y).mean())


def main() -> None:
    """Run the six steps and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--recipe", default=HERE / "recipes" / "w4a4_lsq.yaml", type=Path, help="recipe, YAML or JSON")
    parser.add_argument("--epochs", default=25, type=int, help="epochs of quantized training (float training takes 30)")
    parser.add_argument("--seed", default=0, type=int, help="seed of data split, initialization and order")
    parser.add_argument("--out", default="quickstart_tfkeras.json", type=Path, help="where the figures go")
    options = parser.parse_args()

    started = time.perf_counter()
    keras.utils.set_random_seed(options.seed)
    train_x, train_y, test_x, test_y = digits(options.seed)

    model = network()
    train(model, train_x, train_y, epochs=30, lr=3e-3, seed=options.seed)

    qmodel = trainable_keras.keras2.wrap(model, options.recipe)
    trainable_keras.keras2.calibrate(qmodel, np.array_split(train_x, -(-len(train_x) // 256)))
    calibrated_accuracy = accuracy(qmodel, test_x, test_y)
    train(qmodel, train_x, train_y, epochs=options.epochs, lr=1e-3, seed=options.seed + 1)
    deployed = trainable_keras.keras2.finalize(qmodel)

    difference = float(np.abs(deployed.predict(test_x, verbose=0) - qmodel.predict(test_x, verbose=0)).max())
    figures = {
        "float_accuracy": accuracy(model, test_x, test_y),
        "calibrated_accuracy": calibrated_accuracy,
        "trained_accuracy": accuracy(qmodel, test_x, test_y),
        "deployed_accuracy": accuracy(deployed, test_x, test_y),
        "max_abs_difference": difference,
        "seed": options.seed,
    }
    options.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(trainable_keras.keras2.describe(deployed))
    print()
    for name, value in figures.items():
        print(f"{name:22}{value:10.4f}" if isinstance(value, float) else f"{name:22}{value:10d}")
    print(f"\n{options.out} written; {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
