"""Quantizers written for the ancestor's infrastructure, with nothing changed but their imports."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.keras.framework import (
    FRAMEWORK,
    functions,
    keras,
    kl,
    needs_mctq,
    pull_back,
    tensor,
    to_numpy,
)
from trainable_core import (
    QuantizationMethod,
    QuantizationTarget,
    TrainableQuantizerActivationConfig,
    TrainableQuantizerWeightsConfig,
    TrainingMethod,
    VariableGroup,
)
from trainable_core.constants import MIN_THRESHOLD, SIGNED, THRESHOLD
from trainable_core.errors import InvalidArgumentError
from trainable_keras import ActivationQuantizationHolder, BaseKerasTrainableQuantizer, QuantizationWrapper

PTQ_THRESHOLD = "ptq_threshold_tensor"


def mark_quantizer(target: Any, methods: Any, identifier: Any = None) -> Any:
    from mct_quantizers import mark_quantizer as mark

    return mark(quantization_target=target, quantization_method=methods, identifier=identifier)


def through(x: Any, y: Any) -> Any:
    """Return `y` with the gradient of `x`."""
    return x + FRAMEWORK.functions.stop_gradient(y - x)


class Learned(BaseKerasTrainableQuantizer):
    """Learns a threshold that the layer made."""

    def initialize_quantization(self, tensor_shape: Any, name: str, layer: Any) -> None:
        variable = layer.add_weight(
            name=f"{self.name}_{name}_{PTQ_THRESHOLD}",
            shape=self.threshold_values.shape,
            initializer=keras.initializers.Constant(1.0),
            trainable=True,
        )
        variable.assign(self.threshold_values)
        self.add_quantizer_variable(PTQ_THRESHOLD, variable, VariableGroup.QPARAMS)

    def __call__(self, inputs: Any, training: Any = None) -> Any:
        scale = functions.cast(self.get_quantizer_variable(PTQ_THRESHOLD), "float32") / 2**3
        codes = functions.clip(inputs / scale, -8, 7)
        return through(codes, functions.round(codes)) * scale


@mark_quantizer(QuantizationTarget.Weights, [QuantizationMethod.SYMMETRIC], TrainingMethod.LSQ)
class LsqWeights(Learned):
    def __init__(self, quantization_config: TrainableQuantizerWeightsConfig) -> None:
        super().__init__(quantization_config)
        self.threshold_values = np.array(quantization_config.weights_quantization_params[THRESHOLD])

    def convert2inferable(self) -> Any:
        from mct_quantizers.keras.quantizers import WeightsSymmetricInferableQuantizer

        threshold = [float(each) for each in to_numpy(self.get_quantizer_variable(PTQ_THRESHOLD)).flatten()]
        return WeightsSymmetricInferableQuantizer(4, threshold, True, 1, 2)


@mark_quantizer(QuantizationTarget.Activation, [QuantizationMethod.SYMMETRIC])
class LsqActivation(Learned):
    def __init__(self, quantization_config: TrainableQuantizerActivationConfig, freeze_quant_params: bool = False):
        super().__init__(quantization_config, freeze_quant_params)
        self.threshold_values = np.array([quantization_config.activation_quantization_params[THRESHOLD]])

    def convert2inferable(self) -> Any:
        from mct_quantizers.keras.quantizers import ActivationSymmetricInferableQuantizer

        threshold = [float(each) for each in to_numpy(self.get_quantizer_variable(PTQ_THRESHOLD))]
        return ActivationSymmetricInferableQuantizer(4, threshold, True)


THRESHOLDS = np.float64([0.25, 0.5, 1.0]).reshape(1, 3)
X = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)


def weights_quantizer() -> LsqWeights:
    params = {THRESHOLD: THRESHOLDS, SIGNED: True}
    return LsqWeights(
        TrainableQuantizerWeightsConfig(QuantizationMethod.SYMMETRIC, 4, params, True, 1, True, MIN_THRESHOLD)
    )


def activation_quantizer(**others: Any) -> LsqActivation:
    params = {THRESHOLD: 2.0, SIGNED: True}
    return LsqActivation(
        TrainableQuantizerActivationConfig(QuantizationMethod.SYMMETRIC, 4, params, True, 0.0), **others
    )


def wrapped() -> tuple[Any, Any]:
    layer = kl.Dense(3, use_bias=False)
    layer.build((None, 5))
    layer(tensor(X))
    return QuantizationWrapper(layer, {"kernel": weights_quantizer()}), ActivationQuantizationHolder(
        activation_quantizer()
    )


def test_the_layers_variables_are_kept_and_learn() -> None:
    wrapper, holder = wrapped()
    quantizers = [wrapper.weights_quantizers["kernel"], holder.activation_holder_quantizer]
    variables = [quantizer.get_quantizer_variable(PTQ_THRESHOLD) for quantizer in quantizers]
    for quantizer, owner, variable in zip(quantizers, (wrapper, holder), variables, strict=True):
        assert quantizer.get_trainable_variables(VariableGroup.QPARAMS) == [variable]
        assert any(each is variable for each in owner.trainable_variables)
        assert quantizer.quantizer_parameters[PTQ_THRESHOLD]["var"] is variable
    _, *found = pull_back(lambda x: holder(wrapper(x), training=True), [tensor(X)], tensor(np.ones((4, 3))), variables)
    assert all(np.abs(each).sum() > 0 for each in found)


def test_frozen_variables_do_not_learn() -> None:
    quantizer = activation_quantizer(freeze_quant_params=True)
    ActivationQuantizationHolder(quantizer)
    assert quantizer.get_trainable_variables(VariableGroup.QPARAMS) == []


@needs_mctq
def test_they_deploy_as_mctqs_own() -> None:
    wrapper, holder = wrapped()
    wrapper.weights_quantizers["kernel"].get_quantizer_variable(PTQ_THRESHOLD).assign(2 * THRESHOLDS)
    trained = to_numpy(holder(wrapper(tensor(X)), training=False))
    wrapper.convert_to_inferable_quantizers()
    holder.convert_to_inferable_quantizers()
    deployed = [wrapper.weights_quantizers["kernel"], holder.activation_holder_quantizer]
    assert all(type(each).__module__.startswith("mct_quantizers.") for each in deployed)
    # thresholds are powers of two, so scales and their inverses are exact, and no value of this seed is a tie
    np.testing.assert_allclose(to_numpy(holder(wrapper(tensor(X)))), trained, rtol=0, atol=2**-22)


def test_a_variable_of_another_dtype_is_refused() -> None:
    layer = kl.Dense(3)
    variable = layer.add_weight(name="half", shape=(), initializer="ones", dtype="float16")
    with pytest.raises(InvalidArgumentError, match="float16 would have to be copied"):
        activation_quantizer().add_quantizer_variable("extra", variable)


def test_a_name_that_is_taken_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="another attribute"):
        activation_quantizer().add_quantizer_variable("threshold_values", np.ones(()))


@needs_mctq
def test_mctqs_own_quantizers_are_held() -> None:
    from mct_quantizers.keras.quantizers import ActivationUniformInferableQuantizer

    stock = ActivationUniformInferableQuantizer(4, [-1.0], [0.875])
    holder = ActivationQuantizationHolder(stock)
    np.testing.assert_array_equal(to_numpy(holder(tensor(X))), to_numpy(stock(tensor(X))))
    holder.convert_to_inferable_quantizers()
    assert holder.activation_holder_quantizer is stock
