"""Bad input to the Keras backend, row by row: a typed error names it, and the model is what it was before."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
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
from tests.keras.framework import functions, integers, internal, keras, kl, new_variable, only_tensorflow, tensor
from tests.keras.models import dense, images, moved, network, ready, recipe, state, weights_only
from trainable_core.constants import RANGE_MAX, RANGE_MIN, THRESHOLD
from trainable_core.errors import (
    CalibrationError,
    DocumentError,
    InvalidArgumentError,
    ModelError,
    QuantizerStateError,
    RuleError,
    ShapeMismatchError,
    TrainableError,
)
from trainable_keras import (
    ActivationQuantizationHolder,
    KerasLinearAnnealingScheduler,
    QuantizationWrapper,
    advance_schedules,
    calibrate,
    describe,
    finalize,
    freeze_quant_params,
    load,
    parameter_groups,
    register_layer,
    regularization,
    save,
    wrap,
)
from trainable_keras.graph import layers_within

BUILTIN = internal("quantizers").BUILTIN
BaseKerasTrainableQuantizer = internal("quantizers").BaseKerasTrainableQuantizer
DqaWeightsQuantizer = internal("quantizers").DqaWeightsQuantizer
LsqActivationQuantizer = internal("quantizers").LsqActivationQuantizer
LsqWeightsQuantizer = internal("quantizers").LsqWeightsQuantizer

LSQ, DQA = recipe("LSQ", "UNIFORM"), recipe("DQA")
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
        "holders": [layer.observer for layer in layers if isinstance(layer, ActivationQuantizationHolder)],
        "wrappers": [layer.quantizes_weights for layer in layers if isinstance(layer, QuantizationWrapper)],
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
        "a layer's parent",
        {**LSQ, "rules": [{"match": {"name": "stem"}, "skip": True}]},
        RuleError,
        "rules.0",
        "stem",
        NAMES,
    ),
    *(
        wrapping(what, how, error, *facts)
        for what, (how, error, facts) in recipes("keras", "stem.conv.kernel", NAMES).items()
    ),
)
def test_wrap(state: str, call: Any, error: Any, facts: Any) -> None:
    check(state, call, error, facts)


def unbuilt_part() -> keras.Model:
    class Part(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = kl.Dense(2), kl.Dense(3, name="unused")

        def call(self, x: Any) -> Any:
            return self.used(x)

    model = Part()
    with pytest.warns(UserWarning, match="unbuilt state"):
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
    "nothing": (lambda: None, ("keras.Model", "NoneType")),
    "a class": (lambda: kl.Dense, ("keras.Model", "type")),
    "a function": (lambda: functions.relu, ("keras.Model", "function")),
    "an array": (lambda: np.zeros(3), ("keras.Model", "ndarray")),
    "a variable": (lambda: new_variable(1.0), ("keras.Model", "Variable")),
    "an unbuilt model": (lambda: keras.Sequential([kl.Dense(3)]), ("Sequential is not built", "model.build")),
    "an unbuilt layer": (lambda: kl.Dense(3), ("Dense is not built",)),
    "a layer that is never called": (unbuilt_part, ("'unused'", "no weights yet")),
    "a lambda layer": (with_lambda, ("'twice' is a Lambda", "keras.ops")),
    "a layer without a config": (without_config, ("opaque", "get_config")),
}


@pytest.mark.parametrize(("make", "facts"), UNWRAPPABLE.values(), ids=UNWRAPPABLE)
def test_wrap_of_what_can_not_be_wrapped(make: Any, facts: tuple[str, ...]) -> None:
    refused(lambda: wrap(make(), LSQ), ModelError, facts)


class Layer:
    """What a Keras 2 layer is to this backend: not Keras 3's, and of a class of that name in ``tf_keras``."""


Layer.__module__ = "tf_keras.src.engine.base_layer"


class Dense(Layer):
    """A layer of the other Keras."""


VERBS = {"wrap": lambda model: wrap(model, LSQ), "describe": describe, "finalize": finalize, "calibrate": calibrate}


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_a_keras_2_object_is_told_what_to_install_or_set(verb: Any) -> None:
    refused(lambda: verb(Dense()), ModelError, ("Keras 2", "pip install trainable-tfkeras", "TF_USE_LEGACY_KERAS"))


@only_tensorflow("Keras 2 needs TensorFlow")
def test_a_real_keras_2_model_is_told_what_to_install_or_set() -> None:
    tf_keras = pytest.importorskip("tf_keras", reason="needs tf-keras")
    model = tf_keras.Sequential([tf_keras.layers.Dense(2, input_shape=(3,))])
    refused(lambda: wrap(model, LSQ), ModelError, ("Keras 2", "trainable-tfkeras"))


KERAS_2 = """
import sys, types
keras = types.ModuleType("keras")
keras.__version__ = "2.15.0"
sys.modules["keras"] = keras
import trainable_keras.keras3.plugin
try:
    import trainable_keras.keras3.engine
except ImportError as error:
    print("REFUSED", type(error).__name__, error)
"""


def test_a_process_with_keras_2_is_told_what_to_install() -> None:
    """By what Keras is in the process, whatever versions are installed."""
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KERAS_2], capture_output=True, text=True, check=True
    )
    refusal = finished.stdout.partition("REFUSED ")[2]
    assert refusal.startswith("FrameworkError")
    for fact in ("Keras 2.15.0", "needs Keras 3", "keras>=3.10", "trainable-tfkeras"):
        assert fact in refusal


# ---- calibrate ------------------------------------------------------------------------------------------------------


def calibrating(what: str, batches: Any, error: type[Exception], *facts: str, **options: Any) -> Row:
    """Return a row of `calibrate` on a wrapped model."""
    return row(what, "wrapped", lambda model: calibrate(model, batches, **options), error, *facts)


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
def test_calibrate(state: str, call: Any, error: Any, facts: Any) -> None:
    check(state, call, error, facts)


# ---- the other verbs ------------------------------------------------------------------------------------------------


@table(
    row("finalize a float model", "float", finalize, ModelError, "Sequential", "wrap"),
    row("finalize nothing", "float", lambda _: finalize(None), ModelError, "NoneType"),
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
    row("describe a float model", "float", describe, ModelError, "Sequential", "wrap"),
    row("regularize a float model", "float", regularization, ModelError, "Sequential", "wrap"),
    row("freeze a float model", "float", freeze_quant_params, ModelError, "Sequential", "wrap"),
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
def test_a_verb(state: str, call: Any, error: Any, facts: Any) -> None:
    check(state, call, error, facts)


@only_tensorflow("the engines have their own words around an error in their graphs")
def test_fit_before_calibration_says_so() -> None:
    qmodel = wrap(dense(), LSQ)
    qmodel.compile("sgd", "mse")
    refused(lambda: qmodel.fit(np.zeros((4, 4)), np.zeros((4, 3)), verbose=0), QuantizerStateError, ("fc", "calibrate"))


# ---- quantizers, wrapper, holder ------------------------------------------------------------------------------------


PER_CHANNEL = {"weights_channels_axis": 0, "weights_per_channel_threshold": True}


@pytest.mark.parametrize("cls", BUILTIN, ids=lambda cls: cls.__name__)
def test_a_quantizer_of_a_config_it_is_not_for(cls: type[Any]) -> None:
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
def test_a_call_of_a_quantizer(make: Any, call: Any, error: Any, facts: Any) -> None:
    quantizer = make()
    before = as_it_is(quantizer)
    refused(lambda: call(quantizer), error, facts)
    assert as_it_is(quantizer) == before


@pytest.mark.parametrize(("given", "fact"), RUBBISH.values(), ids=RUBBISH)
def test_a_document_of_rubbish(given: Any, fact: str) -> None:
    refuses_a_document(fresh({THRESHOLD: 1.0}), given, fact)


@pytest.mark.parametrize(("arguments", "fact"), DQA_ARGUMENTS.values(), ids=DQA_ARGUMENTS)
def test_an_argument_of_dqa(arguments: dict[str, Any], fact: str) -> None:
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
def test_a_schedule_on_tensors(arguments: tuple[Any, ...], fact: str) -> None:
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
    "no layer": (lambda _: QuantizationWrapper(None, {}), ModelError, ("keras.layers.Layer", "NoneType")),
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
def test_a_wrapper_or_holder(call: Any, error: type[Exception], facts: tuple[str, ...]) -> None:
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
def test_a_layer_kind(arguments: tuple[Any, ...], fact: str) -> None:
    refused(lambda: register_layer(*arguments), InvalidArgumentError, ("register_layer", fact))
    # still unknown: nothing of it was kept
    assert "no known kind" in describe(wrap(with_mine(), weights_only())).left_out["mine"]


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
        finalize,
        freeze_quant_params,
        load,
        parameter_groups,
        register_layer,
        regularization,
        save,
        wrap,
    }
    assert {getattr(trainable_keras, name) for name in trainable_keras.__all__} - tried == {trainable_keras.Grid}
