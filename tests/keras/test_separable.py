"""Separable convolutions as two layers with a quantizer between them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.keras.framework import FRAMEWORK, keras, kl, numpy, tensor
from tests.keras.models import vectors
from trainable_keras import calibrate, finalize, load, save, wrap
from trainable_keras.graph import layers_within
from trainable_keras.parts import KerasHolder, key_of
from trainable_keras.separable import split

INTEGERS = {
    "bias": "int32",
    "weights": {"method": "SYMMETRIC", "n_bits": 8, "training_method": "STE"},
    "activations": {"method": "SYMMETRIC", "n_bits": 8, "training_method": "STE", "placement": "integer"},
}


def model(shape: tuple[int, ...], layer: Any, **options: Any) -> Any:
    """Return a model that calls a separable convolution twice, once in a model inside, with a batch norm behind."""
    keras.utils.set_random_seed(3)
    shared = layer(2, 3, padding="same", depth_multiplier=2, name="shared", **options)
    given = keras.Input(shape)
    inner = keras.Input((*shape[:-1], 2))
    inside = keras.Model(inner, layer(3, 3, use_bias=False, activation="relu", name="inside")(inner), name="inner")
    x = kl.BatchNormalization(name="norm")(shared(shared(given)))
    return keras.Model(given, inside(x))


def kinds(given: Any) -> list[str]:
    return [type(each).__name__ for each in layers_within(given)]


@pytest.mark.parametrize(
    ("shape", "layer"), [((8, 8, 2), kl.SeparableConv2D), ((8, 2), kl.SeparableConv1D)], ids=["2D", "1D"]
)
def test_two_layers_compute_what_one_did(shape: tuple[int, ...], layer: Any) -> None:
    float_model = model(shape, layer, dilation_rate=2)
    before, x = kinds(float_model), tensor(vectors(3, *shape))
    found = split(FRAMEWORK, float_model)
    assert kinds(float_model) == before
    assert not any(kind.startswith("Separable") for kind in kinds(found))
    names = {each.name for each in layers_within(found)}
    assert {"shared", "shared_depthwise", "inside", "inside_depthwise"} <= names
    np.testing.assert_allclose(numpy(found(x)), numpy(float_model(x)), rtol=2**-18, atol=2**-20)
    assert len(found.weights) == len(float_model.weights)


def test_a_model_without_them_is_itself() -> None:
    float_model = keras.Sequential([keras.Input((4,)), kl.Dense(2)])
    assert split(FRAMEWORK, float_model) is float_model


def test_integers_have_a_quantizer_between_and_a_file_is_read_again(tmp_path: Any) -> None:
    float_model, x = model((8, 8, 2), kl.SeparableConv2D), vectors(4, 8, 8, 2)
    qmodel = calibrate(wrap(float_model, INTEGERS), [x])
    held = {key_of(each) for each in layers_within(qmodel) if isinstance(each, KerasHolder)}
    assert {"shared_depthwise: output", "inner.inside_depthwise: output"} <= held
    save(qmodel, tmp_path / "model.npz")
    again = load(tmp_path / "model.npz", float_model)
    np.testing.assert_array_equal(numpy(again(tensor(x))), numpy(qmodel(tensor(x))))
    finalize(qmodel)


def test_without_integers_they_stay_as_they_are() -> None:
    recipe = {**INTEGERS, "bias": "float", "activations": {**INTEGERS["activations"], "placement": "outputs"}}
    assert any(
        each.startswith("Separable") for each in _plain_kinds(wrap(model((8, 8, 2), kl.SeparableConv2D), recipe))
    )


def _plain_kinds(given: Any) -> list[str]:
    return [cls.__name__ for each in layers_within(given) for cls in type(each).__mro__]
