"""Bad input to the Keras backend, row by row: a typed error names it, and the model is what it was before."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trainable_keras
from tests.bad_input import (
    DQA_ARGUMENTS,
    INF,
    NAN,
    RUBBISH,
    Row,
    activation_config,
    recipes,
    refused,
    refuses_a_document,
    refuses_an_argument,
    refuses_configs_it_is_not_for,
    row,
    table,
    weights_config,
)
from tests.keras.framework import (
    BACKEND,
    KERAS_VERSION,
    functions,
    integers,
    internal,
    keras,
    kl,
    new_variable,
    numpy,
    only_tensorflow,
    tensor,
    tf,
)
from tests.keras.models import call, dense, images, moved, network, ready, recipe, same, state, weights_only
from trainable_core.constants import RANGE_MAX, RANGE_MIN, THRESHOLD
from trainable_core.errors import (
    CalibrationError,
    DocumentError,
    InvalidArgumentError,
    ModelError,
    NothingQuantizedWarning,
    QuantizerStateError,
    RuleError,
    ShapeMismatchError,
    TrainableError,
    UnsupportedConfigError,
)
from trainable_keras import (
    ActivationQuantizationHolder,
    KerasLinearAnnealingScheduler,
    QuantizationWrapper,
    advance_schedules,
    calibrate,
    describe,
    diagnose,
    distill,
    exclude_from_weight_decay,
    export,
    finalize,
    freeze_quant_params,
    load,
    parameter_groups,
    reconstruct,
    reestimate_batch_norm,
    register_layer,
    regularization,
    report,
    save,
    suggest,
    to_mctq,
    track,
    training_callback,
    verify,
    wrap,
)
from trainable_keras.graph import layers_within
from trainable_keras.parts import told_of

BUILTIN = internal("quantizers").BUILTIN
BaseKerasTrainableQuantizer = internal("quantizers").BaseKerasTrainableQuantizer
DqaWeightsQuantizer = internal("quantizers").DqaWeightsQuantizer
LsqActivationQuantizer = internal("quantizers").LsqActivationQuantizer
LsqWeightsQuantizer = internal("quantizers").LsqWeightsQuantizer

LSQ, DQA = recipe("LSQ", "UNIFORM"), recipe("DQA")
FILE = "never-written.tflite"

NAMES = "stem.conv, stem.relu, body, relu, head"

MODELS: dict[str, Callable[[], keras.Model]] = {
    "float": network,
    "wrapped": lambda: wrap(network(), LSQ),
    "wrapped DQA": lambda: wrap(network(), DQA),
    "calibrated": lambda: ready(network(), LSQ, images()),
    "trained": lambda: moved(ready(network(), LSQ, images())),
    "finalized": lambda: finalize(ready(network(), LSQ, images())),
}


def as_it_is(model: Any) -> dict[str, Any]:
    """Return all there is to see of a model: values bit for bit, objects, and what `describe` says."""
    layers = layers_within(model)
    wrapped = any(isinstance(layer, QuantizationWrapper | ActivationQuantizationHolder) for layer in layers)
    return {
        "values": state(model),
        "layers": [(id(layer), layer.name, layer.trainable) for layer in layers],
        "variables": [(id(variable), variable.trainable) for variable in model.variables],
        "holders": [told_of(layer).observer for layer in layers if isinstance(layer, ActivationQuantizationHolder)],
        "wrappers": [told_of(layer).quantizes_weights for layer in layers if isinstance(layer, QuantizationWrapper)],
        "calibrated": [layer.calibrated for layer in layers if isinstance(layer, BaseKerasTrainableQuantizer)],
        "description": str(describe(model)) if wrapped and isinstance(model, keras.Model) else "",
    }


def check(name: str, call: Callable[[Any], object], error: type[Exception], facts: tuple[str, ...]) -> None:
    """Assert that a call on a model is refused, and that the model is as it was."""
    model = MODELS[name]()
    before = as_it_is(model)
    refused(lambda: call(model), error, facts)
    assert as_it_is(model) == before


# ---- wrap -----------------------------------------------------------------------------------------------------------


def wrapping(what: str, how: Any, error: type[Exception], *facts: str) -> Row:
    """Return a row of a recipe that doesn't go with the float model."""
    return row(what, "float", lambda model: wrap(model, how), error, *facts)


@table(
    row("a wrapped model", "wrapped", lambda m: wrap(m, LSQ), QuantizerStateError, "Sequential", "wrapped already"),
    row("a finalized model", "finalized", lambda m: wrap(m, LSQ), QuantizerStateError, "wrapped already"),
    row(
        "a model with a wrapped part",
        "calibrated",
        lambda m: wrap(keras.Sequential([keras.Input((6, 6, 1)), m]), LSQ),
        QuantizerStateError,
        "wrapped",
    ),
    wrapping(
        "a pattern for a layer's parent",
        {**LSQ, "rules": [{"match": {"name": "ste?"}, "skip": True}]},
        RuleError,
        "rules.0",
        "stem",
        NAMES,
    ),
    *(
        wrapping(what, how, error, *facts)
        for what, (how, error, facts) in recipes(BACKEND, "stem.conv.kernel", NAMES).items()
    ),
)
def test_a_wrong_call_of_wrap_is_refused(state: str, call: Any, error: Any, facts: Any) -> None:
    check(state, call, error, facts)


def unbuilt_part() -> keras.Model:
    class Part(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = kl.Dense(2), kl.Dense(3, name="unused")

        def call(self, x: Any) -> Any:
            return self.used(x)

    model = Part()
    expected = pytest.warns(UserWarning, match="unbuilt state") if KERAS_VERSION == 3 else nullcontext()
    with expected:
        model(tensor(np.zeros((1, 2))))
    return model


def with_lambda() -> keras.Model:
    return keras.Sequential([keras.Input((3,)), kl.Lambda(lambda x: x * 2, name="twice"), kl.Dense(2)])


def without_config() -> keras.Model:
    class Opaque(kl.Layer):
        def __init__(self, function: Any) -> None:
            super().__init__(name="opaque")
            self.function = function

        def call(self, x: Any) -> Any:
            return self.function(x)

    return keras.Sequential([keras.Input((3,)), Opaque(lambda x: x), kl.Dense(2)])


UNWRAPPABLE: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "nothing": (lambda: None, ("a Keras model", "NoneType")),
    "a class": (lambda: kl.Dense, ("a Keras model", "type")),
    "a function": (lambda: functions.relu, ("a Keras model", "function")),
    "an array": (lambda: np.zeros(3), ("a Keras model", "ndarray")),
    "a mapping": (lambda: {"kernel": np.zeros(2)}, ("a Keras model", "dict")),
    "a variable": (lambda: new_variable(1.0), ("a Keras model", "Variable")),
    "an unbuilt model": (lambda: keras.Sequential([kl.Dense(3)]), ("Sequential is not built", "model.build")),
    "a model without layers": (keras.Model, ("not built",)),
    "an unbuilt layer": (lambda: kl.Dense(3), ("Dense is not built",)),
    "a layer that is never called": (unbuilt_part, ("'unused'", "no weights yet")),
}


@pytest.mark.parametrize(("make", "facts"), UNWRAPPABLE.values(), ids=UNWRAPPABLE)
def test_wrap_of_what_can_not_be_wrapped(make: Any, facts: tuple[str, ...]) -> None:
    refused(lambda: wrap(make(), LSQ), ModelError, facts)


def test_a_layer_without_a_config_is_copied_and_the_file_of_the_library_needs_none(tmp_path: Path) -> None:
    model, x = without_config(), np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
    qmodel = calibrate(wrap(model, LSQ), [x])
    save(finalize(qmodel), tmp_path / "deployed")
    expected = call(qmodel, x)
    assert not same(expected, call(model, x))  # it is quantized
    assert same(call(load(tmp_path / "deployed", model), x), expected)


def test_a_lambda_layer_is_refused_on_keras_3_and_copied_on_keras_2() -> None:
    """Keras 3 can't see which variables the function uses, and Keras 2 itself would not load the layer."""
    if KERAS_VERSION == 3:
        refused(lambda: wrap(with_lambda(), LSQ), ModelError, ("'twice' is a Lambda", "keras.ops"))
        return
    model = with_lambda()
    for layer in model.layers[1:]:
        layer.kernel.assign(np.ones((3, 2)))
    qmodel = calibrate(wrap(model, weights_only(n_bits=16)))
    assert np.allclose(numpy(qmodel(tensor(np.ones((2, 3))))), 6.0, rtol=0, atol=3 * 2 * 2.0**-15)


@pytest.mark.parametrize("verb", [calibrate, describe, finalize, parameter_groups, regularization])
@pytest.mark.parametrize("given", [None, 3, "model"])
def test_a_verb_of_what_is_not_a_model(verb: Any, given: Any) -> None:
    refused(lambda: verb(given), ModelError, (verb.__name__, "a Keras model", type(given).__name__))


# ---- calibrate ------------------------------------------------------------------------------------------------------


def calibrating(what: str, batches: Any, error: type[Exception], *facts: str, **options: Any) -> Row:
    """Return a row of `calibrate` on a wrapped model."""
    return row(what, "wrapped", lambda model: calibrate(model, batches, **options), error, *facts)


def labelled() -> tuple[Any, Any]:
    """Return inputs and labels, of which a list of one batch is to be made."""
    return images(), np.zeros(len(images()))


def holed(value: float) -> np.ndarray:
    """Return a batch with one value in it that is no number."""
    batch = images()
    batch[3, 2, 2, 0] = value
    return batch


@table(
    calibrating("no batches", None, CalibrationError, "batches", "3 activation quantizers"),
    calibrating("an empty list", [], CalibrationError, "the batches are empty"),
    calibrating("a spent generator", iter(()), CalibrationError, "the batches are empty", "generator"),
    calibrating("an array instead of batches", images(), CalibrationError, "batches", "ndarray", "[batch]"),
    calibrating("a tensor instead of batches", tensor(images()), CalibrationError, "batches", "[batch]"),
    calibrating("a mapping instead of batches", {"input": images()}, CalibrationError, "batches", "dict"),
    calibrating("inputs and labels", labelled(), CalibrationError, "[(x, y)]", "inputs and labels"),
    calibrating("text instead of batches", "data", CalibrationError, "batches", "str"),
    calibrating("a number of batches", 8, CalibrationError, "batches", "int"),
    calibrating("an empty tuple for a batch", [images(), ()], CalibrationError, "a batch is an empty tuple"),
    calibrating("a NaN", [images(), holed(NAN)], CalibrationError, "stem.conv: inputs", "1 NaN", "bad batch"),
    calibrating("an infinity", [holed(-INF)], CalibrationError, "stem.conv: inputs", "1 infinite"),
    calibrating("a forward that is none", [images()], CalibrationError, "forward", "5", forward=5),
    calibrating(
        "a forward that skips the model",
        [images()],
        CalibrationError,
        "stem.conv: inputs",
        "no batch",
        forward=lambda *_: None,
    ),
    row("a float model", "float", lambda m: calibrate(m, [images()]), ModelError, "Sequential", "wrap"),
    row("no model", "float", lambda _: calibrate(None, [images()]), ModelError, "NoneType"),
    row("twice", "calibrated", lambda m: calibrate(m, [images()]), QuantizerStateError, "6 quantizers", "force=True"),
    row("after training", "trained", lambda m: calibrate(m, [images()]), QuantizerStateError, "force=True"),
    row("after the end", "finalized", lambda m: calibrate(m, [images()], force=True), QuantizerStateError, "finalized"),
    row(
        "again, with a NaN", "trained", lambda m: calibrate(m, [holed(NAN)], force=True), CalibrationError, "stem.conv"
    ),
    row("again, with nothing", "trained", lambda m: calibrate(m, [], force=True), CalibrationError, "empty"),
)
def test_a_wrong_call_of_calibrate_is_refused(state: str, call: Any, error: Any, facts: Any) -> None:
    check(state, call, error, facts)


# ---- the other verbs ------------------------------------------------------------------------------------------------


@table(
    row("finalize a float model", "float", finalize, ModelError, "Sequential", "wrap"),
    row("finalize nothing", "float", lambda _: finalize(None), ModelError, "NoneType"),
    row("nothing of mctq's classes", "float", lambda _: to_mctq(None), ModelError, "NoneType"),
    row(
        "finalize before calibration",
        "wrapped",
        finalize,
        QuantizerStateError,
        "stem.conv.kernel",
        "head: inputs",
        "calibrate",
    ),
    row("call before calibration", "wrapped", lambda m: m(images()), QuantizerStateError, "stem.conv: inputs"),
    row(
        "train before calibration",
        "wrapped DQA",
        lambda m: m(images(), training=True),
        QuantizerStateError,
        "stem.conv: inputs",
    ),
    row("export a float model", "float", lambda m: export(m, FILE), ModelError, "Sequential", "wrap"),
    row("export nothing", "float", lambda _: export(None, FILE), ModelError, "NoneType"),
    row("export before finalize", "calibrated", lambda m: export(m, FILE), QuantizerStateError, "finalize"),
    row(
        "export for a target that is not there",
        "finalized",
        lambda m: export(m, FILE, target="tflight"),
        InvalidArgumentError,
        "'tflight'",
        "tflite",
    ),
    row("export to no path", "finalized", lambda m: export(m, None), DocumentError, "NoneType"),
    row("export what stays float", "finalized", lambda m: export(m, FILE), UnsupportedConfigError, "integer kernels"),
    row("verify a float model", "float", lambda m: verify(m, FILE, [images()]), ModelError, "Sequential", "wrap"),
    row("verify nothing", "float", lambda _: verify(None, FILE, [images()]), ModelError, "NoneType"),
    row("verify before finalize", "calibrated", lambda m: verify(m, FILE, []), QuantizerStateError, "finalize"),
    row("verify with no batches", "finalized", lambda m: verify(m, FILE, []), InvalidArgumentError, "no batches"),
    row("verify no file", "finalized", lambda m: verify(m, FILE, [images()]), DocumentError, "can't be read"),
    row("describe a float model", "float", describe, ModelError, "Sequential", "wrap"),
    row("regularize a float model", "float", regularization, ModelError, "Sequential", "wrap"),
    row("freeze a float model", "float", freeze_quant_params, ModelError, "Sequential", "wrap"),
    row(
        "no decay for a float model",
        "float",
        lambda m: exclude_from_weight_decay(keras.optimizers.SGD(0.1), m),
        ModelError,
        "Sequential",
        "wrap",
    ),
    row(
        "statistics of a float model",
        "float",
        lambda m: reestimate_batch_norm(m, [images()]),
        ModelError,
        "Sequential",
        "wrap",
    ),
    row(
        "statistics without a batch norm",
        "calibrated",
        lambda m: reestimate_batch_norm(m, [images()]),
        ModelError,
        "no batch norm",
        "fold_batch_norm: after",
    ),
    row("a diagnosis of a float model", "float", lambda m: diagnose(m, [images()]), ModelError, "Sequential", "wrap"),
    row(
        "a diagnosis of a batch",
        "calibrated",
        lambda m: diagnose(m, labelled()),
        CalibrationError,
        "diagnose",
        "[(x, y)]",
    ),
    row(
        "widths for a batch", "calibrated", lambda m: suggest(m, labelled(), 4), CalibrationError, "suggest", "[(x, y)]"
    ),
    row(
        "tracking with a batch",
        "calibrated",
        lambda m: track(m, "run.csv", batches=labelled()),
        CalibrationError,
        "track",
        "[(x, y)]",
    ),
    row(
        "a report on a batch",
        "calibrated",
        lambda m: report(m, "page.html", labelled()),
        CalibrationError,
        "report",
        "[(x, y)]",
    ),
    row("a diagnosis without a batch", "calibrated", lambda m: diagnose(m, []), CalibrationError, "empty", "fresh"),
    row(
        "a diagnosis by an unknown metric",
        "calibrated",
        lambda m: diagnose(m, [images()], metric="accuracy"),
        InvalidArgumentError,
        "metric",
        "'accuracy'",
    ),
    row("widths for a float model", "float", lambda m: suggest(m, [images()], 4), ModelError, "Sequential", "wrap"),
    row(
        "widths under a budget that is no number",
        "calibrated",
        lambda m: suggest(m, [images()], "small"),
        InvalidArgumentError,
        "budget",
    ),
    row("tracking a float model", "float", lambda m: track(m, "run.csv"), ModelError, "Sequential", "wrap"),
    row("tracking every 0 steps", "calibrated", lambda m: track(m, "run.csv", every=0), InvalidArgumentError, "every"),
    row(
        "tracking into a folder that is not there", "calibrated", lambda m: track(m, "no/run.csv"), DocumentError, "no"
    ),
    row("a report on a float model", "float", lambda m: report(m, "page.html"), ModelError, "Sequential", "wrap"),
    row("a report that is no page", "calibrated", lambda m: report(m, "page.pdf"), DocumentError, "page.pdf", ".html"),
    row("a callback for a float model", "float", training_callback, ModelError, "Sequential", "wrap"),
    row(
        "a callback with a name for a number",
        "calibrated",
        lambda m: training_callback(m, freeze_at="late"),
        InvalidArgumentError,
        "freeze_at",
        "'late'",
    ),
    row("reconstruct a float model", "float", lambda m: reconstruct(m, [images()]), ModelError, "Sequential", "wrap"),
    row(
        "reconstruct what learns no rounding",
        "calibrated",
        lambda m: reconstruct(m, [images()]),
        ModelError,
        "ADAROUND",
    ),
    row("distill into a float model", "float", lambda m: distill(m, m), ModelError, "Sequential", "wrap"),
    row("distill from nothing", "calibrated", lambda m: distill(m, None), ModelError, "NoneType"),
    row(
        "distill by a layer that is not there",
        "calibrated",
        lambda m: distill(m, m, features=["stem.cnov"]),
        InvalidArgumentError,
        "stem.cnov",
    ),
    row("schedules of a float model", "float", advance_schedules, ModelError, "Sequential", "wrap"),
    row("groups of a float model", "float", parameter_groups, ModelError, "Sequential", "wrap"),
    row(
        "params as an option",
        "calibrated",
        lambda m: parameter_groups(m, weights={"params": []}),
        InvalidArgumentError,
        "parameter_groups: weights",
        "'params'",
    ),
    row(
        "a number for options",
        "calibrated",
        lambda m: parameter_groups(m, weights=0.1),
        InvalidArgumentError,
        "parameter_groups: weights",
        "0.1",
    ),
    row("save a float model", "float", lambda m: save(m, "never"), ModelError, "Sequential", "wrap"),
    row("load nothing", "float", lambda m: load("missing", m), DocumentError, "missing", "no such file"),
)
def test_a_wrong_call_of_a_verb_is_refused(state: str, call: Any, error: Any, facts: Any) -> None:
    check(state, call, error, facts)


@only_tensorflow("the engines have their own words around an error in their graphs")
@pytest.mark.parametrize("run", ["graph", "fit", "predict"])
def test_use_before_calibration_says_so_in_graphs_too(run: str) -> None:
    qmodel, x = wrap(dense(), LSQ), np.zeros((4, 4), np.float32)
    qmodel.compile("sgd", "mse")
    calls = {
        "graph": lambda: tf.function(qmodel)(tensor(x)),
        "fit": lambda: qmodel.fit(x, np.zeros((4, 3)), verbose=0),
        "predict": lambda: qmodel.predict(x, verbose=0),
    }
    refused(calls[run], QuantizerStateError, ("fc", "no quantization params", "calibrate the model"))


# ---- quantizers, wrapper, holder ------------------------------------------------------------------------------------


PER_CHANNEL = {"weights_channels_axis": 0, "weights_per_channel_threshold": True}


@pytest.mark.parametrize("cls", BUILTIN, ids=lambda cls: cls.__name__)
def test_a_config_for_another_quantizer_is_refused(cls: type[Any]) -> None:
    refuses_configs_it_is_not_for(cls)


def fresh(params: Any = None, shape: tuple[int, ...] = (2, 3), **fields: Any) -> LsqWeightsQuantizer:
    """Return an initialized weights quantizer called ``fc.kernel``."""
    quantizer = LsqWeightsQuantizer(weights_config(params, **fields))
    quantizer.subject = "fc.kernel"
    quantizer.initialize_quantization(shape, "kernel", None)
    return quantizer


CHANNELS = {THRESHOLD: [1.0, 2.0]}
CALLS: dict[str, tuple[Callable[[], Any], Callable[[Any], object], type[Exception], tuple[str, ...]]] = {
    "before calibration": (fresh, lambda q: q(tensor(np.zeros((2, 3)))), QuantizerStateError, ("fc.kernel",)),
    "converted before calibration": (fresh, lambda q: q.convert2inferable(), QuantizerStateError, ("fc.kernel",)),
    "one channel too many": (
        lambda: fresh(CHANNELS, **PER_CHANNEL),
        lambda q: q(tensor(np.zeros((3, 3)))),
        ShapeMismatchError,
        ("fc.kernel", "2 channels", "(3, 3)"),
    ),
    "one dimension too few": (
        lambda: fresh(CHANNELS, (3, 2), weights_channels_axis=1, weights_per_channel_threshold=True),
        lambda q: q(tensor(np.zeros(2))),
        ShapeMismatchError,
        ("fc.kernel", "axis 1", "(2,)"),
    ),
    "integers": (
        lambda: fresh({THRESHOLD: 1.0}),
        lambda q: q(integers(np.zeros((2, 3)))),
        ShapeMismatchError,
        ("fc.kernel", "int32"),
    ),
    "a list": (lambda: fresh({THRESHOLD: 1.0}), lambda q: q([[0.0]]), ShapeMismatchError, ("fc.kernel", "list")),
    "another shape": (
        lambda: fresh({THRESHOLD: 1.0}, **PER_CHANNEL),
        lambda q: q.initialize_quantization((3, 3), "kernel", None),
        QuantizerStateError,
        ("fc.kernel", "another shape"),
    ),
    "another width": (
        lambda: fresh({THRESHOLD: 1.0}),
        lambda q: q.set_quantization_params({8: {THRESHOLD: 2.0}}),
        InvalidArgumentError,
        ("fc.kernel", "[8]", "[4]"),
    ),
    "a wrong length": (
        lambda: fresh(CHANNELS, **PER_CHANNEL),
        lambda q: q.set_quantization_params({4: {THRESHOLD: [1.0, 2.0, 3.0]}}),
        ShapeMismatchError,
        ("fc.kernel: threshold", "(2,)", "(3,)"),
    ),
    "a range for a threshold": (
        lambda: fresh({THRESHOLD: 1.0}),
        lambda q: q.set_quantization_params({4: {RANGE_MIN: -1.0, RANGE_MAX: 1.0}}),
        InvalidArgumentError,
        ("fc.kernel", "'range_min'"),
    ),
    "NaN for a threshold": (
        lambda: fresh({THRESHOLD: 1.0}),
        lambda q: q.set_quantization_params({4: {THRESHOLD: NAN}}),
        InvalidArgumentError,
        ("fc.kernel", "'threshold'", "finite"),
    ),
    "an unknown variable": (
        lambda: fresh({THRESHOLD: 1.0}),
        lambda q: q.get_quantizer_variable("treshold"),
        QuantizerStateError,
        ("fc.kernel", "'treshold'", "did you mean 'threshold'"),
    ),
}


@pytest.mark.parametrize(("make", "call", "error", "facts"), CALLS.values(), ids=CALLS)
def test_a_wrong_call_of_a_quantizer_is_refused(make: Any, call: Any, error: Any, facts: Any) -> None:
    quantizer = make()
    before = as_it_is(quantizer)
    refused(lambda: call(quantizer), error, facts)
    assert as_it_is(quantizer) == before


@pytest.mark.parametrize(("given", "fact"), RUBBISH.values(), ids=RUBBISH)
def test_a_damaged_document_of_a_quantizer_is_refused(given: Any, fact: str) -> None:
    refuses_a_document(fresh({THRESHOLD: 1.0}), given, fact)


@pytest.mark.parametrize(("arguments", "fact"), DQA_ARGUMENTS.values(), ids=DQA_ARGUMENTS)
def test_a_wrong_argument_of_dqa_is_refused(arguments: dict[str, Any], fact: str) -> None:
    refuses_an_argument(DqaWeightsQuantizer, arguments, fact)


def test_a_document_of_dqa_without_its_step() -> None:
    document = DqaWeightsQuantizer(weights_config()).get_config()
    for wrong in ({"step": "soon"}, {"step": None}):
        refused(lambda wrong=wrong: DqaWeightsQuantizer.from_config({**document, **wrong}), TrainableError, ("step",))


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        ((5, 5, 1.0, 0.0), "t_end must be greater than t_start"),
        ((-1, 4, 1.0, 0.0), "t_start must not be negative"),
        ((0, 4, NAN, 0.0), "initial_val"),
    ],
)
def test_a_wrong_schedule_is_refused(arguments: tuple[Any, ...], fact: str) -> None:
    refused(lambda: KerasLinearAnnealingScheduler(*arguments), InvalidArgumentError, (fact,))


PARTS: dict[str, tuple[Callable[[Any], object], type[Exception], tuple[str, ...]]] = {
    "an unknown weight": (
        lambda layer: QuantizationWrapper(layer, {"kernal": fresh(shape=(3, 2))}),
        InvalidArgumentError,
        ("'kernal'",),
    ),
    "a weight by position": (
        lambda layer: QuantizationWrapper(layer, {0: fresh()}),
        InvalidArgumentError,
        ("weights_quantizers", "str", "[0]"),
    ),
    "no quantizers": (
        lambda layer: QuantizationWrapper(layer, None),
        InvalidArgumentError,
        ("weights_quantizers", "NoneType"),
    ),
    "a number for a quantizer": (
        lambda layer: QuantizationWrapper(layer, {"kernel": 5}),
        InvalidArgumentError,
        ("'kernel'", "int"),
    ),
    "an activation quantizer for weights": (
        lambda layer: QuantizationWrapper(layer, {"kernel": LsqActivationQuantizer(activation_config())}),
        InvalidArgumentError,
        ("'kernel'", "Weights", "Activation"),
    ),
    "no layer": (lambda _: QuantizationWrapper(None, {}), ModelError, ("NoneType",)),
    "an unbuilt layer": (lambda _: QuantizationWrapper(kl.Dense(2), {}), ModelError, ("not built",)),
    "nothing to hold": (
        lambda _: ActivationQuantizationHolder(None),
        InvalidArgumentError,
        ("ActivationQuantizationHolder", "NoneType"),
    ),
    "a weights quantizer for activations": (
        lambda _: ActivationQuantizationHolder(LsqWeightsQuantizer(weights_config())),
        InvalidArgumentError,
        ("ActivationQuantizationHolder", "Activation", "Weights"),
    ),
}


@pytest.mark.parametrize(("call", "error", "facts"), PARTS.values(), ids=PARTS)
def test_a_wrapper_or_holder_of_wrong_parts_is_refused(
    call: Any, error: type[Exception], facts: tuple[str, ...]
) -> None:
    layer = kl.Dense(3)
    layer.build((None, 2))
    before = as_it_is(layer)
    refused(lambda: call(layer), error, facts)
    assert as_it_is(layer) == before


# ---- layers ---------------------------------------------------------------------------------------------------------


class Mine(kl.Layer):
    """A layer of no known kind."""

    def build(self, shape: Any) -> None:
        """Make the kernel."""
        self.kernel = self.add_weight(shape=(shape[-1], 3), name="kernel")

    def call(self, x: Any) -> Any:
        """Return the product with the kernel."""
        return functions.matmul(x, self.kernel)


LAYERS: dict[str, tuple[tuple[Any, ...], str]] = {
    "a layer": ((Mine(), "linear"), "Mine"),
    "no class": (("Mine", "linear"), "'Mine'"),
    "a class that is no layer": ((int, "linear"), "int"),
    "an unknown op": ((Mine, "dense"), "'dense'"),
    "no op": ((Mine, None), "None"),
    "a number for weights": ((Mine, "linear", 5), "weights"),
    "names without axes": ((Mine, "linear", ["kernel"]), "weights"),
    "a word for an axis": ((Mine, "linear", {"kernel": "first"}), "'first'"),
    "a bool axis": ((Mine, "linear", {"kernel": True}), "True"),
    "a number for a name": ((Mine, "linear", {5: 0}), "5"),
    "a word for inputs": ((Mine, "linear", {"kernel": 0}, "input"), "inputs"),
}


def with_mine(cls: type[Any] = Mine) -> keras.Model:
    return keras.Sequential([keras.Input((4,)), cls(name="mine")])


@pytest.mark.parametrize(("arguments", "fact"), LAYERS.values(), ids=LAYERS)
def test_a_wrong_layer_kind_is_refused(arguments: tuple[Any, ...], fact: str) -> None:
    refused(lambda: register_layer(*arguments), InvalidArgumentError, ("register_layer", fact))
    # still unknown: nothing of it was kept
    with pytest.warns(NothingQuantizedWarning):
        qmodel = wrap(with_mine(), weights_only())
    assert "no known kind" in describe(qmodel).left_out["mine"]


@pytest.mark.parametrize(
    ("weights", "error", "facts"),
    [
        ({"kernle": 0}, ModelError, ("layer 'mine'", "'kernle'", "register_layer")),
        ({"kernel": 2}, ShapeMismatchError, ("mine.kernel", "(4, 3)", "2")),
    ],
    ids=["an unknown weight", "an axis beyond the tensor"],
)
def test_a_layer_kind_that_does_not_fit_its_layer(weights: Any, error: type[Exception], facts: tuple[str, ...]) -> None:
    class Other(Mine):
        """Registered for this test only."""

    register_layer(Other, "linear", weights)
    model = with_mine(Other)
    before = as_it_is(model)
    refused(lambda: wrap(model, weights_only()), error, facts)
    assert as_it_is(model) == before


def test_every_public_verb_is_tried() -> None:
    """A new verb needs its rows here."""
    tried = {
        ActivationQuantizationHolder,
        BaseKerasTrainableQuantizer,
        KerasLinearAnnealingScheduler,
        QuantizationWrapper,
        advance_schedules,
        calibrate,
        describe,
        diagnose,
        distill,
        exclude_from_weight_decay,
        export,
        finalize,
        freeze_quant_params,
        load,
        parameter_groups,
        reconstruct,
        reestimate_batch_norm,
        register_layer,
        regularization,
        report,
        save,
        suggest,
        to_mctq,
        track,
        training_callback,
        verify,
        wrap,
    }
    assert {getattr(trainable_keras, name) for name in trainable_keras.__all__} - tried == {trainable_keras.Grid}
