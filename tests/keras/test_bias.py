"""Biases as integers in training and after, on the grid of the layer's sums of products."""

import numpy as np
import pytest

from tests.keras.framework import FRAMEWORK, keras, kl, numpy, only_tensorflow, pull_back, tensor
from tests.keras.models import call, train, vectors
from trainable_core.errors import IntegerRangeError, ModelError, UnsupportedConfigError
from trainable_core.recipe.routes import Origin
from trainable_core.reference import bias as reference
from trainable_keras import calibrate, describe, finalize, load, save, wrap
from trainable_keras.bias import BiasQuantizer
from trainable_keras.flow import flow_of
from trainable_keras.graph import layers_within
from trainable_keras.origins import inputs_of_calls
from trainable_keras.parts import KerasWrapper, variable_of

RECIPE = {
    "bias": "int32",
    "weights": {"method": "SYMMETRIC", "n_bits": 4, "training_method": "LSQ"},
    "activations": {"method": "SYMMETRIC", "n_bits": 8, "training_method": "LSQ", "placement": "integer"},
}


def branched():
    """Return a model whose input two layers read, with a folded batch norm, a depthwise layer and a residual sum."""
    keras.utils.set_random_seed(0)
    given = keras.Input((6, 6, 2), name="image")
    one = kl.Conv2D(4, 3, padding="same", use_bias=False, name="one")(given)
    one = kl.ReLU(name="relu")(kl.BatchNormalization(name="norm")(one))
    two = kl.DepthwiseConv2D(3, padding="same", depth_multiplier=2, bias_initializer="ones", name="two")(given)
    flat = kl.Flatten(name="flat")(kl.MaxPooling2D(2, name="pool")(kl.Add(name="sum")([one, two])))
    return keras.Model(given, kl.Dense(3, bias_initializer="ones", name="head")(flat))


def batch(count=4):
    return vectors(count, 6, 6, 2)


@pytest.fixture(scope="module")
def trained():
    qmodel = calibrate(wrap(branched(), RECIPE), [batch(16)])
    return train(qmodel, batch(16), lr=0.01)


def wrappers(model):
    return {layer.name: layer for layer in layers_within(model) if isinstance(layer, KerasWrapper)}


def test_one_quantizer_for_a_tensor_that_two_layers_read_and_the_scale_of_the_input_for_each_bias(trained):
    told = describe(trained)
    assert dict(told.biases) == {
        "one.bias": "one: inputs",
        "two.bias": "one: inputs",
        "head.bias": "sum: output",
    }
    assert [(row.layer, row.tensor) for row in told.rows if row.target == "Activation"].count(("one", "inputs")) == 1
    assert {(row.layer, row.tensor) for row in told.rows if row.target == "Activation"} == {
        ("one", "inputs"), ("relu", "output"), ("two", "output"), ("sum", "output"), ("head", "output"),
    }  # fmt: skip


@pytest.mark.parametrize("deployed", [False, True])
def test_a_layer_computes_with_the_bias_of_the_reference(trained, deployed):
    model = finalize(trained) if deployed else trained
    for name in ("one", "two", "head"):
        wrapper = wrappers(model)[name]
        bias = wrapper.bias_quantizer
        of_x = bias.source.activation_holder_quantizer
        of_weight = next(iter(wrapper.weights_quantizers.values()))
        scales = [q.qparams.scale if deployed else q.current_qparams().scale for q in (of_x, of_weight)]
        scale = reference.bias_scale(*scales)
        scale = np.repeat(scale, 2) if name == "two" else scale  # two channels of the output for one of the kernel
        float_bias = variable_of(wrapper, "bias")
        found = numpy(bias(wrapper.value_of(float_bias)))
        np.testing.assert_array_equal(found, reference.fake_quantize_bias(numpy(float_bias), scale))
        assert not np.array_equal(found, numpy(float_bias))
        held = wrapper.quantized_for_call(training=False)
        np.testing.assert_array_equal(numpy(held[id(float_bias)]), found)


def test_the_gradient_goes_to_the_float_bias_as_it_is(trained):
    bias = wrappers(trained)["head"].bias_quantizer
    upstream = np.float32([1.0, -2.0, 0.5])
    (found,) = pull_back(bias, [tensor([0.3, -7.0, 1e30])], tensor(upstream))
    np.testing.assert_array_equal(found, upstream)


@pytest.mark.parametrize("way", ["finalized", "keras file", "saved"])
def test_what_is_trained_is_what_is_deployed_and_read(trained, way, tmp_path):
    wanted = call(trained, batch())
    made = finalize(trained)
    if way == "keras file":
        made.save(tmp_path / "model.keras")
        made = keras.models.load_model(tmp_path / "model.keras")
    elif way == "saved":
        save(made, tmp_path / "model.trainable")
        made = load(tmp_path / "model.trainable", branched())
    for one, other in zip(wanted, call(made, batch()), strict=True):
        np.testing.assert_array_equal(one, other)
    assert all(wrappers(made)[name].bias_quantizer is not None for name in ("one", "two", "head"))
    assert dict(describe(made).biases) == dict(describe(trained).biases)


def test_a_code_beyond_int32_is_refused_and_the_thresholds_stay(trained):
    qmodel = wrap(branched(), RECIPE)
    calibrate(qmodel, [batch()])
    before = str(describe(qmodel))
    variable = variable_of(wrappers(qmodel)["head"], "bias")
    FRAMEWORK.assign(variable, np.float32([1.0, 1e9, 1.0]))
    for refused in (lambda: calibrate(qmodel, [batch()], force=True), lambda: finalize(qmodel)):
        with pytest.raises(IntegerRangeError, match=r"head\.bias") as caught:
            refused()
        assert caught.value.channel == 1
        assert str(describe(qmodel)) == before


class Recomputed(kl.Dense):
    """A layer whose bias is not added to the products alone."""

    def call(self, inputs):
        """Return twice what Keras's layer returns."""
        return super().call(inputs) * 2


def _subclass():
    given = keras.Input((4,))
    return keras.Model(given, Recomputed(3, name="odd")(given))


def _recurrent():
    given = keras.Input((4, 2))
    return keras.Model(given, kl.LSTM(3, name="odd")(given))


def _einsum():
    given = keras.Input((4, 2))
    return keras.Model(given, kl.EinsumDense("abc,cd->abd", (4, 3), bias_axes="d", name="odd")(given))


def _behind_float():
    given = keras.Input((4,))
    return keras.Model(given, kl.Dense(3, name="odd")(kl.LayerNormalization(name="norm")(given)))


@pytest.mark.parametrize(
    ("build", "placement", "facts"),
    [
        (_subclass, "integer", ("odd.bias", "Recomputed")),
        (_recurrent, "integer", ("odd.cell.bias", "inside")),
        (_einsum, "integer", ("odd.bias", "axes")),
        (_behind_float, "outputs", ("odd.bias", "norm", "bias")),
    ],
)
def test_a_bias_that_can_not_be_an_integer_is_refused_before_training(build, placement, facts):
    recipe = {**RECIPE, "activations": {**RECIPE["activations"], "placement": placement}}
    if placement == "outputs":  # the layer norm's output is quantized, unless a rule says otherwise
        recipe["rules"] = [{"match": {"name": "norm"}, "skip": True}]
    with pytest.raises(UnsupportedConfigError) as caught:
        wrap(build(), recipe)
    assert all(fact in str(caught.value) for fact in facts)


def test_islands_are_told():
    given = keras.Input((4,))
    hidden = kl.Dense(3, activation="tanh", name="tanh")(given)
    model = keras.Model(given, kl.Dense(2, name="head")(kl.LayerNormalization(name="norm")(hidden)))
    told = describe(wrap(model, RECIPE))
    assert {name: reason.split()[-1] for name, reason in told.islands.items()} == {
        "norm": "normalization",
        "tanh": "float",
    }


def test_a_bias_whose_source_was_not_read_says_so():
    bias = BiasQuantizer("bias", "nowhere: output", None, {}, weight="kernel", repeats=1, subject="fc.bias")
    with pytest.raises(ModelError, match="nowhere: output"):
        _ = bias.source


@only_tensorflow("one engine is enough for what no tensor takes part in")
def test_origins_lead_through_nested_models_and_what_moves_values():
    inner = keras.Sequential([keras.Input((4, 4, 2)), kl.MaxPooling2D(2, name="pool")], name="inner")
    given = keras.Input((4, 4, 2))
    made = kl.Conv2D(2, 1, name="conv")(given)
    flat = kl.Flatten(name="flat")(inner(made))
    odd = kl.Activation("tanh", name="tanh")(flat)
    model = keras.Model(given, [kl.Dense(1, name="a")(flat), kl.Dense(1, name="b")(odd)])
    flow = flow_of(FRAMEWORK.graph(model), FRAMEWORK.model_graph)
    found = inputs_of_calls(
        flow,
        lambda operation: operation.name,
        {"conv"},
        is_layer=FRAMEWORK.is_layer,
        passes=FRAMEWORK.passes,
        joins=lambda _: False,
    )
    assert found["pool"] == found["flat"] == found["a"] == [[Origin("conv")]]
    ((origin,),) = found["b"]
    assert not origin.producer
    assert "tanh" in origin.reason
    assert "input of the model" in found["conv"][0][0].reason
