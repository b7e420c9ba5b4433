"""The deployed model gives bit for bit what was trained, with mctq's inferable quantizers."""

from __future__ import annotations

import pytest
import torch
from mct_quantizers.pytorch import quantizers as mctq
from torch import nn

from tests.torch.models import GRIDS, TRAINED_BY, images, moved, network, ready, recipe, same_state, spec, train
from trainable_core.errors import ModelError, QuantizerStateError
from trainable_torch import ActivationQuantizationHolder, QuantizationWrapper, calibrate, describe, finalize, wrap
from trainable_torch.training import quantizers_of
from trainable_torch.wrapping import count_step

EVERY = pytest.mark.parametrize("training_method", TRAINED_BY)
ON_EVERY_GRID = pytest.mark.parametrize("grid", GRIDS)
INFERABLE = {
    "SYMMETRIC": (mctq.WeightsSymmetricInferableQuantizer, mctq.ActivationSymmetricInferableQuantizer),
    "POWER_OF_TWO": (mctq.WeightsPOTInferableQuantizer, mctq.ActivationPOTInferableQuantizer),
    "UNIFORM": (mctq.WeightsUniformInferableQuantizer, mctq.ActivationUniformInferableQuantizer),
}


def trained(training_method="LSQ", grid="SYMMETRIC", *, per_channel=True, placement="inputs", n_bits=4):
    """Return a model after three steps whose trained numbers have moved, and moved again by force."""
    how = {
        "weights": spec(training_method, grid, n_bits, per_channel=per_channel),
        "activations": spec(training_method, grid, n_bits, placement=placement),
        "calibration": {"weights": "minmax", "activations": "minmax"},  # the fastest; the numbers move anyway
    }
    qmodel = ready(network(), how, images())
    return moved(train(qmodel, [images(), 2 * images(), images()]))


def assert_same_outputs(qmodel, deployed, *batches):
    """Compare in eval mode, with and without gradients."""
    qmodel.eval()
    for x in batches:
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                assert torch.equal(deployed(x), qmodel(x))


@EVERY
@ON_EVERY_GRID
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("placement", ["inputs", "outputs"])
def test_what_was_trained_is_what_is_deployed(training_method, grid, per_channel, placement):
    qmodel = trained(training_method, grid, per_channel=per_channel, placement=placement)
    assert_same_outputs(qmodel, finalize(qmodel), images(), 100 * images(3), torch.zeros(2, 1, 6, 6))


@ON_EVERY_GRID
@pytest.mark.parametrize("placement", ["inputs", "outputs"])
def test_the_gradient_of_the_input_is_the_trained_models(grid, placement):
    """For saliency maps and adversarial examples. Of the weights there is none: they are constants."""
    qmodel = trained("STE", grid, placement=placement).eval()
    deployed = finalize(qmodel)
    found = []
    for model in (qmodel, deployed):
        x = (3 * images()).requires_grad_()  # beyond the calibrated ranges
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x)
        found.append(gradient)
    assert found[0].abs().max() > 0
    assert torch.equal(*found)
    deployed(images()).square().sum().backward()
    weights = [w for m in deployed.modules() if isinstance(m, QuantizationWrapper) for _, w, _ in m.get_weights_vars()]
    assert weights
    assert all(weight.grad is None for weight in weights)


def test_a_deployed_model_is_differentiated_twice():
    """As a physics-informed network that is evaluated; between the roundings it is smooth."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
    x = torch.rand(32, 2)
    qmodel = ready(layers, recipe("STE", n_bits=8), x).eval()
    found = []
    for model in (qmodel, finalize(qmodel)):
        points = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(model(points).sum(), points, create_graph=True)
        (second,) = torch.autograd.grad(first[:, 0].sum(), points)
        found.append((first.detach(), second))
    assert found[0][1].abs().max() > 0
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@EVERY
@ON_EVERY_GRID
@pytest.mark.parametrize("n_bits", [1, 2, 8, 16])
def test_so_it_is_at_every_width(training_method, grid, n_bits):
    qmodel = trained(training_method, grid, n_bits=n_bits)
    assert_same_outputs(qmodel, finalize(qmodel), images())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_so_it_is_in_every_dtype(dtype):
    qmodel = trained().to(dtype)
    assert_same_outputs(qmodel, finalize(qmodel), images().to(dtype))


def test_training_moves_what_is_deployed():
    """Else the tests above would compare what never moved."""
    qmodel = ready(network(), recipe("LSQ"), images())
    before = finalize(qmodel)
    after = finalize(train(qmodel, [images(), images()], lr=1.0))
    assert not torch.equal(before(images()), after(images()))
    thresholds = [
        (one.params, other.params)
        for one, other in zip(describe(before).rows, describe(after).rows, strict=True)
        if one.target == "Activation"
    ]
    assert all(one != other for one, other in thresholds)


@EVERY
@ON_EVERY_GRID
def test_the_deployed_quantizers_are_mctqs(training_method, grid):
    deployed = finalize(trained(training_method, grid))
    weights, activation = INFERABLE[grid]
    wrappers = [m for m in deployed.modules() if isinstance(m, QuantizationWrapper)]
    holders = [m for m in deployed.modules() if isinstance(m, ActivationQuantizationHolder)]
    assert (len(wrappers), len(holders)) == (3, 3)
    assert all(isinstance(q, weights) for wrapper in wrappers for q in wrapper.weights_quantizers.values())
    assert all(isinstance(holder.activation_holder_quantizer, activation) for holder in holders)
    assert quantizers_of(deployed) == {}


def test_the_deployed_model_is_in_eval_mode_and_has_nothing_to_train_in_its_quantizers():
    deployed = finalize(trained())
    assert not any(module.training for module in deployed.modules())
    float_names = {name for name, _ in network().named_parameters()} - {"stem.norm.weight", "stem.norm.bias"}
    assert {name for name, _ in deployed.named_parameters()} == float_names | {"stem.conv.bias"}


def test_the_trained_model_is_left_as_it_is_and_still_trains():
    qmodel = trained("DQA")
    state = {name: value.clone() for name, value in qmodel.state_dict().items()}
    finalize(qmodel)
    assert qmodel.training
    assert all(torch.equal(state[name], value) for name, value in qmodel.state_dict().items())
    train(qmodel, [images()])
    assert not any(torch.equal(state[name], value) for name, value in qmodel.state_dict().items() if "logits" in name)
    assert_same_outputs(qmodel, finalize(qmodel), images())


def test_the_deployed_model_does_not_follow_later_training():
    qmodel = trained()
    deployed = finalize(qmodel)
    before = deployed(images())
    train(qmodel, [images()])
    assert torch.equal(deployed(images()), before)


def test_finalizing_a_finalized_model_gives_an_equal_copy():
    deployed = finalize(trained())
    again = finalize(deployed)
    assert again is not deployed
    assert same_state(again, deployed)
    assert torch.equal(again(images()), deployed(images()))
    assert describe(again) == describe(deployed)


def test_a_deployed_model_counts_no_steps():
    deployed = finalize(trained("DQA"))
    assert count_step not in deployed._forward_pre_hooks.values()  # noqa: SLF001 - there is no public list
    assert not any(name.endswith(("step", "logits")) for name in deployed.state_dict())


def test_hooks_of_the_user_stay():
    qmodel, calls = trained(), []
    qmodel.register_forward_pre_hook(lambda *_: calls.append("before"))
    finalize(qmodel)(images())
    assert calls == ["before"]


def test_before_calibration_the_layers_are_named():
    qmodel = wrap(network(), recipe())
    with pytest.raises(QuantizerStateError, match=r"body.*head.*stem\.conv\.weight.*\n.*calibrate"):
        finalize(qmodel)


def test_only_the_layers_without_numbers_are_named():
    qmodel = wrap(network(), recipe())
    calibrate(qmodel, [images()])
    wrapper = qmodel.head
    with torch.no_grad():
        wrapper.weights_quantizers["weight"].threshold.fill_(float("nan"))
    qmodel.load_state_dict(qmodel.state_dict())
    with pytest.raises(QuantizerStateError, match=r"not calibrated: head\.weight\n"):
        finalize(qmodel)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), None])
def test_what_was_not_wrapped_is_refused(model):
    with pytest.raises(ModelError, match="wrap"):
        finalize(model)


def test_a_quantizer_that_tied_weights_share_stays_shared():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.embed(x))

    deployed = finalize(ready(Tied(), {"weights": spec()}))
    assert deployed.embed.weights_quantizers["weight"] is deployed.head.weights_quantizers["weight"]
    assert deployed.embed.weight is deployed.head.weight


def test_a_deployed_model_moves_between_types_and_states():
    deployed = finalize(trained("LSQ", "UNIFORM"))
    other = finalize(ready(network(), recipe("LSQ", "UNIFORM"), images()))
    assert not torch.equal(other(images()), deployed(images()))
    other.load_state_dict(deployed.state_dict())
    assert torch.equal(other(images()), deployed(images()))
    assert describe(other).rows == describe(deployed).rows
    scales = {name: value for name, value in deployed.to(torch.float16).state_dict().items() if "grid" in name}
    assert scales
    assert {value.dtype for value in scales.values()} == {torch.float32}
