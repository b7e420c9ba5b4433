"""Weights with a scale per group or expert, learned scales under bfloat16, and activations with scales of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import trainable_torch
from tests.torch.models import spec
from trainable_core.config import TrainableQuantizerActivationConfig, TrainableQuantizerWeightsConfig
from trainable_core.enums import QuantizationMethod
from trainable_core.errors import InvalidArgumentError, QuantizerStateError, ShapeMismatchError, UnsupportedConfigError
from trainable_core.granularity import Blocks
from trainable_core.recipe.layers import WeightAxes
from trainable_core.reference import affine, dynamic, lsq
from trainable_torch import calibrate, describe, export, finalize, load, save, to_mctq, wrap
from trainable_torch.granularity import BlocksInferableQuantizer, DynamicInferableQuantizer
from trainable_torch.quantizers import DynamicActivationQuantizer, LsqWeightsQuantizer
from trainable_torch.training import quantizers_of

GRIDS = ("SYMMETRIC", "POWER_OF_TWO", "UNIFORM")


def recipe(training_method: str = "LSQ", method: str = "SYMMETRIC", **more: Any) -> dict[str, Any]:
    return {"weights": {**spec(training_method, method), "group_size": 8, **more}, "target": "native"}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3))


def vectors(count: int = 6) -> Tensor:
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(count))


def trained(qmodel: nn.Module, steps: int = 3, dtype: torch.dtype = torch.float32) -> nn.Module:
    optimizer = torch.optim.SGD(qmodel.parameters(), lr=0.05)
    for step in range(steps):
        optimizer.zero_grad()
        qmodel.train()(vectors(4 + step).to(dtype)).float().square().mean().backward()
        optimizer.step()
    return qmodel.eval()


def weights_quantizer(x: Tensor, method: str = "SYMMETRIC", **more: Any) -> LsqWeightsQuantizer:
    """Return an LSQ quantizer of groups of 4 with a threshold for each that clips some of its values."""
    blocks = Blocks((0,), 1, 4)
    rows = np.abs(blocks.rows(x.numpy())).max(1) * 0.7
    params: dict[str, Any] = {"threshold": rows.tolist()}
    if method == "UNIFORM":
        params = {"range_min": (-rows).tolist(), "range_max": (rows * 1.2).tolist()}
    config = TrainableQuantizerWeightsConfig(
        weights_quantization_method=method,
        weights_n_bits=3,
        weights_quantization_params=params,
        weights_channels_axis=0,
        weights_per_channel_threshold=True,
        weights_group_size=4,
        weights_group_axis=1,
        **more,
    )
    quantizer = LsqWeightsQuantizer(config)
    quantizer.initialize_quantization(tuple(x.shape), "w", None)
    return quantizer


# ---- groups ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", GRIDS)
@pytest.mark.parametrize("training_method", ["STE", "LSQ", "DQA"])
def test_what_was_trained_in_groups_is_what_is_deployed_and_saved(training_method: str, method: str, tmp_path: Path):
    qmodel = trained(calibrate(wrap(network(), recipe(training_method, method))))
    expected = qmodel(vectors(9))
    deployed = finalize(qmodel)
    assert torch.equal(deployed(vectors(9)), expected)
    for model in (qmodel, deployed):
        save(model, tmp_path / "model")
        assert torch.equal(load(tmp_path / "model", network()).eval()(vectors(9)), expected)
    kinds = [type(m) for m in deployed.modules() if isinstance(m, BlocksInferableQuantizer)]
    assert len(kinds) == 2
    assert [row.granularity for row in describe(deployed).rows] == ["channel (axis 0), group of 8 (axis 1)"] * 2


@pytest.mark.parametrize("method", GRIDS)
def test_values_and_gradients_of_groups_are_the_references(method: str) -> None:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    upstream = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    quantizer, blocks = weights_quantizer(x, method), Blocks((0,), 1, 4)
    grid = quantizer.current_qparams()
    given = x.clone().requires_grad_()
    values = quantizer(given, True)
    values.backward(upstream)
    rows = blocks.rows(x.numpy())
    assert np.array_equal(values.detach().numpy(), blocks.tensor(affine.fake_quantize(rows, grid), (3, 8)))
    expected = lsq.gradients(rows, blocks.rows(upstream.numpy()), grid)
    assert np.array_equal(given.grad.numpy(), blocks.tensor(expected.x, (3, 8)).astype(np.float32))
    if method == "SYMMETRIC":
        # four float32 terms per group, each with three roundings
        np.testing.assert_allclose(quantizer.threshold.grad.numpy(), expected.scale / 4, rtol=1e-5, atol=1e-6)


def test_a_group_by_hand() -> None:
    x = torch.tensor([[1.0, -2.0, 0.4, 7.0, 0.1, -0.2, 0.04, 0.7]])
    quantizer = weights_quantizer(x)
    quantizer.assign(quantizer.threshold, np.array([8.0, 0.8], np.float32))  # scales 2 and 0.2
    assert quantizer(x, False)[0].tolist() == pytest.approx([0.0, -2.0, 0.0, 6.0, 0.0, -0.2, 0.0, 0.6])


@pytest.mark.parametrize(
    ("layer", "shape", "groups"),
    [
        (nn.Conv2d(16, 4, 3), (2, 16, 5, 5), (4, 2)),
        (nn.Conv2d(3, 4, 3), (2, 3, 5, 5), (4, 1)),
        (nn.Conv1d(16, 6, 3, groups=2), (2, 16, 5), (6, 1)),
        (nn.ConvTranspose2d(16, 4, 3), (2, 16, 5, 5), (4, 2)),
        (nn.Bilinear(16, 3, 4), None, (4, 2)),
    ],
    ids=str,
)
def test_groups_lie_along_the_inputs_of_a_layer(layer: nn.Module, shape: Any, groups: tuple[int, int]) -> None:
    qmodel = calibrate(wrap(nn.Sequential(layer), recipe("STE")))
    (quantizer,) = quantizers_of(qmodel).values()
    assert tuple(quantizer.threshold.shape) == (groups[0] * groups[1],)
    if shape is not None:
        x = torch.randn(shape)
        assert torch.equal(finalize(qmodel)(x), qmodel.eval()(x))


def test_groups_of_an_embedding_lie_along_its_vectors() -> None:
    qmodel = calibrate(wrap(nn.Sequential(nn.Embedding(5, 16)), recipe("STE")))
    (quantizer,) = quantizers_of(qmodel).values()
    assert quantizer.threshold.numel() == 5 * 2


def test_a_registered_layer_may_hold_experts() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 16, 4, generator=torch.Generator().manual_seed(0)))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("eni,eio->eno", x, self.up)

    trainable_torch.register_layer(Experts, "linear", {"up": WeightAxes(2, inputs=1, experts=0)}, ("x",))
    qmodel = calibrate(wrap(nn.Sequential(Experts()), recipe("LSQ")))
    (quantizer,) = quantizers_of(qmodel).values()
    assert quantizer.threshold.numel() == 3 * 4 * 2
    x = torch.randn(3, 5, 16)
    qmodel.train()(x).sum().backward()
    assert quantizer.threshold.grad.shape == (24,)
    assert torch.equal(finalize(qmodel)(x), qmodel.eval()(x))


def test_a_weight_of_another_shape_gets_new_groups_when_it_is_calibrated_again() -> None:
    qmodel = calibrate(wrap(network(), recipe()))
    qmodel[2].weight = nn.Parameter(torch.randn(5, 16))
    qmodel[2].bias = nn.Parameter(torch.zeros(5))
    with pytest.raises(ShapeMismatchError, match="blocks with a scale each"):
        qmodel(vectors())
    calibrate(qmodel, force=True)
    assert quantizers_of(qmodel)["2.weights_quantizers.weight"].threshold.numel() == 10
    assert torch.equal(finalize(qmodel)(vectors()), qmodel.eval()(vectors()))


def test_what_no_other_library_or_file_holds_is_refused(tmp_path: Path) -> None:
    deployed = finalize(calibrate(wrap(network(), recipe())))
    with pytest.raises(UnsupportedConfigError, match="0: weight: mctq has no counterpart"):
        to_mctq(deployed)
    with pytest.raises(UnsupportedConfigError, match=r"0\.weight has a scale for each group"):
        export(deployed, tmp_path / "m.onnx", example=vectors())
    quantizer = next(m for m in deployed.modules() if isinstance(m, BlocksInferableQuantizer))
    with pytest.raises(UnsupportedConfigError, match="mctq has no scales for groups"):
        quantizer.to_mctq()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of dynamo's own modules
def test_groups_and_dynamic_activations_are_compiled_in_one_graph() -> None:
    qmodel = calibrate(wrap(network(), {**recipe(), "activations": spec("DYNAMIC", n_bits=8)}))
    compiled = torch.compile(qmodel.eval(), backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(vectors()), qmodel(vectors()))


# ---- bfloat16 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, {"group_size": None}], ids=["groups", "channels"])
def test_scales_learn_in_float32_under_bfloat16_weights(more: dict[str, Any], tmp_path: Path) -> None:
    recipe_ = recipe(**more)
    recipe_["weights"] = {key: value for key, value in recipe_["weights"].items() if value is not None}
    qmodel = calibrate(wrap(network(), recipe_)).to(torch.bfloat16)
    assert {p.dtype for n, p in qmodel.named_parameters() if "threshold" not in n} == {torch.bfloat16}
    thresholds = {name: p for name, p in qmodel.named_parameters() if "threshold" in name}
    before = {name: p.detach().clone() for name, p in thresholds.items()}
    optimizer = torch.optim.SGD([{"params": list(thresholds.values()), "lr": 1e-4}])
    qmodel.train()(vectors().bfloat16()).float().square().mean().backward()
    optimizer.step()
    for name, parameter in thresholds.items():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        moved = (parameter != before[name]).float().mean()
        unseen = (parameter.bfloat16() == before[name].bfloat16()).float().mean()
        assert moved > 0.5
        assert unseen > 0.5  # steps that bfloat16, of eight bits, would have lost
    deployed = finalize(qmodel)
    x = vectors(9).bfloat16()
    expected = qmodel.eval()(x)
    assert expected.dtype == torch.bfloat16
    assert torch.equal(deployed(x), expected)
    for model in (qmodel, deployed):
        save(model, tmp_path / "model")
        again = load(tmp_path / "model", network().to(torch.bfloat16)).eval()
        assert torch.equal(again(x), expected)
        state, own = again.state_dict(), model.state_dict()
        for name in own:
            if "threshold" in name or "grid_" in name:
                assert state[name].dtype == torch.float32
                assert torch.equal(state[name], own[name])


# ---- dynamic activations --------------------------------------------------------------------------------------------


def activation_quantizer(
    granularity: str = "token", method: str = "SYMMETRIC", n_bits: int = 4, **params: Any
) -> DynamicActivationQuantizer:
    config = TrainableQuantizerActivationConfig(
        activation_quantization_method=method, activation_n_bits=n_bits, activation_quantization_params=params
    )
    quantizer = DynamicActivationQuantizer(config, granularity=granularity)
    quantizer.initialize_quantization(None, "x", None)
    return quantizer


@pytest.mark.parametrize("shape", [(4, 3, 5), (7,), (), (2, 3, 1), (2, 1, 4, 4)], ids=str)
@pytest.mark.parametrize("granularity", ["token", "tensor"])
@pytest.mark.parametrize("method", GRIDS)
def test_dynamic_values_are_the_references(method: str, granularity: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 5
    quantizer = activation_quantizer(granularity, method)
    grid = dynamic.grid_of(x.numpy(), QuantizationMethod[method], 4, min_threshold=2.0**-16, granularity=granularity)
    expected = dynamic.fake_quantize(x.numpy(), grid)
    for training in (False, True):
        assert np.array_equal(quantizer(x, training).numpy(), expected)
    assert np.array_equal(quantizer.convert2inferable()(x).numpy(), expected)


def test_a_token_by_hand() -> None:
    x = torch.tensor([[1.2, -3.5], [0.875, 0.05]])  # largest magnitudes are code 7 of the scales 0.5 and 0.125
    assert activation_quantizer()(x, True).tolist() == [[1.0, -3.5], [0.875, 0.0]]
    assert activation_quantizer("tensor")(x, True).tolist() == [[1.0, -3.5], [1.0, 0.0]]


def test_the_largest_value_is_never_clipped() -> None:
    x = torch.randn(500, 7, generator=torch.Generator().manual_seed(4))
    for n_bits in (2, 4, 8):
        values = activation_quantizer(n_bits=n_bits)(x, False)
        # the last code is the largest magnitude, up to the roundings of the scale and of the product
        torch.testing.assert_close(values.abs().amax(1), x.abs().amax(1), rtol=2.0**-21, atol=0.0)


def test_the_gradient_passes_as_it_is() -> None:
    x = (torch.randn(3, 5) * 9).requires_grad_()
    upstream = torch.randn(3, 5)
    quantizer = activation_quantizer()
    for values in (quantizer(x, True), quantizer.convert2inferable()(x)):
        (gradient,) = torch.autograd.grad(values, x, upstream)
        assert torch.equal(gradient, upstream)


def test_a_token_does_not_depend_on_its_batch_and_a_tensor_does() -> None:
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(5))
    token, tensor = activation_quantizer(), activation_quantizer("tensor")
    assert torch.equal(token(x, False)[:2], token(x[:2], False))
    x[5] *= 100
    assert not torch.equal(tensor(x, False)[:2], tensor(x[:2], False))


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3)], ids=str)
def test_an_empty_tensor_stays_one(shape: tuple[int, ...]) -> None:
    quantizer = activation_quantizer()
    assert quantizer(torch.zeros(shape), True).shape == shape
    assert quantizer.convert2inferable()(torch.zeros(shape)).shape == shape


def test_zeros_nan_and_infinities() -> None:
    x = torch.tensor([[0.0, 0.0, 0.0], [torch.nan, 1.0, -1.0], [torch.inf, 1.0, -torch.inf]])
    values = activation_quantizer()(x, False)
    assert values[0].tolist() == [0.0, 0.0, 0.0]
    assert values[1].isnan().tolist() == [True, False, False]
    assert values[1, 1:].tolist() == [1.0, -1.0]
    assert values[2].isfinite().all()


def test_a_sign_may_be_given_and_a_threshold_may_not() -> None:
    quantizer = activation_quantizer(is_signed=False)
    assert quantizer(torch.tensor([-1.0, 0.5, 1.5]), False).tolist() == pytest.approx([0.0, 0.5, 1.5])
    with pytest.raises(UnsupportedConfigError, match="computes its grid from the tensor itself"):
        activation_quantizer(threshold=1.0)
    with pytest.raises(InvalidArgumentError, match=r"granularity.*token, tensor"):
        activation_quantizer("channel")
    with pytest.raises(QuantizerStateError, match=r"computes its grid from each tensor"):
        activation_quantizer().current_qparams()
    with pytest.raises(QuantizerStateError, match="not initialized"):
        DynamicActivationQuantizer(quantizer.quantization_config)(torch.zeros(3), False)


@pytest.mark.parametrize("granularity", ["token", "tensor"])
def test_calibration_needs_no_batches_and_leaves_dynamic_activations_alone(granularity: str, tmp_path: Path) -> None:
    activations = spec("DYNAMIC", n_bits=8, arguments={"granularity": granularity})
    qmodel = wrap(network(), {"weights": spec("LSQ"), "activations": activations, "target": "native"})
    calibrate(qmodel)
    calibrate(qmodel, force=True)
    trained(qmodel)
    deployed = finalize(qmodel)
    assert torch.equal(deployed(vectors(9)), qmodel(vectors(9)))
    assert sum(isinstance(m, DynamicInferableQuantizer) for m in deployed.modules()) == 2
    rows = [row for row in describe(qmodel).rows if row.target == "Activation"]
    assert {(row.granularity, row.state, len(row.params)) for row in rows} == {
        (f"{granularity}, computed", "trainable", 0)
    }
    for model in (qmodel, deployed):
        save(model, tmp_path / "model")
        assert torch.equal(load(tmp_path / "model", network()).eval()(vectors(9)), qmodel(vectors(9)))
    with pytest.raises(UnsupportedConfigError, match=r"mctq has no counterpart"):
        to_mctq(deployed)
    with pytest.raises(UnsupportedConfigError, match="computes its scales from the activation itself"):
        export(deployed, tmp_path / "m.onnx", example=vectors())


def test_a_model_of_dynamic_activations_alone_is_never_waiting_for_calibration() -> None:
    qmodel = wrap(network(), {"activations": spec("DYNAMIC", n_bits=8), "target": "native"})
    before = qmodel.eval()(vectors())
    calibrate(qmodel)
    assert torch.equal(qmodel(vectors()), before)
    assert torch.equal(finalize(qmodel)(vectors()), before)
