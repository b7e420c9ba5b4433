"""The whole way from a float model to a wrapped one, on a Keras of a few lines."""

from typing import ClassVar

import numpy as np
import pytest

from tests.core.toy_keras import (
    BatchNormalization,
    Chain,
    Dense,
    Foreign,
    Holder,
    Layer,
    Multiply,
    ReLU,
    ToyPlugin,
    Trainable,
    Wrapper,
    framework,
)
from trainable_core.errors import ModelError, QuantizerStateError
from trainable_core.recipe.state import WrappedState
from trainable_core.registry.process import default_registry, register
from trainable_keras.folding import Folding
from trainable_keras.wrapping import STATE, Wrapping

WEIGHTS = {"weights": {"method": "SYMMETRIC", "n_bits": 4, "training_method": "STE"}, "fold_batch_norm": False}
BOTH = {**WEIGHTS, "activations": {"method": "SYMMETRIC", "n_bits": 8, "training_method": "STE"}}
TOY = framework()


@pytest.fixture(autouse=True)
def _toy():
    register(ToyPlugin(), "toy")
    yield
    default_registry().unregister("toy")


def test_layers_are_wrapped_and_the_given_model_is_untouched():
    model = Chain(Dense("fc"), ReLU("relu"))
    wrapped = TOY.wrap(model, BOTH)
    assert [type(each) for each in model.layers] == [Dense, ReLU]
    (wrapper,) = [each for each in wrapped.layers if isinstance(each, Wrapper) and each.weights_quantizers]
    assert wrapper.layer.kernel is not model.layers[0].kernel
    assert [quantizer.subject for quantizer in TOY.quantizers_in(wrapper)] == ["fc.kernel", "fc: inputs"]
    assert TOY.parts_of(model) == []


def test_quantizers_of_the_model_are_the_backends():
    wrapped = TOY.wrap(Chain(Dense("fc")), BOTH)
    assert all(isinstance(each, Trainable) for each in TOY.quantizers_in(wrapped))
    assert len(list(TOY.quantizers_in(wrapped))) == 2


def test_what_is_known_of_a_model_is_on_it_and_in_its_first_part():
    wrapped = TOY.wrap(Chain(Dense("fc"), Dense("head")), WEIGHTS)
    state = TOY.state_of(wrapped)
    assert isinstance(state, WrappedState)
    assert list(state.plans) == ["fc", "head"]
    first, second = TOY.parts_of(wrapped)
    assert second.notes is None
    delattr(wrapped, STATE)  # as after loading
    assert TOY.state_of(wrapped).plans == state.plans
    assert TOY.state_of(wrapped) is TOY.state_of(wrapped)
    assert first.plan == state.plans["fc"]


@pytest.mark.parametrize(
    ("model", "fact"), [(3, "the model is no toy"), (Chain(Dense()), "not made by trainable_toy.wrap")]
)
def test_a_model_that_was_not_wrapped_has_no_state(model, fact):
    with pytest.raises(ModelError, match=fact):
        TOY.state_of(model)


def test_a_wrapped_model_is_not_wrapped_again():
    with pytest.raises(QuantizerStateError, match="wrapped already"):
        TOY.wrap(TOY.wrap(Chain(Dense()), WEIGHTS), WEIGHTS)


def test_a_model_without_weights_yet_is_refused():
    model = Chain(Dense())
    model.built = False
    with pytest.raises(ModelError, match="not built"):
        TOY.wrap(model, WEIGHTS)


def test_what_a_backend_refuses_is_refused():
    def refuse(model):
        message = "a layer I don't know what to do with"
        raise ModelError(message)

    with pytest.raises(ModelError, match="don't know what to do"):
        framework(check_layers=refuse).wrap(Chain(Dense()), WEIGHTS)


def test_layers_of_no_known_kind_are_told():
    model = Layer("model")
    model.fc, model.mine = Dense("fc"), Foreign("mine")
    wrapped = TOY.wrap(model, WEIGHTS)
    assert TOY.state_of(wrapped).left_out["mine"].startswith("Foreign is of no known kind")
    assert type(wrapped.fc) is Wrapper
    assert wrapped.fc.plan.layer.name == "fc"


def test_a_layer_alone_is_called_model():
    wrapped = TOY.wrap(Dense("fc"), WEIGHTS)
    assert type(wrapped) is Wrapper
    assert list(TOY.state_of(wrapped).plans) == ["model"]


def test_a_layer_before_an_activation_is_quantized_behind_it():
    recipe = {**BOTH, "activations": {**BOTH["activations"], "placement": "outputs"}}
    wrapped = TOY.wrap(Chain(Dense("fc"), ReLU("relu"), Dense("head")), recipe)
    placed = {part.plan.layer.name: part.output_holder is not None for part in TOY.parts_of(wrapped)}
    assert placed == {"fc": False, "relu": True, "head": True}


class Noted(Holder):
    """A holder that passes values on and notes them."""

    seen: ClassVar[list[tuple[str, str, float]]] = []

    def __call__(self, x, training=None):
        self.seen.append((self.name, self.tensor, x))
        return x


@pytest.mark.parametrize(
    ("placement", "seen"),
    [
        ("inputs", [("multiply_input_0_holder", "input 0", 3.0), ("multiply_input_1_holder", "input 1", 5.0)]),
        ("outputs", [("multiply_output_holder", "output", 15.0)]),
    ],
)
def test_operations_get_holders_at_their_inputs_or_behind_them(placement, seen):
    Noted.seen.clear()
    recipe = {**BOTH, "activations": {**BOTH["activations"], "placement": placement}}
    recipe["rules"] = [{"match": {"op": "mul"}, "activations": {"n_bits": 4}}]
    toy, model = framework(holder=Noted), Chain(Dense("fc"), Multiply())
    state = toy.state_of(toy.wrap(model, recipe))
    wrapping = Wrapping(toy, state, {}, Folding())
    assert wrapping.call_operation(model.layers[1], "multiply", (3.0, 5.0), {}) == 15.0
    assert Noted.seen == seen
    assert state.plans["multiply"].activation.config.n_bits == 4
    assert wrapping.call_operation(model.layers[1], "not planned", (3.0, 5.0), {}) == 15.0
    assert len(Noted.seen) == len(seen)


def test_a_tensor_that_goes_in_twice_has_one_holder():
    Noted.seen.clear()
    recipe = {**BOTH, "rules": [{"match": {"op": "mul"}, "activations": {"n_bits": 4}}]}
    toy, model, x = framework(holder=Noted), Chain(Dense("fc"), Multiply()), 3.0
    wrapping = Wrapping(toy, toy.state_of(toy.wrap(model, recipe)), {}, Folding())
    wrapping.call_operation(model.layers[1], "multiply", (x, x), {})
    assert len(Noted.seen) == 1


def test_a_folded_norm_passes_and_its_layer_is_the_folded_copy():
    def folding(model):
        dense, norm = model.layers
        return Folding({id(dense): norm}, {id(norm)}, {"norm": "fc"}, {"other": "it stays"})

    seen = []

    def folded_copy(layer, norm, name):
        seen.append((layer.name, norm.name, name))
        return Dense(layer.name, kernel=np.ones((2, 2)))

    model = Chain(Dense("fc"), BatchNormalization("norm"))
    toy = framework(folding=folding, folded_copy=folded_copy)
    wrapped = toy.wrap(model, {**WEIGHTS, "fold_batch_norm": True})
    assert seen == [("fc", "norm", "fc")]
    assert wrapped.layers[0].layer.kernel.value.tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert type(wrapped.layers[1]) is Layer
    state = toy.state_of(wrapped)
    assert state.folded == {"norm": "fc"}
    assert state.left_out["other"] == "batch norm not folded: it stays"


def test_a_holder_knows_its_plan_and_its_tensor():
    wrapped = TOY.wrap(Chain(Dense("fc")), BOTH)
    plan = TOY.state_of(wrapped).plans["fc"]
    made = TOY.hold(plan, "fc", "input 0", "fc_holder")
    assert type(made) is Holder
    assert (made.name, made.plan, made.tensor) == ("fc_holder", plan, "input 0")
    assert made.activation_holder_quantizer.subject == "fc: input 0"
