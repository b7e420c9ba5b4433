"""Batch norms that are simulated as folded: what is quantized in training is what `finalize` deploys."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from tests.torch.models import GRIDS, images, ready, same_state, spec, train
from trainable_core.errors import (
    ModelError,
    QuantizerStateError,
    ShapeMismatchError,
    StatisticsMissingWarning,
    UnknownQuantizerError,
)
from trainable_core.reference import batch_norm as reference
from trainable_torch import (
    calibrate,
    describe,
    diagnose,
    finalize,
    freeze_batch_norm,
    load,
    parameter_groups,
    reestimate_batch_norm,
    regularization,
    save,
    to_mctq,
    training_callback,
    wrap,
)
from trainable_torch.training import quantizers_of


def network(*, seen: bool = True) -> nn.Sequential:
    """Return layers of every kind, with batch norms that have seen batches, for images of shape (1, 6, 6)."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), nn.ReLU(),
        nn.ConvTranspose2d(4, 6, 2, groups=2), nn.BatchNorm2d(6, affine=False), nn.ReLU(),
        nn.Flatten(), nn.Linear(54, 5), nn.Unflatten(1, (5, 1)), nn.Flatten(), nn.Linear(5, 3),
    )  # fmt: skip
    for norm in (model[1], model[4]):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    with torch.no_grad():
        model[1].weight[1], model[4].weight[2] = 0.0, -0.7
    for step in range(40 if seen else 0):
        model(images(16 + step))
    return model


def simulated(grid: str = "SYMMETRIC", rule: str = "LSQ", n_bits: int = 4, **more: Any) -> dict[str, Any]:
    return {"weights": spec(rule, grid, n_bits, **more), "fold_batch_norm": "training"}


def quantized_inputs(how: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {**how, "activations": spec("LSQ", "UNIFORM", 8, **more)}


def trained(how: Any, model: nn.Module | None = None) -> nn.Module:
    qmodel = ready(network() if model is None else model, how, images())
    return train(qmodel, [images(8 + step % 3) for step in range(6)], lr=0.01)


class Row(nn.Module):
    """A linear layer with a batch norm, for vectors."""

    def __init__(self, *, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.fc, self.norm = nn.Linear(6, 4, bias=bias), nn.BatchNorm1d(4)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)
        for _ in range(30):
            self(torch.randn(32, 6))

    def forward(self, x: Tensor) -> Tensor:
        """Return normalized rows."""
        y: Tensor = self.norm(self.fc(x))
        return y


ROWS = torch.randn(16, 6, generator=torch.Generator().manual_seed(5))


def exact(parameter: Any) -> Any:
    return parameter.detach().double().numpy()


# ---- the reference --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_forward_gradients_and_statistics_are_the_reference_s(bias: bool) -> None:
    qmodel = calibrate(wrap(Row(bias=bias), simulated(rule="STE", n_bits=8, min_threshold=4.0), example=ROWS)).train()
    fc, norm = qmodel.fc, qmodel.norm
    before = [exact(norm.running_mean), exact(norm.running_var)]
    weight, own = exact(fc.float_weight("weight")), exact(fc.float_weight("bias"))
    x = ROWS.clone().requires_grad_()
    y = qmodel(x)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(6))
    y.backward(upstream)
    rows, products = exact(x), exact(x) @ weight.T
    statistics = reference.batch_statistics(products)
    expected = [
        reference.updated(old, found, norm.momentum)
        for old, found in zip(before, (statistics.mean + own, statistics.variance * 16 / 15), strict=True)
    ]
    # float32 sums of 6 products and of 16 rows, of numbers below 10: 2**-24 * 10 * (6 + 16), and as much again
    bound: dict[str, Any] = {"rtol": 2.0**-18, "atol": 2.0**-15}
    np.testing.assert_allclose(exact(norm.running_mean), expected[0], **bound)
    np.testing.assert_allclose(exact(norm.running_var), expected[1], **bound)
    running = exact(norm.running_var)
    gain = reference.gain(exact(norm.weight), running, norm.eps)
    quantizer = fc.weights_quantizers["weight"]
    folded = torch.tensor(weight * gain[:, None], dtype=torch.float32)
    assert (folded.abs() < quantizer.threshold.reshape(-1, 1) * 127 / 128).all()  # so the slope is 1
    values = exact(fc.get_quantized_weights()["weight"])
    layer = reference.Layer(own, exact(norm.weight), exact(norm.bias), running, norm.eps)
    np.testing.assert_allclose(exact(y), reference.training_output(rows @ values.T, products, layer), **bound)
    found = reference.training_gradients(exact(upstream), rows @ values.T, products, layer)
    of_folded, of_float = found.quantized.T @ rows, found.products.T @ rows
    gradients = {
        fc.float_weight("weight"): of_folded * gain[:, None] + of_float,
        norm.weight: found.gamma + (of_folded * weight).sum(1) / np.sqrt(running + norm.eps),
        norm.bias: found.beta,
        x: found.quantized @ values + found.products @ weight,
    }
    for parameter, gradient in gradients.items():
        # sums of 16 or 6 terms below 100, each of which has the rounding above
        np.testing.assert_allclose(exact(parameter.grad), gradient, rtol=2.0**-14, atol=2.0**-12)
    if bias:
        assert (fc.float_weight("bias").grad == 0).all()
    else:
        assert not fc.float_weight("bias").requires_grad


@pytest.mark.parametrize("grid", ["POWER_OF_TWO", "SYMMETRIC", "UNIFORM"])
@pytest.mark.parametrize("per_channel", [True, False])
def test_at_16_bits_it_is_the_float_model_in_training(grid: str, per_channel: bool) -> None:
    model = network()
    more = {"per_channel": per_channel, "min_threshold": 4.0}  # nothing is clipped, also when statistics have moved
    if grid == "UNIFORM":  # whose ranges have no such bound
        for norm in (model[1], model[4], model[7]):
            norm.momentum = 0.0
    how = {**simulated(grid, "STE", 16, **more), "calibration": {"weights": "minmax"}}
    qmodel = calibrate(wrap(model, how)).train()
    model.train()
    x, y = images(16), images(16).requires_grad_()
    one, other = model(x), qmodel(y)
    # half a step of 2**-13 (the range is [-4, 4]) in each weight; sums of up to 54 products of numbers below 4, through
    # 5 layers, each of which may double it
    bound = 2.0**-14 * 54 * 4 * 5
    assert (one - other).abs().max() < bound
    if grid == "UNIFORM":  # the largest weights are at the ends of their ranges, where gradients are 0
        return
    one.square().sum().backward()
    other.square().sum().backward()
    float_parameters = dict(model.named_parameters())
    for name, parameter in qmodel.named_parameters():
        if name in float_parameters:
            wanted = float_parameters[name].grad
            assert wanted is not None
            assert parameter.grad is not None
            # gradients of the outputs are twice the outputs; ReLUs may switch where a value is next to zero
            assert (parameter.grad - wanted).abs().max() < 0.02 * (1 + wanted.abs().max()), name
    assert torch.equal(qmodel[1].num_batches_tracked, model[1].num_batches_tracked)


@pytest.mark.parametrize("momentum", [0.1, None, 1.0])
def test_running_statistics_are_batch_norm_s_own(momentum: float | None) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=True), nn.BatchNorm2d(4, momentum=momentum))
    model(images(32))
    qmodel = calibrate(wrap(model, simulated())).train()
    for count in (4, 9, 6):
        model(images(count))
        qmodel(images(count))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        # one float32 layer is the same here; sums of 9 * 16 squares below 10 in another order
        torch.testing.assert_close(getattr(qmodel[1], name), getattr(model[1], name), rtol=2.0**-16, atol=2.0**-18)


# ---- what is trained is what is deployed ----------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["STE", "LSQ", "TQT", "LSQ_PLUS", "DQA", "ADAROUND", "DOREFA"])
@pytest.mark.parametrize("grid", GRIDS)
def test_what_is_trained_is_deployed_bit_for_bit(rule: str, grid: str) -> None:
    try:
        qmodel = trained(quantized_inputs(simulated(grid, rule)))
    except UnknownQuantizerError as error:
        pytest.skip(f"no such quantizer: {error}"[:80])
    qmodel.eval()
    deployed = finalize(qmodel)
    for given in (images(), images(3), images(1)):
        assert torch.equal(qmodel(given), deployed(given))
        with torch.no_grad():
            assert torch.equal(qmodel(given), deployed(given))
    assert describe(deployed).folded == {"1": "0", "4": "3", "7": "6"}
    assert not any(isinstance(module, nn.BatchNorm2d) for module in deployed.modules())
    assert torch.equal(finalize(qmodel)(images()), deployed(images()))
    if rule in {"STE", "LSQ"}:
        assert torch.equal(to_mctq(deployed)(images()), deployed(images()))


@pytest.mark.parametrize(
    "more",
    [
        {"per_channel": False},
        {"granularity": "group", "group_size": 4},
        {"modifiers": {"oscillation_dampening": {"strength": 0.1}}},
        {"modifiers": {"oscillation_freezing": {"threshold": 0.1}}},
    ],
    ids=str,
)
def test_other_grids_and_modifiers_see_the_folded_weight(more: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    for _ in range(20):
        model(images(16))
    qmodel = trained({**simulated(**more), "target": "native"}, model)
    assert torch.equal(finalize(qmodel.eval())(images()), qmodel(images()))


def test_int32_biases_are_those_of_the_folded_layers() -> None:
    how = {**quantized_inputs(simulated()), "bias": "int32"}
    qmodel = trained(how)
    assert (qmodel[0].float_weight("bias") == 0).all()
    qmodel.eval()
    deployed = finalize(qmodel)
    assert torch.equal(qmodel(images()), deployed(images()))
    name, bias = deployed[0].integer_bias()
    codes = bias / deployed[0].bias_quantizer.scale()
    assert name == "bias"
    assert (bias != 0).any()
    torch.testing.assert_close(codes, codes.round(), rtol=2.0**-22, atol=0)
    freeze_batch_norm(qmodel).train()
    assert torch.equal(qmodel(images()), deployed(images()))


@pytest.mark.parametrize("placement", ["outputs", "integer"])
def test_quantizers_at_outputs_stand_behind_the_batch_norm(placement: str) -> None:
    how = {**simulated("POWER_OF_TWO"), "activations": spec("LSQ", "UNIFORM", 8, placement=placement)}
    qmodel = trained(how).eval()
    assert torch.equal(finalize(qmodel)(images()), qmodel(images()))
    before = ready(network(), {**how, "fold_batch_norm": "before"}, images())
    after = ready(network(), how, images())
    places = {(row.layer, row.tensor) for row in describe(before).rows}
    assert {(row.layer, row.tensor) for row in describe(after).rows} == places


def test_thresholds_are_those_of_the_folded_weight() -> None:
    before = ready(network(), {**simulated(), "fold_batch_norm": "before"}, images())
    now = ready(network(), simulated(), images())
    for name, quantizer in quantizers_of(before).items():
        # the fold is rounded in float32 here and in float64 there
        found, wanted = quantizers_of(now)[name].threshold, quantizer.threshold
        torch.testing.assert_close(found, wanted, rtol=2.0**-20, atol=2.0**-20)
    with torch.no_grad():
        one, other = before.eval()(images()), now.eval()(images())
    assert (one - other).abs().median() < 2.0**-14  # a weight next to a tie may have another code


# ---- freezing and estimating ----------------------------------------------------------------------------------------


def test_frozen_statistics_train_what_is_deployed() -> None:
    qmodel = freeze_batch_norm(trained(quantized_inputs(simulated()))).train()
    before = {name: value.clone() for name, value in qmodel.named_buffers()}
    assert not qmodel[1].training
    deployed = finalize(qmodel)
    found = qmodel(images())
    assert torch.equal(found, deployed(images()))
    found.square().sum().backward()
    assert qmodel[1].weight.grad.abs().sum() > 0
    assert qmodel[1].bias.grad.abs().sum() > 0
    assert qmodel[0].float_weight("bias").grad is None
    assert all(torch.equal(value, before[name]) for name, value in qmodel.named_buffers() if "running" in name)
    freeze_batch_norm(qmodel, frozen=False)
    assert qmodel[1].training
    qmodel(images())
    assert not torch.equal(qmodel[1].running_mean, before["1.running_mean"])


def test_one_batch_norm_in_evaluation_mode_is_frozen_as_in_the_float_model() -> None:
    qmodel = ready(network(), simulated(), images()).train()
    qmodel[1].eval()
    before = qmodel[1].running_var.clone(), qmodel[4].running_var.clone()
    qmodel(images())
    assert torch.equal(qmodel[1].running_var, before[0])
    assert not torch.equal(qmodel[4].running_var, before[1])


def test_a_callback_freezes_at_a_step() -> None:
    qmodel = ready(network(), simulated(), images()).train()
    callback = training_callback(qmodel, freeze_batch_norm_at=2)
    callback.start()
    modes = []
    for _ in range(3):
        qmodel.train()(images())
        modes.append(qmodel[1].training)
        callback.step_end()
    assert modes == [True, True, False]
    with pytest.raises(ModelError, match="no batch norm whose folding is simulated"):
        training_callback(ready(network(), {**simulated(), "fold_batch_norm": "before"}), freeze_batch_norm_at=2)
    with pytest.raises(ModelError, match="no batch norm whose folding is simulated"):
        freeze_batch_norm(ready(network(), {**simulated(), "fold_batch_norm": "after"}))


def test_statistics_are_estimated_anew_frozen_or_not() -> None:
    qmodel = freeze_batch_norm(trained(simulated()))
    with torch.no_grad():
        qmodel[1].running_mean.add_(5.0)
    wrong = qmodel.eval()(images())
    reestimate_batch_norm(qmodel, [images(8), images(9)])
    layer = copy.deepcopy(qmodel[0])
    products = torch.nn.functional.conv2d(torch.zeros(0, 1, 6, 6), layer.float_weight("weight"))
    assert products.shape[1] == 4
    of_batches = [torch.nn.functional.conv2d(images(n), layer.float_weight("weight")) for n in (8, 9)]
    means = torch.stack([each.mean((0, 2, 3)) for each in of_batches]).mean(0)
    torch.testing.assert_close(qmodel[1].running_mean, means + layer.float_weight("bias"), rtol=2.0**-18, atol=2.0**-18)
    assert not torch.equal(qmodel(images()), wrong)
    assert not qmodel.train()[1].training


def test_new_statistics_are_warned_of() -> None:
    with pytest.warns(StatisticsMissingWarning, match="calibrate: 1, 4, 7"):
        calibrate(wrap(network(seen=False), simulated()))


def test_a_batch_of_one_value_per_channel_is_refused() -> None:
    qmodel = calibrate(wrap(Row(), simulated(), example=ROWS)).train()
    with pytest.raises(ShapeMismatchError, match="several values"):
        qmodel(ROWS[:1])
    assert freeze_batch_norm(qmodel)(ROWS[:1]).shape == (1, 4)


# ---- what is left as it is ------------------------------------------------------------------------------------------


def test_it_is_told_of_and_stays_a_batch_norm() -> None:
    qmodel = ready(network(), simulated(), images())
    assert describe(qmodel).left_out["1"] == "batch norm that finalize folds into 0, as training simulates"
    assert isinstance(qmodel[1], nn.BatchNorm2d)
    assert torch.equal(qmodel[1](torch.ones(2, 4, 3, 3)), torch.ones(2, 4, 3, 3))
    names = set(network().state_dict())
    assert names <= set(qmodel.state_dict())
    qmodel.load_state_dict(network().state_dict(), strict=False)


def test_batch_norms_of_layers_that_are_skipped_are_folded_in_the_end() -> None:
    how = {**simulated(), "rules": [{"match": {"name": "0"}, "skip": True}]}
    qmodel = trained(how)
    assert type(qmodel[1]) is nn.BatchNorm2d
    assert qmodel[0].bias is None
    assert describe(qmodel).left_out["1"] == "batch norm that finalize folds into 0"
    deployed = finalize(qmodel.eval())
    assert describe(deployed).folded == {"1": "0", "4": "3", "7": "6"}
    torch.testing.assert_close(qmodel(images()), deployed(images()), rtol=1e-4, atol=1e-4)  # a float layer, folded


class Own(nn.Conv2d):
    """A convolution that pads by itself."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of what is padded."""
        return super().forward(nn.functional.pad(x, (1, 1, 1, 1)))


def test_what_is_not_known_to_be_right_is_left_alone() -> None:
    shared = nn.Conv2d(4, 4, 3, padding=1)
    hooked = nn.BatchNorm2d(4)
    hooked.register_forward_hook(lambda *_: None)
    model = nn.Sequential(Own(1, 4, 3), nn.BatchNorm2d(4), shared, nn.BatchNorm2d(4), shared, nn.BatchNorm2d(4),
                          nn.Conv2d(4, 4, 3), hooked)  # fmt: skip
    qmodel = wrap(model, simulated())
    told = describe(qmodel).left_out
    assert "called twice in training" in told["1"]
    assert "more than once" in told["3"]
    assert "hook" in told["7"]
    assert all(type(qmodel[index]) is nn.BatchNorm2d for index in (1, 3, 5, 7))
    train(calibrate(qmodel), [images()])


def test_a_conversion_to_synchronized_batch_norms_comes_before_wrapping() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    qmodel = ready(model, simulated(), images()).train()
    assert isinstance(qmodel[1], nn.SyncBatchNorm)
    assert qmodel(images()).shape == (8, 3)  # without a process group it has the statistics of its own batch
    assert torch.equal(finalize(qmodel.eval())(images()), qmodel(images()))
    with pytest.raises(QuantizerStateError, match="before wrapping"):
        nn.SyncBatchNorm.convert_sync_batchnorm(qmodel)
    assert not hasattr(qmodel[1], "qconfig")


# ---- lifecycle ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
def test_files_hold_models_before_and_after(frozen: bool, tmp_path: Any) -> None:
    qmodel = trained({**quantized_inputs(simulated()), "bias": "int32"})
    if frozen:
        freeze_batch_norm(qmodel)
    deployed = finalize(qmodel)
    for each in (qmodel, deployed):
        save(each, tmp_path / "model.safetensors")
        again = load(tmp_path / "model.safetensors", network(seen=False))
        assert same_state(again, each)
        assert describe(again).left_out == describe(each).left_out
        assert torch.equal(again(images()), each(images()))
    save(qmodel, tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors", network())
    batches = [images(8), images(9)]
    assert same_state(train(again, batches), train(qmodel, batches))
    assert again[1].training is not frozen


def test_copies_and_pickles_train_by_themselves() -> None:
    qmodel = trained(simulated())
    for other in (copy.deepcopy(qmodel), pickle.loads(pickle.dumps(qmodel))):  # noqa: S301 - made in the line itself
        assert other[0].batch_norm is other[1]
        assert other[0].batch_norm is not qmodel[1]
        twin = copy.deepcopy(qmodel)
        assert same_state(train(other, [images()]), train(twin, [images()]))


def test_a_state_dict_resumes() -> None:
    qmodel = trained(simulated())
    other = ready(network(), simulated(), images())
    for assign in (False, True):
        state = {name: value.clone() for name, value in qmodel.state_dict().items()}
        other.load_state_dict(state, assign=assign)
        twin = copy.deepcopy(qmodel)
        assert same_state(train(other, [images()]), train(twin, [images()]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of dynamo's own modules
def test_compiled_and_functional_calls_do_the_same() -> None:
    qmodel = trained(quantized_inputs(simulated()))
    twin, third = copy.deepcopy(qmodel), copy.deepcopy(qmodel)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    y = qmodel(images())
    # the same operations in other kernels: a code may differ where a value is next to a tie, by a step of 2**-3
    assert (compiled(images()) - y).abs().median() < 2.0**-16
    torch.testing.assert_close(twin[1].running_var, qmodel[1].running_var)
    assert torch.equal(functional_call(third, dict(third.named_parameters()), images()), y)


def test_activation_checkpointing_updates_statistics_once() -> None:
    one = trained(simulated())
    one.zero_grad()
    other = copy.deepcopy(one)
    one(images()).square().sum().backward()
    checkpoint(other, images(), use_reentrant=False).square().sum().backward()
    assert same_state(one, other)
    gradients = [[p.grad for p in model.parameters() if p.grad is not None] for model in (one, other)]
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))


def test_autocast_and_half_precision_compute_statistics_in_float32() -> None:
    qmodel = ready(network(), simulated(), images()).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = qmodel(images())
    assert qmodel[1].running_var.dtype == torch.float32
    y.float().sum().backward()
    assert torch.isfinite(qmodel[0].float_weight("weight").grad).all()
    half = ready(network().bfloat16(), simulated(), images().bfloat16()).eval()
    assert torch.equal(half(images().bfloat16()), finalize(half)(images().bfloat16()))


def test_groups_regularization_and_diagnosis_work() -> None:
    qmodel = ready(network(), quantized_inputs(simulated()), images())
    grouped = {id(p) for group in parameter_groups(qmodel) for p in group["params"]}
    learning = {id(p) for p in qmodel.parameters() if p.requires_grad}
    assert grouped == learning
    assert regularization(qmodel).dim() == 0
    assert "0" in str(diagnose(qmodel, [images()]))


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose3d])
def test_every_rank_of_convolution(kind: Any) -> None:
    rank = 1 if "1d" in kind.__name__ else 3
    norm = {1: nn.BatchNorm1d, 3: nn.BatchNorm3d}[rank]
    torch.manual_seed(0)
    model = nn.Sequential(kind(4, 6, 2, groups=2), norm(6), nn.ReLU(), kind(6, 2, 2, bias=False), norm(2))
    x = torch.randn(5, 4, *[5] * rank)
    for _ in range(30):
        model(torch.randn(5, 4, *[5] * rank))
    qmodel = train(ready(model, quantized_inputs(simulated()), x), [x, x], lr=0.01).eval()
    deployed = finalize(qmodel)
    assert describe(deployed).folded == {"1": "0", "4": "3"}
    assert torch.equal(qmodel(x), deployed(x))
