"""Models that people use, made by either Keras, and what of each is quantized, counted by hand."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
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


def shallow(name: str, builder: str, arguments: Sequence[Any], keras: Any) -> Any:
    """Return a model of the family of ``keras.applications.<name>`` with fewer blocks, so that it is tried in seconds.

    `builder` is the function of its module that the application calls with its own numbers of blocks.
    """
    build = getattr(inspect.getmodule(getattr(keras.applications, name)), builder)
    return build(*arguments, weights=None, input_shape=(32, 32, 3), classes=CLASSES)


def resnet(keras: Any) -> Any:
    """Return two stages of two bottlenecks each."""
    module = inspect.getmodule(keras.applications.ResNet50)
    stage = getattr(module, "stack_residual_blocks_v1", None) or module.stack1  # Keras 3's name, and Keras 2's

    def stages(x: Any) -> Any:
        return stage(stage(x, 64, 2, stride1=1, name="conv2"), 128, 2, name="conv3")

    return shallow("ResNet50", "ResNet", (stages, False, True, "resnet"), keras)


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
    # stem; 4 bottlenecks of three convolutions; two shortcuts; classifier: 1 + 4 * 3 + 2 + 1
    "ResNet": RealModel(resnet, *_IMAGES, 16, 15),
    # half as deep as B0: stem; 10 blocks of depthwise, two squeeze-and-excite and projection convolutions, 9 with an
    # expansion; last; classifier: 1 + 10 * 4 + 9 + 1 + 1; squeeze and excite have no batch norm
    "EfficientNet": RealModel(partial(shallow, "EfficientNetB0", "EfficientNet", (1.0, 0.5, 32)), *_IMAGES, 52, 31),
    # stem; 9 dense layers of two convolutions; three transitions; classifier: 1 + 9 * 2 + 3 + 1; the stem's and each
    # dense layer's inner batch norm directly follow a convolution, the others follow a concatenation or a pooling
    "DenseNet": RealModel(partial(shallow, "DenseNet121", "DenseNet", ([2, 3, 2, 2],)), *_IMAGES, 23, 10),
}
