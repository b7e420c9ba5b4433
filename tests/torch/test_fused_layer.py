"""A layer called as one function: what its parts give, and its usual way wherever anybody could tell."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name everyone reads

import trainable_torch
from tests.torch.models import assert_the_graph_can_be_used_twice, bytes_kept, quantized
from trainable_torch import finalize, kernels, ops
from trainable_torch.kernels import layer as fused_layer
from trainable_torch.kernels import native, tier
from trainable_torch.quantizers import LsqWeightsQuantizer, SteActivationQuantizer

LAYERS = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), (2, 4, 9, 8)),
    "grouped": (lambda: nn.Conv2d(4, 8, 3, groups=2, dilation=2), (2, 4, 9, 8)),
    "channels last": (lambda: nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last), (2, 4, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 4, 5, 3)),
    "linear": (lambda: nn.Linear(8, 6), (5, 8)),
    "sequence": (lambda: nn.Linear(8, 6, bias=False), (3, 5, 8)),
}
UNIT = 2.0**-24  # relative error of one float32 operation

pytestmark = pytest.mark.skipif(tier.wanted() == tier.PLAIN, reason="layers are called part by part")
layers = pytest.mark.parametrize("layer", LAYERS)
rules = pytest.mark.parametrize("rule", ["STE", "LSQ"])
methods = pytest.mark.parametrize("method", ["SYMMETRIC", "POWER_OF_TWO", "UNIFORM"])


@pytest.fixture(params=["numba", "torch"])
def kernels_of(request, monkeypatch):
    """Compute with the loops that numba compiles, or without them."""
    if request.param == "torch":
        monkeypatch.setattr(native, "compiled", lambda: None)
    elif native.compiled() is None:
        pytest.skip("numba is not installed, or told not to compile")


def case(layer, rule, method="SYMMETRIC", **more):
    torch.manual_seed(0)
    make, shape = LAYERS[layer]
    x = torch.randn(shape)
    if layer == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    return quantized(nn.Sequential(make()), x, rule, method, **more), x


def is_fused(y):
    return "FusedLayer" in y.grad_fn.name()


def results(model, x, *, learns_input=True):
    """Return the output, the input's gradient and the parameters' gradients, of a copy."""
    copied, leaf = copy.deepcopy(model), x.clone(memory_format=torch.preserve_format).requires_grad_(learns_input)
    y = copied(leaf)
    y.square().sum().backward()
    return y.detach(), leaf.grad, {name: each.grad for name, each in copied.named_parameters()}


def by_parts(function, *arguments, **more):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "call_layer", lambda *_, **__: None)
        return function(*arguments, **more)


def magnitudes(model, x):
    """Return the sum of magnitudes of all products of which the input's gradients are made, in float64."""
    wrapper = model[0]
    layer, (holder,) = wrapper.layer, wrapper.input_holders.values()
    leaf, quantized_x = x.clone(), holder(x).detach().double().abs().requires_grad_()
    y = by_parts(model, leaf)
    upstream = torch.autograd.grad(y.square().sum(), y)[0].double().abs()
    weight = wrapper.weights_quantizers["weight"](wrapper.weight, True).detach().double().abs()
    if isinstance(layer, nn.Linear):
        made = F.linear(quantized_x, weight)
    else:
        convolve = (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3]
        made = convolve(quantized_x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    return float(torch.autograd.grad(made, quantized_x, upstream)[0].sum())


@pytest.mark.usefixtures("kernels_of")
@layers
@rules
@methods
@pytest.mark.parametrize("per_channel", [True, False])
def test_it_gives_what_its_parts_give(layer, rule, method, per_channel):
    """Bit for bit, but the sums for a learned grid, whose order depends on how the gradient lies in memory."""
    model, x = case(layer, rule, method, per_channel=per_channel)
    assert is_fused(model(x.clone().requires_grad_()))
    assert not is_fused(by_parts(model, x.clone().requires_grad_()))
    one, other = results(model, x), by_parts(results, model, x)
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])
    assert one[1].any()
    for name, gradient in one[2].items():
        assert torch.equal(gradient, other[2][name])
        assert gradient.any()


@pytest.mark.usefixtures("kernels_of")
@layers
@methods
def test_the_threshold_of_an_input_that_needs_no_gradient_learns_the_same(layer, method):
    """Along a direction: another sum of the same products, so within rounding of their magnitudes."""
    model, x = case(layer, "LSQ", method)
    found, expected = results(model, x, learns_input=False), by_parts(results, model, x, learns_input=False)
    assert torch.equal(found[0], expected[0])
    # Each way rounds sums of products of upstream gradient, weight and slope: first one per weight, then one per
    # element, of the input or the output. A slope is at most 16 codes (n_bits=4); a variable's gradient is at most
    # that of the scale over 8, or, by way of the zero point, some of both over 15. Below 16 operations besides.
    count = model[0].weight.numel() + max(x.numel(), found[0].numel()) + 16
    bound = 2 * count * UNIT * 16 * magnitudes(model, x)
    for name, gradient in found[2].items():
        if "input_holders" not in name:
            assert torch.equal(gradient, expected[2][name])
            continue
        assert gradient.any()
        assert float((gradient - expected[2][name]).abs()) <= bound


@rules
def test_it_keeps_what_the_float_layer_keeps(rule):
    """Grids' own numbers come to it: a few per channel, and small tensors, which are not worth making again."""
    if native.compiled() is None:
        pytest.skip("nothing is made again without numba")
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(8, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 8, 3))
    x = torch.randn(8, 8, 32, 32, requires_grad=True)
    assert all(size > fused_layer.KEPT for size in (x.numel(), module[2].weight.numel()))
    model = quantized(module, x.detach(), rule)

    assert bytes_kept(model, x) < 1.02 * bytes_kept(module, x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_layer, "KEPT", 2**40)
        assert bytes_kept(model, x) > 1.4 * bytes_kept(module, x)


# ---- what needs a gradient ------------------------------------------------------------------------------------------


@layers
@pytest.mark.parametrize("frozen", ["weight", "bias", "weights_quantizers", "input_holders"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_its_own(layer, frozen):
    model, x = case(layer, "LSQ")
    for name, parameter in model.named_parameters():
        if frozen in name:
            parameter.requires_grad_(False)
    for learns_input in (True, False):
        found, expected = (
            results(model, x, learns_input=learns_input),
            by_parts(results, model, x, learns_input=learns_input),
        )
        assert (found[1] is None) == (not learns_input)
        for name, gradient in found[2].items():
            assert (gradient is None) == (frozen in name) == (expected[2][name] is None)


@pytest.mark.parametrize("layer", ["conv1d", "conv2d", "grouped", "conv3d"])
@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3)))
def test_a_convolution_gives_no_other_gradients_than_it_is_asked_for(layer, needs):
    """PyTorch gives tensors of other shapes in the places of some that its mask leaves out."""
    make, shape = LAYERS[layer]
    module, x = make(), torch.randn(shape)
    dims = len(module.kernel_size)
    settings = module.stride, module.padding, module.dilation, False, [0] * dims, module.groups
    upstream, tensors = torch.randn_like(module(x)), (x, module.weight, torch.zeros(module.out_channels))
    found = fused_layer.Convolution(settings).gradients(upstream, x, module.weight.detach(), needs)
    expected = [each.shape if need else None for each, need in zip(tensors, needs, strict=True)]
    assert [None if each is None else each.shape for each in found] == expected


def test_a_layer_in_which_nothing_learns_goes_its_usual_way():
    model, x = case("conv2d", "STE")
    model.requires_grad_(False)
    assert not model(x).requires_grad
    assert is_fused(model(x.requires_grad_()))


@rules
def test_only_weights_or_only_activations_may_be_quantized(rule):
    for parts in ({"activations": None}, {"weights": None}):
        model, x = case("conv2d", rule, **parts)
        leaf = x.clone().requires_grad_()
        assert is_fused(model(leaf))
        one, other = results(model, x), by_parts(results, model, x)
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
        assert all(torch.equal(one[2][name], other[2][name]) for name in one[2])


@layers
@rules
def test_the_gradient_that_came_is_not_changed(layer, rule):
    model, x = case(layer, rule)
    y = model(x.requires_grad_())
    upstream = torch.randn(y.shape)
    before = upstream.clone()
    y.backward(upstream)
    assert torch.equal(upstream, before)


# ---- autograd's other uses ------------------------------------------------------------------------------------------


@layers
@rules
def test_second_derivatives_are_those_of_the_parts(layer, rule):
    model, x = case(layer, rule)

    def second(model, x):
        leaf = x.clone().requires_grad_()
        parameters = list(model.parameters())
        first = torch.autograd.grad(model(leaf).square().sum(), [leaf, *parameters], create_graph=True)
        total = sum(each.square().sum() for each in first)
        return torch.autograd.grad(total, [leaf, *parameters], allow_unused=True)

    for one, other in zip(second(model, x), by_parts(second, model, x), strict=True):
        assert (one is None) == (other is None)
        # the same products, added in another order; a few thousand of them
        assert one is None or torch.allclose(
            one, other, rtol=2**12 * UNIT, atol=2**12 * UNIT * float(other.abs().max())
        )


def test_a_weight_that_also_made_the_input_is_not_counted_twice():
    """As where layers share a weight: what the input owes to it comes by the input's own way."""
    model, _ = case("linear", "STE")
    weight = model[0].weight
    maker = torch.randn(8, 6)

    def penalty():
        x = torch.tanh(maker @ weight)
        (first,) = torch.autograd.grad(model(x).square().sum(), weight, create_graph=True)
        return first

    assert torch.allclose(penalty(), by_parts(penalty), rtol=2**10 * UNIT, atol=2**-12)


@layers
@rules
def test_gradients_of_many_outputs_at_once(layer, rule):
    model, x = case(layer, rule)
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    rows = torch.randn(3, *y.shape)
    together = torch.autograd.grad(y, leaf, rows, is_grads_batched=True, retain_graph=True)[0]
    one_by_one = [torch.autograd.grad(y, leaf, row, retain_graph=True)[0] for row in rows]
    # sums of as many products as a filter has weights, in another order
    assert torch.allclose(
        together, torch.stack(one_by_one), rtol=2**8 * UNIT, atol=2**8 * UNIT * float(together.abs().max())
    )


@rules
def test_the_graph_can_be_used_twice_if_it_is_retained(rule):
    model, x = case("conv2d", rule)
    assert_the_graph_can_be_used_twice(model, x)


@pytest.mark.parametrize("which", ["weight", "input", "threshold"])
def test_what_changed_since_is_refused_as_autograd_refuses_it(which):
    model, x = case("conv2d", "LSQ")
    doubled = x.clone().requires_grad_() * 2
    loss = model(doubled).sum()
    (holder,) = model[0].input_holders.values()
    changed = {"weight": model[0].weight, "input": doubled, "threshold": holder.activation_holder_quantizer.threshold}
    with torch.no_grad():
        changed[which].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- where it stands aside ------------------------------------------------------------------------------------------


def parts(model):
    wrapper = model[0]
    (holder,), (quantizer,) = wrapper.input_holders.values(), wrapper.weights_quantizers.values()
    return {
        "layer": wrapper.layer,
        "holder": holder,
        "activation quantizer": holder.activation_holder_quantizer,
        "weight quantizer": quantizer,
    }


HOOKS = {
    "forward": lambda module, seen: module.register_forward_hook(lambda *_: seen.append(1)),
    "before": lambda module, seen: module.register_forward_pre_hook(lambda *_: seen.append(1)),
    "backward": lambda module, seen: module.register_full_backward_hook(lambda *_: seen.append(1)),
}


@pytest.mark.parametrize("part", ["layer", "holder", "activation quantizer", "weight quantizer"])
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_of_any_part_run(part, kind):
    model, x = case("conv2d", "STE")
    seen = []
    handle = HOOKS[kind](parts(model)[part], seen)
    model(x.clone().requires_grad_()).sum().backward()
    assert seen
    handle.remove()
    assert is_fused(model(x.requires_grad_()))


def test_hooks_of_all_modules_run():
    model, x = case("conv2d", "STE")
    seen = set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(type(module)))
    try:
        model(x)
    finally:
        handle.remove()
    assert SteActivationQuantizer in seen
    assert any(issubclass(each, nn.Conv2d) for each in seen)


@pytest.mark.parametrize("part", ["layer", "activation quantizer", "weight quantizer"])
def test_a_method_put_into_an_object_is_called(part, monkeypatch):
    model, x = case("conv2d", "STE")
    module, seen = parts(model)[part], []
    usual = module.forward
    monkeypatch.setattr(module, "forward", lambda *arguments: seen.append(1) or usual(*arguments))
    model(x)
    assert seen


class Doubling(LsqWeightsQuantizer):
    """A method of somebody's own on top of ours."""

    def fake_quantize(self, x, grid, training):
        return 2 * super().fake_quantize(x, grid, training)


class Slower(LsqWeightsQuantizer):
    """A rule of somebody's own, which says all there is to say."""

    def rule(self, sharing, quant_max):
        return ops.Lsq(super().rule(sharing, quant_max).gradient_scale / 2)


class Halving(nn.Conv2d):
    """A layer of somebody's own."""

    def forward(self, x):
        return super().forward(x) / 2


def test_classes_of_ones_own_are_called_as_they_are():
    model, x = case("conv2d", "LSQ")
    plain, threshold = model(x).detach(), "0.weights_quantizers.weight.threshold"
    usual = results(model, x)[2][threshold]
    wrapper = model[0]
    wrapper.weights_quantizers["weight"].__class__ = Doubling
    assert torch.equal(model(x), 2 * plain)
    assert not is_fused(model(x))
    wrapper.weights_quantizers["weight"].__class__ = Slower
    assert is_fused(model(x))
    assert torch.equal(results(model, x)[2][threshold], usual / 2)
    torch.manual_seed(0)
    halving = quantized(nn.Sequential(Halving(4, 6, 3)), x, "STE")
    assert not is_fused(halving(x))


@pytest.mark.parametrize(
    "make", [lambda: nn.Conv2d(4, 6, 3, padding="same"), lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")]
)
def test_padding_that_is_more_than_zeros_at_both_sides_is_left_to_the_layer(make):
    x = torch.randn(2, 4, 8, 8)
    assert not is_fused(quantized(nn.Sequential(make()), x, "STE")(x))


def test_inputs_of_other_dimensions_and_by_name_are_left_to_the_layer():
    model, x = case("conv2d", "STE")
    assert not is_fused(model(x[0]))
    assert model(x[0]).shape == model(x).shape[1:]
    assert not is_fused(model[0](input=x))
    linear, x = case("linear", "STE")
    assert not is_fused(linear(x[0]))


def test_other_dtypes_modes_and_hooks_for_saved_tensors_go_the_usual_way():
    model, x = case("conv2d", "LSQ")
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype is torch.bfloat16
    with torch.autograd.graph.save_on_cpu():
        assert not is_fused(model(x))
    with torch.device("cpu"):  # a mode that sees every function
        assert not is_fused(model(x))
    with torch.no_grad():
        assert model(x).grad_fn is None
    model.eval()
    assert not is_fused(model(x))


@pytest.mark.parametrize("layer", ["conv2d", "linear"])
def test_it_learns_what_its_parts_learn(layer):
    """Some steps of SGD: weights bit for bit with fixed grids."""
    model, x = case(layer, "STE")

    def steps(model):
        copied = copy.deepcopy(model)
        optimizer = torch.optim.SGD(copied.parameters(), 0.01)
        for _ in range(3):
            optimizer.zero_grad()
            copied(x).square().mean().backward()
            optimizer.step()
        return copied.state_dict()

    one, other = steps(model), by_parts(steps, model)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(one[name], value) for name, value in model.state_dict().items())


def test_without_numba_every_quantized_tensor_is_kept(monkeypatch):
    """To make them again by PyTorch's own kernels would take a good part of a step."""
    model, x = case("conv2d", "STE")
    monkeypatch.setattr(fused_layer, "KEPT", 0)
    snaps = []
    usual = kernels.FakeQuantization.snap
    monkeypatch.setattr(kernels.FakeQuantization, "snap", lambda self, x: snaps.append(1) or usual(self, x))
    for compiled, expected in ((native.compiled, 2), (lambda: None, 0)):  # in backward: input and weight, or none
        if compiled() is None and expected:
            continue
        monkeypatch.setattr(native, "compiled", compiled)
        loss = model(x.clone().requires_grad_()).sum()
        snaps.clear()
        loss.backward()
        assert len(snaps) == expected


def test_every_pair_of_rules_fits_together():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 8, 8)
    for first, second in itertools.product(("STE", "LSQ", "DQA"), repeat=2):
        one, other = ({"method": "SYMMETRIC", "training_method": name, "n_bits": 4} for name in (first, second))
        recipe = {"weights": one, "activations": other, "fold_batch_norm": False}
        model = trainable_torch.calibrate(trainable_torch.wrap(nn.Sequential(nn.Conv2d(4, 6, 3)), recipe), [x]).train()
        leaf = x.clone().requires_grad_()
        assert is_fused(model(leaf)) == ("DQA" not in {first, second})
        found, expected = results(model, x), by_parts(results, model, x)
        assert torch.equal(found[0], expected[0])
        assert all(torch.equal(found[2][name], expected[2][name]) for name in found[2])


@pytest.mark.usefixtures("kernels_of")
@layers
@methods
def test_a_deployed_layer_takes_an_input_that_needs_a_gradient(layer, method):
    """As that of a layer behind another one's weights does where gradients are on."""
    model, x = case(layer, "LSQ", method)
    deployed = finalize(model)
    with torch.no_grad():
        expected = deployed(x)
    assert torch.equal(deployed(x.clone().requires_grad_()), expected)
