"""From models of every shape to wrapped ones: what is quantized, where, and what stays as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.keras.framework import KERAS_VERSION, keras, kl, only_keras, path_of, tensor, to_numpy
from tests.keras.models import (
    MODELS,
    call,
    dense,
    functional,
    network,
    ready,
    recipe,
    same,
    spec,
    state,
    subclassed,
    tensors,
    train,
    vectors,
    weights_only,
)
from trainable_core.errors import NothingQuantizedWarning, QuantizerStateError, RuleError, UnsupportedConfigError
from trainable_keras import QuantizationWrapper, calibrate, describe, finalize, parameter_groups, wrap
from trainable_keras.graph import layers_within
from trainable_keras.training import quantizers_of

LSQ = recipe("LSQ", "UNIFORM")
every_model = pytest.mark.parametrize("name", list(MODELS))


def outputs(**more: Any) -> dict[str, Any]:
    return {"weights": spec("LSQ"), "activations": spec("LSQ", "UNIFORM", 8, placement="outputs"), **more}


def tensors_of(qmodel: keras.Model) -> list[str]:
    return [f"{row.layer}: {row.tensor}" for row in describe(qmodel).rows]


# ---- the given model, and the new one -------------------------------------------------------------------------------


@every_model
def test_the_given_model_is_untouched(name: str) -> None:
    make, batches = MODELS[name]
    model = make()
    before, values = call(model, batches()), state(model)
    layers = [id(layer) for layer in layers_within(model)]
    qmodel = calibrate(wrap(model, LSQ), [(tensors(batches()),)])
    train(qmodel, batches())
    assert state(model) == values
    assert same(call(model, batches()), before)
    assert [id(layer) for layer in layers_within(model)] == layers
    shared = {id(variable) for variable in model.variables} & {id(variable) for variable in qmodel.variables}
    assert shared == set()


@every_model
def test_training_moves_weights_and_thresholds(name: str) -> None:
    make, batches = MODELS[name]
    qmodel = ready(make(), LSQ, batches())
    groups = parameter_groups(qmodel)
    assert sum(len(group["params"]) for group in groups) == len(qmodel.trainable_variables)
    before = [[to_numpy(v).copy() for v in group["params"]] for group in groups]
    train(qmodel, batches(), lr=0.5)
    for group, old in zip(groups, before, strict=True):
        assert any(not np.array_equal(to_numpy(v), o) for v, o in zip(group["params"], old, strict=True))


def test_the_new_model_is_of_the_same_class_and_name() -> None:
    for name, (make, _) in MODELS.items():
        model = make()
        qmodel = wrap(model, LSQ)
        assert isinstance(qmodel, type(model)), name
        if name != "subclassed":
            assert qmodel.name == model.name
            assert len(qmodel.inputs) == len(model.inputs)


def test_layers_that_do_not_train_still_do_not() -> None:
    model = network()
    model.get_layer("head").trainable = False
    assert [v for v in wrap(model, weights_only()).trainable_variables if "head" in path_of(v)] == []


def test_a_shared_layer_has_one_quantizer() -> None:
    qmodel = ready(functional(), LSQ, MODELS["functional"][1]())
    wrappers = [layer for layer in layers_within(qmodel) if isinstance(layer, QuantizationWrapper)]
    assert [wrapper.layer.name for wrapper in wrappers].count("shared") == 1
    batch = MODELS["functional"][1]()
    assert same(call(finalize(qmodel), batch), call(qmodel, batch))


def test_a_layer_alone_is_wrapped() -> None:
    layer = kl.Dense(3)
    layer(tensor(vectors(1, 4)))
    qlayer = ready(layer, LSQ, vectors(8, 4))
    assert isinstance(qlayer, QuantizationWrapper)
    assert same(call(finalize(qlayer), vectors(8, 4)), call(qlayer, vectors(8, 4)))


def test_a_recipe_may_be_a_file(tmp_path: Any) -> None:
    (tmp_path / "recipe.json").write_text('{"weights": {"method": "UNIFORM", "n_bits": 3, "training_method": "STE"}}')
    assert [row.n_bits for row in describe(wrap(dense(), tmp_path / "recipe.json")).rows] == [3]


class Plain(keras.Model):
    """A class as people write it: no config, no keyword arguments."""

    def __init__(self, units: int = 2) -> None:
        super().__init__()
        self.layer = kl.Dense(units, name="layer")

    def call(self, x: Any) -> Any:
        """Return the output."""
        return self.layer(x)


def test_a_class_without_a_config_is_made_again_by_its_arguments() -> None:
    """And within a graph: Keras calls it for its shape before anything is calibrated."""
    held = Plain(units=3)
    setattr(held, {2: "_name", 3: "name"}[KERAS_VERSION], "held")  # its class takes no name
    qmodel = ready(keras.Sequential([keras.Input((3,)), held]), weights_only())
    assert tensors_of(qmodel) == ["held.layer: kernel"]
    assert same(call(finalize(qmodel), vectors(2, 3)), call(qmodel, vectors(2, 3)))


# ---- what is quantized ----------------------------------------------------------------------------------------------


def test_layers_have_full_names_with_dots() -> None:
    assert tensors_of(wrap(functional(), LSQ)) == [
        f"{layer}: {what}" for layer in ("shared", "inner.conv", "head", "score") for what in ("kernel", "inputs")
    ]
    assert tensors_of(wrap(subclassed(), LSQ)) == [
        f"{layer}: {what}" for layer in ("stem", "blocks.0", "blocks.1", "tail.dense") for what in ("kernel", "inputs")
    ]


def test_outputs_are_quantized_behind_activations_and_operations() -> None:
    found = tensors_of(wrap(functional(), outputs()))
    layers = [each.removesuffix(": output") for each in found if each.endswith(": output")]
    assert len(layers) == 7
    assert {"shared", "inner.conv", "pool", "head", "score"} < set(layers)
    # Keras numbers operations: multiply, relu; the sum before relu is quantized behind it
    assert {name.rpartition(".")[2].rstrip("_0123456789") for name in set(layers)} >= {"multiply", "relu"}


def test_a_layer_whose_activation_follows_is_quantized_behind_it() -> None:
    found = tensors_of(wrap(network(), outputs()))
    assert [each for each in found if "output" in each] == ["stem.relu: output", "relu: output", "head: output"]


def test_in_a_model_without_a_graph_functions_are_left_out_with_the_reason() -> None:
    left_out = describe(wrap(subclassed(), outputs())).left_out
    assert "have a graph" in left_out["functional operations"]


def test_a_rule_reaches_functional_operations() -> None:
    rule = {"match": {"op": "add"}, "activations": spec("LSQ", "UNIFORM", 8)}
    batch = MODELS["functional"][1]()
    qmodel = ready(functional(), weights_only("LSQ", rules=[rule]), batch)
    assert len([each for each in tensors_of(qmodel) if "input" in each]) == 2
    assert same(call(finalize(qmodel), batch), call(qmodel, batch))


def test_a_rule_by_name_or_op_changes_its_layers_only() -> None:
    rules = [
        {"match": {"name": "stem.*"}, "weights": {"n_bits": 8}},
        {"match": {"op": "linear"}, "weights": {"per_channel": False}},
        {"match": {"op": "depthwise_conv"}, "skip": True},
    ]
    rows = {row.layer: row for row in describe(wrap(network(), weights_only(rules=rules))).rows}
    assert {name: (row.n_bits, row.channels_axis) for name, row in rows.items()} == {
        "stem.conv": (8, 3),
        "head": (4, None),
    }


def test_lists_of_inputs_are_quantized_one_by_one() -> None:
    first, second = keras.Input((3,)), keras.Input((3,))
    model = keras.Model([first, second], kl.Add(name="add")([kl.Dense(3)(first), kl.Dense(3)(second)]))
    rule = {"match": {"op": "add"}, "activations": spec("LSQ", "UNIFORM", 2)}
    batch = [vectors(8, 3), vectors(8, 3)]
    qmodel = ready(model, weights_only(rules=[rule]), batch)
    assert [each for each in tensors_of(qmodel) if each.startswith("add")] == ["add: inputs.0", "add: inputs.1"]
    assert same(call(finalize(qmodel), batch), call(qmodel, batch))


@pytest.mark.filterwarnings("ignore::trainable_core.errors.NothingQuantizedWarning")  # that is what it is about
def test_a_model_with_nothing_to_quantize_is_copied() -> None:
    model = keras.Sequential([keras.Input((3,)), kl.ReLU()])
    qmodel = wrap(model, weights_only())
    assert describe(qmodel).rows == ()
    assert same(call(finalize(qmodel), vectors(2, 3)), call(model, vectors(2, 3)))


@only_keras(3, "Keras quantizes layers itself")
@pytest.mark.filterwarnings("ignore::trainable_core.errors.NothingQuantizedWarning")  # that is what it is about
def test_a_layer_that_keras_quantized_is_left_out() -> None:
    model = dense()
    model.layers[0].quantize("int8")
    assert "Keras has quantized it to int8" in describe(wrap(model, weights_only())).left_out["fc"]


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_a_wrapped_model_is_not_wrapped_again() -> None:
    qmodel = wrap(dense(), LSQ)
    for again in (qmodel, keras.Sequential([keras.Input((4,)), qmodel])):
        with pytest.raises(QuantizerStateError, match="wrapped already"):
            wrap(again, LSQ)


def test_a_rule_that_matches_nothing_lists_the_layers() -> None:
    with pytest.raises(RuleError) as caught:
        wrap(network(), weights_only(rules=[{"match": {"name": "stemm"}, "skip": True}]))
    assert caught.value.layers == ["stem.conv", "stem.relu", "body", "relu", "head"]


def test_quantizers_are_named_after_their_tensors() -> None:
    assert set(quantizers_of(wrap(dense(), LSQ))) == {"fc.kernel", "fc: inputs"}


# ---- rules for what can't be quantized, and for quantizers that moved -----------------------------------------------


def nested() -> keras.Model:
    """Return a model with layers of no known kind, and with a model inside."""
    inner = keras.Sequential([keras.Input((4,)), kl.Dense(4, name="one"), kl.Dense(4, name="two")], name="inner")
    layers = [keras.Input((4,)), kl.Reshape((4,), name="shape"), inner, kl.Dense(2, name="head")]
    return keras.Sequential(layers)


@pytest.mark.parametrize(
    ("name", "layers"),
    [("shape", {"inner.one", "inner.two", "head"}), ("inner", {"head"}), ("inner.two", {"inner.one", "head"})],
)
def test_any_layer_can_be_skipped_by_its_name_and_a_model_with_all_of_its_layers(name: str, layers: set[str]) -> None:
    qmodel = wrap(nested(), weights_only(rules=[{"match": {"name": name}, "skip": True}]))
    assert {row.layer for row in describe(qmodel).rows} == layers
    assert describe(qmodel).left_out[name] == "skipped by a rule"


def test_widths_asked_of_what_can_not_be_quantized_are_refused_with_the_reason() -> None:
    rule = {"match": {"name": "shape"}, "activations": spec()}
    with pytest.raises(RuleError, match="shape: Reshape has no weights and is of no known kind"):
        wrap(nested(), weights_only(rules=[rule]))


def activation_widths(model: keras.Model, *rules: dict[str, Any]) -> dict[str, int]:
    rows = describe(wrap(model, outputs(rules=list(rules)))).rows
    return {row.layer: row.n_bits for row in rows if row.tensor == "output"}


def width(name: str, n_bits: int) -> dict[str, Any]:
    return {"match": {"name": name}, "activations": {"n_bits": n_bits}}


def with_activation() -> keras.Model:
    layers = [keras.Input((4,)), kl.Dense(4, name="fc"), kl.Dropout(0.5, name="drop"), kl.ReLU(name="act")]
    return keras.Sequential([*layers, kl.Dense(2, name="head")])


def test_a_rule_reaches_a_quantizer_that_moved_behind_an_activation() -> None:
    assert activation_widths(with_activation()) == {"act": 8, "head": 8}
    assert activation_widths(with_activation(), width("fc", 3)) == {"act": 3, "head": 8}
    assert activation_widths(with_activation(), width("fc", 3), width("act", 5)) == {"act": 5, "head": 8}
    assert activation_widths(with_activation(), width("act", 5), width("fc", 3)) == {"act": 3, "head": 8}


def test_layers_before_one_activation_that_ask_for_different_widths_keep_their_quantizers() -> None:
    def shared() -> keras.Model:
        x, act = keras.Input((4,)), kl.ReLU(name="act")
        y = act(kl.Dense(4, name="first")(x))
        return keras.Model(x, act(kl.Dense(4, name="second")(y)))

    assert activation_widths(shared()) == {"act": 8}
    assert activation_widths(shared(), width("first", 3)) == {"first": 3, "act": 8}
    assert activation_widths(shared(), width("first", 3), width("second", 3)) == {"act": 3}


def test_a_model_in_which_nothing_is_quantized_warns_and_says_what_was_looked_at() -> None:
    skipped = weights_only(rules=[{"match": {"name": "*"}, "skip": True}])
    with pytest.warns(NothingQuantizedWarning, match="fc, drop, act, head: skipped by a rule") as told:
        wrap(with_activation(), skipped)
    assert told[0].filename == __file__  # the line that called wrap


def test_the_target_is_checked_before_training() -> None:
    with pytest.raises(UnsupportedConfigError, match=r"^fc\..*: onnx can't express SYMMETRIC with 16 bits"):
        wrap(with_activation(), {**weights_only("LSQ", n_bits=16), "target": "onnx"})
