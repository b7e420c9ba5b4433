"""Bad input to the Keras 2 backend, row by row: a typed error names it, and the model is what it was before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from pydantic import ValidationError
from trainable_keras.keras2.wrapping import STATE

import trainable_keras.keras2
from tests.bad_input import (
    DQA_ARGUMENTS,
    INF,
    RUBBISH,
    recipes,
    refused,
    refuses_a_document,
    refuses_an_argument,
    refuses_configs_it_is_not_for,
)
from tests.tfkeras.models import LSQ, WEIGHTS, calibrated, dqa, kl, small
from trainable_core.config import TrainableQuantizerWeightsConfig
from trainable_core.enums import QuantizationMethod
from trainable_core.errors import (
    DocumentError,
    InvalidArgumentError,
    ModelError,
    QuantizerStateError,
    ShapeMismatchError,
)
from trainable_keras.keras2 import KerasLinearAnnealingScheduler, QuantizationWrapper, describe, wrap
from trainable_keras.keras2.quantizers import (
    BUILTIN,
    DqaWeightsQuantizer,
    LsqActivationQuantizer,
    LsqWeightsQuantizer,
)
from trainable_keras.keras2.tracing import layers_within

NAMES = "conv, relu, head"


def as_it_is(model: Any) -> dict[str, Any]:
    """Return all there is to see of a model: values bit for bit, objects, and what `describe` says."""
    seen = {
        "values": [weight.numpy().tobytes() for weight in model.weights],
        "weights": [id(weight) for weight in model.weights],
        "trainable": [id(weight) for weight in model.trainable_weights],
        "layers": [(id(layer), layer.name, layer.trainable) for layer in layers_within(model)],
        "wrappers": [each.quantizes_weights for each in layers_within(model) if isinstance(each, QuantizationWrapper)],
    }
    return {**seen, "description": str(describe(model)) if hasattr(model, STATE) else ""}


# ---- wrap -----------------------------------------------------------------------------------------------------------

RECIPES = recipes("tf_keras", "conv.kernel", NAMES)


@pytest.mark.parametrize(("recipe", "error", "facts"), RECIPES.values(), ids=RECIPES)
def test_a_recipe_that_does_not_fit(recipe: Any, error: Any, facts: Any) -> None:
    model = small()
    before = as_it_is(model)
    refused(lambda: wrap(model, recipe), error, facts)
    assert as_it_is(model) == before


class Opaque(kl.Layer):
    """A layer that can't be made again: its argument is in no config."""

    def __init__(self, function: Any) -> None:
        super().__init__(name="opaque")
        self.function = function

    def call(self, x: Any) -> Any:
        return self.function(x)


@pytest.mark.parametrize(
    ("make", "error", "facts"),
    [
        (lambda: None, ModelError, ("tf.keras.Model", "NoneType")),
        (lambda: kl.Dense, ModelError, ("tf.keras.Model", "type")),
        (lambda: {"kernel": np.zeros(2)}, ModelError, ("tf.keras.Model", "dict")),
        (lambda: tf.keras.Sequential([kl.Dense(2)]), ModelError, ("not built", "model.build(input_shape)")),
        (tf.keras.Model, ModelError, ("not built",)),
        (
            lambda: tf.keras.Sequential([tf.keras.Input((3,)), Opaque(abs), kl.Dense(2)]),
            ModelError,
            ("opaque", "get_config"),
        ),
        (lambda: calibrated()[0], QuantizerStateError, ("wrapped already",)),
        (lambda: trainable_keras.keras2.finalize(calibrated()[0]), QuantizerStateError, ("wrapped already",)),
        (
            lambda: tf.keras.Sequential([tf.keras.Input((6, 6, 2)), calibrated()[0]]),
            QuantizerStateError,
            ("wrapped already",),
        ),
    ],
    ids=["nothing", "class", "dict", "unbuilt", "empty", "opaque", "wrapped", "finalized", "part"],
)
def test_what_can_not_be_wrapped(make: Any, error: Any, facts: Any) -> None:
    given = make()
    refused(lambda: wrap(given, LSQ), error, facts)


def test_a_lambda_layer_is_copied_though_keras_would_not_load_it() -> None:
    model = tf.keras.Sequential([tf.keras.Input((3,)), kl.Lambda(lambda x: x * 2), kl.Dense(2)])
    x = np.ones((2, 3), np.float32)
    qmodel = trainable_keras.keras2.calibrate(wrap(model, WEIGHTS))
    assert np.isfinite(qmodel(x).numpy()).all()


def test_a_layer_of_unknown_kind_is_left_alone_and_told() -> None:
    @tf.keras.saving.register_keras_serializable(package="tests")
    class Unknown(kl.Layer):
        def build(self, shape: Any) -> None:
            self.w = self.add_weight(name="w", shape=(shape[-1],))

        def call(self, x: Any) -> Any:
            return x + self.w

    qmodel = wrap(tf.keras.Sequential([tf.keras.Input((3,)), Unknown(name="unknown"), kl.Dense(2)]), LSQ)
    assert "register_layer" in describe(qmodel).left_out["unknown"]


@pytest.mark.parametrize("verb", ["calibrate", "describe", "finalize", "parameter_groups", "regularization"])
@pytest.mark.parametrize("verb_gets", ["float", "nothing"])
def test_a_verb_of_what_was_not_wrapped(verb: str, verb_gets: str) -> None:
    given = small() if verb_gets == "float" else None
    fact = "not made by trainable_keras.keras2.wrap" if verb_gets == "float" else "must be a tf.keras.Model"
    refused(lambda: getattr(trainable_keras.keras2, verb)(given), ModelError, (fact,))


@pytest.mark.parametrize("verb", ["freeze_quant_params", "advance_schedules"])
def test_a_switch_of_what_was_not_wrapped(verb: str) -> None:
    refused(lambda: getattr(trainable_keras.keras2, verb)(small()), ModelError, ("not made by",))


def test_save_of_a_float_model_and_to_where_nothing_can_be_written(tmp_path: Any) -> None:
    refused(lambda: trainable_keras.keras2.save(small(), tmp_path / "model"), ModelError, ("not made by",))
    refused(
        lambda: trainable_keras.keras2.save(calibrated()[0], tmp_path / "missing" / "model"),
        DocumentError,
        ("can't be written",),
    )


@pytest.mark.parametrize("run", ["eager", "graph", "fit", "predict"])
def test_use_before_calibration_keeps_its_type(run: str) -> None:
    qmodel, x = wrap(small(), LSQ), np.ones((2, 6, 6, 2), np.float32)
    qmodel.compile("sgd", "mse")
    calls = {
        "eager": lambda: qmodel(x),
        "graph": lambda: tf.function(qmodel)(tf.constant(x)),
        "fit": lambda: qmodel.fit(x, np.zeros((2, 3)), verbose=0),
        "predict": lambda: qmodel.predict(x, verbose=0),
    }
    refused(calls[run], QuantizerStateError, ("conv: inputs", "no quantization params", "calibrate the model"))


# ---- quantizers -----------------------------------------------------------------------------------------------------


def weights_config(params: Any = None, **fields: Any) -> TrainableQuantizerWeightsConfig:
    return TrainableQuantizerWeightsConfig(
        weights_quantization_method=fields.pop("method", QuantizationMethod.SYMMETRIC),
        weights_n_bits=4,
        weights_quantization_params={"threshold": 1.0} if params is None else params,
        **fields,
    )


def fresh(params: Any = None, shape: tuple[int, ...] = (2, 3), **fields: Any) -> LsqWeightsQuantizer:
    quantizer = LsqWeightsQuantizer(weights_config(params, **fields))
    quantizer.initialize_quantization(shape, "kernel", None)
    return quantizer


PER_CHANNEL = {"weights_channels_axis": 0, "weights_per_channel_threshold": True}


@pytest.mark.parametrize("cls", BUILTIN, ids=lambda cls: cls.__name__)
def test_a_quantizer_of_a_config_it_is_not_for(cls: type[Any]) -> None:
    refuses_configs_it_is_not_for(cls)


@pytest.mark.parametrize(("given", "fact"), RUBBISH.values(), ids=RUBBISH)
def test_a_document_of_rubbish(given: Any, fact: str) -> None:
    refuses_a_document(fresh(), given, fact)


CALLS: dict[str, tuple[Callable[[], object], type[Exception], tuple[str, ...]]] = {
    "frozen by a number": (
        lambda: LsqWeightsQuantizer(weights_config(), freeze_quant_params=1),
        InvalidArgumentError,
        ("freeze_quant_params",),
    ),
    "an axis beyond the tensor": (
        lambda: fresh(weights_channels_axis=2, weights_per_channel_threshold=True),
        ShapeMismatchError,
        ("weights_channels_axis", "(2, 3)"),
    ),
    "another number of channels": (
        lambda: fresh({"threshold": [1.0, 2.0, 3.0]}, **PER_CHANNEL),
        ShapeMismatchError,
        ("threshold", "axis 0"),
    ),
    "a shape of words": (lambda: fresh(shape=("a",)), ShapeMismatchError, ("tensor_shape",)),
    "initialized again": (
        lambda: fresh({}, **PER_CHANNEL).initialize_quantization((5, 3), "kernel", None),
        QuantizerStateError,
        ("already initialized",),
    ),
    "an unknown variable": (
        lambda: fresh().get_quantizer_variable("treshold"),
        QuantizerStateError,
        ("treshold", "did you mean 'threshold'"),
    ),
    "params of another width": (
        lambda: fresh().set_quantization_params({8: {"threshold": 1.0}}),
        InvalidArgumentError,
        ("widths [8]", "[4]"),
    ),
    "a negative threshold": (
        lambda: fresh().set_quantization_params({4: {"threshold": -1.0}}),
        InvalidArgumentError,
        ("threshold", "positive"),
    ),
    "an infinite threshold": (
        lambda: fresh().set_quantization_params({4: {"threshold": INF}}),
        InvalidArgumentError,
        ("threshold", "finite"),
    ),
    "converted too early": (lambda: fresh({}).convert2inferable(), QuantizerStateError, ("no quantization params",)),
    "converted though switched off": (
        lambda: fresh(enable_weights_quantization=False).convert2inferable(),
        QuantizerStateError,
        ("switches quantization off",),
    ),
    "called too early": (
        lambda: LsqWeightsQuantizer(weights_config())(tf.ones(3)),
        QuantizerStateError,
        ("not initialized",),
    ),
    "a document of rubbish": (
        lambda: LsqActivationQuantizer.from_config({"quantization_config": 3}),
        InvalidArgumentError,
        ("quantization_config",),
    ),
    "a file of other variables": (
        lambda: fresh().load_own_variables({"treshold": np.ones(())}),
        QuantizerStateError,
        ("treshold", "threshold"),
    ),
}


@pytest.mark.parametrize(("call", "error", "facts"), CALLS.values(), ids=CALLS)
def test_a_call_of_a_quantizer(call: Any, error: Any, facts: Any) -> None:
    refused(call, error, facts)


@pytest.mark.parametrize(("arguments", "fact"), DQA_ARGUMENTS.values(), ids=DQA_ARGUMENTS)
def test_an_argument_of_dqa(arguments: dict[str, Any], fact: str) -> None:
    refuses_an_argument(DqaWeightsQuantizer, arguments, fact)
    model = small()
    before = as_it_is(model)
    refused(lambda: wrap(model, dqa(**arguments)), (InvalidArgumentError, ValidationError), ())
    assert as_it_is(model) == before


def test_a_schedule_on_tensors_is_checked_like_cores() -> None:
    refused(lambda: KerasLinearAnnealingScheduler(5, 1, 1.0, 0.1), InvalidArgumentError, ("t_end",))


# ---- wrapper --------------------------------------------------------------------------------------------------------


def built() -> Any:
    layer = kl.Dense(3)
    layer.build((None, 2))
    return layer


@pytest.mark.parametrize(
    ("call", "error", "facts"),
    [
        (lambda: QuantizationWrapper(3, {}), ModelError, ("int",)),
        (lambda: QuantizationWrapper(kl.Dense(3), {}), ModelError, ("not built",)),
        (lambda: QuantizationWrapper(built(), {"kernel": 3}), InvalidArgumentError, ("needs a quantizer", "int")),
        (lambda: QuantizationWrapper(built(), {"kernal": fresh()}), InvalidArgumentError, ("kernal", "no weight")),
        (
            lambda: QuantizationWrapper(built(), {"kernel": fresh({"threshold": [1.0] * 7}, (7, 3), **PER_CHANNEL)}),
            ShapeMismatchError,
            ("threshold", "got 7"),
        ),
    ],
)
def test_a_wrapper(call: Any, error: Any, facts: Any) -> None:
    refused(call, error, facts)


def test_every_public_verb_is_tried() -> None:
    source = open(__file__, encoding="utf-8").read()  # noqa: PTH123, SIM115 - this very file
    public = set(trainable_keras.keras2.__all__) - {
        "BaseKerasTrainableQuantizer",
        "Grid",
        "ActivationQuantizationHolder",
    }
    elsewhere = {"load", "register_layer"}  # test_serialization.py, test_layers.py
    assert [name for name in public - elsewhere if name not in source] == []
