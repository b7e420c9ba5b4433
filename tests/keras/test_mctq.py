"""mct-quantizers beside ours: what it finds, and models that are made of nothing but its classes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import trainable_keras
from tests import mctq_classes
from tests.keras.framework import BACKEND, KERAS_VERSION, keras, kl, needs_mctq
from trainable_core import list_quantizers

METHODS = "SYMMETRIC", "POWER_OF_TWO", "UNIFORM"
TARGETS = "Weights", "Activation"


def recipe(method: str = "SYMMETRIC", n_bits: int = 8, **others: Any) -> dict[str, Any]:
    tensor = {"method": method, "n_bits": n_bits, "training_method": "LSQ"}
    return {"weights": tensor, "activations": tensor, **others}


# ---- what mctq finds ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def everything_of_ours() -> Any:
    """Return whatever this backend has of mctq's, in use: classes, a wrapped and a deployed model, a user's class."""
    import mct_quantizers

    class Mine(trainable_keras.BaseKerasTrainableQuantizer):
        """A quantizer that a user writes."""

    methods = [mct_quantizers.QuantizationMethod[name] for name in METHODS]
    mct_quantizers.mark_quantizer(mct_quantizers.QuantizationTarget.Weights, methods, "MINE")(Mine)
    rows = list_quantizers(BACKEND)
    model = keras.Sequential([kl.Input((6, 6, 3)), kl.Conv2D(4, 3), kl.ReLU()])
    qmodel = trainable_keras.calibrate(
        trainable_keras.wrap(model, recipe()), [np.random.default_rng(0).normal(size=(2, 6, 6, 3)).astype(np.float32)]
    )
    return [Mine, rows, qmodel, trainable_keras.finalize(qmodel)]


@needs_mctq
@pytest.mark.usefixtures("everything_of_ours")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("target", TARGETS)
def test_mctq_finds_one_class_for_a_target_and_a_grid(target: str, method: str) -> None:
    import mct_quantizers
    from mct_quantizers.common.get_quantizers import get_inferable_quantizer_class
    from mct_quantizers.keras.quantizers import BaseKerasInferableQuantizer

    found = get_inferable_quantizer_class(
        mct_quantizers.QuantizationTarget[target],
        mct_quantizers.QuantizationMethod[method],
        BaseKerasInferableQuantizer,
    )
    assert found.__module__.startswith("mct_quantizers.")


@pytest.mark.usefixtures("everything_of_ours")
def test_none_of_our_classes_is_found_among_the_subclasses_of_mctqs() -> None:
    assert "BaseInferableQuantizer" in {cls.__name__ for cls in mctq_classes.classes()}  # the look-up sees the classes
    assert mctq_classes.foreign() == set()


@pytest.mark.usefixtures("everything_of_ours")
def test_no_class_is_registered_with_keras_under_a_name_of_mctqs() -> None:
    registered = keras.saving.get_custom_objects()
    theirs = {cls.__name__ for cls in mctq_classes.classes()} - {"MetadataLayer"}  # which mctq itself registers
    assert any(name.startswith("trainable_keras") for name in registered)
    assert theirs.isdisjoint(registered)


def test_what_is_made_is_still_of_mctqs_classes(everything_of_ours: Any) -> None:
    import mct_quantizers

    own, _, qmodel, deployed = everything_of_ours
    assert issubclass(own, mct_quantizers.BaseInferableQuantizer)
    for model in (qmodel, deployed):
        wrapper = next(layer for layer in model.layers if hasattr(layer, "weights_quantizers"))
        (holder,) = wrapper.input_holders.values()
        for quantizer in (wrapper.weights_quantizers["kernel"], holder.activation_holder_quantizer):
            assert isinstance(quantizer, mct_quantizers.BaseInferableQuantizer)
        if KERAS_VERSION == 2:  # where mctq's wrapper and holder run
            assert isinstance(wrapper, mct_quantizers.KerasQuantizationWrapper)
            assert isinstance(holder, mct_quantizers.KerasActivationQuantizationHolder)
