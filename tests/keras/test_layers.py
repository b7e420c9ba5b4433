"""Which layers are of which kind, and what a user's own layer needs to be quantized."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.keras.framework import FRAMEWORK, KERAS_VERSION, functions, keras, kl, numpy, only_keras, tensor
from tests.keras.models import call, ready, recipe, same, vectors, weights_only
from trainable_core.errors import ModelError
from trainable_core.recipe.layers import OPS
from trainable_keras import describe, finalize, register_layer, wrap
from trainable_keras.layers import KINDS

find_weight, kind_of = FRAMEWORK.types.find_weight, FRAMEWORK.kind


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test register layers that the next test doesn't know."""
    monkeypatch.setattr(FRAMEWORK.types, "_registered", {})


def test_every_kind_is_a_layer_of_keras_and_of_a_known_op() -> None:
    missing = [name for name in KINDS if not hasattr(kl, name)]
    if KERAS_VERSION == 2:
        assert missing == ["RMSNormalization"]
    else:  # neither is in every version of Keras 3
        assert missing in ([], ["ThresholdedReLU"], ["RMSNormalization", "ThresholdedReLU"])
    assert {kind.op for kind in KINDS.values()} <= set(OPS)


def test_a_subclass_of_a_known_type_is_of_its_kind() -> None:
    class Mine(kl.Dense):
        pass

    assert kind_of(Mine(3)) == kind_of(kl.Dense(3))
    assert [FRAMEWORK.types.stock(layer) for layer in (Mine(3), kl.Dense(3))] == ["", "Dense"]


def test_each_keras_has_its_own_name_for_a_depthwise_kernel() -> None:
    name = {2: "depthwise_kernel", 3: "kernel"}[KERAS_VERSION]
    for layer in (kl.DepthwiseConv1D(3), kl.DepthwiseConv2D(3)):
        assert dict(kind_of(layer).weights) == {name: -2}


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


@pytest.mark.filterwarnings("ignore::trainable_core.errors.NothingQuantizedWarning")  # that is what it is about
def test_an_einsum_without_output_channels_is_left_out() -> None:
    given = keras.Input((4, 3))
    model = keras.Model(given, kl.EinsumDense("abc,c->ab", (4,), name="sum")(given))
    assert "no axis of its kernel" in describe(wrap(model, weights_only())).left_out["sum"]


@only_keras(3, "LoRA adapters")
@pytest.mark.filterwarnings("ignore::trainable_core.errors.NothingQuantizedWarning")  # that is what it is about
def test_weights_with_adapters_are_left_out() -> None:
    model = keras.Sequential([keras.Input((4,)), kl.Dense(3, name="fc")])
    model.layers[0].enable_lora(2)
    assert "LoRA" in describe(wrap(model, weights_only())).left_out["fc"]


class Scaled(kl.Layer):
    """A user's linear layer, with a second weight."""

    def __init__(self, units: int = 3, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.units = units

    def get_config(self) -> dict[str, Any]:
        """Return the arguments: Keras 2 does not collect them."""
        return {**super().get_config(), "units": self.units}

    def build(self, shape: Any) -> None:
        """Make the weights."""
        self.matrix = self.add_weight(shape=(self.units, shape[-1]), name="matrix")
        self.factor = self.add_weight(shape=(self.units,), name="factor", initializer="ones")

    def call(self, x: Any) -> Any:
        """Return the scaled product."""
        return functions.matmul(x, functions.transpose(self.matrix)) * self.factor


def scaled() -> keras.Model:
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((4,)), Scaled(name="mine")])


@pytest.mark.filterwarnings("ignore::trainable_core.errors.NothingQuantizedWarning")  # that is what it is about
@pytest.mark.usefixtures("forgotten")
def test_a_users_layer_is_quantized_once_it_is_registered() -> None:
    assert "no known kind" in describe(wrap(scaled(), weights_only())).left_out["mine"]
    register_layer(Scaled, "linear", {"matrix": 0}, ("x",))
    qmodel = ready(scaled(), recipe("LSQ"), vectors(8, 4))
    assert [(row.tensor, row.channels_axis) for row in describe(qmodel).rows] == [("matrix", 0), ("x", None)]
    assert same(call(finalize(qmodel), vectors(8, 4)), call(qmodel, vectors(8, 4)))
    (quantized,) = qmodel.layers[0].get_quantized_weights().values()
    assert not np.array_equal(numpy(quantized), numpy(qmodel.layers[0].matrix))


@pytest.mark.usefixtures("forgotten")
def test_subclasses_of_a_registered_layer_are_of_its_kind() -> None:
    class Special(Scaled):
        pass

    register_layer(Scaled, "linear", {"matrix": 0})
    assert kind_of(Special()).weights == {"matrix": 0}


@pytest.mark.usefixtures("forgotten")
def test_a_registered_kind_takes_precedence_over_the_table() -> None:
    class Flat(kl.Dense):
        pass

    register_layer(Flat, "other")
    assert (kind_of(Flat(3)).op, dict(kind_of(Flat(3)).weights)) == ("other", {})


def test_a_negative_axis_counts_from_the_end() -> None:
    layer = kl.Conv2D(4, 3)
    layer.build((None, 6, 6, 2))
    info = FRAMEWORK.info("conv", layer, kind_of(layer))
    assert (info.op, info.weights["kernel"].shape, info.weights["kernel"].channels_axis) == ("conv", (3, 3, 2, 4), 3)


def test_a_layer_without_weights_yet_says_so() -> None:
    with pytest.raises(ModelError, match="no weights yet"):
        FRAMEWORK.info("dense", kl.Dense(3), kind_of(kl.Dense(3)))


def test_a_weight_of_an_attention_layer_is_found_by_the_name_of_its_sublayer() -> None:
    attention, query = kl.MultiHeadAttention(2, 3), tensor(np.ones((1, 4, 6)))
    attention(query, query)
    assert find_weight(attention, "query_dense.kernel") is attention.weights[0]  # Keras makes the query's kernel first
    assert find_weight(attention, "query_dense.kernal") is None


def test_a_weight_is_found_through_sublayers_or_not_at_all() -> None:
    layer = kl.LSTM(3)
    layer.build((None, 5, 4))
    assert find_weight(layer, "cell.kernel") is layer.cell.kernel
    assert find_weight(layer, "cell.kernal") is None
    assert find_weight(layer, "cell") is None
