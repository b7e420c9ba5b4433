"""The holder quantizes what passes, tells its quantizer whether the model trains, and observes when asked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.keras.framework import dtype_name, integers, internal, numpy, symbolic, tensor
from tests.keras.models import vectors
from trainable_core.calibration import Observer
from trainable_core.config import TrainableQuantizerActivationConfig
from trainable_core.errors import CalibrationError, QuantizerStateError
from trainable_keras import ActivationQuantizationHolder

InferableQuantizer = internal("inferable").InferableQuantizer
SteActivationQuantizer = internal("quantizers").SteActivationQuantizer


def config(**params: Any) -> TrainableQuantizerActivationConfig:
    return TrainableQuantizerActivationConfig(
        activation_quantization_method="SYMMETRIC", activation_n_bits=4, activation_quantization_params=params
    )


class Listening(SteActivationQuantizer):
    """Keeps what it was told."""

    def fake_quantize(self, x: Any, grid: Any, training: bool) -> Any:
        """Return the input."""
        self.told = training
        return x


@pytest.mark.parametrize("training", [True, False])
def test_the_quantizer_is_told_whether_the_model_trains(training: bool) -> None:
    quantizer = Listening(config(threshold=1.0))
    ActivationQuantizationHolder(quantizer)(tensor([0.5]), training=training)
    assert quantizer.told is training


def test_it_quantizes_what_passes() -> None:
    holder = ActivationQuantizationHolder(SteActivationQuantizer(config(threshold=1.0)))
    # steps of 1/8 up to 7/8; ties go up
    assert numpy(holder(tensor([0.0625, -0.0625, 0.3, 9.0, -9.0]))).tolist() == [0.125, 0.0, 0.25, 0.875, -1.0]


def test_before_calibration_it_says_so() -> None:
    holder = ActivationQuantizationHolder(SteActivationQuantizer(config()))
    with pytest.raises(QuantizerStateError, match="no quantization params"):
        holder(tensor([0.5]))


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool"])
def test_integers_pass_untouched(dtype: str) -> None:
    holder = ActivationQuantizationHolder(SteActivationQuantizer(config(threshold=1.0)))
    given = integers([0, 1, 1], dtype)
    passed = holder(given)
    assert dtype_name(passed) == dtype
    assert numpy(passed).tolist() == numpy(given).tolist()


def test_while_an_observer_is_set_values_are_seen_and_passed_on() -> None:
    holder = ActivationQuantizationHolder(SteActivationQuantizer(config(threshold=1.0)))
    holder.observer = Observer()
    x = vectors(40)
    assert np.array_equal(numpy(holder(tensor(x))), x)
    assert (holder.observer.minimum, holder.observer.maximum) == (x.min(), x.max())
    holder.observer = None
    assert not np.array_equal(numpy(holder(tensor(x))), x)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_an_observer_sees_every_float_type(dtype: str) -> None:
    holder = ActivationQuantizationHolder(SteActivationQuantizer(config(threshold=1.0)))
    holder.observer = Observer()
    holder(tensor([0.5, -2.0], dtype))
    assert (holder.observer.minimum, holder.observer.maximum) == (-2.0, 0.5)


def test_what_is_not_finite_is_told_with_the_tensor() -> None:
    quantizer = SteActivationQuantizer(config())
    quantizer.subject = "fc: inputs"
    holder = ActivationQuantizationHolder(quantizer)
    holder.observer = Observer()
    with pytest.raises(CalibrationError, match=r"fc: inputs.*1 NaN"):
        holder(tensor([np.nan, 1.0]))


def test_conversion_deploys_and_doing_it_twice_changes_nothing() -> None:
    holder = ActivationQuantizationHolder(SteActivationQuantizer(config(threshold=1.0)))
    expected = numpy(holder(tensor(vectors(40))))
    assert holder.trainable_quantizer is not None
    for _ in range(2):
        holder.convert_to_inferable_quantizers()
        assert isinstance(holder.activation_holder_quantizer, InferableQuantizer)
        assert holder.trainable_quantizer is None
        assert np.array_equal(numpy(holder(tensor(vectors(40)))), expected)


@pytest.mark.parametrize("deployed", [False, True], ids=["trainable", "deployed"])
def test_its_config_makes_it_again(deployed: bool) -> None:
    holder = ActivationQuantizationHolder(SteActivationQuantizer(config(threshold=1.5)), name="mine")
    if deployed:
        holder.convert_to_inferable_quantizers()
    again = ActivationQuantizationHolder.from_config(holder.get_config())
    assert again.name == "mine"
    assert again.get_config() == holder.get_config()
    assert np.array_equal(numpy(again(tensor(vectors(40)))), numpy(holder(tensor(vectors(40)))))


def test_shape_dtype_and_mask_pass_a_symbolic_call() -> None:
    holder = ActivationQuantizationHolder(SteActivationQuantizer(config()))
    passed = holder(symbolic((None, 4), "float16"))
    assert (tuple(passed.shape), dtype_name(passed)) == ((None, 4), "float16")
    assert holder.supports_masking
