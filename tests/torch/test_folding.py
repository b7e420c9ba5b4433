"""Batch-norm folding: the function in eval mode stays, and what can't be folded says why."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from tests.torch.models import network, recipe, vectors, weights_only
from trainable_torch import describe, wrap
from trainable_torch.structure.folding import fold_batch_norm
from trainable_torch.structure.observing import observe


def settled(norm):
    """Return the batch norm as if it had trained: its own statistics, and its own gain and shift."""
    torch.manual_seed(1)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    if norm.affine:
        with torch.no_grad():
            norm.weight.normal_()
            norm.bias.normal_()
    return norm


PAIRS = {
    "conv1d": (lambda bias: nn.Conv1d(3, 4, 2, bias=bias), nn.BatchNorm1d, (2, 3, 5)),
    "conv2d": (lambda bias: nn.Conv2d(3, 4, 2, bias=bias), nn.BatchNorm2d, (2, 3, 5, 5)),
    "conv3d": (lambda bias: nn.Conv3d(3, 4, 2, bias=bias), nn.BatchNorm3d, (2, 3, 4, 4, 4)),
    "grouped": (lambda bias: nn.Conv2d(4, 4, 2, groups=2, bias=bias), nn.BatchNorm2d, (2, 4, 5, 5)),
    "depthwise": (lambda bias: nn.Conv2d(4, 4, 2, groups=4, bias=bias), nn.BatchNorm2d, (2, 4, 5, 5)),
    "transposed1d": (lambda bias: nn.ConvTranspose1d(3, 4, 2, bias=bias), nn.BatchNorm1d, (2, 3, 5)),
    "transposed2d": (lambda bias: nn.ConvTranspose2d(3, 4, 2, bias=bias), nn.BatchNorm2d, (2, 3, 5, 5)),
    "transposed3d": (lambda bias: nn.ConvTranspose3d(3, 4, 2, bias=bias), nn.BatchNorm3d, (2, 3, 3, 3, 3)),
    "transposed_grouped": (lambda bias: nn.ConvTranspose2d(6, 4, 2, groups=2, bias=bias), nn.BatchNorm2d, (2, 6, 5, 5)),
}


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("name", PAIRS)
def test_the_function_in_eval_mode_stays(name, bias, affine):
    layer, norm, shape = PAIRS[name]
    torch.manual_seed(0)
    model = nn.Sequential(layer(bias), settled(norm(4, affine=affine, eps=1e-3))).double().eval()
    x = vectors(*shape).double()
    before = model(x)
    assert fold_batch_norm(model) == ({"1": "0"}, {})
    assert isinstance(model[1], nn.Identity)
    # float64, values of order 10, sums of less than 100 products: rounding stays below 100 * 10 * 2**-53 < 1e-12
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_a_linear_layer_takes_a_batch_norm_over_vectors(bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 4, bias=bias), settled(nn.BatchNorm1d(4)))
    assert outcome(model, vectors(5, 3)) == ({"2": "1"}, {})


def test_it_works_in_single_precision_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 2), settled(nn.BatchNorm2d(4))).eval()
    x = vectors(2, 3, 5, 5)
    exact = copy.deepcopy(model).double()(x.double())
    fold_batch_norm(model)
    assert model[0].weight.dtype == model[0].bias.dtype == torch.float32
    # 12 products and a bias of order 1, all rounded once to float32, summed in float32: 13 * 2 * 2**-24 * 8 < 2e-5
    torch.testing.assert_close(model(x).double(), exact, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_keep_their_type(dtype):
    model = nn.Sequential(nn.Conv2d(3, 4, 2, bias=False), settled(nn.BatchNorm2d(4))).to(dtype)
    fold_batch_norm(model)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@pytest.mark.parametrize("requires_grad", [True, False])
def test_a_new_bias_learns_when_the_weight_does(requires_grad):
    model = nn.Sequential(nn.Conv2d(3, 4, 2, bias=False), nn.BatchNorm2d(4)).requires_grad_(requires_grad)
    fold_batch_norm(model)
    assert model[0].bias.requires_grad is requires_grad


def test_parameters_stay_the_same_objects():
    model = nn.Sequential(nn.Conv2d(3, 4, 2), settled(nn.BatchNorm2d(4)))
    weight, bias = model[0].weight, model[0].bias
    fold_batch_norm(model)
    assert model[0].weight is weight
    assert model[0].bias is bias


def test_what_is_folded_is_told_by_the_wrapped_model():
    qmodel = wrap(network(), recipe())
    assert describe(qmodel).folded == {"stem.norm": "stem.conv"}
    assert describe(qmodel).left_out == {}
    assert "stem.norm -> stem.conv" in str(describe(qmodel))


def test_wrapping_folds_before_weights_are_quantized_and_leaves_the_model_alone():
    model = network()
    settled(model.stem.norm)
    state = copy.deepcopy(model.state_dict())
    qmodel = wrap(model, recipe())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert isinstance(model.stem.norm, nn.BatchNorm2d)
    gain = model.stem.norm.weight / (model.stem.norm.running_var + model.stem.norm.eps).sqrt()
    # one rounding to float32 in the folding, three here: 4 * 2**-24 relative
    torch.testing.assert_close(
        qmodel.stem.conv.weight, model.stem.conv.weight * gain[:, None, None, None], rtol=4 * 2**-24, atol=0
    )


def test_a_recipe_can_switch_folding_off():
    qmodel = wrap(network(), recipe(fold_batch_norm=False))
    assert isinstance(qmodel.stem.norm, nn.BatchNorm2d)
    assert describe(qmodel).folded == {}
    assert describe(qmodel).left_out == {}


@torch.no_grad()
def outcome(model, *inputs, example=None):
    """Fold a model in float64; assert that its function in eval mode stays, and return what was folded and kept."""
    model, inputs = model.double().eval(), [x.double() for x in inputs]
    before = [model(x) for x in inputs]
    observed = None if example is None else observe(model, example.double())
    result = fold_batch_norm(model, observed)
    for x, expected in zip(inputs, before, strict=True):
        # float64, values of order 10, sums of less than 100 products: rounding stays below 100 * 10 * 2**-53 < 1e-12
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    return result


# ---- reasons to leave a batch norm where it is ----------------------------------------------------------------------


class Graph(nn.Module):
    """Layers and a forward that connects them."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.connect = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self.connect(self, x)


def kept(model):
    """Return why the model's one batch norm stays; its function in eval mode must be exactly the same."""
    model.eval()
    x = vectors(2, 4, 5, 5)
    before = model(x)
    folded, reasons = fold_batch_norm(model)
    assert folded == {}
    assert torch.equal(model(x), before)
    ((_, reason),) = reasons.items()
    return reason


def conv(**more):
    torch.manual_seed(0)
    return nn.Conv2d(4, 4, 3, padding=1, **more)


def norm():
    return settled(nn.BatchNorm2d(4))


class SpecialConv(nn.Conv2d):
    """Does more than a convolution."""

    def forward(self, x):
        return super().forward(x).relu()


def after(model, x):
    return model.norm(model.conv(x))


def tied():
    first, second = conv(), conv()
    second.weight = first.weight
    return Graph(lambda m, x: m.norm(m.conv(x)) + m.other(x), conv=first, other=second, norm=norm())


REASONS = {
    "nothing before": ("no layer", lambda: Graph(lambda m, x: m.norm(x), norm=norm())),
    "a function before": ("no layer", lambda: Graph(lambda m, x: m.norm(m.conv(x).relu()), conv=conv(), norm=norm())),
    "another module before": ("ReLU", lambda: nn.Sequential(conv(), nn.ReLU(), norm())),
    "a subclass": ("SpecialConv", lambda: nn.Sequential(SpecialConv(4, 4, 3), norm())),
    "other users": (
        "other users",
        lambda: Graph(lambda m, x: m.norm(y := m.conv(x)) + y, conv=conv(), norm=norm()),
    ),
    "layer called twice": (
        "more than once",
        lambda: Graph(lambda m, x: m.norm(m.conv(x)) + m.conv(x + 1), conv=conv(), norm=norm()),
    ),
    "norm called twice": (
        "more than once",
        lambda: Graph(lambda m, x: m.norm(m.conv(x)) + m.norm(m.other(x)), conv=conv(), other=conv(), norm=norm()),
    ),
    "layer under two names": (
        "more than once",
        lambda: Graph(after, conv=(shared := conv()), norm=norm(), again=shared),
    ),
    "weights shared": ("shares its weights", tied),
    "no statistics": ("statistics", lambda: nn.Sequential(conv(), nn.BatchNorm2d(4, track_running_stats=False))),
    "computed weight": ("hook", lambda: nn.Sequential(nn.utils.spectral_norm(conv()), norm())),
    "parametrized weight": (
        "ParametrizedConv2d",
        lambda: nn.Sequential(parametrizations.spectral_norm(conv()), norm()),
    ),
    "a cut": (
        "can't be traced",
        lambda: Graph(lambda m, x: after(m, x) if x.sum() > -1e9 else x, conv=conv(), norm=norm()),
    ),
}


@pytest.mark.parametrize("case", REASONS)
def test_a_batch_norm_stays_and_says_why(case):
    expected, build = REASONS[case]
    assert expected in kept(build())


def test_other_channels_than_the_layers_are_a_reason():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.norm = nn.Linear(4, 6), settled(nn.BatchNorm1d(3))

        def forward(self, x):  # (batch, 3, 4): the norm's channels are not the layer's
            return self.norm(self.fc(x))

    model = Other().eval()
    x = vectors(2, 3, 4)
    before = model(x)
    assert "channels" in fold_batch_norm(model)[1]["norm"]
    assert torch.equal(model(x), before)


def test_the_wrapped_model_tells_the_reason():
    qmodel = wrap(nn.Sequential(conv(), nn.ReLU(), norm()), weights_only())
    assert "ReLU" in describe(qmodel).left_out["2"]


def test_in_an_untraceable_model_the_parts_are_folded():
    class Chooses(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(conv(), norm())

        def forward(self, x):
            return self.block(x) if x.sum() > -1e9 else x

    model = Chooses().double().eval()
    x = vectors(2, 4, 5, 5).double()
    before = model(x)
    assert fold_batch_norm(model) == ({"block.1": "block.0"}, {})
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)  # as above


def test_dropout_in_the_model_does_not_keep_it_from_being_folded():
    model = Graph(
        lambda m, x: nn.functional.dropout(m.norm(m.conv(x)), training=m.training), conv=conv(), norm=norm()
    ).train()
    assert fold_batch_norm(model)[0] == {"norm": "conv"}


def test_a_branch_that_only_eval_mode_takes_is_seen():
    """In train mode the convolution has one user; in eval mode its output is used before the norm as well."""

    def forward(model, x):
        y = model.conv(x)
        return model.norm(y) if model.training else model.norm(y) + y

    model = Graph(forward, conv=conv(), norm=norm())
    assert "can't be traced" in kept(model)
    model = Graph(forward, conv=conv(), norm=norm()).train()
    assert fold_batch_norm(model)[0] == {}


def test_a_model_without_batch_norm_has_nothing_to_fold():
    assert fold_batch_norm(nn.Sequential(nn.Linear(2, 2), nn.ReLU())) == ({}, {})


def test_folding_works_without_data_on_the_meta_device():
    with torch.device("meta"):
        model = network()
    assert fold_batch_norm(model) == ({"stem.norm": "stem.conv"}, {})
    assert model.stem.conv.bias.is_meta
