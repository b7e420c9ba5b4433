"""Which batch norms go where, and what a layer is that took one over, on a Keras of a few lines."""

import numpy as np
import pytest

from tests.core.numpy_backend import Variable
from tests.core.toy_keras import (
    KERAS,
    TYPES,
    BatchNormalization,
    Chain,
    Dense,
    Layer,
    Multiply,
    ReLU,
    children,
    graph_of,
    is_layer,
    layers_within,
)
from trainable_keras.copying import own_variables
from trainable_keras.folding import ModelView, folded_copy, plan_folding


def view(model):
    return ModelView(
        KERAS,
        layers_within(model),
        variables_of=lambda layer: own_variables(layer, layer.direct),
        graph=graph_of,
        children=children,
        kind=TYPES.kind_of,
        is_layer=is_layer,
        stock=TYPES.stock,
    )


def planned(model):
    return plan_folding(model, view(model))


def test_a_norm_behind_a_dense_layer_goes_into_it():
    dense, norm = Dense("fc"), BatchNormalization("norm")
    found = planned(Chain(Chain(dense, norm, name="stem"), ReLU("relu")))
    assert found.folded == {"stem.norm": "stem.fc"}
    assert found.norms == {id(dense): norm}
    assert found.gone == {id(norm)}
    assert found.kept == {}


def with_activation():
    dense = Dense("fc")
    dense.activation = "relu"
    return Chain(dense, BatchNormalization())


def shared_weights():
    one, other = Dense("one"), Dense("fc")
    other.kernel = one.kernel
    return Chain(one, other, BatchNormalization())


def without_graph():
    model = Layer("model")
    model.fc, model.norm = Dense("fc"), BatchNormalization()
    return model


def twice():
    dense = Dense("fc")
    return Chain(dense, ReLU(), dense, BatchNormalization())


KEPT = {
    "first of the model": (lambda: Chain(BatchNormalization()), "no layer"),
    "behind an operation": (lambda: Chain(Multiply(), BatchNormalization()), "no layer"),
    "behind another kind": (lambda: Chain(ReLU(), BatchNormalization()), "is ReLU"),
    "behind a subclass": (lambda: Chain(type("Mine", (Dense,), {})(), BatchNormalization()), "is Mine"),
    "behind an activation": (with_activation, "has an activation"),
    "other channels": (lambda: Chain(Dense(), BatchNormalization(axis=0)), "channels are not the layer's"),
    "shared weights": (shared_weights, "shares its weights"),
    "called twice": (twice, "more than once"),
    "no graph": (without_graph, "has no graph"),
}


@pytest.mark.parametrize(("make", "reason"), KEPT.values(), ids=KEPT)
def test_a_norm_that_stays_says_why(make, reason):
    found = planned(make())
    assert (found.folded, found.gone) == ({}, set())
    assert [reason in why for why in found.kept.values()] == [True]


def test_a_variable_of_one_layer_alone_is_not_shared():
    model = Chain(Dense("one"), Dense("other"))
    assert not view(model).shares_variables(model.layers[0])


@pytest.mark.parametrize("bias", [None, [1.0, 2.0]])
def test_a_layer_with_a_norm_in_it_gives_what_both_gave(bias):
    layer, norm = Dense("fc", bias=bias), BatchNormalization()
    copied = Dense("fc", kernel=np.zeros((2, 2)), bias=[0.0, 0.0])

    def assign(variable, value):
        variable.value = value

    assert folded_copy(layer, norm, copied, "kernel", to_numpy=lambda v: v.value, assign=assign) is copied
    # the norm multiplies by 2 / sqrt(4) and 4 / sqrt(16), and adds 1 less the mean 1, and -1 less the mean 2
    assert copied.kernel.value.tolist() == layer.kernel.value.tolist()
    assert copied.bias.value.tolist() == [0.0 + (bias or [0, 0])[0], -3.0 + (bias or [0, 0])[1]]


def test_other_variables_are_copied_along():
    layer, norm, copied = Dense("fc"), BatchNormalization(), Dense("fc", bias=[0.0, 0.0])
    layer.steps, copied.steps = Variable([7.0]), Variable([0.0])
    folded_copy(layer, norm, copied, "kernel", to_numpy=lambda v: v.value, assign=lambda v, a: setattr(v, "value", a))
    assert copied.steps.value.tolist() == [7.0]
