"""Wrappers and holders of a Keras of a few lines."""

import json

import numpy as np
import pytest

from tests.core.home_backend import activation_config, weights_config
from tests.core.toy_keras import (
    ActivationDeployed,
    ActivationTrainable,
    Dense,
    Deployed,
    Holder,
    Layer,
    ToyPlugin,
    Trainable,
    Wrapper,
)
from trainable_core.calibration import Observer
from trainable_core.errors import CalibrationError, InvalidArgumentError, ModelError
from trainable_core.recipe.document import QuantizationRecipe
from trainable_core.recipe.layers import LayerInfo, WeightInfo
from trainable_core.recipe.plan import LayerPlan, QuantizerPlan
from trainable_core.recipe.state import WrappedState
from trainable_core.registry.process import default_registry, register
from trainable_keras.parts import deployed_among, describe_parts, parts_among

WEIGHTS = weights_config({"threshold": 2.0}, n_bits=2)  # codes -2..1, step 1
ACTIVATION = activation_config({"threshold": 4.0, "is_signed": True}, n_bits=2)  # step 2
PLAN = LayerPlan(
    LayerInfo("fc", "linear", {"kernel": WeightInfo((2, 2), 1)}),
    {"kernel": QuantizerPlan(WEIGHTS, "STE")},
    QuantizerPlan(ACTIVATION, "STE"),
    "inputs",
)
KERNEL = [[1.0, -2.0], [0.5, 0.25]]  # ties to even: 0.5 goes to 0
QUANTIZED = [[1.0, -2.0], [0.0, 0.0]]


@pytest.fixture(autouse=True)
def _toy():
    register(ToyPlugin(), "toy")
    yield
    default_registry().unregister("toy")


def holder(tensor="inputs"):
    found = Holder(ActivationTrainable(ACTIVATION), name="hold")
    found.keep(plan=PLAN, tensor=tensor)
    return found


def wrapper(**arguments):
    found = Wrapper(Dense("fc"), {"kernel": Trainable(WEIGHTS)}, **arguments)
    found.keep(plan=PLAN)
    return found


# ---- wrapper --------------------------------------------------------------------------------------------------------


def test_a_wrapper_calls_its_layer_with_quantized_weights():
    made = wrapper()
    assert made.get_quantized_weights()["kernel"].tolist() == QUANTIZED
    assert made(np.eye(2)).tolist() == QUANTIZED
    assert made.layer.kernel.value.tolist() == KERNEL
    ((attribute, weight, quantizer),) = made.get_weights_vars()
    assert (attribute, weight, quantizer) == ("kernel", made.layer.kernel, made.weights_quantizers["kernel"])
    assert (made.is_weights_quantization, made.num_weights_quantizers) == (True, 1)


def unbuilt():
    layer = Dense()
    layer.built = False
    return layer


@pytest.mark.parametrize(
    ("layer", "quantizers", "error", "fact"),
    [
        (3, {}, ModelError, "got int"),
        (unbuilt(), {}, ModelError, "not built"),
        (Dense(), [Trainable(WEIGHTS)], InvalidArgumentError, "must be a mapping, got list"),
        (Dense(), {3: Trainable(WEIGHTS)}, InvalidArgumentError, "keyed by str"),
        (Dense(), {"kernel": 3}, InvalidArgumentError, "needs a quantizer, got int"),
        (Dense(), {"kernel": ActivationTrainable(ACTIVATION)}, InvalidArgumentError, "is for Activation"),
        (Dense(), {"kernal": Trainable(WEIGHTS)}, InvalidArgumentError, "no weight 'kernal'"),
    ],
)
def test_what_a_wrapper_can_not_be_made_of_is_refused(layer, quantizers, error, fact):
    with pytest.raises(error, match=fact):
        Wrapper(layer, quantizers)


def doubled(value, training=None):
    return value * 2


def test_inputs_are_quantized_by_position_by_name_and_in_lists():
    made = wrapper(input_holders={"inputs.1": doubled, "mask": doubled}, input_names=("inputs.0", "inputs.1", "mask"))
    assert made.argument_names() == ["inputs", "mask"]
    assert made.quantize_inputs([[1, 2]], {"mask": 3}, None) == ([[1, 4]], {"mask": 6})
    assert made.quantize_inputs([(1, 2), 3], {}, None) == ([(1, 4), 6], {})
    assert made.quantize_inputs([[1]], {"mask": None}, None) == ([[1]], {"mask": None})


@pytest.mark.parametrize(
    ("given", "kwargs", "values", "named"),
    [
        ((1, 2), {}, [1, 4], {"key": 4}),  # the key is the value, before either is quantized
        ((1,), {"value": 2}, [1], {"value": 4, "key": 4}),
        ((1, 2, 3), {}, [1, 4, 6], {}),
        ((1, 2), {"key": 3}, [1, 4], {"key": 6}),
    ],
)
def test_an_attention_layers_key_is_its_value(given, kwargs, values, named):
    made = wrapper(input_holders={"value": doubled, "key": doubled}, input_names=("query", "value", "key"))
    assert made.quantize_inputs(given, kwargs, None) == (values, named)


def test_of_several_outputs_the_first_is_quantized():
    made = wrapper(output_holder=doubled)
    assert made.quantize_output(3, None) == 6
    assert made.quantize_output((3, 4), None) == (6, 4)
    assert wrapper().quantize_output((3, 4), None) == (3, 4)


def test_conversion_is_of_all_quantizers_or_of_none():
    made = wrapper()
    deployed = made.deployed_quantizers()
    assert type(deployed["kernel"]) is Deployed
    assert type(made.weights_quantizers["kernel"]) is Trainable
    made.weights_quantizers = deployed
    assert made.deployed_quantizers() == deployed
    assert made.get_quantized_weights()["kernel"].tolist() == QUANTIZED


def test_a_wrapper_comes_back_from_its_config():
    made = wrapper(input_holders={"inputs": holder()}, output_holder=holder("output"), name="wrapped")
    made.keep(notes={"some": "thing"})
    config = json.loads(json.dumps(made.own_config()))
    again = Wrapper.of_config(config, Dense("fc"))
    assert again.own_config() == made.own_config()
    assert (again.name, again.notes, again.plan) == ("wrapped", {"some": "thing"}, PLAN)
    assert [each.tensor for each in again.holders] == ["inputs", "output"]


# ---- holder ---------------------------------------------------------------------------------------------------------


def test_a_holder_comes_back_from_its_config():
    made = holder()
    again = Holder.from_config(json.loads(json.dumps(made.get_config())))
    assert again.get_config() == made.get_config()
    assert (again.name, again.tensor, again.plan, again.observer) == ("hold", "inputs", PLAN, None)
    assert again(np.float32([3.1, 9.0])).tolist() == [4.0 - 2.0, 2.0]  # 3.1 / 2 goes to 2, beyond the last code 1


def test_a_trainable_quantizer_is_told_until_it_is_converted():
    made = holder()
    assert made.trainable_quantizer is made.activation_holder_quantizer
    made.activation_holder_quantizer = made.activation_holder_quantizer.convert2inferable()
    assert made.trainable_quantizer is None
    assert made.compute_output_shape((None, 3)) == (None, 3)


def test_what_is_observed_passes_and_what_is_not_finite_names_the_tensor():
    made = holder()
    made.activation_holder_quantizer.subject = "fc: inputs"
    made.keep(observer=Observer())
    assert made(np.float32([0.3, 5.0])).tolist() == [np.float32(0.3), 5.0]
    assert made.observer.minimum == np.float32(0.3)
    with pytest.raises(CalibrationError, match="fc: inputs"):
        made(np.float32([np.nan]))


# ---- the parts of a model -------------------------------------------------------------------------------------------


def test_a_holder_in_a_wrapper_is_no_part_of_its_own():
    inner, alone = holder(), holder("input 0")
    made = wrapper(input_holders={"inputs": inner})
    assert parts_among([Layer(), made, inner, alone]) == [made, alone]


def test_parts_are_described_in_order():
    parts = [wrapper(input_holders={"inputs": holder()}), holder("input 0")]
    state = WrappedState(QuantizationRecipe(), left_out={"tail": "no known kind"}, folded={"norm": "fc"})
    found = describe_parts(parts, state)
    assert [(row.layer, row.tensor, row.state) for row in found.rows] == [
        ("fc", "kernel", "trainable"),
        ("fc", "inputs", "trainable"),
        ("fc", "input 0", "trainable"),
    ]
    assert (found.left_out, found.folded, found.finalized) == ({"tail": "no known kind"}, {"norm": "fc"}, False)


def test_deployed_quantizers_are_found_by_the_name_of_their_tensor():
    part, alone = wrapper(input_holders={"inputs": holder()}), holder("input 0")
    assert deployed_among([part, alone]) == {}
    part.weights_quantizers = part.deployed_quantizers()
    alone.activation_holder_quantizer = alone.activation_holder_quantizer.convert2inferable()
    found = deployed_among([part, alone])
    assert {name: type(each) for name, each in found.items()} == {
        "fc.kernel": Deployed,
        "fc: input 0": ActivationDeployed,
    }
