"""The activation holder: mctq's fault, and what ours adds."""

from __future__ import annotations

import pytest
import torch
from mct_quantizers import PytorchActivationQuantizationHolder
from mct_quantizers.pytorch.quantizers import ActivationSymmetricInferableQuantizer
from torch import Tensor

from trainable_core import QuantizationMethod, TrainableQuantizerActivationConfig
from trainable_core.calibration import Observer
from trainable_core.constants import SIGNED, THRESHOLD
from trainable_core.errors import QuantizerStateError
from trainable_torch import ActivationQuantizationHolder
from trainable_torch.quantizers.lsq import LsqActivationQuantizer
from trainable_torch.quantizers.ste import SteActivationQuantizer


def config(**params):
    return TrainableQuantizerActivationConfig(
        activation_quantization_method=QuantizationMethod.SYMMETRIC,
        activation_n_bits=4,
        activation_quantization_params=params,
    )


CALIBRATED = {THRESHOLD: 2.0, SIGNED: True}


class Listening(SteActivationQuantizer):
    """Notes what it is told; has the ancestor's signature, which trains unless told otherwise."""

    def __init__(self, quantization_config: TrainableQuantizerActivationConfig) -> None:
        super().__init__(quantization_config)
        self.told: list[bool] = []

    def forward(self, inputs: Tensor, training: bool = True) -> Tensor:
        self.told.append(training)
        return super().forward(inputs, training)


@pytest.mark.parametrize(
    "holder_class",
    [
        pytest.param(
            PytorchActivationQuantizationHolder,
            marks=pytest.mark.xfail(strict=True, reason="mctq's holder never tells its quantizer the mode"),
        ),
        ActivationQuantizationHolder,
    ],
)
def test_the_quantizer_is_told_whether_the_model_trains(holder_class):
    holder = holder_class(Listening(config(**CALIBRATED)))
    x = torch.zeros(2)
    for mode in (True, False, True):
        holder.train(mode)
        holder(x)
    assert holder.activation_holder_quantizer.told == [True, False, True]


def test_it_is_still_mctqs():
    assert isinstance(
        ActivationQuantizationHolder(SteActivationQuantizer(config())), PytorchActivationQuantizationHolder
    )


def test_it_quantizes_what_passes():
    holder = ActivationQuantizationHolder(LsqActivationQuantizer(config(**CALIBRATED)))
    # scale 2 / 8 = 0.25, codes -8 .. 7
    assert holder(torch.tensor([0.3, -9.0, 9.0, 0.0])).tolist() == [0.25, -2.0, 1.75, 0.0]


def test_before_calibration_it_says_so():
    holder = ActivationQuantizationHolder(LsqActivationQuantizer(config()))
    with pytest.raises(QuantizerStateError, match="calibrate"):
        holder(torch.zeros(1))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool])
def test_integers_pass_untouched(dtype):
    holder = ActivationQuantizationHolder(LsqActivationQuantizer(config(**CALIBRATED)))
    indices = torch.tensor([0, 1, 1]).to(dtype)
    assert holder(indices) is indices


def test_what_is_no_tensor_passes_untouched():
    holder = ActivationQuantizationHolder(LsqActivationQuantizer(config(**CALIBRATED)))
    assert holder(None) is None


def test_while_an_observer_is_set_values_are_seen_and_passed_on():
    holder = ActivationQuantizationHolder(LsqActivationQuantizer(config()))
    holder.observer = Observer()
    x = torch.tensor([0.3, -9.0], requires_grad=True)
    assert holder(x) is x
    assert (holder.observer.minimum, holder.observer.maximum, holder.observer.count) == (
        -9.0,
        pytest.approx(0.3),
        2,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_an_observer_sees_every_float_type(dtype):
    holder = ActivationQuantizationHolder(LsqActivationQuantizer(config()))
    holder.observer = Observer()
    holder(torch.tensor([0.5, -9.0], dtype=dtype))
    assert (holder.observer.minimum, holder.observer.maximum) == (-9.0, 0.5)


def test_conversion_deploys_and_doing_it_twice_changes_nothing():
    holder = ActivationQuantizationHolder(LsqActivationQuantizer(config(**CALIBRATED)))
    x = torch.linspace(-3, 3, 101)
    trained = holder(x)
    holder.convert_to_inferable_quantizers()
    deployed = holder.activation_holder_quantizer
    assert isinstance(deployed, ActivationSymmetricInferableQuantizer)
    assert holder.trainable_quantizer is None
    assert torch.equal(holder(x), trained)
    holder.convert_to_inferable_quantizers()
    assert holder.activation_holder_quantizer is deployed


def test_mctqs_own_inferable_quantizer_can_be_held():
    stock = ActivationSymmetricInferableQuantizer(num_bits=4, threshold=[2.0], signed=True)
    holder = ActivationQuantizationHolder(stock)
    assert holder(torch.tensor([0.3, -9.0])).tolist() == [0.25, -2.0]
    holder.convert_to_inferable_quantizers()
    assert holder.activation_holder_quantizer is stock
