"""Which layers are of which kind, and what a user's own layer needs to be quantized."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as kl

from tests.keras.models import call, ready, recipe, same, vectors, weights_only
from trainable_core.recipe.layers import OPS
from trainable_keras import describe, finalize, register_layer, wrap
from trainable_keras.keras3 import layers
from trainable_keras.keras3.layers import find_weight, kind_of, layer_info
from trainable_keras.layers import KINDS, LayerTypes


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let a test register layers that the next one doesn't know."""
    monkeypatch.setattr(layers, "TYPES", LayerTypes(keras.layers))
    return


def test_every_kind_is_a_layer_of_keras_and_of_a_known_op() -> None:
    older = {"ThresholdedReLU", "RMSNormalization"}  # not in every Keras 3
    assert [name for name in KINDS if not hasattr(keras.layers, name)] in ([], ["ThresholdedReLU"], sorted(older))
    assert {kind.op for kind in KINDS.values()} <= set(OPS)


def test_a_subclass_of_a_known_type_is_of_its_kind() -> None:
    class Mine(kl.Dense):
        pass

    assert kind_of(Mine(3)) == kind_of(kl.Dense(3))


def test_a_namesake_of_a_known_type_is_not() -> None:
    class Dense(kl.Layer):
        pass

    assert kind_of(Dense()) is None


@pytest.mark.parametrize(
    ("equation", "axis"),
    [("ab,bc->ac", 1), ("abc,cde->abde", 2), ("abc,dc->abd", 0)],
)
def test_the_channels_of_an_einsum_follow_its_equation(equation: str, axis: int) -> None:
    assert kind_of(kl.EinsumDense(equation, (3,))).weights == {"kernel": axis}


def test_an_einsum_without_output_channels_is_left_out() -> None:
    given = keras.Input((4, 3))
    model = keras.Model(given, kl.EinsumDense("abc,c->ab", (4,), name="sum")(given))
    assert "no axis of its kernel" in describe(wrap(model, weights_only())).left_out["sum"]


def test_weights_with_adapters_are_left_out() -> None:
    model = keras.Sequential([keras.Input((4,)), kl.Dense(3, name="fc")])
    model.layers[0].enable_lora(2)
    assert "LoRA" in describe(wrap(model, weights_only())).left_out["fc"]


class Scaled(kl.Layer):
    """A linear layer of one's own, with a second weight."""

    def __init__(self, units: int = 3, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.units = units

    def build(self, shape: Any) -> None:
        """Make the weights."""
        self.matrix = self.add_weight(shape=(self.units, shape[-1]), name="matrix")
        self.factor = self.add_weight(shape=(self.units,), name="factor", initializer="ones")

    def call(self, x: Any) -> Any:
        """Return the scaled product."""
        return keras.ops.matmul(x, keras.ops.transpose(self.matrix)) * self.factor


def scaled() -> keras.Model:
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((4,)), Scaled(name="mine")])


def test_a_layer_of_ones_own_is_quantized_once_registered(registered: None) -> None:
    assert "no known kind" in describe(wrap(scaled(), weights_only())).left_out["mine"]
    register_layer(Scaled, "linear", {"matrix": 0}, ("x",))
    qmodel = ready(scaled(), recipe("LSQ"), vectors(8, 4))
    assert [(row.tensor, row.channels_axis) for row in describe(qmodel).rows] == [("matrix", 0), ("x", None)]
    assert same(call(finalize(qmodel), vectors(8, 4)), call(qmodel, vectors(8, 4)))
    (quantized,) = qmodel.layers[0].get_quantized_weights().values()
    assert not np.array_equal(
        keras.ops.convert_to_numpy(quantized), keras.ops.convert_to_numpy(qmodel.layers[0].matrix)
    )


def test_subclasses_are_meant_too(registered: None) -> None:
    class Special(Scaled):
        pass

    register_layer(Scaled, "linear", {"matrix": 0})
    assert kind_of(Special()).weights == {"matrix": 0}


def test_a_registered_kind_wins_over_kerass_own(registered: None) -> None:
    class Flat(kl.Dense):
        pass

    register_layer(Flat, "other")
    assert (kind_of(Flat(3)).op, dict(kind_of(Flat(3)).weights)) == ("other", {})


def test_a_negative_axis_counts_from_the_end() -> None:
    layer = kl.Conv2D(4, 3)
    layer.build((None, 6, 6, 2))
    info = layer_info("conv", layer, kind_of(layer))
    assert (info.op, info.weights["kernel"].shape, info.weights["kernel"].channels_axis) == ("conv", (3, 3, 2, 4), 3)


def test_a_weight_is_found_through_sublayers_or_not_at_all() -> None:
    layer = kl.LSTM(3)
    layer.build((None, 5, 4))
    assert find_weight(layer, "cell.kernel") is layer.cell.kernel
    assert find_weight(layer, "cell.kernal") is None
    assert find_weight(layer, "cell") is None
