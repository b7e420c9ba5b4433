"""The quantization wrapper: each fault of mctq's class against ours, and its interface."""

from __future__ import annotations

import copy
import inspect
import pickle

import numpy as np
import pytest
import torch
from mct_quantizers import PytorchQuantizationWrapper
from mct_quantizers.pytorch import quantize_wrapper
from mct_quantizers.pytorch import quantizers as mctq
from torch import nn

import trainable_torch
from tests.torch.models import vectors
from trainable_core import QuantizationMethod, TrainableQuantizerActivationConfig, TrainableQuantizerWeightsConfig
from trainable_core.constants import RANGE_MAX, RANGE_MIN, SIGNED, THRESHOLD
from trainable_core.errors import InvalidArgumentError, QuantizerStateError
from trainable_torch import ActivationQuantizationHolder, QuantizationWrapper
from trainable_torch.quantizers.lsq import LsqActivationQuantizer, LsqWeightsQuantizer
from trainable_torch.quantizers.ste import SteWeightsQuantizer


def config(params=None, *, n_bits=4, method=QuantizationMethod.SYMMETRIC, axis=None):
    return TrainableQuantizerWeightsConfig(
        weights_quantization_method=method,
        weights_n_bits=n_bits,
        weights_quantization_params={THRESHOLD: 1.0} if params is None else params,
        weights_channels_axis=axis,
        weights_per_channel_threshold=axis is not None,
    )


def lsq(**more):
    return LsqWeightsQuantizer(config(**more))


def holder():
    chosen = TrainableQuantizerActivationConfig(
        activation_quantization_method=QuantizationMethod.SYMMETRIC,
        activation_n_bits=2,
        activation_quantization_params={THRESHOLD: 1.0, SIGNED: True},
    )
    return ActivationQuantizationHolder(LsqActivationQuantizer(chosen))


def linear():
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def faulty(reason):
    """Return both wrapper classes, mctq's expected to fail for this reason."""
    theirs = pytest.param(
        PytorchQuantizationWrapper, marks=pytest.mark.xfail(strict=True, reason=f"mctq's wrapper {reason}"), id="mctq"
    )
    return pytest.mark.parametrize("wrapper_class", [theirs, pytest.param(QuantizationWrapper, id="ours")])


# ---- mctq's faults --------------------------------------------------------------------------------------------------


@faulty("keeps quantizing the tensor it had before")
def test_assigned_weights_are_the_ones_quantized(wrapper_class):
    wrapper = wrapper_class(linear(), {"weight": lsq()})
    state = {name: value.clone() for name, value in wrapper.state_dict().items()}
    state[next(name for name in state if name.split(".")[-1] == "weight")].zero_()
    wrapper.load_state_dict(state, assign=True)
    assert wrapper.get_quantized_weights()["weight"].abs().max() == 0


@faulty("leaves a tensor of the autograd graph in the layer, which can't be copied")
def test_it_can_be_copied_after_a_training_forward(wrapper_class):
    wrapper = wrapper_class(linear(), {"weight": lsq()}).train()
    x = vectors(4, 3)
    wrapper(x)
    assert torch.equal(copy.deepcopy(wrapper)(x), wrapper(x))


@faulty("drops its weight quantizers at the second conversion")
def test_converting_twice_is_converting_once(wrapper_class):
    wrapper = wrapper_class(linear(), {"weight": lsq()})
    wrapper.convert_to_inferable_quantizers()
    wrapper.convert_to_inferable_quantizers()
    assert wrapper.num_weights_quantizers == 1


@faulty("makes a new parameter of the weight")
def test_tied_weights_stay_one_parameter(wrapper_class):
    embedding = nn.Embedding(5, 3)
    head = nn.Linear(3, 5, bias=False)
    head.weight = embedding.weight
    wrapped_embedding = wrapper_class(embedding, {"weight": lsq()})
    wrapped_head = wrapper_class(head, {"weight": lsq()})
    assert wrapped_head.get_weights_vars()[0][1] is wrapped_embedding.get_weights_vars()[0][1]


@faulty("renames `0.bias` to `0.layer.bias`")
def test_a_float_checkpoint_finds_its_keys(wrapper_class):
    model = nn.Sequential(linear(), nn.ReLU())
    checkpoint = copy.deepcopy(model).state_dict()
    model[0] = wrapper_class(model[0], {"weight": lsq()})
    incompatible = model.load_state_dict(checkpoint, strict=False)
    assert incompatible.unexpected_keys == []
    assert [name for name in incompatible.missing_keys if not name.endswith("threshold")] == []


@faulty("inspects its quantizer's signature in every forward")
def test_no_forward_inspects_a_signature(wrapper_class, monkeypatch):
    quantizer = lsq()
    wrapper = wrapper_class(linear(), {"weight": quantizer})
    inspected = []
    signature = inspect.signature
    monkeypatch.setattr(inspect, "signature", lambda *args: inspected.append(args[0]) or signature(*args))
    assert quantize_wrapper.inspect.signature is inspect.signature  # what mctq calls is what is counted
    for _ in range(3):
        wrapper(vectors(4, 3))
    # torch.autograd.Function.apply inspects the functions it calls; that is no wrapper's doing
    assert [called for called in inspected if getattr(called, "__self__", None) is quantizer] == []


def stock_uniform(low, high, n_bits):
    quantizer = mctq.WeightsUniformInferableQuantizer(
        num_bits=n_bits, min_range=low.tolist(), max_range=high.tolist(), per_channel=True, channel_axis=0
    )
    return quantizer.zero_points.flatten(), quantizer.min_range.flatten(), quantizer.scales.flatten()


def our_uniform(low, high, n_bits):
    params = {RANGE_MIN: low.tolist(), RANGE_MAX: high.tolist()}
    trainable = SteWeightsQuantizer(config(params, n_bits=n_bits, method=QuantizationMethod.UNIFORM, axis=0))
    trainable.initialize_quantization((len(low), 1), "weight", None)
    quantizer = trainable.convert2inferable()
    assert isinstance(quantizer, mctq.WeightsUniformInferableQuantizer)
    return quantizer.zero_points.flatten(), quantizer.min_range.flatten(), quantizer.scales.flatten()


@pytest.mark.parametrize("n_bits", [4, 8])
@pytest.mark.parametrize(
    "build",
    [
        pytest.param(
            stock_uniform,
            marks=pytest.mark.xfail(
                strict=True, reason="mctq's WeightsUniformInferableQuantizer truncates its zero point: 116.99999 -> 116"
            ),
            id="mctq",
        ),
        pytest.param(our_uniform, id="ours"),
    ],
)
def test_no_zero_point_of_2000_random_ranges_is_truncated(build, n_bits):
    """What mctq derives from a range, also from the one that our quantizer tells it, is the nearest integer."""
    generator = np.random.default_rng(0)
    low, high = -generator.uniform(0.01, 4, 2000), generator.uniform(0.01, 4, 2000)
    zero_points, min_range, scales = build(low, high, n_bits)
    nearest = torch.round(-min_range.double() / scales.double())
    assert int((zero_points.double() != nearest).sum()) == 0


# ---- what else ours promises ----------------------------------------------------------------------------------------


def test_it_is_still_mctqs():
    assert isinstance(QuantizationWrapper(linear(), {"weight": lsq()}), PytorchQuantizationWrapper)


def test_the_layer_runs_with_quantized_weights_and_a_float_bias():
    layer, x = linear(), vectors(4, 3)
    wrapper = QuantizationWrapper(layer, {"weight": lsq()})
    # threshold 1, 4 bits: scale 1 / 8, codes -8 .. 7
    quantized = (layer.weight * 8).round().clamp(-8, 7) / 8
    assert not torch.equal(quantized, layer.weight)
    assert torch.equal(wrapper(x), nn.functional.linear(x, quantized, layer.bias))


def test_the_float_weight_is_what_is_kept_and_trained():
    layer = linear()
    before = layer.weight.detach().clone()
    wrapper = QuantizationWrapper(layer, {"weight": lsq()})
    wrapper(vectors(4, 3)).sum().backward()
    assert wrapper.weight is layer.weight
    assert torch.equal(layer.weight, before)
    assert layer.weight.grad.abs().sum() > 0
    assert [name for name, _ in wrapper.named_parameters()] == ["weight", "bias", "weights_quantizers.weight.threshold"]


def test_a_new_parameter_set_on_the_wrapper_is_the_layers():
    layer = linear()
    wrapper = QuantizationWrapper(layer, {"weight": lsq()})
    wrapper.weight = nn.Parameter(torch.zeros(2, 3))
    assert layer.weight is wrapper.weight
    assert torch.equal(wrapper(vectors(4, 3)), layer.bias.expand(4, 2))


def test_attributes_of_the_layer_are_reached_through_the_wrapper():
    wrapper = QuantizationWrapper(nn.Conv2d(3, 4, 3, stride=2), {"weight": lsq()})
    assert (wrapper.stride, wrapper.out_channels) == ((2, 2), 4)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = wrapper.no_such_thing


def test_pickle_keeps_it_whole():
    wrapper = QuantizationWrapper(linear(), {"weight": lsq()})
    x = vectors(4, 3)
    restored = pickle.loads(pickle.dumps(wrapper))  # noqa: S301 - our own bytes
    assert torch.equal(restored(x), wrapper(x))
    with torch.no_grad():
        restored.weight.zero_()
    assert torch.equal(restored.layer.weight, torch.zeros(2, 3))  # layer and wrapper share still


def test_train_and_eval_reach_layer_and_quantizers():
    attention = nn.MultiheadAttention(4, 2)
    wrapper = QuantizationWrapper(attention, {"in_proj_weight": lsq(), "out_proj.weight": lsq()})
    wrapper.eval()
    assert not any(m.training for m in (attention, attention.out_proj, *wrapper.weights_quantizers.values()))
    wrapper.train()
    assert all(m.training for m in (attention, attention.out_proj, *wrapper.weights_quantizers.values()))


def test_a_new_wrapper_has_its_layers_mode():
    assert not QuantizationWrapper(linear().eval(), {"weight": lsq()}).training


def test_hooks_of_the_layer_run_once_each():
    layer, calls = linear(), []
    layer.register_forward_pre_hook(lambda *_: calls.append("before"))
    layer.register_forward_hook(lambda *_: calls.append("after"))
    QuantizationWrapper(layer, {"weight": lsq()})(vectors(4, 3))
    assert calls == ["before", "after"]


def test_weights_are_listed_with_their_quantizers():
    layer = linear()
    quantizer = lsq()
    wrapper = QuantizationWrapper(layer, {"weight": quantizer})
    ((name, weight, listed),) = wrapper.get_weights_vars()
    assert (name, wrapper.is_weights_quantization, wrapper.num_weights_quantizers) == ("weight", True, 1)
    assert weight is layer.weight
    assert listed is quantizer


def test_without_quantizers_it_is_the_layer():
    layer, x = linear(), vectors(4, 3)
    wrapper = QuantizationWrapper(layer, {})
    assert not wrapper.is_weights_quantization
    assert torch.equal(wrapper(x), layer(x))


def test_a_weight_of_a_child_is_named_with_a_dot():
    attention = nn.MultiheadAttention(4, 2)
    wrapper = QuantizationWrapper(attention, {"out_proj.weight": lsq()})
    assert "weights_quantizers.out_proj__weight.threshold" in wrapper.state_dict()
    assert "out_proj.weight" in wrapper.weights_quantizers
    assert list(wrapper.weights_quantizers) == ["out_proj.weight"] == wrapper.weights_quantizers.keys()
    assert len(wrapper.weights_quantizers) == 1
    assert wrapper.weights_quantizers["out_proj.weight"] is wrapper.get_weights_vars()[0][2]


def test_mctqs_own_inferable_quantizers_serve_too():
    stock = mctq.WeightsSymmetricInferableQuantizer(num_bits=4, threshold=[1.0], per_channel=False)
    layer, x = linear(), vectors(4, 3)
    layer.weight.requires_grad_(False)  # mctq's class clears the flag of what it is given, which a trained one forbids
    ours = QuantizationWrapper(copy.deepcopy(layer), {"weight": lsq()})
    theirs = QuantizationWrapper(layer, {"weight": stock})
    assert theirs.weights_quantizers["weight"] is stock
    assert torch.equal(theirs(x), ours(x))
    theirs.convert_to_inferable_quantizers()
    assert theirs.weights_quantizers["weight"] is stock


def test_conversion_deploys_weights_and_holders_or_nothing():
    wrapper = QuantizationWrapper(linear(), {"weight": lsq()}, input_holders={"input": holder()})
    x = vectors(4, 3)
    trained = wrapper(x)
    wrapper.convert_to_inferable_quantizers()
    assert isinstance(wrapper.weights_quantizers["weight"], mctq.WeightsSymmetricInferableQuantizer)
    assert wrapper.holders[0].trainable_quantizer is None
    assert torch.equal(wrapper(x), trained)


def test_a_conversion_that_fails_changes_nothing():
    wrapper = QuantizationWrapper(
        nn.MultiheadAttention(4, 2), {"in_proj_weight": lsq(), "out_proj.weight": lsq(params={})}
    )
    with pytest.raises(QuantizerStateError):
        wrapper.convert_to_inferable_quantizers()
    assert all(isinstance(each, LsqWeightsQuantizer) for each in wrapper.weights_quantizers.values())


@pytest.mark.parametrize("attribute", ["no_such_weight", "in_features"])
def test_a_quantizer_for_what_is_no_weight_is_refused(attribute):
    with pytest.raises(InvalidArgumentError, match=attribute):
        QuantizationWrapper(linear(), {attribute: lsq()})


def test_a_position_without_constants_is_refused():
    with pytest.raises(InvalidArgumentError, match="str"):
        QuantizationWrapper(linear(), {0: lsq()})


# ---- functions with constants, as mctq wraps them -------------------------------------------------------------------


def test_a_constant_of_a_function_is_quantized_at_its_position():
    constant, x = torch.tensor([0.3, -0.2, 0.9]), vectors(4, 3)
    wrapper = QuantizationWrapper(torch.sub, {0: lsq()}, {0: constant})
    assert torch.equal(wrapper(x), torch.tensor([0.25, -0.25, 0.875]) - x)
    assert list(wrapper.state_dict()) == ["positional_weight_0", "weights_quantizers.0.threshold"]


def test_constants_go_into_a_list_with_the_calls_own_arguments():
    constant, x = torch.full((2, 3), 0.3), vectors(2, 3)
    wrapper = QuantizationWrapper(
        torch.cat, {1: lsq()}, {1: constant}, op_call_kwargs={"dim": 1}, is_inputs_as_list=True
    )
    assert torch.equal(wrapper(x, x), torch.cat([x, torch.full((2, 3), 0.25), x], dim=1))


def test_positional_arguments_of_the_call_come_last():
    wrapper = QuantizationWrapper(torch.cat, {0: lsq()}, {0: torch.ones(2, 3)}, [1], is_inputs_as_list=True)
    assert wrapper(torch.zeros(2, 3)).shape == (2, 6)


def test_positions_of_constants_and_quantizers_must_agree():
    with pytest.raises(InvalidArgumentError, match="positions"):
        QuantizationWrapper(torch.sub, {1: lsq()}, {0: torch.ones(3)})


# ---- holders at inputs and output -----------------------------------------------------------------------------------


class Adds(nn.Module):
    """Takes two tensors."""

    def forward(self, one, other=None):
        return one if other is None else one + other


def held(x):
    """Return what `holder` makes of x: scale 1 / 2, codes -2 .. 1."""
    return (x * 2).round().clamp(-2, 1) / 2


def two_inputs():
    return QuantizationWrapper(
        Adds(), {}, input_holders={"one": holder(), "other": holder()}, input_names=("one", "other")
    )


@pytest.mark.parametrize("call", ["positions", "keywords", "both"])
def test_inputs_are_quantized_however_they_are_passed(call):
    x, y = vectors(4, 3), 2 * vectors(4, 3)
    wrapper = two_inputs()
    results = {
        "positions": lambda: wrapper(x, y),
        "keywords": lambda: wrapper(other=y, one=x),
        "both": lambda: wrapper(x, other=y),
    }
    assert torch.equal(results[call](), held(x) + held(y))


def test_an_input_left_out_stays_out():
    x = vectors(4, 3)
    assert torch.equal(two_inputs()(x), held(x))


def test_the_callers_arguments_are_not_changed():
    x = vectors(4, 3)
    before = x.clone()
    arguments = {"other": x}
    two_inputs()(x, **arguments)
    assert arguments["other"] is x
    assert torch.equal(x, before)


def test_the_output_is_quantized():
    x = vectors(4, 3)
    wrapper = QuantizationWrapper(Adds(), {}, output_holder=holder())
    assert torch.equal(wrapper(x, x), held(x + x))


def test_of_several_outputs_the_first_is_quantized():
    class Two(nn.Module):
        def forward(self, x):
            return x, x

    x = vectors(4, 3)
    first, second = QuantizationWrapper(Two(), {}, output_holder=holder())(x)
    assert torch.equal(first, held(x))
    assert second is x


class LinearWithExtraState(torch.nn.Linear):
    """A layer that keeps more than tensors in its state."""

    note = "fresh"

    def get_extra_state(self):
        return {"note": self.note}

    def set_extra_state(self, state):
        self.note = state["note"]


def test_the_layers_extra_state_is_saved_and_loaded():
    recipe = {"weights": {"method": "SYMMETRIC", "n_bits": 4, "training_method": "LSQ"}}
    qmodel = trainable_torch.wrap(torch.nn.Sequential(LinearWithExtraState(3, 2)), recipe)
    trainable_torch.calibrate(qmodel)
    qmodel[0].layer.note = "trained"
    other = trainable_torch.wrap(torch.nn.Sequential(LinearWithExtraState(3, 2)), recipe)
    other.load_state_dict(qmodel.state_dict(), strict=True)
    assert other[0].layer.note == "trained"
    assert other[0].weights_quantizers["weight"].calibrated


def test_a_foreign_key_is_still_unexpected():
    recipe = {"weights": {"method": "SYMMETRIC", "n_bits": 4, "training_method": "LSQ"}}
    qmodel = trainable_torch.wrap(torch.nn.Sequential(torch.nn.Linear(3, 2)), recipe)
    state = {**qmodel.state_dict(), "0.foreign": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"0\.foreign"):
        qmodel.load_state_dict(state, strict=True)
