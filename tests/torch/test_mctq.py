"""mct-quantizers beside ours: what it finds, and models that are made of nothing but its classes."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import mct_quantizers
import numpy as np
import pytest
import torch
from mct_quantizers.common.get_quantizers import get_inferable_quantizer_class
from mct_quantizers.pytorch import quantizers as mctq
from torch import nn

import trainable_torch
from tests import mctq_classes
from trainable_core import list_quantizers
from trainable_core.errors import ModelError, QuantizerStateError, UnsupportedConfigError

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


# ---- models of mctq's own classes -----------------------------------------------------------------------------------


class Residual(nn.Module):
    """A model whose layers are reached through a list, with functional operations between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm(self.first(x)))
        return self.head(torch.relu(self.second(y) + y).mean((2, 3)))


class Flows(nn.Module):
    """A model that no symbolic tracing follows."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) if x.sum() > 0 else self.fc(-x)


IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
VECTOR = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
MODELS: dict[str, Any] = {
    "one layer": (lambda: nn.Linear(8, 4), VECTOR),
    "convolutions": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), IMAGE),
    "nested": (lambda: nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.ReLU6()), nn.Linear(8, 2)), VECTOR),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.GELU()), IMAGE),
    "depthwise": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.Hardswish()), IMAGE),
    "embedding": (lambda: nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 2)), torch.tensor([[1, 4, 2]])),
    "residual": (Residual, IMAGE),
}


def deployed(model: nn.Module, x: torch.Tensor, **others: Any) -> nn.Module:
    torch.manual_seed(0)
    return trainable_torch.finalize(calibrated(model.eval(), [x], **others))


def with_placement(placement: str, method: str = "SYMMETRIC", n_bits: int = 8) -> dict[str, Any]:
    asked = recipe(method, n_bits)
    return {**asked, "activations": {**asked["activations"], "placement": placement}}


@pytest.mark.parametrize("placement", ["inputs", "outputs"])
@pytest.mark.parametrize(("method", "n_bits"), [("SYMMETRIC", 8), ("POWER_OF_TWO", 3), ("UNIFORM", 4), ("UNIFORM", 16)])
@pytest.mark.parametrize("name", MODELS)
def test_a_stock_model_is_of_mctqs_classes_and_gives_the_same(name: str, method: str, n_bits: int, placement: str):
    make, x = MODELS[name]
    ours = trainable_torch.finalize(
        trainable_torch.calibrate(trainable_torch.wrap(make().eval(), with_placement(placement, method, n_bits)), [x])
    )
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    stock = trainable_torch.to_mctq(ours)
    assert not stock.training
    assert torch.equal(stock(x), ours(x))
    quantizers = [q for m in stock.modules() for q in getattr(m, "weights_quantizers", {}).values()]
    quantizers += [m.activation_holder_quantizer for m in stock.modules() if hasattr(m, "activation_holder_quantizer")]
    assert len(quantizers) >= 2
    for each in [*stock.modules(), *quantizers]:
        assert not type(each).__module__.startswith("trainable"), each
    assert {type(q).__module__.partition(".")[0] for q in quantizers} == {"mct_quantizers"}
    assert all(
        torch.equal(value, before[key]) for key, value in ours.state_dict().items()
    )  # the given one is untouched
    assert isinstance(
        next(m for m in ours.modules() if hasattr(m, "weights_quantizers")), trainable_torch.QuantizationWrapper
    )


ALONE = """
import sys
for name in ("trainable_core", "trainable_torch", "trainable_keras", "tensorflow"):
    sys.modules[name] = None
import torch
from mct_quantizers import pytorch_load_quantized_model
stock = pytorch_load_quantized_model(sys.argv[1], weights_only=False)
torch.save(stock(torch.load(sys.argv[2])), sys.argv[3])
"""


@pytest.mark.parametrize("placement", ["inputs", "outputs"])
@pytest.mark.parametrize("name", ["convolutions", "embedding"])
def test_a_stock_model_opens_where_only_mctq_is_installed(tmp_path: Any, name: str, placement: str):
    make, x = MODELS[name]
    ours = trainable_torch.finalize(
        trainable_torch.calibrate(trainable_torch.wrap(make().eval(), with_placement(placement)), [x])
    )
    files = [str(tmp_path / name) for name in ("stock", "x", "y")]
    torch.save(trainable_torch.to_mctq(ours), files[0])
    torch.save(x, files[1])
    subprocess.run([sys.executable, "-c", ALONE, *files], check=True)
    assert torch.equal(torch.load(files[2]), ours(x))


def test_whoever_holds_a_layer_holds_mctqs_wrapper():
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
            self.layers = [self.first, self.second]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x))

    ours = deployed(Listed(), VECTOR)
    stock = trainable_torch.to_mctq(ours)
    assert torch.equal(stock(VECTOR), ours(VECTOR))
    if isinstance(ours.first, nn.Linear):  # the layer stayed itself when it was wrapped
        assert stock.layers == [stock.first, stock.second]


def test_hooks_and_copies_go_on():
    ours = deployed(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), VECTOR)
    ours[0].register_forward_hook(lambda module, args, output: output + 1)
    stock = trainable_torch.to_mctq(ours)
    expected = ours(VECTOR)
    assert torch.equal(stock(VECTOR), expected)
    assert torch.equal(copy.deepcopy(stock)(VECTOR), expected)


def test_mctqs_own_quantizers_are_taken_as_they_are():
    quantizer = mctq.WeightsSymmetricInferableQuantizer(num_bits=4, threshold=[1.0], per_channel=False)
    ours = deployed(nn.Sequential(nn.Linear(8, 8)), VECTOR)
    ours[0].weights_quantizers["weight"] = quantizer
    stock = trainable_torch.to_mctq(ours)
    (wrapper,) = (m for m in stock.modules() if type(m) is mct_quantizers.PytorchQuantizationWrapper)
    assert type(wrapper.weights_quantizers["weight"]) is mctq.WeightsSymmetricInferableQuantizer
    assert wrapper.weights_quantizers["weight"].num_bits == 4


def test_what_a_config_switches_off_stays_float():
    asked = {**recipe(), "activations": {**recipe()["activations"], "enabled": False}}
    model = nn.Sequential(nn.Linear(8, 8))
    ours = trainable_torch.finalize(trainable_torch.calibrate(trainable_torch.wrap(model, asked)))
    stock = trainable_torch.to_mctq(ours)
    assert not any(isinstance(m, mct_quantizers.PytorchActivationQuantizationHolder) for m in stock.modules())
    assert torch.equal(stock(VECTOR), ours(VECTOR))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_exported_to_onnx_it_runs_with_mctqs_operators(tmp_path: Any, method: Any):
    onnxruntime = pytest.importorskip("onnxruntime", reason="mctq's ONNX path needs onnxruntime")
    pytest.importorskip("onnxruntime_extensions", reason="mctq's ONNX operators need onnxruntime-extensions")
    ours = deployed(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), IMAGE, method=method.name)
    stock = trainable_torch.to_mctq(ours)
    for module in stock.modules():
        for quantizer in [
            *getattr(module, "weights_quantizers", {}).values(),
            getattr(module, "activation_holder_quantizer", None),
        ]:
            if quantizer is not None:
                quantizer.enable_custom_impl()
    file = str(tmp_path / "stock.onnx")
    torch.onnx.export(stock, (IMAGE,), file, dynamo=False)
    session = onnxruntime.InferenceSession(file, mct_quantizers.get_ort_session_options())
    (output,) = session.run(None, {session.get_inputs()[0].name: IMAGE.numpy()})
    # 28 products are summed in another order, each sum 2**-24 off of at most 28 times the largest term; mctq's
    # operators divide where its quantizers multiply, which no value of this seed is near enough to a tie to show
    np.testing.assert_allclose(output, ours(IMAGE).detach(), rtol=0, atol=28 * 28 * 2**-24)


# ---- what mctq can't express, or computes otherwise -----------------------------------------------------------------


def refused(ours: nn.Module, *facts: str, **arguments: Any) -> None:
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    with pytest.raises(UnsupportedConfigError) as caught:
        trainable_torch.to_mctq(ours, **arguments)
    for fact in facts:
        assert fact in str(caught.value)
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("value", [torch.inf, torch.nan, 1e30], ids=["inf", "nan", "beyond 2**63 steps"])
def test_a_weight_that_mctq_sends_to_the_lowest_code_is_refused(value: float):
    ours = deployed(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), VECTOR)
    dict(ours.named_parameters())["1.weight"].data[3, 2] = value
    refused(ours, "1: weight", "computes otherwise", "1 of 64")


def test_a_truncated_zero_point_is_refused(monkeypatch: pytest.MonkeyPatch):
    """Our own grids are chosen so that it never happens; a grid that mctq derives otherwise is told by its values."""
    ours = deployed(nn.Sequential(nn.Linear(8, 8)), VECTOR, method="UNIFORM")
    init = mctq.WeightsUniformInferableQuantizer.__init__

    def truncated(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if type(self) is mctq.WeightsUniformInferableQuantizer:
            self.zero_points = self.zero_points - 1

    monkeypatch.setattr(mctq.WeightsUniformInferableQuantizer, "__init__", truncated)
    refused(ours, "0: weight", "computes otherwise")


@pytest.mark.parametrize("end", ["scale", "zero_point"])
def test_an_activation_grid_that_mctq_derives_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch, end: str):
    ours = deployed(nn.Sequential(nn.Linear(8, 8)), VECTOR, method="UNIFORM")
    init = mctq.ActivationUniformInferableQuantizer.__init__

    def other(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        setattr(self, end, getattr(self, end) * (1 + 2**-20) if end == "scale" else self.zero_point + 1)

    monkeypatch.setattr(mctq.ActivationUniformInferableQuantizer, "__init__", other)
    refused(ours, "0: input", "computes otherwise")


def test_several_inputs_and_weights_of_inner_layers_are_refused_together():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    refused(
        deployed(model, torch.randn(2, 3, 8)),
        "self_attn: out_proj.weight",
        "self_attn: query, key, value",
        "one tensor",
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_are_refused(dtype: torch.dtype):
    ours = deployed(nn.Sequential(nn.Linear(8, 8)), VECTOR).to(dtype)
    refused(ours, "0.weight", str(dtype))


def test_other_dtypes_of_inputs_are_seen_in_a_run():
    model = trainable_torch.wrap(nn.Sequential(nn.ReLU()), with_placement("outputs"))
    ours = trainable_torch.finalize(trainable_torch.calibrate(model, [VECTOR]))
    refused(ours, "float64", example=VECTOR.double())


def test_a_quantizer_without_counterpart_is_refused():
    class Unknown(nn.Module):
        quantization_target = mct_quantizers.QuantizationTarget.Weights

        def initialize_quantization(self, *_: Any) -> dict[str, Any]:
            return {}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    ours = deployed(nn.Sequential(nn.Linear(8, 8)), VECTOR)
    ours[0].weights_quantizers["weight"] = Unknown()
    refused(ours, "0: weight", "no counterpart", "Unknown")


def test_a_weight_that_the_model_reads_is_refused():
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(nn.functional.linear(self.fc(x), self.fc.weight))

    for placement in ("inputs", "outputs"):
        model = trainable_torch.wrap(Reads(), with_placement(placement))
        ours = trainable_torch.finalize(trainable_torch.calibrate(model, [VECTOR]))
        refused(ours, "fc: weight", "reads it")
        refused(ours, "fc: weight", "reads it", example=VECTOR)


def test_code_that_asks_for_a_layers_class_is_refused():
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
                if type(layer).__module__.startswith(("trainable", "torch.nn.modules.linear")):
                    x = torch.relu(x)
            return x

    ours = deployed(Asks(), VECTOR)
    assert ours(VECTOR).min() >= 0
    refused(ours, "behind layers.0", "class of a layer")
    refused(ours, "behind layers.0", "class of a layer", example=VECTOR)


def test_a_model_that_cant_be_traced_needs_an_example():
    ours = deployed(Flows(), VECTOR)
    with pytest.raises(ModelError, match=r"example=batch"):
        trainable_torch.to_mctq(ours)
    for example in (VECTOR, (VECTOR, "labels"), {"x": VECTOR}):
        stock = trainable_torch.to_mctq(ours, example)
        assert torch.equal(stock(VECTOR), ours(VECTOR))
        assert torch.equal(stock(-VECTOR), ours(-VECTOR))


def test_only_finalized_models_are_converted():
    qmodel = calibrated(nn.Sequential(nn.Linear(8, 8)), [VECTOR])
    with pytest.raises(QuantizerStateError, match="finalize"):
        trainable_torch.to_mctq(qmodel)
    with pytest.raises(ModelError, match="wrap"):
        trainable_torch.to_mctq(nn.Linear(8, 8))
