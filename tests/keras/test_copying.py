"""Copies of models: every layer once, under its full name, with weights of its own; what can't be copied is named."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.keras.framework import FRAMEWORK, functions, keras, kl, numpy, tensor
from tests.keras.models import call, dense, ready, same, spec, vectors, weights_only
from trainable_core.errors import ModelError, QuantizerStateError
from trainable_keras import QuantizationWrapper, describe, finalize, wrap
from trainable_keras.copying import copy_model, join, made_again, own_variables
from trainable_keras.graph import attributes, children, layers_within


@keras.saving.register_keras_serializable(package="tests")
class Holding(kl.Layer):
    """Layers in attributes, lists, tuples and dictionaries, and a weight that is in no layer."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.head = kl.Dense(4)
        self.blocks = [kl.Dense(4), (kl.Dense(4),)]
        self.named = {"one": kl.Dense(4), "number": 3}

    def build(self, shape: Any) -> None:
        """Make the weight; the layers make theirs when they are called first."""
        self.factor = self.add_weight(shape=(4,), name="factor", initializer="ones")
        super().build(shape)

    def call(self, x: Any) -> Any:
        """Return the output."""
        x = self.blocks[1][0](self.blocks[0](self.head(x)))
        return self.named["one"](x) * self.factor


NAMES = ["head", "blocks.0", "blocks.1.0", "named.one"]


def holding() -> Holding:
    keras.utils.set_random_seed(0)
    model = Holding()
    model(tensor(np.zeros((1, 4))))
    model.factor.assign([1.0, 2.0, 3.0, 4.0])
    return model


def test_layers_are_found_by_name_in_lists_tuples_and_dictionaries() -> None:
    model = holding()
    assert [name for name, _ in children(model)] == NAMES
    assert {"head", "blocks", "named", "factor"} <= {name for name, _ in attributes(model)}


def test_own_variables_are_those_of_no_layer_inside() -> None:
    model = holding()
    assert [id(each) for each in own_variables(model)] == [id(model.factor)]


def test_layers_in_lists_tuples_and_dictionaries_are_copied_and_wrapped() -> None:
    model = holding()
    qmodel = ready(model, weights_only())
    assert [row.layer for row in describe(qmodel).rows] == NAMES
    assert all(isinstance(layer, QuantizationWrapper) for _, layer in children(qmodel))
    assert {id(each) for each in qmodel.variables} & {id(each) for each in model.variables} == set()
    assert qmodel.named["number"] == 3
    assert np.array_equal(numpy(qmodel.factor), numpy(model.factor))
    assert same(call(finalize(qmodel), vectors(8, 4)), call(qmodel, vectors(8, 4)))


def test_a_plain_copy_gives_the_same_outputs() -> None:
    model = holding()
    copied = copy_model(FRAMEWORK, model)
    assert {id(each) for each in layers_within(copied)} & {id(each) for each in layers_within(model)} == set()
    assert same(call(copied, vectors(8, 4)), call(model, vectors(8, 4)))


def test_operations_of_a_nested_model_have_its_name() -> None:
    given = keras.Input((4,))
    inner = keras.Model(given, functions.relu(kl.Dense(4, name="fc")(given)), name="inner")
    model = keras.Sequential([keras.Input((4,)), inner])
    rule = {"match": {"name": "inner.*", "op": "activation"}, "activations": spec("LSQ")}
    rows = [row for row in describe(wrap(model, weights_only(rules=[rule]))).rows if row.target == "Activation"]
    assert [row.tensor for row in rows] == ["input 0"]
    assert rows[0].layer.startswith("inner.")
    assert "relu" in rows[0].layer


def test_a_tensor_that_goes_into_an_operation_twice_has_one_holder() -> None:
    given = keras.Input((4,))
    model = keras.Model(given, kl.Dense(3)(given * given))
    rule = {"match": {"op": "mul"}, "activations": spec("LSQ", "UNIFORM")}
    qmodel = ready(model, weights_only(rules=[rule]), vectors(8, 4))
    assert [row.tensor for row in describe(qmodel).rows if row.target == "Activation"] == ["input 0"]
    assert same(call(finalize(qmodel), vectors(8, 4)), call(qmodel, vectors(8, 4)))


@pytest.mark.parametrize("raised", [ValueError("no"), QuantizerStateError("q", "no")], ids=["theirs", "ours"])
def test_what_keras_raises_names_the_layer_and_our_own_errors_pass(raised: Exception) -> None:
    seen = ModelError if isinstance(raised, ValueError) else QuantizerStateError
    with pytest.raises(seen) as caught, made_again(SimpleNamespace(name="fc"), "a.fc"):
        raise raised
    assert ("'a.fc' (SimpleNamespace)" in str(caught.value)) is (seen is ModelError)


def test_what_can_not_be_copied_names_the_model() -> None:
    class Broken(FRAMEWORK.copier):
        def fill(self, value: Any, made: Any) -> None:
            message = "nothing there"
            raise KeyError(message)

    model = dense()
    with pytest.raises(ModelError, match=rf"'{model.name}' .*can't be copied: .*nothing there"):
        Broken(FRAMEWORK).copy(model)


def test_names_are_joined_with_a_dot() -> None:
    assert [join("", "a"), join("a", "b")] == ["a", "a.b"]
