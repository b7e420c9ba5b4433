"""mct-quantizers beside ours: what it finds, and models that are made of nothing but its classes."""

from __future__ import annotations

from typing import Any

import mct_quantizers
import pytest
import torch
from mct_quantizers.common.get_quantizers import get_inferable_quantizer_class
from mct_quantizers.pytorch import quantizers as mctq
from torch import nn

import trainable_torch
from tests import mctq_classes
from trainable_core import list_quantizers

METHODS = [mct_quantizers.QuantizationMethod[name] for name in ("SYMMETRIC", "POWER_OF_TWO", "UNIFORM")]
TARGETS = list(mct_quantizers.QuantizationTarget)


def recipe(method: str = "SYMMETRIC", n_bits: int = 8, **others: Any) -> dict[str, Any]:
    tensor = {"method": method, "n_bits": n_bits, "training_method": "LSQ"}
    return {"weights": tensor, "activations": tensor, **others}


def calibrated(model: nn.Module, batches: Any, **others: Any) -> nn.Module:
    return trainable_torch.calibrate(trainable_torch.wrap(model, recipe(**others)), batches)


# ---- what mctq finds ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def everything_of_ours() -> Any:
    """Return whatever this backend has of mctq's, in use: classes, a wrapped and a deployed model, a user's class."""

    class Mine(trainable_torch.BasePytorchTrainableQuantizer):
        """A quantizer that a user writes."""

    Mine = mct_quantizers.mark_quantizer(mct_quantizers.QuantizationTarget.Weights, METHODS, "MINE")(Mine)  # noqa: N806 - as a decorator would
    rows = list_quantizers("torch")
    qmodel = calibrated(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), [torch.randn(2, 3, 6, 6)])
    return [Mine, rows, qmodel, trainable_torch.finalize(qmodel)]


@pytest.mark.usefixtures("everything_of_ours")
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_mctq_finds_one_class_for_a_target_and_a_grid(target: Any, method: Any):
    found = get_inferable_quantizer_class(target, method, mctq.BasePyTorchInferableQuantizer)
    assert found.__module__.startswith("mct_quantizers.")


@pytest.mark.usefixtures("everything_of_ours")
def test_none_of_our_classes_is_found_among_the_subclasses_of_mctqs():
    assert mctq.WeightsSymmetricInferableQuantizer in set(mctq_classes.classes())  # the look-up sees the classes
    assert mctq_classes.foreign() == set()


def test_what_is_made_is_still_of_mctqs_classes(everything_of_ours: Any):
    own, _, qmodel, deployed = everything_of_ours
    assert issubclass(own, mct_quantizers.BaseInferableQuantizer)
    for model in (qmodel, deployed):
        wrapper = model[0]
        holder = next(m for m in model.modules() if isinstance(m, trainable_torch.ActivationQuantizationHolder))
        assert isinstance(wrapper, mct_quantizers.PytorchQuantizationWrapper)
        assert isinstance(holder, mct_quantizers.PytorchActivationQuantizationHolder)
        for quantizer in (wrapper.weights_quantizers["weight"], holder.activation_holder_quantizer):
            assert isinstance(quantizer, mct_quantizers.BaseInferableQuantizer)
            assert isinstance(quantizer, mctq.BasePyTorchInferableQuantizer) is (model is deployed)
