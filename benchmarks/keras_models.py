"""The Keras models whose training steps are measured: a small convolutional network and a transformer block."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
from tensorflow.keras import layers


def cnn(width: int) -> Any:
    """Return a convolutional network of five layers for images of shape (32, 32, 3), ten classes."""
    x = image = tf.keras.Input((32, 32, 3))
    for index, (channels, stride) in enumerate([(1, 1), (2, 2), (2, 1), (4, 2)]):
        x = layers.Conv2D(channels * width, 3, stride, "same", use_bias=False, name=f"conv{index}")(x)
        x = layers.BatchNormalization(name=f"norm{index}")(x)
        x = layers.ReLU(name=f"relu{index}")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return tf.keras.Model(image, layers.Dense(10, name="head")(x))


def transformer(length: int = 128, width: int = 256, heads: int = 4, hidden: int = 1024) -> Any:
    """Return a block of attention and a feed-forward part, each behind a layer norm, with residuals."""
    x = sequence = tf.keras.Input((length, width))
    normed = layers.LayerNormalization(name="norm1")(x)
    x = layers.Add(name="add1")([x, layers.MultiHeadAttention(heads, width // heads, name="attention")(normed, normed)])
    y = layers.LayerNormalization(name="norm2")(x)
    y = layers.Dense(hidden, activation="gelu", name="up")(y)
    return tf.keras.Model(sequence, layers.Add(name="add2")([x, layers.Dense(width, name="down")(y)]))


def cases() -> dict[str, tuple[Any, Any]]:
    """Return each model with a batch for it."""
    return {
        "CNN, 64 channels, batch 8": (cnn(64), tf.random.normal((8, 32, 32, 3))),
        "CNN, 32 channels, batch 32": (cnn(32), tf.random.normal((32, 32, 32, 3))),
        "transformer block, batch 8, length 128": (transformer(), tf.random.normal((8, 128, 256))),
    }
