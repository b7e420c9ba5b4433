"""What PyTorch users do with a model: copy, cast, compile, checkpoint, distribute, stop and go on."""

from __future__ import annotations

import copy
import io
import pickle
import shutil
import warnings

import pytest
import torch
import torch.distributed.checkpoint
from torch import distributed, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from tests.torch.models import TRAINED_BY, images, moved, ready, same_state, spec, train, weights_only
from trainable_core.errors import CalibrationError
from trainable_torch import (
    calibrate,
    describe,
    finalize,
    freeze_quant_params,
    kernels,
    load,
    parameter_groups,
    regularization,
    save,
    wrap,
)
from trainable_torch.kernels import native, tier
from trainable_torch.training import quantizers_of

MINMAX = {"weights": "minmax", "activations": "minmax"}
EVERY = pytest.mark.parametrize("training_method", TRAINED_BY)
SHORT = {"t_start": 0, "t_end": 8, "initial_val": 1.0, "target_val": 0.1}


def how(training_method="LSQ", *, placement="inputs", grid="SYMMETRIC"):
    """Return a recipe whose schedules end within the tests."""
    more = {"arguments": {"temperature": SHORT}, "candidates": [4, 8]} if training_method == "DQA" else {}
    one = spec(training_method, grid, **more)
    return {"weights": one, "activations": {**one, "placement": placement}, "calibration": MINMAX}


class Small(nn.Module):
    """As little as has two kinds of layers and a functional activation, for images of shape (1, 6, 6)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(1, 2, 3, stride=3), nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(torch.relu(self.conv(x)).flatten(1))


def made(training_method="LSQ", **more):
    return ready(Small(), how(training_method, **more), images())


def trained(training_method="LSQ", **more):
    return train(made(training_method, **more), [images()])


# ---- copies ---------------------------------------------------------------------------------------------------------


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))  # noqa: S301 - our own bytes


@EVERY
@pytest.mark.parametrize("placement", ["inputs", "outputs"])
@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle])
@pytest.mark.parametrize("prepare", [made, trained], ids=["before_training", "after_training"])
def test_a_copy_is_equal_independent_and_trains_alike(training_method, placement, copied, prepare):
    qmodel = prepare(training_method, placement=placement)
    other = copied(qmodel)
    assert same_state(other, qmodel)
    names = [name for name, _ in qmodel.named_parameters()]
    assert [name for name, _ in other.named_parameters()] == names  # an optimizer's state goes by their order
    state = copy.deepcopy(qmodel.state_dict())
    train(other, [images(), images()])
    assert all(torch.equal(state[name], value) for name, value in qmodel.state_dict().items())
    assert same_state(train(qmodel, [images(), images()]), other)
    assert describe(other) == describe(qmodel)
    assert torch.equal(finalize(other)(images()), finalize(qmodel)(images()))


def test_a_copy_can_be_made_between_forward_and_backward():
    qmodel = made()
    loss = qmodel(images()).sum()
    other = copy.deepcopy(qmodel)
    loss.backward()
    assert all(parameter.grad is None for parameter in other.parameters())
    assert torch.equal(other(images()), qmodel(images()))


@EVERY
def test_an_averaged_copy_follows_the_training(training_method):
    qmodel = made(training_method)
    averaged = AveragedModel(qmodel, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    averaged.update_parameters(qmodel)
    before = {name: value.detach().clone() for name, value in qmodel.named_parameters()}
    train(qmodel, [images()])
    averaged.update_parameters(qmodel)
    for name, value in averaged.module.named_parameters():
        torch.testing.assert_close(
            value, (before[name] + dict(qmodel.named_parameters())[name]) / 2
        )  # default: float32
    averaged.eval()
    assert torch.equal(finalize(averaged.module)(images()), averaged(images()))


@EVERY
def test_an_average_of_parameters_and_buffers_is_deployed_as_it_evaluates(training_method):
    qmodel = made(training_method)
    averaged = AveragedModel(qmodel, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    for _ in range(3):
        train(qmodel, [images()])
        averaged.update_parameters(qmodel)
    averaged.eval()
    assert not same_state(averaged.module, qmodel)
    assert torch.equal(finalize(averaged.module)(images()), averaged(images()))
    assert [q.signed for q in quantizers_of(averaged.module).values()] == [
        q.signed for q in quantizers_of(qmodel).values()
    ]
    fresh = wrap(Small(), how(training_method))
    fresh.load_state_dict(averaged.module.state_dict())
    assert torch.equal(fresh.eval()(images()), averaged(images()))


# ---- states ---------------------------------------------------------------------------------------------------------


def through_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@EVERY
@pytest.mark.parametrize("placement", ["inputs", "outputs"])
@pytest.mark.parametrize("assign", [True, False])
def test_a_state_loads_strictly_into_a_fresh_wrap(training_method, placement, assign):
    qmodel = moved(trained(training_method, placement=placement))
    fresh = wrap(Small(), how(training_method, placement=placement)).train()
    state = through_file(qmodel.state_dict())
    assert not fresh.load_state_dict(state, strict=True, assign=assign).missing_keys
    assert same_state(fresh, qmodel)
    assert torch.equal(fresh(images()), qmodel(images()))
    fresh.load_state_dict(through_file(qmodel.state_dict()), strict=True, assign=assign)  # the forward counted a step
    assert same_state(train(fresh, [images()]), train(qmodel, [images()]))
    assert torch.equal(finalize(fresh)(images()), finalize(qmodel)(images()))


def test_a_state_before_calibration_leaves_a_model_not_calibrated():
    fresh = made()
    fresh.load_state_dict(wrap(Small(), how()).state_dict())
    assert {row.state for row in describe(fresh).rows} == {"not calibrated"}
    calibrate(fresh, [images()])


@EVERY
@pytest.mark.parametrize("placement", ["inputs", "outputs"])
def test_a_model_can_be_made_without_memory_and_filled(training_method, placement):
    qmodel = moved(trained(training_method, placement=placement))
    with torch.device("meta"):
        empty = wrap(Small(), how(training_method, placement=placement))
    assert all(value.is_meta for value in empty.parameters())
    for assign in (True, False):
        filled = copy.deepcopy(empty).to_empty(device="cpu")
        filled.load_state_dict(copy.deepcopy(qmodel.state_dict()), assign=assign)
        assert same_state(filled, qmodel)
        assert torch.equal(filled.train()(images()), qmodel.train()(images()))
        assert torch.equal(finalize(filled)(images()), finalize(qmodel)(images()))
    direct = copy.deepcopy(empty)
    direct.load_state_dict(copy.deepcopy(qmodel.state_dict()), assign=True)  # without to_empty
    assert torch.equal(direct.train()(images()), qmodel.train()(images()))


@EVERY
@pytest.mark.parametrize("placement", ["inputs", "outputs"])
@pytest.mark.filterwarnings("ignore:.*torch.distributed is disabled, unavailable or uninitialized:UserWarning")
def test_a_distributed_checkpoint_of_one_process_resumes_bit_for_bit(training_method, placement, tmp_path):
    """Model and optimizer; what several ranks make of it is in test_distributed."""
    qmodel = made(training_method, placement=placement).train()
    optimizer = torch.optim.Adam(parameter_groups(qmodel), lr=0.01)
    loop(qmodel, optimizer, [images()])
    model_state, optimizer_state = get_state_dict(qmodel, optimizer)
    distributed.checkpoint.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=tmp_path / "point")

    fresh = wrap(Small(), how(training_method, placement=placement)).train()
    other = torch.optim.Adam(parameter_groups(fresh), lr=0.01)
    states = dict(zip(("model", "optimizer"), get_state_dict(fresh, other), strict=True))
    distributed.checkpoint.load(states, checkpoint_id=tmp_path / "point")
    set_state_dict(fresh, other, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    assert same_state(fresh, qmodel)
    loop(qmodel, optimizer, [images(5)])
    loop(fresh, other, [images(5)])
    assert same_state(fresh, qmodel)
    assert torch.equal(finalize(fresh)(images()), finalize(qmodel)(images()))


@EVERY
@pytest.mark.parametrize("placement", ["inputs", "outputs"])
def test_a_model_made_without_memory_is_calibrated_like_another(training_method, placement):
    """Float weights are all that is loaded: the quantizers get their variables when they get their numbers."""
    with torch.device("meta"):
        empty = wrap(Small(), how(training_method, placement=placement))
    with pytest.raises(CalibrationError, match="meta"):
        calibrate(empty, [images()])
    empty.load_state_dict(Small().state_dict(), strict=False, assign=True)
    qmodel = made(training_method, placement=placement)
    assert same_state(calibrate(empty, [images()]), qmodel)
    assert same_state(train(empty, [images()]), train(qmodel, [images()]))
    assert torch.equal(finalize(empty)(images()), finalize(qmodel)(images()))


# ---- types ----------------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("placement", ["inputs", "outputs"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_keeps_the_quantizers_numbers_in_float32(training_method, placement, dtype):
    qmodel = trained(training_method, placement=placement)
    numbers = {name: value.clone() for name, value in qmodel.state_dict().items() if "quantizer" in name}
    qmodel.to(dtype)
    state = qmodel.state_dict()
    assert all(torch.equal(value, state[name]) and value.dtype == state[name].dtype for name, value in numbers.items())
    assert {value.dtype for name, value in state.items() if name not in numbers} == {dtype}
    out = qmodel(images().to(dtype))
    assert out.dtype == dtype
    out.sum().backward()
    assert all(
        parameter.grad.dtype == parameter.dtype for parameter in qmodel.parameters() if parameter.grad is not None
    )
    qmodel.eval()
    assert torch.equal(finalize(qmodel)(images().to(dtype)), qmodel(images().to(dtype)))


def test_half_and_float_are_casts_too():
    qmodel = trained()
    assert qmodel.half().fc.weight.dtype == torch.float16
    assert qmodel.float().fc.weights_quantizers["weight"].threshold.dtype == torch.float32


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_quantizes_in_float32(training_method, dtype):
    qmodel = made(training_method)
    seen = []
    for quantizer in quantizers_of(qmodel).values():
        quantize = quantizer.quantize
        quantizer.quantize = lambda x, training, quantize=quantize: seen.append(x.dtype) or quantize(x, training)
    with torch.autocast("cpu", dtype=dtype):
        out = qmodel.train()(images())
    out.float().square().mean().backward()
    assert out.dtype == dtype
    assert set(seen) == {torch.float32}
    assert all(parameter.grad.isfinite().all() for parameter in qmodel.parameters() if parameter.grad is not None)


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_deployed_model_gives_the_same_under_autocast(training_method, dtype):
    qmodel = trained(training_method).eval()
    deployed = finalize(qmodel)
    for grad in (True, False):
        with torch.autocast("cpu", dtype=dtype), torch.set_grad_enabled(grad):
            assert torch.equal(deployed(images()), qmodel(images()))


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_scaled_loss_trains_like_one_that_is_not(training_method, dtype):
    """A scale of 2**10 is taken off exactly, where no float16 number under- or overflows on the way."""
    plain, scaled = (made(training_method).train() for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    for qmodel, scale in ((plain, None), (scaled, scaler)):
        optimizer = torch.optim.SGD(parameter_groups(qmodel), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype):
                loss = qmodel(images()).float().square().mean() + regularization(qmodel)
            if scale is None:
                loss.backward()
                optimizer.step()
            else:
                scale.scale(loss).backward()
                scale.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(qmodel.parameters(), 1e9)
                scale.step(optimizer)
                scale.update()
    assert scaler.get_scale() == 2.0**10
    for (name, one), other in zip(plain.named_parameters(), scaled.parameters(), strict=True):
        # float16 gradients below 2**-14 lose digits without the scale: at most 2**-24 each, of at most 8 * 36 terms
        torch.testing.assert_close(one, other, rtol=2.0**-10, atol=3 * 0.05 * 288 * 2.0**-24, msg=name)
    scaled.eval()
    assert torch.equal(finalize(scaled)(images()), scaled(images()))


@EVERY
def test_a_loss_scaled_too_far_skips_its_step_and_leaves_the_model_as_it_was(training_method):
    """Infinite gradients are seen by the scaler: in the weights', while thresholds count theirs as nothing."""
    qmodel = made(training_method).train()
    optimizer = torch.optim.SGD(parameter_groups(qmodel), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    before = [parameter.detach().clone() for parameter in qmodel.parameters()]
    with torch.autocast("cpu", dtype=torch.float16):
        loss = qmodel(images()).float().square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 2.0**120
    assert all(torch.equal(one, other) for one, other in zip(before, qmodel.parameters(), strict=True))


# ---- ways to call and to train --------------------------------------------------------------------------------------


@EVERY
def test_gradients_accumulate_over_micro_batches(training_method):
    """Each micro-batch is a step of the schedules; without a schedule, two halves make the whole."""
    qmodel = made(training_method).train()
    whole = copy.deepcopy(qmodel)
    x = images(8).double()
    qmodel, whole = qmodel.double(), whole.double()
    for half in x.chunk(2):
        (qmodel(half).square().sum() / len(x)).backward()
    (whole(x).square().sum() / len(x)).backward()
    if training_method == "DQA":
        assert {int(quantizer.step) for quantizer in quantizers_of(qmodel).values()} == {2}
        return
    for name, parameter in qmodel.named_parameters():
        gradient = dict(whole.named_parameters())[name].grad
        if "input_holders" in name:
            # LSQ scales an activation threshold's gradient by 1 / sqrt(elements sharing it): half the batch, sqrt(2)
            gradient = gradient * 2**0.5
        # quantizers work in float32: sums of at most 8 * 36 rounded values of order 1 / 8
        torch.testing.assert_close(parameter.grad, gradient, rtol=288 * 2**-24, atol=288 * 2**-24 / 8)


class Blocks(nn.Module):
    """Linear layers, each of which may be recomputed in the backward pass."""

    def __init__(self, *, recomputed):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(2))
        self.recomputed = recomputed

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recomputed else block(x)
        return x


@EVERY
def test_recomputed_activations_give_the_same_gradients_and_count_no_step_twice(training_method):
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    plain, recomputed = (ready(Blocks(recomputed=flag), how(training_method), x).train() for flag in (False, True))
    for _ in range(2):
        for qmodel in (plain, recomputed):
            qmodel.zero_grad()
            qmodel(x).square().sum().backward()
        for one, other in zip(plain.parameters(), recomputed.parameters(), strict=True):
            assert torch.equal(one.grad, other.grad)
    assert {int(getattr(q, "step", 2)) for q in quantizers_of(recomputed).values()} == {2}


@pytest.fixture
def plain_kernels(monkeypatch):
    """Call layers part by part, and add up as PyTorch does: then the sums for thresholds are the same bit for bit."""
    monkeypatch.setattr(kernels, "call_layer", lambda *_, **__: None)
    monkeypatch.setattr(native, "compiled", lambda: None)


@EVERY
@pytest.mark.usefixtures("plain_kernels")
def test_so_it_is_when_the_whole_model_is_recomputed(training_method):
    plain, recomputed = made(training_method).train(), made(training_method).train()
    for _ in range(2):
        plain.zero_grad()
        recomputed.zero_grad()
        plain(images()).square().sum().backward()
        checkpoint(recomputed, images(), use_reentrant=False).square().sum().backward()
        for one, other in zip(plain.parameters(), recomputed.parameters(), strict=True):
            assert torch.equal(one.grad, other.grad)
    assert {int(getattr(q, "step", 2)) for q in quantizers_of(recomputed).values()} == {2}


@EVERY
@pytest.mark.parametrize("placement", ["inputs", "outputs"])
def test_functional_call_takes_parameters_from_outside(training_method, placement):
    qmodel, other = made(training_method, placement=placement), moved(trained(training_method, placement=placement))
    state = {name: value.detach().clone() for name, value in other.state_dict().items()}
    qmodel.eval()
    before = qmodel(images())
    assert torch.equal(torch.func.functional_call(qmodel, state, (images(),)), other.eval()(images()))
    assert torch.equal(qmodel(images()), before)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # clamp_ is done sample by sample
def test_per_sample_gradients_come_from_vmap():
    qmodel = ready(nn.Linear(6, 3), how(), images(5).reshape(5, 36)[:, :6])
    x = images(5).reshape(5, 36)[:, :6]
    parameters = {name: value.detach() for name, value in qmodel.named_parameters()}

    def loss(values, one):
        return torch.func.functional_call(qmodel, values, (one[None],)).square().sum()

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for index in range(len(x)):
        qmodel.zero_grad()
        qmodel(x[index : index + 1]).square().sum().backward()
        # sums of at most 6 float32 products, in another order: 6 * 2**-24 relative, twice
        torch.testing.assert_close(gradients["weight"][index], qmodel.weight.grad, rtol=12 * 2**-24, atol=1e-7)


# A wrapped DQA quantizer reads from its logits, as a plain number, which width it evaluates; a stack has several.
@pytest.mark.parametrize(
    ("training_method", "deployed"), [("STE", False), ("LSQ", False), ("STE", True), ("LSQ", True), ("DQA", True)]
)
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # clamp_ is done model by model
def test_an_ensemble_is_one_call_under_vmap(training_method, deployed):
    """Parameters and buffers stacked: each member gives what it gives alone."""
    members = [moved(made(training_method)).eval() for _ in range(2)]
    with torch.no_grad():
        for parameter in members[1].parameters():
            parameter.mul_(1.25)
    members = [finalize(member) if deployed else member for member in members]
    parameters, buffers = torch.func.stack_module_state(members)
    base = copy.deepcopy(members[0]).to("meta")

    def call(values, others, x):
        return torch.func.functional_call(base, (values, others), (x,))

    together = torch.func.vmap(call, in_dims=(0, 0, None))(parameters, buffers, images())
    for member, outputs in zip(members, together, strict=True):
        # convolution and linear layer run as other kernels for a stack: sums of at most 9 terms in another order, and
        # then a tie may fall to the other side: one step of the second layer's input, times its weights
        close = (outputs - member(images())).abs() <= 16 * 2.0**-24 * (1 + outputs.abs())
        assert close.float().mean() > 0.9
    assert not torch.equal(*together)


@EVERY
def test_a_frozen_model_gives_gradients_to_its_input(training_method):
    qmodel = freeze_quant_params(made(training_method)).requires_grad_(False)
    x = images().requires_grad_()
    qmodel(x).sum().backward()
    assert x.grad.abs().sum() > 0


# ---- compiled -------------------------------------------------------------------------------------------------------

# what PyTorch does itself while it compiles
COMPILES = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def compiled(qmodel, backend="aot_eager"):
    torch._dynamo.reset()  # noqa: SLF001 - the documented way to forget earlier graphs
    return torch.compile(qmodel, fullgraph=True, backend=backend)


@COMPILES
@pytest.mark.parametrize(
    ("training_method", "placement"), [("STE", "inputs"), ("LSQ", "inputs"), ("LSQ", "outputs"), ("DQA", "inputs")]
)
@pytest.mark.usefixtures("plain_kernels")
def test_a_compiled_model_is_one_graph_and_computes_the_same(training_method, placement):
    """Traced ahead of time and run by eager kernels: bit for bit the same, forward and backward."""
    qmodel = made(training_method, placement=placement)
    other = copy.deepcopy(qmodel)
    fast = compiled(other)
    for training in (True, False, True):
        qmodel.train(training)
        fast.train(training)
        assert torch.equal(fast(images()), qmodel(images()))
    qmodel(images()).square().mean().backward()
    fast(images()).square().mean().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(qmodel.parameters(), other.parameters(), strict=True))
    assert {int(getattr(quantizer, "step", 3)) for quantizer in quantizers_of(other).values()} == {3}


@COMPILES
@pytest.mark.parametrize("training_method", ["STE", "LSQ"])
def test_a_layer_called_as_one_function_computes_what_a_compiled_one_does(training_method):
    """All but the sums for thresholds, which have another order."""
    qmodel = made(training_method).train()
    other = copy.deepcopy(qmodel)
    result = qmodel(images())
    assert ("FusedLayer" in result.grad_fn.name()) == (tier.wanted() != tier.PLAIN)  # one node wherever one is allowed
    assert torch.equal(compiled(other)(images()), result)
    for model in (qmodel, other):
        model(images()).square().mean().backward()
    found = {name: parameter.grad for name, parameter in qmodel.named_parameters() if "quantizer" not in name}
    assert found
    assert all(torch.equal(found[name], dict(other.named_parameters())[name].grad) for name in found)


@COMPILES
@pytest.mark.parametrize("build", [Small, lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 3))])
def test_a_schedule_goes_on_in_a_compiled_model_without_a_new_graph(build):
    """The step is counted in a graph of its own, or in the model's when that is PyTorch's own container."""
    qmodel = ready(build(), how("DQA"), images())
    other = copy.deepcopy(qmodel)
    counter = CompileCounterWithBackend("aot_eager")
    fast, graphs = compiled(other, backend=counter), set()
    for _ in range(10):  # past the end of the schedule
        results = [model(images()) for model in (qmodel, fast)]
        assert torch.equal(*results)
        for model, result in zip((qmodel, other), results, strict=True):
            model.zero_grad()
            result.square().mean().backward()
        # a compiled backward may compute the temperature once more; the step must still be the forward's
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(qmodel.parameters(), other.parameters(), strict=True))
        graphs.add(counter.frame_count)
    assert len(graphs) == 1
    assert {int(quantizer.step) for quantizer in quantizers_of(other).values()} == {10}


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "cl"))), reason="inductor needs a C++ compiler")
def test_inductor_computes_the_same_within_a_step():
    """The deployed kernels' only freedom (DESIGN section 5.4): the last ulp, which may move a tie by one step."""
    qmodel = ready(nn.Linear(6, 3), how("LSQ"), images(50).reshape(-1, 6)).train()
    fast = compiled(copy.deepcopy(qmodel), backend="inductor")
    x = images(50).reshape(-1, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # inductor warns of its own environment
        result = fast(x)
    step = qmodel.input_holders["input"].activation_holder_quantizer.threshold.item() / 8
    weight = qmodel.get_quantized_weights()["weight"].abs()
    off = (result - qmodel(x)).abs()
    rounding = 8 * 2**-24 * (step * 8 * weight.sum(1) + 1)  # six products and a bias, in float32
    assert (off > rounding).float().mean() <= 1e-3  # ties are rare among normal numbers
    assert (off <= step * weight.amax(1) * 6 + rounding).all()


# ---- stopping and going on ------------------------------------------------------------------------------------------


def loop(qmodel, optimizer, batches):
    for x in batches:
        optimizer.zero_grad()
        (qmodel(x).square().mean() + regularization(qmodel)).backward()
        optimizer.step()


@EVERY
@pytest.mark.parametrize("placement", ["inputs", "outputs"])
def test_a_training_resumed_mid_schedule_is_bit_for_bit_the_one_not_stopped(training_method, placement, tmp_path):
    batches = [images(count) for count in (4, 5, 6, 7, 8, 9)]

    def start(qmodel):
        return torch.optim.Adam(parameter_groups(qmodel, qparams={"lr": 1e-2}), lr=1e-3)

    straight = made(training_method, placement=placement).train()
    loop(straight, start(straight), batches)

    first = made(training_method, placement=placement).train()
    optimizer = start(first)
    loop(first, optimizer, batches[:3])
    save(first, tmp_path / "model")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer")
    del first, optimizer

    second = load(tmp_path / "model", Small())
    optimizer = start(second)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer", weights_only=True))
    loop(second, optimizer, batches[3:])
    assert same_state(second, straight)
    assert torch.equal(finalize(second)(images()), finalize(straight)(images()))
    if training_method == "DQA":
        assert {int(quantizer.step) for quantizer in quantizers_of(second).values()} == {6}


def test_weights_alone_live_as_well():
    """A model without activation quantizers goes the same way."""
    qmodel = train(ready(Small(), weights_only("DQA")), [images()])
    other = by_pickle(copy.deepcopy(qmodel))
    assert same_state(train(other, [images()]), train(qmodel, [images()]))
