"""Quantizers written for the ancestor's infrastructure, with nothing changed but their imports."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from mct_quantizers import QuantizationMethod, QuantizationTarget, mark_quantizer
from mct_quantizers.pytorch.quantizers import (
    ActivationSymmetricInferableQuantizer,
    ActivationUniformInferableQuantizer,
    WeightsPOTInferableQuantizer,
    WeightsSymmetricInferableQuantizer,
    WeightsUniformInferableQuantizer,
)
from torch import Tensor, nn

from trainable_core import (
    TrainableQuantizerActivationConfig,
    TrainableQuantizerWeightsConfig,
    TrainingMethod,
    VariableGroup,
)
from trainable_core.constants import MIN_THRESHOLD, RANGE_MAX, RANGE_MIN, SIGNED, THRESHOLD
from trainable_core.errors import InvalidArgumentError
from trainable_torch import ActivationQuantizationHolder, BasePytorchTrainableQuantizer, QuantizationWrapper

PTQ_THRESHOLD = "ptq_threshold_tensor"


def through(x: Tensor, y: Tensor) -> Tensor:
    """Return `y` with the gradient of `x`."""
    return x + (y - x).detach()


@mark_quantizer(
    quantization_target=QuantizationTarget.Weights,
    quantization_method=[QuantizationMethod.POWER_OF_TWO, QuantizationMethod.SYMMETRIC],
    identifier=TrainingMethod.STE,
)
class SteWeights(BasePytorchTrainableQuantizer):
    """Keeps everything in itself and a parameter that does not learn in the layer."""

    def __init__(self, quantization_config: TrainableQuantizerWeightsConfig):
        super().__init__(quantization_config)
        self.power_of_two = quantization_config.weights_quantization_method == QuantizationMethod.POWER_OF_TWO
        self.threshold_values = quantization_config.weights_quantization_params[THRESHOLD]
        self.threshold_shape = np.asarray(self.threshold_values).shape
        self.num_bits = quantization_config.weights_n_bits
        delta = self.threshold_values / np.power(2.0, self.num_bits - 1)
        self.delta_tensor = torch.as_tensor(delta, dtype=torch.float32)
        self.min_int, self.max_int = -(2 ** (self.num_bits - 1)), 2 ** (self.num_bits - 1) - 1
        self.min, self.max = delta * self.min_int, delta * self.max_int

    def initialize_quantization(self, tensor_shape: Any, name: str, layer: Any) -> None:
        values = torch.as_tensor(np.asarray(self.threshold_values), dtype=torch.float32)
        layer.register_parameter(f"{name}_{PTQ_THRESHOLD}", nn.Parameter(values, requires_grad=False))
        variable = layer.get_parameter(f"{name}_{PTQ_THRESHOLD}")
        self.add_quantizer_variable(PTQ_THRESHOLD, variable, VariableGroup.QPARAMS)

    def __call__(self, inputs: Tensor, training: bool) -> Tensor:
        codes = through(inputs / self.delta_tensor, (inputs / self.delta_tensor).round())
        return self.delta_tensor * through(codes, codes.clip(self.min_int, self.max_int))

    def convert2inferable(self) -> Any:
        threshold = self.get_quantizer_variable(PTQ_THRESHOLD).cpu().detach().numpy().flatten()
        make = WeightsPOTInferableQuantizer if self.power_of_two else WeightsSymmetricInferableQuantizer
        config = self.quantization_config
        return make(
            num_bits=self.num_bits,
            threshold=threshold.tolist(),
            per_channel=config.weights_per_channel_threshold,
            channel_axis=config.weights_channels_axis,
        )


@mark_quantizer(QuantizationTarget.Weights, [QuantizationMethod.SYMMETRIC], TrainingMethod.LSQ)
class LsqWeights(SteWeights):
    """Learns the layer's threshold."""

    def initialize_quantization(self, tensor_shape: Any, name: str, layer: Any) -> None:
        values = nn.Parameter(torch.as_tensor(np.asarray(self.threshold_values), dtype=torch.float32))
        layer.register_parameter(f"{name}_{PTQ_THRESHOLD}", values)
        self.add_quantizer_variable(
            PTQ_THRESHOLD, layer.get_parameter(f"{name}_{PTQ_THRESHOLD}"), VariableGroup.QPARAMS
        )

    def __call__(self, inputs: Tensor, training: bool) -> Tensor:
        scale = self.get_quantizer_variable(PTQ_THRESHOLD) / 2 ** (self.num_bits - 1)
        codes = (inputs / scale).clip(self.min_int, self.max_int)
        return through(codes, codes.round()) * scale


@mark_quantizer(QuantizationTarget.Weights, [QuantizationMethod.UNIFORM])
class UniformWeights(BasePytorchTrainableQuantizer):
    """Learns a range, is shaped to broadcast, and its mark has no identifier."""

    def __init__(self, quantization_config: TrainableQuantizerWeightsConfig):
        super().__init__(quantization_config)
        self.num_bits = quantization_config.weights_n_bits
        self.min_values = np.array(quantization_config.weights_quantization_params[RANGE_MIN])
        self.max_values = np.array(quantization_config.weights_quantization_params[RANGE_MAX])

    def initialize_quantization(self, tensor_shape: Any, name: str, layer: Any) -> None:
        for key, values in (("min", self.min_values), ("max", self.max_values)):
            layer.register_parameter(f"{name}_{key}", nn.Parameter(torch.as_tensor(values, dtype=torch.float32)))
            self.add_quantizer_variable(key, layer.get_parameter(f"{name}_{key}"), VariableGroup.QPARAMS)

    def __call__(self, inputs: Tensor, training: bool) -> Tensor:
        low, high = self.get_quantizer_variable("min"), self.get_quantizer_variable("max")
        scale = (high - low) / (2**self.num_bits - 1)
        nudged = scale * through(low / scale, (low / scale).round())
        codes = torch.minimum(torch.maximum(inputs, nudged), high - low + nudged) / scale
        return through(codes, codes.round()) * scale

    def convert2inferable(self) -> Any:
        low, high = (self.get_quantizer_variable(key).detach().numpy().flatten().tolist() for key in ("min", "max"))
        config = self.quantization_config
        return WeightsUniformInferableQuantizer(
            self.num_bits, low, high, config.weights_per_channel_threshold, config.weights_channels_axis
        )


@mark_quantizer(
    quantization_target=QuantizationTarget.Activation,
    quantization_method=[QuantizationMethod.SYMMETRIC],
    identifier=TrainingMethod.LSQ,
)
class LsqActivation(BasePytorchTrainableQuantizer):
    """Learns the holder's threshold."""

    def __init__(self, quantization_config: TrainableQuantizerActivationConfig, freeze_quant_params: bool = False):
        super().__init__(quantization_config, freeze_quant_params)
        self.sign = quantization_config.activation_quantization_params[SIGNED]
        self.threshold_values = np.array([quantization_config.activation_quantization_params[THRESHOLD]])
        self.num_bits = quantization_config.activation_n_bits

    def initialize_quantization(self, tensor_shape: Any, name: str, layer: Any) -> None:
        values = nn.Parameter(torch.as_tensor(self.threshold_values, dtype=torch.float32))
        values.requires_grad_(not self.freeze_quant_params)
        layer.register_parameter(name, values)
        self.add_quantizer_variable(PTQ_THRESHOLD, layer.get_parameter(name), VariableGroup.QPARAMS)

    def __call__(self, inputs: Tensor, training: bool = True) -> Tensor:
        scale = self.get_quantizer_variable(PTQ_THRESHOLD) / 2 ** (self.num_bits - int(self.sign))
        first, last = (
            (-(2 ** (self.num_bits - 1)), 2 ** (self.num_bits - 1) - 1) if self.sign else (0, 2**self.num_bits - 1)
        )
        codes = (inputs / scale).clip(first, last)
        return through(codes, codes.round()) * scale

    def convert2inferable(self) -> Any:
        threshold = self.get_quantizer_variable(PTQ_THRESHOLD).detach().numpy()
        return ActivationSymmetricInferableQuantizer(self.num_bits, threshold.tolist(), self.sign)


def weights_config(method: QuantizationMethod, params: dict[str, Any], axis: int | None = 0) -> Any:
    return TrainableQuantizerWeightsConfig(method, 4, params, True, axis, axis is not None, MIN_THRESHOLD)


THRESHOLDS = np.float64([0.25, 0.5, 1.0, 0.125]).reshape(4, 1, 1, 1)
WEIGHTS = {
    "STE": lambda: SteWeights(weights_config(QuantizationMethod.SYMMETRIC, {THRESHOLD: THRESHOLDS, SIGNED: True})),
    "STE on powers of two": lambda: SteWeights(
        weights_config(QuantizationMethod.POWER_OF_TWO, {THRESHOLD: THRESHOLDS})
    ),
    "STE per tensor": lambda: SteWeights(weights_config(QuantizationMethod.SYMMETRIC, {THRESHOLD: 0.5}, None)),
    "LSQ": lambda: LsqWeights(weights_config(QuantizationMethod.SYMMETRIC, {THRESHOLD: THRESHOLDS})),
    "a range": lambda: UniformWeights(
        weights_config(
            QuantizationMethod.UNIFORM, {RANGE_MIN: -8 * THRESHOLDS, RANGE_MAX: 7 * THRESHOLDS, SIGNED: True}
        )
    ),
}


def activation(**others: Any) -> LsqActivation:
    config = TrainableQuantizerActivationConfig(
        QuantizationMethod.SYMMETRIC, 4, {THRESHOLD: 2.0, SIGNED: True}, True, 0.0
    )
    return LsqActivation(config, **others)


def wrapped(make: Any) -> nn.Module:
    torch.manual_seed(0)
    layer = QuantizationWrapper(nn.Conv2d(3, 4, 3), {"weight": make()})
    return nn.Sequential(layer, ActivationQuantizationHolder(activation()))


@pytest.mark.parametrize("make", WEIGHTS.values(), ids=WEIGHTS)
def test_the_ancestors_quantizers_train_and_deploy(make: Any):
    model = wrapped(make)
    x = torch.randn(2, 3, 6, 6)
    own = [
        v
        for q in model.modules()
        if isinstance(q, BasePytorchTrainableQuantizer)
        for v in q.get_trainable_variables(VariableGroup.QPARAMS)
    ]
    before = [variable.detach().clone() for variable in own]
    weight = dict(model.named_parameters())["0.weight"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(x).square().sum().backward()
        optimizer.step()
    assert all(variable.grad.abs().sum() > 0 for variable in own)
    assert all(not torch.equal(old, new) for old, new in zip(before, own, strict=True))
    assert (
        len(own) == 1 + {SteWeights: 0, LsqWeights: 1, UniformWeights: 2}[type(model[0].weights_quantizers["weight"])]
    )
    assert weight.grad.abs().sum() > 0

    trained = model.eval()(x).detach()
    wide = model[0].weights_quantizers["weight"](weight.detach(), False)
    for part in model:
        part.convert_to_inferable_quantizers()
    quantizers = [model[0].weights_quantizers["weight"], model[1].activation_holder_quantizer]
    assert all(type(each).__module__.startswith("mct_quantizers.") for each in quantizers)
    narrow = model[0].get_quantized_weights()["weight"]
    # mctq's kernel multiplies by the rounded inverse of the scale: no value of this seed is next to a tie, so the codes
    # are equal, and a code times a scale that was divided and rounded twice is within 2**-22 of itself
    torch.testing.assert_close(narrow, wide.reshape(narrow.shape), rtol=2**-22, atol=0)
    # 27 products are summed, and each output is rounded to a step of the holder, as before
    torch.testing.assert_close(model(x), trained, rtol=2**-22, atol=0)


@pytest.mark.parametrize("name", ["STE", "STE on powers of two"])
def test_a_config_compares_with_mctqs_members(name: str):
    quantizer = WEIGHTS[name]()
    assert quantizer.power_of_two is (name == "STE on powers of two")


def test_a_variable_of_the_layer_is_kept_as_the_object_it_is():
    layer = nn.Linear(2, 2)
    quantizer = LsqWeights(weights_config(QuantizationMethod.SYMMETRIC, {THRESHOLD: [0.5, 1.0]}))
    quantizer.initialize_quantization((2, 2), "weight", layer)
    variable = layer.get_parameter(f"weight_{PTQ_THRESHOLD}")
    assert quantizer.get_quantizer_variable(PTQ_THRESHOLD) is variable
    assert quantizer.get_trainable_variables(VariableGroup.QPARAMS) == [variable]
    assert quantizer.quantizer_parameters[PTQ_THRESHOLD]["var"] is variable
    quantizer.freeze()
    assert not variable.requires_grad
    quantizer.freeze(frozen=False)
    assert variable.requires_grad


def test_a_parameter_that_needs_no_gradient_stays_so():
    layer = nn.Linear(2, 2)
    quantizer = WEIGHTS["STE"]()
    quantizer.initialize_quantization((4, 3, 3, 3), "weight", layer)
    assert not layer.get_parameter(f"weight_{PTQ_THRESHOLD}").requires_grad
    assert quantizer.get_trainable_variables(VariableGroup.QPARAMS) == []


def test_frozen_parameters_do_not_learn():
    holder = ActivationQuantizationHolder(activation(freeze_quant_params=True))
    assert holder.activation_holder_quantizer.get_trainable_variables(VariableGroup.QPARAMS) == []
    x = torch.randn(4, requires_grad=True)
    holder.train()(x).sum().backward()
    assert holder.activation_holder_quantizer.get_quantizer_variable(PTQ_THRESHOLD).grad is None


@pytest.mark.parametrize(
    ("variable", "facts"),
    [
        (torch.ones(2, requires_grad=True), "Tensor of torch.float32"),
        (torch.ones(2, requires_grad=True) * 2, "Tensor of torch.float32"),
        (nn.Parameter(torch.ones(2).half()), "Parameter of torch.float16"),
        (nn.Parameter(torch.ones(2).double()), "Parameter of torch.float64"),
    ],
    ids=["leaf", "computed", "half", "double"],
)
def test_what_would_have_to_be_copied_is_refused(variable: Any, facts: str):
    quantizer = activation()
    with pytest.raises(InvalidArgumentError, match=facts):
        quantizer.add_quantizer_variable("extra", variable)
    assert "extra" not in dict(quantizer.named_parameters())


@pytest.mark.parametrize("name", ["num_bits", "a.b", "forward", 3])
def test_a_name_that_is_taken_is_refused(name: Any):
    with pytest.raises(InvalidArgumentError, match="variable"):
        activation().add_quantizer_variable(name, torch.ones(()))


def test_a_buffer_of_the_layer_is_kept_too():
    layer, quantizer = nn.Linear(2, 2), activation()
    layer.register_buffer("moving", torch.ones(2))
    quantizer.add_quantizer_variable("moving", layer.moving, VariableGroup.QPARAMS)
    layer.moving.add_(1)
    assert torch.equal(quantizer.get_quantizer_variable("moving"), torch.full((2,), 2.0))


def test_copies_and_states_keep_what_learns():
    model = wrapped(WEIGHTS["LSQ"])
    x = torch.randn(2, 3, 6, 6)
    model.train()(x).sum().backward()
    with torch.no_grad():
        model[0].weights_quantizers["weight"].get_quantizer_variable(PTQ_THRESHOLD).mul_(1.5)
    expected = model.eval()(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = wrapped(WEIGHTS["LSQ"])
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.eval()(x), expected)


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_mctqs_own_activation_quantizers_are_held(mode: bool):
    stock = ActivationUniformInferableQuantizer(4, [-1.0], [0.875])
    holder = ActivationQuantizationHolder(stock).train(mode)
    x = torch.linspace(-2, 2, 33)
    assert torch.equal(holder(x), stock(x))
    holder.convert_to_inferable_quantizers()
    assert holder.activation_holder_quantizer is stock
