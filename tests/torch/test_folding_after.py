"""Batch norms that stay in training and are folded by `finalize`: the codes of weights are those that were trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.torch.models import GRIDS, images, ready, same_state, spec, train
from trainable_core.errors import UnsupportedConfigError
from trainable_torch import describe, finalize, load, reestimate_batch_norm, save, to_mctq, wrap


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), nn.ReLU(),
        nn.ConvTranspose2d(4, 2, 2), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(18, 3),
    )  # fmt: skip


def after(grid: str = "SYMMETRIC", rule: str = "LSQ", **more: Any) -> dict[str, Any]:
    return {"weights": spec(rule, grid, 4, **more), "fold_batch_norm": "after"}


def trained(how: Any) -> nn.Module:
    """Return a model whose batch norms have moved, one channel to a gain of zero and one to a negative one."""
    qmodel = train(ready(network(), how, images()), [images(8 + step % 3) for step in range(6)], lr=0.01)
    with torch.no_grad():
        qmodel[1].weight[1] = 0.0
        qmodel[4].weight[2] = -0.5
    return qmodel.eval()


def codes(model: nn.Module, name: str) -> Tensor:
    layer = model.get_submodule(name)
    quantizer, weight = layer.weights_quantizers["weight"], layer.get_quantized_weights()["weight"].detach()
    if hasattr(quantizer, "deployed_scale"):
        return (weight / quantizer.grid(weight.dim()).scale.detach()).round()
    threshold, axis = quantizer.params.get("threshold"), int(isinstance(layer, nn.ConvTranspose2d))
    if threshold is None:
        params = quantizer.params
        step = (torch.tensor(params["range_max"]) - torch.tensor(params["range_min"])) / 15
    else:
        step = torch.tensor(threshold) / 8
    shape = [1] * weight.dim()
    shape[axis] = -1
    return (weight / step.reshape(shape)).round()


@pytest.mark.parametrize("grid", ["SYMMETRIC", "UNIFORM"])
@pytest.mark.parametrize("rule", ["STE", "LSQ"])
def test_codes_stay_and_outputs_differ_by_rounding_alone(rule: str, grid: str) -> None:
    qmodel = trained(after(grid, rule))
    with torch.no_grad():  # the lowest code of a channel whose gain is negative has no opposite
        threshold = qmodel[3].weights_quantizers["weight"].grid(4).scale[2].detach() * 7
        qmodel[3].weight[2].clamp_(-threshold, threshold)
    deployed = finalize(qmodel)
    assert describe(deployed).folded == {"1": "0", "4": "3", "7": "6"}
    assert not any(isinstance(module, nn.BatchNorm2d) for module in deployed.modules())
    signs = {"0": torch.tensor([1.0, 0, 1, 1]), "3": torch.tensor([1.0, 1, -1, 1])}
    for name in ("0", "3", "6"):
        expected = codes(qmodel, name)
        expected = expected * signs[name].view(-1, 1, 1, 1) if name in signs else expected
        assert torch.equal(codes(deployed, name), expected)
    one, other = qmodel(images(32)), deployed(images(32))
    # scales of UNIFORM have 20 bits; three layers, and gains up to 4
    torch.testing.assert_close(one, other, rtol=2.0**-16, atol=2.0**-16 * float(one.detach().abs().max()))
    assert torch.equal(finalize(qmodel)(images()), deployed(images()))
    assert torch.equal(to_mctq(deployed)(images()), deployed(images()))


def test_what_can_t_be_folded_stays_and_is_told() -> None:
    qmodel = trained(after())
    with torch.no_grad():
        qmodel[3].weight[2, 0, 0, 0] = -100.0
    deployed = finalize(qmodel)
    told = describe(deployed)
    assert told.folded == {"1": "0", "7": "6"}
    assert "negative gain" in told.left_out["4"]
    torch.testing.assert_close(qmodel(images()), deployed(images()), rtol=1e-4, atol=1e-4)
    assert "no power of two" in describe(finalize(trained(after("POWER_OF_TWO")))).left_out["1"]
    assert "no scale for each" in describe(finalize(trained(after(per_channel=False)))).left_out["1"]


def test_float_layers_are_folded_as_before_training() -> None:
    how = {**after(), "rules": [{"match": {"name": "3"}, "skip": True}]}
    deployed = finalize(trained(how))
    assert describe(deployed).folded == {"1": "0", "4": "3", "7": "6"}


def test_batch_norms_train_and_are_told_of() -> None:
    qmodel = ready(network(), after(), images())
    assert describe(qmodel).left_out["1"] == "batch norm that finalize folds into 0"
    before = qmodel[1].running_mean.clone()
    qmodel.train()(images()).sum().backward()
    assert qmodel[1].weight.grad is not None
    assert not torch.equal(qmodel[1].running_mean, before)
    assert "0.bias" not in qmodel.state_dict()
    assert "0.bias" in finalize(reestimate_batch_norm(qmodel, [images()])).state_dict()
    assert isinstance(qmodel[1], nn.BatchNorm2d)


@pytest.mark.parametrize("grid", GRIDS)
def test_files_hold_models_before_and_after(grid: str, tmp_path: Any) -> None:
    qmodel = trained(after(grid))
    deployed = finalize(qmodel)
    for each in (qmodel, deployed):
        save(each, tmp_path / "model.safetensors")
        again = load(tmp_path / "model.safetensors", network())
        assert same_state(again, each)
        assert torch.equal(again(images()), each(images()))
        assert describe(again).folded == describe(each).folded
    save(qmodel, tmp_path / "model.safetensors")
    assert torch.equal(finalize(load(tmp_path / "model.safetensors", network()))(images()), deployed(images()))


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({**after(), "bias": "int32", "activations": spec("LSQ")}, "int32 bias"),
        ({**after(), "activations": spec("LSQ", placement="outputs")}, "stands between"),
    ],
)
def test_what_can_t_be_folded_then_is_refused(how: Any, told: str) -> None:
    with pytest.raises(UnsupportedConfigError, match=told):
        wrap(network(), how)
