"""Models that people use, made by either Keras, and what of each is quantized, counted by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

RECIPE = {
    "schema_version": 1,
    "weights": {"method": "SYMMETRIC", "n_bits": 4, "training_method": "LSQ"},
    "activations": {"method": "UNIFORM", "n_bits": 8, "training_method": "LSQ"},
    "calibration": {"weights": "minmax", "activations": "minmax"},
}
CLASSES = 4
BATCH = 4


def transformer_block(keras: Any) -> Any:
    """Return attention and a two-layer perceptron, each with its shortcut and normalization."""
    layers = keras.layers
    given = keras.Input((6, 8))
    attended = layers.MultiHeadAttention(2, 4, name="attention")(given, given)
    x = layers.LayerNormalization()(given + attended)
    hidden = layers.Dense(8, name="down")(layers.Dense(16, activation="gelu", name="up")(x))
    return keras.Model(given, layers.LayerNormalization()(x + hidden))


def application(name: str, keras: Any, **arguments: Any) -> Any:
    """Return a model of ``keras.applications`` for small images, its weights random."""
    return getattr(keras.applications, name)(weights=None, input_shape=(32, 32, 3), classes=CLASSES, **arguments)


@dataclass(frozen=True)
class RealModel:
    """How a model is made, and how many of its weights are quantized and of its batch norms folded."""

    make: Callable[[Any], Any]
    shape: tuple[int, ...]
    outputs: tuple[int, ...]
    weights: int
    folded: int

    def batch(self) -> np.ndarray:
        """Return the model's input."""
        return np.random.default_rng(0).normal(size=(BATCH, *self.shape)).astype("float32")

    def target(self) -> np.ndarray:
        """Return targets that differ by class: softmax passes no gradient that is the same for all of them."""
        return np.random.default_rng(1).normal(size=(BATCH, *self.outputs)).astype("float32")


_IMAGES = ((32, 32, 3), (CLASSES,))

MODELS: dict[str, RealModel] = {
    # query, key, value, output; up, down
    "transformer block": RealModel(transformer_block, (6, 8), (6, 8), 6, 0),
    # stem; 17 blocks of depthwise and projection convolutions, 16 of them with an expansion; last; classifier:
    # 1 + 17 * 2 + 16 + 1 + 1; each convolution is followed by its batch norm
    "MobileNetV2": RealModel(partial(application, "MobileNetV2", alpha=0.35), *_IMAGES, 53, 52),
    # stem; 16 bottlenecks of three convolutions; four shortcuts; classifier: 1 + 16 * 3 + 4 + 1
    "ResNet50": RealModel(partial(application, "ResNet50"), *_IMAGES, 54, 53),
    # stem; 16 blocks of depthwise, two squeeze-and-excite and projection convolutions, 15 with an expansion; last;
    # classifier: 1 + 16 * 4 + 15 + 1 + 1; squeeze and excite have no batch norm
    "EfficientNetB0": RealModel(partial(application, "EfficientNetB0"), *_IMAGES, 82, 49),
    # stem; 58 dense layers of two convolutions; three transitions; classifier: 1 + 58 * 2 + 3 + 1; the stem's and each
    # dense layer's inner batch norm directly follow a convolution, the others follow a concatenation or a pooling
    "DenseNet121": RealModel(partial(application, "DenseNet121"), *_IMAGES, 121, 59),
}
