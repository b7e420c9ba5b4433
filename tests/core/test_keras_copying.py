"""Copies of models of a Keras of a few lines."""

import numpy as np
import pytest

from tests.core.toy_keras import Chain, Copier, Dense, Foreign, Layer, Multiply, ReLU, children
from trainable_core.errors import ModelError, QuantizerStateError
from trainable_keras.copying import attributes, check_same_shapes, join, layers_in, made_again, own_variables


class Holding(Layer):
    def __init__(self):
        super().__init__("holding")
        self.head = Dense("head")
        self.blocks = [Dense("first"), (Dense("second"),)]
        self.named = {"one": Dense("third"), "number": 3}
        self._self_account, self._obj_reference_counts, self._layers = [self.head], {}, [self.head]
        self.scale = Foreign().matrix


def plain(layer, name):  # what a replacement that replaces nothing returns
    return None


def test_keras_own_account_is_no_attribute():
    assert [name for name, _ in attributes(Holding())][2:] == ["head", "blocks", "named", "scale"]


def test_names_lead_into_lists_tuples_and_dictionaries():
    holding = Holding()
    every = [holding.head, holding.blocks[0], holding.blocks[1][0], holding.named["one"]]
    held = {id(each) for each in every}
    found = [pair for name, value in attributes(holding) for pair in layers_in(value, name, held)]
    assert found == list(zip(["head", "blocks.0", "blocks.1.0", "named.one"], every, strict=True))
    assert list(layers_in(holding.head, "head", set())) == []  # what Keras doesn't know of doesn't count


def test_own_variables_are_those_of_no_layer_inside():
    holding = Holding()
    assert own_variables(holding, holding.direct) == [holding.scale]


def test_a_layer_is_copied_once_however_often_it_is_met():
    shared = Dense("shared")
    copied = Copier(plain).copy(Chain(shared, ReLU("relu"), shared))
    assert copied.layers[0] is copied.layers[2]
    assert copied.layers[0] is not shared
    assert copied.layers[0].kernel is not shared.kernel


def test_what_is_replaced_is_told_by_its_full_name():
    seen = []

    def replace(layer, name):
        seen.append(name)
        return ReLU("instead") if name == "inner.fc" else None

    copied = Copier(replace).copy(Chain(Chain(Dense("fc"), name="inner"), Dense("fc")))
    assert seen == ["", "inner", "inner.fc", "fc"]
    assert type(copied.layers[0].layers[0]) is ReLU
    assert type(copied.layers[1]) is Dense


def test_a_layer_that_holds_others_gets_copies_of_them():
    holding = Holding()
    copied = Copier(plain).copy(holding)
    assert [type(copied.blocks), type(copied.blocks[1]), copied.named["number"]] == [list, tuple, 3]
    assert {id(each) for _, each in children(copied)} & {id(each) for _, each in children(holding)} == set()
    assert np.array_equal(copied.named["one"].kernel.value, holding.named["one"].kernel.value)


def test_operations_are_called_by_their_full_name():
    calls = []

    def call(operation, name, args, kwargs):
        calls.append(name)
        return operation(*args, **kwargs)

    copied = Copier(plain, call).copy(Chain(Chain(Multiply(), name="inner")))
    assert copied.layers[0].layers[0].call(3.0) == 9.0
    assert calls == ["inner.multiply"]


@pytest.mark.parametrize(("raised", "seen"), [(ValueError("no"), ModelError), (QuantizerStateError("q", "no"),) * 2])
def test_what_keras_raises_names_the_layer_and_our_own_errors_pass(raised, seen):
    with pytest.raises(type(seen) if isinstance(seen, Exception) else seen) as caught, made_again(Dense("fc"), "a.fc"):
        raise raised
    assert ("'a.fc' (Dense)" in str(caught.value)) is (seen is ModelError)


def test_a_graph_that_can_not_be_copied_names_the_model():
    class Broken(Copier):
        def copy_graph(self, model, prefix):
            message = "nothing there"
            raise KeyError(message)

    with pytest.raises(ModelError, match=r"model 'chain' can't be copied: .*nothing there"):
        Broken(plain).copy(Chain(Dense("fc")))


def test_other_variables_than_before_are_refused():
    one, other = Dense("fc"), Dense("fc", kernel=np.ones((3, 2)))
    check_same_shapes(one.variables, Dense().variables, "fc", one)
    with pytest.raises(ModelError, match=r"\[\(3, 2\)\], not \[\(2, 2\)\]"):
        check_same_shapes(one.variables, other.variables, "fc", one)


def test_names_are_joined_with_a_dot():
    assert [join("", "a"), join("a", "b")] == ["a", "a.b"]
