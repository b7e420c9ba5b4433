"""Biases as integers: on the grid of the layer's sums of products, in training and after."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name everyone reads

import trainable_torch
from tests.torch.models import GRIDS, TRAINED_BY, images, moved, network, ready, same_state, spec, train, vectors
from trainable_core.errors import IntegerRangeError, RuleError, UnsupportedConfigError
from trainable_core.reference.bias import bias_scale, fake_quantize_bias
from trainable_torch.training import quantizers_of
from trainable_torch.wrapper import QuantizationWrapper


def how(
    training_method: str = "LSQ", method: str = "SYMMETRIC", placement: str = "inputs", **more: Any
) -> dict[str, Any]:
    """Return a recipe of 8-bit tensors and int32 biases."""
    both = spec(training_method, method, 8)
    return {"weights": dict(both), "activations": {**both, "placement": placement}, "bias": "int32", **more}


def layers_of(model: nn.Module) -> dict[str, Any]:
    """Return the layers with integer biases, by name."""
    wrapped = {name: m for name, m in model.named_modules() if isinstance(m, QuantizationWrapper)}
    return {name: layer for name, layer in wrapped.items() if layer.quantizes_bias}


def expected_bias(layer: Any, groups: int = 1) -> np.ndarray:
    """Return the reference's value of a deployed layer's bias."""
    scale_x = layer.bias_quantizer.source.activation_holder_quantizer.qparams.scale
    scale_w = layer.weights_quantizers["weight"].qparams.scale
    return fake_quantize_bias(layer.float_weight("bias").detach().numpy(), bias_scale(scale_x, scale_w, groups))


def assert_is_what_the_reference_says(deployed: nn.Module, *, groups: int = 1) -> None:
    """Assert that every bias is the reference's, bit for bit, and so are its codes."""
    for layer in layers_of(deployed).values():
        bias = layer.float_weight("bias")
        on_grid = layer.quantized_bias(bias)
        np.testing.assert_array_equal(on_grid.detach().numpy(), expected_bias(layer, groups))
        codes, scale = layer.bias_quantizer.integers(bias)
        assert (codes.dtype, scale.dtype) == (torch.int32, torch.float32)
        assert torch.equal(codes.float() * scale, on_grid)
        # Else this says nothing; but a float32 number is on every power-of-two grid that is finer than its last place.
        assert not torch.equal(on_grid, bias) or bool((scale <= bias.abs() * 2.0**-23).all())


# ---- what is trained is what is deployed ----------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["inputs", "integer"])
@pytest.mark.parametrize("method", GRIDS)
@pytest.mark.parametrize("training_method", TRAINED_BY)
def test_a_trained_bias_is_the_deployed_one_and_the_references(training_method: str, method: str, placement: str):
    model = network()
    nn.init.uniform_(model.stem.norm.bias, -0.5, 0.5)  # the bias of the folded convolution; a new one is zero
    qmodel = moved(ready(model, how(training_method, method, placement), images()))
    deployed = trainable_torch.finalize(qmodel)
    assert set(layers_of(deployed)) == {"stem.conv", "body", "head"}
    assert_is_what_the_reference_says(deployed)
    qmodel.eval()
    assert torch.equal(qmodel(images(5)), deployed(images(5)))
    with torch.no_grad():
        assert torch.equal(qmodel(images(5)), deployed(images(5)))


@pytest.mark.parametrize(
    ("training_method", "method"), [("TQT", "SYMMETRIC"), ("TQT", "POWER_OF_TWO"), ("LSQ_PLUS", "UNIFORM")]
)
def test_a_bias_is_on_the_grid_of_thresholds_that_other_variables_stand_for(training_method: str, method: str):
    model = network()
    nn.init.uniform_(model.stem.norm.bias, -0.5, 0.5)  # the bias of the folded convolution; a new one is zero
    qmodel = moved(ready(model, how(training_method, method), images()))
    deployed = trainable_torch.finalize(qmodel)
    assert_is_what_the_reference_says(deployed)
    with torch.no_grad():
        assert torch.equal(qmodel.eval()(images(5)), deployed(images(5)))


LAYERS: dict[str, tuple[nn.Module, Tensor, int]] = {
    "linear": (nn.Linear(6, 4), vectors(3, 6), 1),
    "linear of sequences": (nn.Linear(6, 4), vectors(2, 3, 6), 1),
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1), vectors(2, 4, 5), 1),
    "grouped conv2d": (nn.Conv2d(4, 6, 3, groups=2), vectors(2, 4, 5, 5), 1),
    "conv2d padded by reflection": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), vectors(2, 4, 5, 5), 1),
    "conv3d": (nn.Conv3d(2, 3, 2), vectors(2, 2, 3, 3, 3), 1),
    "transposed": (nn.ConvTranspose2d(4, 6, 3), vectors(2, 4, 5, 5), 1),
    "transposed in groups": (nn.ConvTranspose2d(4, 6, 3, groups=2), vectors(2, 4, 5, 5), 2),
    "transposed in one dimension": (nn.ConvTranspose1d(4, 6, 3, groups=2), vectors(2, 4, 5), 2),
}


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_layer_has_its_bias_on_its_own_grid(name: str, per_channel: bool):
    layer, x, groups = LAYERS[name]
    recipe = how()
    recipe["weights"]["per_channel"] = per_channel
    qmodel = train(ready(nn.Sequential(layer), recipe, x), [x])
    deployed = trainable_torch.finalize(qmodel)
    assert_is_what_the_reference_says(deployed, groups=groups if per_channel else 1)
    stored = deployed[0]
    x_on_grid = stored.input_holders["input"](x)
    plain = copy.deepcopy(layer).eval()
    plain.load_state_dict(
        {
            "weight": stored.get_quantized_weights()["weight"],
            "bias": torch.tensor(expected_bias(stored, groups if per_channel else 1)),
        }
    )
    with torch.no_grad():
        assert torch.equal(deployed(x), plain(x_on_grid))
        assert torch.equal(qmodel.eval()(x), deployed(x))


def test_a_layer_that_is_the_model_has_its_bias_quantized_too():
    qmodel = ready(nn.Linear(6, 4), how(), vectors(3, 6))
    assert trainable_torch.describe(qmodel).biases == {"model.bias": "model: input"}
    assert_is_what_the_reference_says(trainable_torch.finalize(qmodel))


# ---- gradients ------------------------------------------------------------------------------------------------------


def test_the_gradient_passes_straight_to_the_float_bias_and_thresholds_get_none_of_it():
    """Against the same model whose float bias already has the quantized values."""
    x = images()
    qmodel = ready(network(), how(), x).train()
    beside = trainable_torch.wrap(network(), {**how(), "bias": "float"})
    beside.load_state_dict(qmodel.state_dict())
    beside.train()
    for name, layer in layers_of(qmodel).items():
        with torch.no_grad():
            beside.get_submodule(name).bias.copy_(layer.quantized_bias(layer.bias))
    for model in (qmodel, beside):
        model(x).square().sum().backward()
    assert torch.equal(qmodel(x), beside(x))
    for (name, one), (_, other) in zip(qmodel.named_parameters(), beside.named_parameters(), strict=True):
        assert one.grad is not None, name
        assert torch.equal(one.grad, other.grad), name


def test_the_scale_of_a_bias_moves_with_the_thresholds():
    qmodel = ready(nn.Sequential(nn.Linear(6, 4)), how(), vectors(3, 6))
    layer = layers_of(qmodel)["0"]
    before = layer.bias_quantizer.scale()
    with torch.no_grad():
        for quantizer in quantizers_of(qmodel).values():
            quantizer.threshold.mul_(2)
    assert torch.equal(layer.bias_quantizer.scale(), 4 * before)
    assert torch.equal(trainable_torch.finalize(qmodel)[0].bias_quantizer.scale(), 4 * before)


@pytest.mark.parametrize("training", [True, False])
def test_every_way_of_calling_a_layer_gives_the_same(training: bool, monkeypatch: pytest.MonkeyPatch):
    """As one function, with a hook, and on the plain path: outputs and gradients of the bias are the same numbers."""
    x, found = images(), []
    for way in ("fused", "hooked", "plain"):
        qmodel = ready(network(), how(), x).train(training)
        if way == "hooked":
            for layer in layers_of(qmodel).values():
                layer.weights_quantizers["weight"].register_forward_hook(lambda *_: None)
        if way == "plain":
            monkeypatch.setenv("TRAINABLE_TORCH_KERNELS", "plain")
        y = qmodel(x)
        y.square().sum().backward()
        found.append((y, qmodel.head.bias.grad))
    assert all(torch.equal(found[0][0], y) for y, _ in found)
    assert all(torch.equal(found[0][1], gradient) for _, gradient in found)


def test_a_changed_bias_is_seen_in_evaluation():
    x = vectors(3, 6)
    deployed = trainable_torch.finalize(ready(nn.Sequential(nn.Linear(6, 4)), how(), x))
    with torch.no_grad():
        before = deployed(x)
        deployed[0].float_weight("bias").add_(1.0)
        after = deployed(x)
    assert bool(((after - before) > 0.9).all())
    assert_is_what_the_reference_says(deployed)


# ---- codes beyond int32 ---------------------------------------------------------------------------------------------


def huge(model: nn.Module) -> nn.Module:
    """Return the model with a bias whose code int32 does not hold: a step is at least 2**-16 / 2**7 squared."""
    with torch.no_grad():
        model.body.bias[2] = 2.0**31
    return model


def test_calibration_refuses_a_bias_beyond_int32_and_changes_nothing():
    qmodel = trainable_torch.wrap(huge(network()), how())
    before = {name: value.clone() for name, value in qmodel.state_dict().items()}
    with pytest.raises(IntegerRangeError, match=r"body\.bias.*channel 2"):
        trainable_torch.calibrate(qmodel, [images()])
    after = qmodel.state_dict()
    assert all(torch.equal(value.nan_to_num(7), after[name].nan_to_num(7)) for name, value in before.items())
    assert not any(quantizer.calibrated for quantizer in quantizers_of(qmodel).values())


def test_a_calibration_that_is_refused_keeps_the_thresholds_of_the_one_before():
    qmodel = ready(network(), how(), images())
    kept = copy.deepcopy(qmodel)
    huge(qmodel), huge(kept)
    with pytest.raises(IntegerRangeError):
        trainable_torch.calibrate(qmodel, [10 * images()], force=True)
    assert same_state(qmodel, kept)
    assert all(quantizer.calibrated for quantizer in quantizers_of(qmodel).values())


def test_finalize_refuses_a_bias_that_has_grown_beyond_int32():
    qmodel = huge(ready(network(), how(), images()))
    with pytest.raises(IntegerRangeError, match=r"body\.bias.*channel 2"):
        trainable_torch.finalize(qmodel)
    qmodel.train()(images()).sum().backward()  # while it trains, the code saturates
    assert bool(qmodel.body.bias.grad.isfinite().all())


# ---- refusals -------------------------------------------------------------------------------------------------------


class TwoWays(nn.Module):
    """A layer behind two others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.shared = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(self.first(x)) + self.shared(self.second(x))


FIRST_TWO = [{"match": {"name": name}, "bias": "float"} for name in ("first", "second")]
OUTPUTS = how(placement="outputs", rules=[{"match": {"name": "0"}, "activations": {"placement": "inputs"}}])


@pytest.mark.parametrize(
    ("model", "recipe", "subject", "reason"),
    [
        (nn.Sequential(nn.Linear(4, 4)), {"weights": spec(), "bias": "int32"}, "0.bias", "no quantizer makes that"),
        (nn.Sequential(nn.Linear(4, 4)), how(placement="outputs"), "0.bias", "an input of the model"),
        (nn.Linear(4, 4), how(placement="outputs"), "model.bias", "no quantizer makes"),
        (
            nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
            {**OUTPUTS, "rules": [{"match": {"name": "0"}, "skip": True}]},
            "1.bias",
            "0 has no quantizer behind it",
        ),
        (
            nn.Sequential(nn.Linear(4, 4), nn.AvgPool1d(2), nn.Linear(2, 2)),
            {**OUTPUTS, "rules": [*OUTPUTS["rules"], {"match": {"op": "pooling"}, "skip": True}]},
            "2.bias",
            "1 has no quantizer",
        ),
        (TwoWays(), how(placement="outputs", rules=FIRST_TWO), "shared.bias", "several quantizers: first, second"),
        (nn.Sequential(nn.LSTM(4, 4)), how(), "0.bias_ih_l0", "inside of the layer"),
        (nn.LSTMCell(4, 4), how(), "model.bias_ih", "inside of the layer"),
        (nn.MultiheadAttention(4, 2), how(), "model.in_proj_bias", "inside of the layer"),
        (nn.Bilinear(4, 4, 2), how(), "model.bias", "products of three tensors"),
    ],
)  # fmt: skip
def test_a_bias_without_a_known_grid_is_refused_before_training(
    model: nn.Module, recipe: Any, subject: str, reason: str
):
    with pytest.raises(UnsupportedConfigError, match=f"^{subject}: .*int32.*{reason}") as caught:
        trainable_torch.wrap(model, recipe)
    assert '"bias": "float"' in str(caught.value)
    name = subject.rpartition(".")[0]
    leave = [*recipe.get("rules", []), {"match": {"name": name if name != "model" else "*"}, "bias": "float"}]
    qmodel = trainable_torch.wrap(model, {**recipe, "rules": leave})
    assert subject not in trainable_torch.describe(qmodel).biases


class Scaled(nn.Linear):
    """A subclass that changes its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(2 * x, self.weight, self.bias)


class Late(nn.Linear):
    """A subclass that adds its bias to something else."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight).sigmoid() + self.bias


class Padded(nn.Conv2d):
    """A subclass that pads its input with zeros."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


@pytest.mark.parametrize("cls", [Scaled, Late])
def test_a_subclass_that_uses_its_bias_otherwise_is_refused(cls: type[nn.Linear]):
    with pytest.raises(UnsupportedConfigError, match=r"0\.bias: .*has its own forward"):
        trainable_torch.wrap(nn.Sequential(cls(4, 4)), how())


def test_a_subclass_that_only_pads_is_as_good_as_its_base():
    qmodel = ready(nn.Sequential(Padded(2, 3, 3)), how(), vectors(1, 2, 4, 4))
    assert_is_what_the_reference_says(trainable_torch.finalize(qmodel))


class OwnLayer(nn.Module):
    """A layer of no class of PyTorch's."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.shift = nn.Parameter(vectors(3, 4)), nn.Parameter(vectors(3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kernel.t() + self.shift


def test_a_registered_layer_says_which_attribute_is_its_bias(monkeypatch: pytest.MonkeyPatch):
    from trainable_torch import layers

    monkeypatch.setattr(layers, "_KINDS", dict(layers._KINDS))  # noqa: SLF001 - as above
    trainable_torch.register_layer(OwnLayer, "linear", {"kernel": 0})
    with pytest.raises(UnsupportedConfigError, match=r"0\.shift: .*does not say whether 'shift' is the bias"):
        trainable_torch.wrap(nn.Sequential(OwnLayer()), how())
    trainable_torch.register_layer(OwnLayer, "linear", {"kernel": 0}, bias="shift")
    x = vectors(2, 4)
    qmodel = ready(nn.Sequential(OwnLayer()), how(), x)
    layer = trainable_torch.finalize(qmodel)[0]
    scale = bias_scale(
        layer.input_holders["input"].activation_holder_quantizer.qparams.scale,
        layer.weights_quantizers["kernel"].qparams.scale,
    )
    shift = torch.tensor(fake_quantize_bias(layer.float_weight("shift").detach().numpy(), scale))
    kernel = layer.get_quantized_weights()["kernel"]
    assert torch.equal(layer(x), layer.input_holders["input"](x) @ kernel.t() + shift)


def test_a_layer_without_bias_needs_nothing():
    qmodel = ready(nn.Sequential(nn.Linear(4, 4, bias=False)), how(placement="outputs"), vectors(2, 4))
    assert trainable_torch.describe(qmodel).biases == {}
    with pytest.raises(RuleError, match="none of its layers has a bias"):
        trainable_torch.wrap(
            nn.Sequential(nn.Linear(4, 4, bias=False)), how(rules=[{"match": {"op": "linear"}, "bias": "int32"}])
        )


# ---- the life of a model --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["inputs", "integer"])
def test_the_state_has_the_bias_under_its_own_name_and_nothing_else(placement: str):
    qmodel = trainable_torch.wrap(network(), how(placement=placement))
    beside = trainable_torch.wrap(network(), {**how(placement=placement), "bias": "float"})
    assert list(qmodel.state_dict()) == list(beside.state_dict())
    assert "head.bias" in dict(qmodel.named_parameters())
    qmodel.load_state_dict(nn.Sequential(*network()).state_dict(), strict=False)


@pytest.mark.parametrize("deployed", [False, True])
@pytest.mark.parametrize("placement", ["inputs", "integer"])
def test_a_saved_model_goes_on_bit_for_bit(placement: str, deployed: bool, tmp_path: Path):
    qmodel = train(ready(network(), how(placement=placement), images()), [images()])
    before = trainable_torch.finalize(qmodel) if deployed else qmodel
    trainable_torch.save(before, tmp_path / "model")
    loaded = trainable_torch.load(tmp_path / "model", network())
    assert same_state(before, loaded)
    assert trainable_torch.describe(loaded).to_dict() == trainable_torch.describe(before).to_dict()
    assert torch.equal(before.eval()(images(3)), loaded.eval()(images(3)))
    if not deployed:
        assert same_state(train(before, [images()]), train(loaded, [images()]))


def pickled(model: nn.Module) -> nn.Module:
    """Return the model from a pickle."""
    return pickle.loads(pickle.dumps(model))  # noqa: S301 - the test's own


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize("placement", ["inputs", "integer"])
def test_a_copy_follows_its_own_thresholds(placement: str, copied: Any):
    qmodel = train(ready(network(), how(placement=placement), images()), [images()])
    twin = copied(qmodel)
    before = qmodel.eval()(images())
    assert torch.equal(before, twin.eval()(images()))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    assert torch.equal(before, qmodel(images()))
    assert torch.equal(twin(images()), trainable_torch.finalize(twin)(images()))
    assert_is_what_the_reference_says(trainable_torch.finalize(twin))


def test_finalizing_twice_and_training_on_change_nothing():
    qmodel = ready(network(), how(), images())
    deployed = trainable_torch.finalize(qmodel)
    again = trainable_torch.finalize(deployed)
    before = deployed(images())
    train(qmodel, [images()])
    assert torch.equal(before, deployed(images()))
    assert torch.equal(before, again(images()))
    buffer = io.BytesIO()
    torch.save(deployed.state_dict(), buffer)
    buffer.seek(0)
    again.load_state_dict(torch.load(buffer, weights_only=True), assign=True)
    assert torch.equal(before, again(images()))


def test_frozen_quantizers_leave_the_bias_learning():
    qmodel = trainable_torch.freeze_quant_params(ready(network(), how(), images()))
    before = qmodel.head.bias.clone()
    train(qmodel, [images()])
    assert not torch.equal(before, qmodel.head.bias)
    assert_is_what_the_reference_says(trainable_torch.finalize(qmodel))


def test_tied_layers_share_a_weight_and_have_biases_of_their_own():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    qmodel = train(ready(model, how(placement="integer"), vectors(8, 4)), [vectors(8, 4)])
    deployed = trainable_torch.finalize(qmodel)
    first, second = layers_of(deployed).values()
    assert first.weights_quantizers["weight"] is second.weights_quantizers["weight"]
    assert_is_what_the_reference_says(deployed)
    assert not torch.equal(first.bias_quantizer.scale(), second.bias_quantizer.scale())


class Parent(nn.Module):
    """Computes with a child's weight and bias itself, besides calling the child."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.proj.weight, self.proj.bias) + 0 * self.proj(x)


def test_whoever_reads_the_bias_while_the_model_runs_gets_the_quantized_one():
    x = vectors(2, 4)
    deployed = trainable_torch.finalize(ready(Parent(), how(), x))
    layer = deployed.proj
    bias = torch.tensor(expected_bias(layer))
    with torch.no_grad():
        assert torch.equal(deployed(x), F.linear(x, layer.get_quantized_weights()["weight"], bias) + 0 * layer(x))
    assert layer.bias is layer.float_weight("bias")  # outside of a forward


class OnlyRead(Parent):
    """Computes with a child's weight and bias, and never calls the child."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.proj.weight, self.proj.bias)


def test_a_bias_whose_inputs_quantizer_is_switched_off_stays_float_and_is_told():
    x = vectors(2, 4)
    qmodel = ready(OnlyRead(), how(), x)
    deployed = trainable_torch.finalize(qmodel)
    for model in (qmodel.eval(), deployed):
        described = trainable_torch.describe(model)
        assert described.biases == {}
        assert "switched off" in described.left_out["proj.bias"]
        weight = model.proj.get_quantized_weights()["weight"]
        assert torch.equal(model(x), F.linear(x, weight, model.proj.float_weight("bias")))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_of_another_dtype_computes_its_biases_in_float32(dtype: torch.dtype):
    x = images()
    qmodel = ready(network(), how(), x)
    deployed = trainable_torch.finalize(qmodel).to(dtype)
    for layer in layers_of(deployed).values():
        assert layer.quantized_bias(layer.float_weight("bias")).dtype == dtype
    assert torch.equal(deployed(x.to(dtype)), qmodel.to(dtype).eval()(x.to(dtype)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of dynamo's own modules
@pytest.mark.parametrize("placement", ["inputs", "integer"])
def test_a_compiled_model_gives_the_same(placement: str):
    x = images()
    qmodel = ready(network(), how(placement=placement), x)
    for model in (qmodel.train(), trainable_torch.finalize(qmodel)):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), model(x))


def test_to_mctq_keeps_the_biases_of_the_grid():
    pytest.importorskip("mct_quantizers")
    deployed = trainable_torch.finalize(ready(network(), how(), images()))
    stock = trainable_torch.to_mctq(deployed)
    assert torch.equal(stock(images()), deployed(images()))


def test_a_hook_that_computes_the_weight_is_no_obstacle():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))
    qmodel = train(ready(model, how(), vectors(4, 4)), [vectors(4, 4)])
    deployed = trainable_torch.finalize(qmodel)
    assert_is_what_the_reference_says(deployed)
    assert torch.equal(qmodel.eval()(vectors(4, 4)), deployed(vectors(4, 4)))


def test_a_recipe_without_integer_biases_quantizes_none():
    qmodel = ready(network(), {**how(), "bias": "float"}, images())
    assert layers_of(qmodel) == {}
    assert trainable_torch.describe(qmodel).biases == {}
