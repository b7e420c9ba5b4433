"""The holder quantizes what passes, tells its quantizer whether the model trains, and observes when asked."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from tests.keras.framework import (
    ENGINE,
    dtype_name,
    dtype_policy,
    integers,
    internal,
    kl,
    name_of,
    numpy,
    only_keras,
    symbolic,
    tensor,
    tf,
)
from tests.keras.models import vectors
from trainable_core.calibration import Observer
from trainable_core.config import TrainableQuantizerActivationConfig
from trainable_core.errors import CalibrationError, QuantizerStateError
from trainable_keras import ActivationQuantizationHolder
from trainable_keras.parts import told_of

InferableQuantizer = internal("inferable").InferableQuantizer
SteActivationQuantizer = internal("quantizers").SteActivationQuantizer


def config(**params: Any) -> TrainableQuantizerActivationConfig:
    return TrainableQuantizerActivationConfig(
        activation_quantization_method="SYMMETRIC", activation_n_bits=4, activation_quantization_params=params
    )


OBSERVER = object()
of_mctq = only_keras(2, "mctq's own holder can't run on Keras 3")


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


@only_keras(2, "Keras 3 passes truth values to layers, never tensors")
@pytest.mark.parametrize("training", [True, False, None])
def test_training_may_be_a_tensor(training: bool | None) -> None:
    holder, x = ActivationQuantizationHolder(SteActivationQuantizer(config(threshold=1.0))), tensor(vectors(40))
    given = None if training is None else tf.constant(training)
    run = tf.function(lambda x, flag: holder(x, training=flag))
    assert np.array_equal(numpy(run(x, given)), numpy(holder(x)))


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


def observe(holder: Any, observer: Any = OBSERVER) -> None:
    """Let a holder show what passes to an observer, a new one by default, or to none any more."""
    told_of(holder).observer = Observer() if observer is OBSERVER else observer


def test_while_an_observer_is_set_values_are_seen_and_passed_on() -> None:
    holder = ActivationQuantizationHolder(SteActivationQuantizer(config(threshold=1.0)))
    observe(holder)
    x = vectors(40)
    assert np.array_equal(numpy(holder(tensor(x))), x)
    assert (told_of(holder).observer.minimum, told_of(holder).observer.maximum) == (x.min(), x.max())
    observe(holder, None)
    assert not np.array_equal(numpy(holder(tensor(x))), x)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_every_floating_dtype_is_given_back(dtype: str) -> None:
    if ENGINE == "jax" and dtype == "float64":
        pytest.skip("JAX computes in float32 unless told otherwise")
    holder = ActivationQuantizationHolder(SteActivationQuantizer(config(threshold=1.0)))
    with dtype_policy("mixed_float16"):
        assert dtype_name(holder(tensor([0.5, -2.0], dtype))) == dtype


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_an_observer_sees_every_float_type(dtype: str) -> None:
    holder = ActivationQuantizationHolder(SteActivationQuantizer(config(threshold=1.0)))
    observe(holder)
    holder(tensor([0.5, -2.0], dtype))
    assert (told_of(holder).observer.minimum, told_of(holder).observer.maximum) == (-2.0, 0.5)


def test_what_is_not_finite_is_told_with_the_tensor() -> None:
    quantizer = SteActivationQuantizer(config())
    quantizer.subject = "fc: inputs"
    holder = ActivationQuantizationHolder(quantizer)
    observe(holder)
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
    again = ActivationQuantizationHolder.from_config(json.loads(json.dumps(holder.get_config())))
    assert again.name == "mine"
    assert again.get_config() == holder.get_config()
    assert np.array_equal(numpy(again(tensor(vectors(40)))), numpy(holder(tensor(vectors(40)))))


def test_shape_dtype_and_mask_pass_a_symbolic_call() -> None:
    holder = ActivationQuantizationHolder(SteActivationQuantizer(config()))
    passed = holder(symbolic((None, 4), "float16"))
    assert (tuple(passed.shape), dtype_name(passed)) == ((None, 4), "float16")
    assert holder.supports_masking


def test_masks_pass() -> None:
    x = np.ones((1, 4, 2), np.float32)
    x[0, 2:] = 0.0  # masked
    holder = ActivationQuantizationHolder(SteActivationQuantizer(config(threshold=2.0)))
    assert numpy(kl.GlobalAveragePooling1D()(holder(kl.Masking()(tensor(x))))).tolist() == [[1.0, 1.0]]


# ---- mctq's own holder, which runs on Keras 2 ------------------------------------------------------------------------


def stock() -> Any:
    """Return mctq's holder with mctq's quantizer."""
    from mct_quantizers import KerasActivationQuantizationHolder
    from mct_quantizers.keras import quantizers as mctq

    inferable = mctq.ActivationSymmetricInferableQuantizer(num_bits=4, threshold=[2.0], signed=True)
    return KerasActivationQuantizationHolder(inferable)


@of_mctq
def test_it_is_an_instance_of_mctqs_class() -> None:
    assert isinstance(ActivationQuantizationHolder(SteActivationQuantizer(config(threshold=1.0))), type(stock()))


@of_mctq
def test_conversion_in_place_gives_none_and_mctqs_own_gives_another_layer() -> None:
    holder = ActivationQuantizationHolder(SteActivationQuantizer(config(threshold=1.0)))
    assert holder.convert_to_inferable_quantizers() is None
    own = type(stock())(SteActivationQuantizer(config(threshold=1.0)))
    own(tensor([0.5]))
    assert own.convert_to_inferable_quantizers() is not own


@of_mctq
def test_it_has_no_weights_of_its_own_where_mctqs_own_counts_steps() -> None:
    holder, own = ActivationQuantizationHolder(SteActivationQuantizer(config(threshold=1.0))), stock()
    own(tensor([0.5]))
    assert {name_of(weight) for weight in holder.weights} == {"threshold", "is_signed"}
    assert [weight.dtype for weight in own.weights] == [tf.int32]


@of_mctq
def test_mctqs_own_holder_loses_masks_and_refuses_other_dtypes() -> None:
    x = np.ones((1, 4, 2), np.float32)
    x[0, 2:] = 0.0  # masked
    pooled = kl.GlobalAveragePooling1D()
    assert numpy(pooled(stock()(kl.Masking()(tensor(x))))).tolist() == [[0.5, 0.5]]
    for given in (tensor([0.5], "float16"), tensor([0.5], "bfloat16"), tensor([0.5], "float64"), integers([1])):
        with pytest.raises(AssertionError, match="float tensor"), dtype_policy("mixed_float16"):
            stock()(given)
