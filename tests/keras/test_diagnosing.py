"""What hurts a model and what to change: damaged layers are found, and the figures are core's."""

import json

import numpy as np
import pytest

import trainable_keras
from tests.keras.framework import keras, kl, numpy, only_tensorflow, tensor, tf
from tests.keras.models import network, recipe, spec
from trainable_core.enums import TieRule
from trainable_core.errors import CalibrationError, InvalidArgumentError, ModelError, QuantizerStateError
from trainable_core.reference import lsq
from trainable_keras import diagnose, finalize, suggest, wrap
from trainable_keras.training import quantizers_of

EIGHT = {"weights": spec("LSQ", n_bits=8), "activations": spec("LSQ", "UNIFORM", 8)}
IMAGES = np.random.default_rng(0).normal(size=(48, 6, 6, 1)).astype(np.float32)
BATCHES = [tensor(IMAGES[:32]), tensor(IMAGES[32:])]


def ready(model, how, batches=BATCHES):
    return trainable_keras.calibrate(wrap(model, how), batches)


@pytest.fixture(scope="module")
def eight():
    return ready(network(), EIGHT)


def values(model):
    return [np.array(numpy(each)) for each in model.weights]


def same(one, other):
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_figures_are_those_of_the_definitions():
    qmodel = ready(network(), recipe("LSQ", "UNIFORM", 3))
    found = diagnose(qmodel, BATCHES, metric="mse")
    x = tensor(IMAGES)
    quantized, floats = (numpy(each(x, training=False)).astype(np.float64) for each in (qmodel, network()))
    expected = np.square(quantized - floats).sum() / np.square(floats).sum()
    # a folded batch norm is rounded otherwise than one that was not folded: by some units in 2**24
    assert found.total == pytest.approx(expected, rel=1e-4)
    assert {each.layer for each in found.layers} == {"stem.conv", "body", "head"}
    kernel = {each.layer: each for each in found.quantizers if each.target == "Weights"}["head"]
    (head,) = [part for part in qmodel.layers if part.name == "head"]
    weight = numpy(head.get_weights_vars()[0][1]).astype(np.float64)
    made = numpy(head.get_quantized_weights()["kernel"]).astype(np.float64)
    assert kernel.quality.sqnr == pytest.approx(
        10 * np.log10(np.square(weight).sum() / np.square(made - weight).sum()), abs=1e-6
    )
    assert json.loads(found.to_json())["batches"] == 2


@pytest.mark.parametrize("layer", ["stem.conv", "body", "head"])
def test_a_layer_of_two_bits_among_eight_is_first(layer):
    qmodel = ready(network(), {**EIGHT, "rules": [{"match": {"name": layer}, "weights": {"n_bits": 2}}]})
    first = diagnose(qmodel, BATCHES, gradients=False).findings[0]
    assert (first.layer, first.kind) == (layer, "bits")


@pytest.mark.parametrize("target", ["Weights", "Activation"])
def test_a_range_ten_times_too_small_is_first(target):
    qmodel = ready(network(), EIGHT)
    quantizer = next(
        each
        for name, each in quantizers_of(qmodel).items()
        if name.startswith("body") and str(each.quantization_config.target) == target
    )
    for name in quantizer.variable_names:
        variable = quantizer.get_quantizer_variable(name)
        quantizer.assign(variable, numpy(variable) * 0.1)
    first = diagnose(qmodel, BATCHES, gradients=False).findings[0]
    assert (first.layer, first.kind) == ("body", "range")
    moved = {(each.quantizer, each.name): each.moved for each in diagnose(qmodel, BATCHES).variables}
    assert max(value for value in moved.values() if value is not None) == pytest.approx(0.9, rel=1e-6)


def test_gradients_are_those_of_the_reference(eight):
    found = {(each.quantizer, each.name): each for each in diagnose(eight, BATCHES[:1], metric="mse").variables}
    assert len(found) == 9  # a threshold for each weight, two ends for each input
    assert {each.moved for each in found.values()} == {0.0}
    *others, head = eight.layers
    x = BATCHES[0]
    for layer in others:
        x = layer(x)
    x = numpy(head.input_holders["inputs"](x)).astype(np.float64)
    ((_, kernel, quantizer),) = head.get_weights_vars()
    reference = numpy(network()(BATCHES[0], training=False)).astype(np.float64)
    output = numpy(eight(BATCHES[0], training=False)).astype(np.float64)
    upstream = x.T @ (2 * (output - reference) / np.square(reference).sum())
    grid = quantizer.current_qparams()
    of_scale = lsq.gradients(numpy(kernel), upstream, grid, tie_rule=TieRule.HALF_UP).scale
    expected = np.sqrt(np.square(of_scale / 2**7).mean())  # eight bits and a sign: the threshold is 2**7 scales
    # the output is near the reference, and both are float32: their difference has some 12 bits
    assert found["head.kernel", "threshold"].gradient == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("rule", ["LSQ", "DQA"])
def test_nothing_of_the_model_changes(rule):
    layers = [keras.Input((6, 6, 1)), kl.Conv2D(4, 3, name="conv"), kl.Dropout(0.5), kl.BatchNormalization()]
    model = keras.Sequential([*layers, kl.Flatten(), kl.Dense(3, name="head")])
    how = {"weights": spec(rule, n_bits=4), "activations": spec("STE"), "fold_batch_norm": False}
    qmodel = ready(model, how)
    qmodel(BATCHES[0], training=True)
    before, trained = values(qmodel), [each.trainable for each in qmodel.weights]
    description, outputs = str(trainable_keras.describe(qmodel)), numpy(qmodel(BATCHES[0], training=False))
    diagnose(qmodel, iter(BATCHES))
    suggest(qmodel, iter(BATCHES), {"bytes": 1000})
    assert same(values(qmodel), before)
    assert [each.trainable for each in qmodel.weights] == trained
    assert str(trainable_keras.describe(qmodel)) == description
    assert np.array_equal(numpy(qmodel(BATCHES[0], training=False)), outputs)
    with pytest.raises(Exception, match=r".+"):
        diagnose(qmodel, [tensor(np.zeros((2, 6, 6, 5), np.float32))])
    assert same(values(qmodel), before)
    assert np.array_equal(numpy(qmodel(BATCHES[0], training=False)), outputs)


def test_an_axis_that_is_wrong_is_first():
    @keras.saving.register_keras_serializable(package="test_diagnosing")
    class AlongInputs(kl.Dense):
        pass

    trainable_keras.register_layer(AlongInputs, "linear", {"kernel": 0})
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((6,)), AlongInputs(6, name="wrong"), kl.ReLU(), kl.Dense(3, name="right")])
    x = [tensor(IMAGES[..., 0].reshape(-1, 6))]
    first = diagnose(ready(model, EIGHT, x), x, gradients=False).findings[0]
    assert (first.layer, first.tensor, first.kind) == ("wrong", "kernel", "axis")
    assert "along axis 0, and its output channels lie along axis 1" in first.sentence


def test_probabilities_at_the_end_and_a_teacher(eight):
    keras.utils.set_random_seed(0)
    layers = [keras.Input((6, 6, 1)), kl.Flatten(), kl.Dense(4, name="one"), kl.Dense(3, name="two")]
    plain = keras.Sequential(layers)
    ended = keras.Sequential([*layers[:-1], kl.Dense(3, activation="softmax", name="two")])
    ended.build((None, 6, 6, 1))
    ended.set_weights(plain.get_weights())
    logits, probabilities = (diagnose(ready(each, recipe("LSQ")), BATCHES) for each in (plain, ended))
    # float32 probabilities have 24 bits, and the divergence is a hundredth
    assert probabilities.total == pytest.approx(logits.total, rel=1e-3)
    assert diagnose(eight, BATCHES, network()).float_cost == pytest.approx(0.0, abs=1e-9)


@only_tensorflow("tf.data is TensorFlow's")
def test_a_data_set_of_tensorflow_with_labels(eight):
    whole = tf.data.Dataset.from_tensor_slices((IMAGES, np.zeros(48))).batch(24)
    of_unknown_length = whole.filter(lambda image, label: True)
    expected = str(diagnose(eight, [tensor(IMAGES[:24]), tensor(IMAGES[24:])]))
    assert [str(diagnose(eight, data)) for data in (whole, of_unknown_length)] == [expected] * 2


def test_a_metric_and_a_call_of_the_user_s(eight):
    def closeness(outputs, batch):
        return -float(np.abs(numpy(outputs)).mean()) * len(batch)

    given = [{"x": batch} for batch in BATCHES]
    found = diagnose(eight, given, metric=closeness, forward=lambda model, batch: model(batch["x"], training=False))
    assert found.metric == "closeness"
    assert {each.gradient is None for each in found.variables} == {False}
    assert diagnose(finalize(eight), BATCHES).variables == ()


def test_suggested_widths_fit_the_budget_and_the_recipe_gives_them(eight):
    chosen = suggest(eight, BATCHES, 4)
    assert chosen.average_bits <= 4
    assert all(chosen.predicted <= cost + 1e-12 for cost in chosen.uniform.values())
    again = wrap(network(), chosen.recipe)
    widths = {row.layer: row.n_bits for row in trainable_keras.describe(again).rows if row.target == "Weights"}
    assert widths == chosen.widths
    row = next(row for row in chosen.rows if row.layers == ("head",))
    other = ready(network(), {**EIGHT, "rules": [{"match": {"name": "head"}, "weights": {"n_bits": 3}}]})
    more = diagnose(other, BATCHES, gradients=False).total - diagnose(eight, BATCHES, gradients=False).total
    assert row.added[3] == pytest.approx(more, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize(
    ("call", "error", "fact"),
    [
        (lambda m: diagnose(network(), BATCHES), ModelError, "wrap"),
        (lambda m: diagnose(wrap(network(), EIGHT), BATCHES), QuantizerStateError, "not calibrated"),
        (lambda m: diagnose(m, []), CalibrationError, "empty"),
        (lambda m: diagnose(m, BATCHES[0]), CalibrationError, "batches"),
        (lambda m: diagnose(m, BATCHES, "teacher"), ModelError, "str"),
        (lambda m: diagnose(m, BATCHES, metric="accuracy"), InvalidArgumentError, "'accuracy'"),
        (lambda m: diagnose(m, BATCHES, forward=lambda model, batch: "text"), ModelError, "str"),
        (lambda m: suggest(finalize(m), BATCHES, 4), QuantizerStateError, "finalized"),
        (lambda m: suggest(m, BATCHES, 1.5), InvalidArgumentError, "too small"),
        (lambda m: suggest(m, BATCHES, 4, widths="4"), InvalidArgumentError, "widths"),
    ],
)
def test_what_is_refused(eight, call, error, fact):
    with pytest.raises(error) as caught:
        call(eight)
    assert fact in str(caught.value)
