"""Batch norm goes into the layer before it, or says why it stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import trainable_keras.keras2
from tests.tfkeras.models import WEIGHTS, kl, output, values
from trainable_keras.keras2.folding import folded_copy

MAKE: dict[str, Any] = {
    "Conv1D": (lambda: kl.Conv1D(4, 2), (6, 2)),
    "Conv2D": (lambda: kl.Conv2D(4, 3), (6, 6, 2)),
    "Conv2D, groups": (lambda: kl.Conv2D(4, 3, use_bias=False, groups=2), (6, 6, 2)),
    "DepthwiseConv2D": (lambda: kl.DepthwiseConv2D(3, depth_multiplier=2), (6, 6, 2)),
    "SeparableConv2D": (lambda: kl.SeparableConv2D(4, 3), (6, 6, 2)),
    "Conv2DTranspose": (lambda: kl.Conv2DTranspose(4, 3, strides=2), (6, 6, 2)),
    "Dense": (lambda: kl.Dense(4), (6, 6, 2)),
}


def with_norm(*before: Any, shape: tuple[int, ...] = (4, 4, 4), **norm: Any) -> Any:
    layers = [tf.keras.Input(shape), *before, kl.BatchNormalization(name="norm", epsilon=0.01, **norm)]
    model = tf.keras.Sequential(layers)
    random = np.random.default_rng(0)
    for variable in model.get_layer("norm").weights:
        variable.assign(random.uniform(0.5, 2, variable.shape))
    return model


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("name", list(MAKE))
def test_folding_keeps_the_function(name: str, scale: bool) -> None:
    make, shape = MAKE[name]
    layer = make()
    model = with_norm(layer, shape=shape, scale=scale)
    x = values(3, *shape)
    expected, norm = output(model, x), model.get_layer("norm")
    actual = np.array(folded_copy(layer, norm, "layer")(x).numpy())
    # float32 sums of up to 36 products of numbers below 8, and the normalization's own ten operations
    assert np.abs(actual - expected).max() <= (36 + 10) * 2.0**-24 * 8 * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("name", list(MAKE))
def test_the_wrapped_model_says_so(name: str) -> None:
    make, shape = MAKE[name]
    layer = make()
    description = trainable_keras.keras2.describe(trainable_keras.keras2.wrap(with_norm(layer, shape=shape), WEIGHTS))
    assert description.folded == {"norm": layer.name}
    assert "norm" not in description.left_out


def shared() -> Any:
    given = tf.keras.Input((4, 4, 4))
    conv = kl.Conv2D(4, 1)
    return tf.keras.Model(given, kl.BatchNormalization(name="norm")(conv(conv(given))))


def two_users() -> Any:
    given = tf.keras.Input((4, 4, 4))
    y = kl.Conv2D(4, 1)(given)
    return tf.keras.Model(given, kl.Add()([kl.BatchNormalization(name="norm")(y), y]))


def function_before() -> Any:
    given = tf.keras.Input((4, 4, 4))
    return tf.keras.Model(given, kl.BatchNormalization(name="norm")(tf.nn.relu(kl.Conv2D(4, 1)(given))))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: with_norm(kl.Conv2D(4, 1, activation="relu")), "has an activation"),
        (lambda: with_norm(kl.MaxPooling2D(1)), "MaxPooling2D"),
        (lambda: with_norm(kl.Conv2D(4, 1), axis=1), "channels are not the layer's"),
        (shared, "called more than once"),
        (two_users, "other users"),
        (function_before, "no layer"),
    ],
)
def test_what_stays_says_why(make: Any, reason: str) -> None:
    description = trainable_keras.keras2.describe(trainable_keras.keras2.wrap(make(), WEIGHTS))
    assert reason in description.left_out["norm"]
    assert description.folded == {}


def test_a_recipe_may_leave_it() -> None:
    qmodel = trainable_keras.keras2.wrap(with_norm(kl.Conv2D(4, 1)), {**WEIGHTS, "fold_batch_norm": False})
    assert trainable_keras.keras2.describe(qmodel).folded == {}
    assert isinstance(qmodel.get_layer("norm"), kl.BatchNormalization)
