"""Wrappers and holders by themselves: which argument a holder quantizes, and what a config brings back."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.keras.framework import BACKEND, internal, kl, numpy, tensor
from tests.keras.models import dense, network, ready, recipe, vectors
from trainable_core.config import TrainableQuantizerActivationConfig, TrainableQuantizerWeightsConfig
from trainable_core.documents.quantizer import quantizer_document, quantizer_from_document
from trainable_core.enums import QuantizationMethod, QuantizationTarget
from trainable_core.errors import UnknownQuantizerError
from trainable_keras import ActivationQuantizationHolder, QuantizationWrapper
from trainable_keras.graph import layers_within
from trainable_keras.parts import (
    KerasHolder,
    KerasWrapper,
    Told,
    argument_names,
    deployed_quantizers,
    own_config,
    parts_among,
    quantize_inputs,
    quantize_output,
    told_of,
)
from trainable_keras.two_classes import TOLD

quantizers = internal("quantizers")
class_of = internal("inferable").class_of
KERNEL = [[1.0, -2.0], [0.5, 0.25]]  # in steps of 1 from -2 to 1; ties go up: 0.5 goes to 1
QUANTIZED = [[1.0, -2.0], [1.0, 0.0]]


def weights(params: Any = None, **fields: Any) -> TrainableQuantizerWeightsConfig:
    return TrainableQuantizerWeightsConfig(
        weights_quantization_method=fields.pop("method", "SYMMETRIC"),
        weights_n_bits=2,
        weights_quantization_params={"threshold": 2.0} if params is None else params,
        **fields,
    )


def activation(**params: Any) -> TrainableQuantizerActivationConfig:
    return TrainableQuantizerActivationConfig(
        activation_quantization_method="SYMMETRIC", activation_n_bits=2, activation_quantization_params=params
    )


def holder() -> ActivationQuantizationHolder:
    made = ActivationQuantizationHolder(quantizers.LsqActivationQuantizer(activation(threshold=4.0)), name="hold")
    told_of(made).tensor = "inputs"
    return made


def wrapper(**arguments: Any) -> QuantizationWrapper:
    layer = dense(2, 2, use_bias=False).layers[-1]
    layer.kernel.assign(KERNEL)
    return QuantizationWrapper(layer, {"kernel": quantizers.LsqWeightsQuantizer(weights())}, **arguments)


def test_a_wrapper_calls_its_layer_with_quantized_weights() -> None:
    made = wrapper()
    assert numpy(made.get_quantized_weights()["kernel"]).tolist() == QUANTIZED
    assert numpy(made(tensor(np.eye(2)))).tolist() == QUANTIZED
    assert numpy(made.layer.kernel).tolist() == KERNEL
    ((attribute, weight, quantizer),) = made.get_weights_vars()
    assert (attribute, id(weight)) == ("kernel", id(made.layer.kernel))
    assert quantizer is made.weights_quantizers["kernel"]
    assert (made.is_weights_quantization, made.num_weights_quantizers) == (True, 1)


def doubled(value: Any, training: Any = None) -> Any:
    return value * 2


def arguments(names: tuple[str, ...], held: tuple[str, ...], output: Any = None) -> Any:
    """Return what stands for a layer whose call has these arguments, some of them held."""
    told = Told(input_names=names)
    return SimpleNamespace(**{TOLD: told}, input_holders=dict.fromkeys(held, doubled), output_holder=output)


def test_inputs_are_quantized_by_position_by_name_and_in_lists() -> None:
    made = arguments(("inputs.0", "inputs.1", "mask"), ("inputs.1", "mask"))
    assert argument_names(("inputs.0", "inputs.1", "mask")) == ["inputs", "mask"]
    assert quantize_inputs(made, [[1, 2]], {"mask": 3}, None) == ([[1, 4]], {"mask": 6})
    assert quantize_inputs(made, [(1, 2), 3], {}, None) == ([(1, 4), 6], {})
    assert quantize_inputs(made, [[1]], {"mask": None}, None) == ([[1]], {"mask": None})


@pytest.mark.parametrize(
    ("given", "kwargs", "values", "named"),
    [
        ((1, 2), {}, [1, 4], {"key": 4}),  # the key is the value, before either is quantized
        ((1,), {"value": 2}, [1], {"value": 4, "key": 4}),
        ((1, 2, 3), {}, [1, 4, 6], {}),
        ((1, 2), {"key": 3}, [1, 4], {"key": 6}),
    ],
)
def test_an_attention_layers_key_is_its_value(given: Any, kwargs: Any, values: Any, named: Any) -> None:
    made = arguments(("query", "value", "key"), ("value", "key"))
    assert quantize_inputs(made, given, kwargs, None) == (values, named)


def test_of_several_outputs_the_first_is_quantized() -> None:
    made = arguments(("inputs",), (), doubled)
    assert quantize_output(made, 3, None) == 6
    assert quantize_output(made, (3, 4), None) == (6, 4)
    assert quantize_output(arguments(("inputs",), ()), (3, 4), None) == (3, 4)


def test_deployed_quantizers_are_made_without_changing_the_wrapper() -> None:
    made = wrapper()
    deployed = deployed_quantizers(made)
    assert type(deployed["kernel"]) is class_of(QuantizationTarget.Weights, QuantizationMethod.SYMMETRIC)
    assert type(made.weights_quantizers["kernel"]) is quantizers.LsqWeightsQuantizer
    made.convert_to_inferable_quantizers()
    assert deployed_quantizers(made)["kernel"] is made.weights_quantizers["kernel"]
    assert numpy(made.get_quantized_weights()["kernel"]).tolist() == QUANTIZED


@pytest.mark.parametrize("deployed", [False, True], ids=["trainable", "deployed"])
def test_a_wrapper_comes_back_from_its_config(deployed: bool) -> None:
    made = wrapper(input_holders={"inputs": holder()}, output_holder=holder())
    told_of(made).notes = {"some": "thing"}
    if deployed:
        made.convert_to_inferable_quantizers()
    again = QuantizationWrapper.from_config(json.loads(json.dumps(made.get_config())))
    assert own_config(again) == own_config(made)
    assert json.loads(json.dumps(again.get_config())) == json.loads(json.dumps(made.get_config()))
    assert (again.name, told_of(again).notes, told_of(again).plan) == ("fc", {"some": "thing"}, None)
    assert [told_of(each).tensor for each in again.holders] == ["inputs", "inputs"]


def test_a_holder_in_a_wrapper_is_not_a_part_of_its_own() -> None:
    qmodel = ready(network(), recipe("LSQ"), np.ones((2, 6, 6, 1), np.float32))
    layers = layers_within(qmodel)
    assert any(isinstance(layer, KerasHolder) for layer in layers)
    assert all(isinstance(part, KerasWrapper) for part in parts_among(layers))
    alone = holder()
    assert parts_among([alone, kl.ReLU(), *layers])[0] is alone


# ---- a quantizer's document -----------------------------------------------------------------------------------------


def again(quantizer: Any) -> Any:
    document = json.loads(json.dumps(quantizer_document(quantizer)))
    return quantizer_from_document(document, BACKEND, class_of)


@pytest.mark.parametrize(
    ("name", "config", "shape"),
    [
        ("SteWeightsQuantizer", weights(), (2, 3)),
        ("LsqWeightsQuantizer", weights({}, method="UNIFORM"), (2, 3)),  # not calibrated
        ("LsqActivationQuantizer", activation(threshold=3.0, is_signed=False), None),
    ],
)
def test_a_trainable_quantizer_comes_back_by_its_key(name: str, config: Any, shape: Any) -> None:
    quantizer = getattr(quantizers, name)(config)
    quantizer.subject = "fc.kernel"
    quantizer.initialize_quantization(shape, "kernel", None)
    for each in quantizer.variable_names if config.quantization_params else ():
        variable = quantizer.get_quantizer_variable(each)
        quantizer.assign(variable, quantizer.to_numpy(variable) * 1.5)  # as training does
    found = again(quantizer)
    assert type(found) is type(quantizer)
    assert (found.subject, found.quantization_config, found.calibrated) == ("fc.kernel", config, quantizer.calibrated)
    for each in found.variable_names:
        one, other = (numpy(q.get_quantizer_variable(each)) for q in (found, quantizer))
        assert np.array_equal(one, other, equal_nan=True)


def test_a_deployed_quantizer_comes_back_by_target_and_grid() -> None:
    quantizer = quantizers.LsqWeightsQuantizer(weights())
    quantizer.initialize_quantization((2, 3), "kernel", None)
    deployed = quantizer.convert2inferable()
    assert quantizer_document(deployed)["inferable"] == ["Weights", "SYMMETRIC"]
    found = again(deployed)
    assert type(found) is type(deployed)
    assert np.array_equal(found.qparams.scale, deployed.qparams.scale)
    assert found.num_bits == 2
    x = tensor(vectors(2, 3))
    assert np.array_equal(numpy(found(x)), numpy(deployed(x)))


def test_the_key_of_a_document_is_target_method_and_grid_and_an_unknown_one_is_told() -> None:
    quantizer = quantizers.SteWeightsQuantizer(weights())
    document = quantizer_document(quantizer)
    assert document["trainable"] == ["Weights", "STE", "SYMMETRIC"]
    document["trainable"][1] = "GONE"
    with pytest.raises(UnknownQuantizerError, match="GONE"):
        quantizer_from_document(document, BACKEND, class_of)
