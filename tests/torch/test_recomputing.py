"""What layers keep for backward is made again then: same gradients, less memory, and no surprise for anyone's hooks."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.torch.models import assert_the_graph_can_be_used_twice, bytes_kept, quantized
from trainable_torch import kernels
from trainable_torch.kernels import eligible, native

if native.compiled() is None:
    pytest.skip("nothing is made again without the extra trainable-torch[speed]", allow_module_level=True)


@pytest.fixture(autouse=True)
def by_parts(monkeypatch):
    """Call every layer part by part; as one function, some of these would keep input and weight by themselves."""
    monkeypatch.setattr(kernels, "call_layer", lambda *_, **__: None)


LAYERS = {
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 8, 8)),
    "channels last": (lambda: nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last), (2, 4, 8, 8)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (2, 4, 8, 8)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3), (2, 4, 8, 8)),
    "linear": (lambda: nn.Linear(4, 6), (2, 5, 4)),
    "one vector": (lambda: nn.Linear(4, 6), (4,)),
}
layers = pytest.mark.parametrize("layer", LAYERS)
rules = pytest.mark.parametrize("rule", ["STE", "LSQ"])


def case(layer, rule, **more):
    torch.manual_seed(0)
    make, shape = LAYERS[layer]
    x = torch.randn(shape)
    if layer == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    return quantized(nn.Sequential(make()), x, rule, **more), x


def gradients(model, x, through=lambda model, x: model(x)):
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    copied = copy.deepcopy(model)
    y = through(copied, leaf)
    y.square().sum().backward()
    return [y.detach(), leaf.grad, *(parameter.grad for parameter in copied.parameters())]


def keep_everything(monkeypatch):
    monkeypatch.setattr(kernels, "recomputed", lambda _: nullcontext())


def assert_all_equal(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


@layers
@rules
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("method", ["SYMMETRIC", "UNIFORM"])
def test_gradients_are_the_same_bit_for_bit(layer, rule, per_channel, method, monkeypatch):
    model, x = case(layer, rule, per_channel=per_channel, method=method)
    found = gradients(model, x)
    keep_everything(monkeypatch)
    assert_all_equal(found, gradients(model, x))
    assert all(each is not None and each.any() for each in found)


@rules
def test_a_quantized_network_keeps_what_the_float_one_keeps(rule, monkeypatch):
    """The grids' own numbers come to it: a few per channel, and the bookkeeping of PyTorch's allocator."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(8, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 3))
    x = torch.randn(4, 8, 32, 32, requires_grad=True)
    model = quantized(module, x.detach(), rule)
    floating = bytes_kept(module, x)
    assert bytes_kept(model, x) < 1.02 * floating
    keep_everything(monkeypatch)
    assert bytes_kept(model, x) > 1.4 * floating  # so it is the recomputing that saves them


@rules
@pytest.mark.parametrize("which", ["weight", "input"])
def test_a_changed_float_tensor_is_refused_as_autograd_refuses_it(rule, which):
    model, x = case("conv", rule)
    leaf = x.clone().requires_grad_()
    doubled = leaf * 2
    loss = model(doubled).sum()
    with torch.no_grad():
        (model[0].weight if which == "weight" else doubled).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Spoils(nn.Conv2d):
    """A convolution that changes its input first, unseen by autograd."""

    def forward(self, x):
        with torch.no_grad():
            x.mul_(0.5)
        return super().forward(x)


def test_a_quantized_tensor_that_the_layer_wrote_into_is_kept_as_it_is(monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 8, 8)
    model = quantized(nn.Sequential(Spoils(4, 6, 3)), x, "STE")
    found = gradients(model, x)
    keep_everything(monkeypatch)
    assert_all_equal(found, gradients(model, x))


@rules
def test_the_graph_can_be_used_twice(rule):
    model, x = case("conv", rule)
    assert_the_graph_can_be_used_twice(model, x)


@layers
@rules
def test_second_derivatives_are_the_same(layer, rule, monkeypatch):
    model, x = case(layer, rule)

    def penalty(model, x):
        (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return first

    found = gradients(model, x, penalty)
    keep_everything(monkeypatch)
    assert_all_equal(found, gradients(model, x, penalty))
    assert found[2] is not None
    assert found[2].any()


def test_other_hooks_see_what_they_saw(monkeypatch):
    """Their owner counts or moves what is saved; so with them everything is saved as ever."""
    model, x = case("conv", "LSQ")

    def seen():
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape) or t, lambda t: t):
            model(x.requires_grad_())
        return shapes

    found = seen()
    keep_everything(monkeypatch)
    assert found == seen()
    assert torch.Size([6, 4, 3, 3]) in found


@rules
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(rule, reentrant):
    model, x = case("conv", rule)
    assert_all_equal(
        gradients(model, x, lambda model, x: checkpoint(model, x, use_reentrant=reentrant)), gradients(model, x)
    )


@rules
def test_saving_elsewhere_and_forbidding_hooks_work(rule):
    model, x = case("conv", rule)
    expected = gradients(model, x)
    with torch.autograd.graph.save_on_cpu():
        assert_all_equal(gradients(model, x), expected)
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        assert_all_equal(gradients(model, x), expected)


def test_nothing_is_hooked_where_no_gradient_is_recorded_or_pytorch_can_not_tell(monkeypatch):
    model, x = case("conv", "STE")
    value = model[0].get_quantized_weights()["weight"]
    assert not isinstance(kernels.recomputed([value]), nullcontext)
    assert isinstance(kernels.recomputed([x, None, 3]), nullcontext)
    with torch.no_grad():
        assert isinstance(kernels.recomputed([value]), nullcontext)
    monkeypatch.setattr(eligible, "_top_saved_tensors_hooks", None)  # as in a PyTorch that lacks it
    assert isinstance(kernels.recomputed([value]), nullcontext)


def test_without_the_native_kernels_tensors_are_kept(monkeypatch):
    """Making them again would take longer than it is worth."""
    model, _ = case("conv", "STE")
    weight = model[0].get_quantized_weights()["weight"]
    assert not isinstance(kernels.recomputed([weight]), nullcontext)
    monkeypatch.setattr(native, "compiled", lambda: None)
    assert isinstance(kernels.recomputed([weight]), nullcontext)
