"""Which batch norms are known to belong to a layer: by the classes, by hooks, by who else reads them, by an example."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name everyone reads
from torch.nn.utils import parametrizations, parametrize

from tests.torch.models import vectors, weights_only
from tests.torch.test_folding import Graph, outcome, settled
from trainable_core.errors import DocumentError, ModelError, NothingQuantizedWarning
from trainable_torch import calibrate, describe, finalize, load, save, wrap
from trainable_torch.structure.folding import fold_batch_norm

IMAGE = (2, 4, 5, 5)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def conv(cls=nn.Conv2d, **more):
    return cls(4, 4, 3, padding=1, **more)


def norm(cls=nn.BatchNorm2d, channels=4, **more):
    return settled(cls(channels, **more))


def after(model, x):
    return model.norm(model.conv(x))


def folded(model, *inputs, example=None):
    """Return what was folded; the function in eval mode is checked."""
    return outcome(model, *(inputs or [vectors(*IMAGE)]), example=example)[0]


def reason(model, *inputs, example=None):
    """Return why the only batch norm stays; the function in eval mode is checked."""
    done, kept = outcome(model, *(inputs or [vectors(*IMAGE)]), example=example)
    assert done == {}
    (text,) = kept.values()
    return text


# ---- a value worked out by hand -------------------------------------------------------------------------------------


def by_hand():
    """Return a layer y = (2x, 4x + 1) and a batch norm that makes (y0 - 1) * 3, (y1 - 2) * 0.5 + 7 of it."""
    layer, batch_norm = nn.Linear(1, 2), nn.BatchNorm1d(2, eps=0.0)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[2.0], [4.0]]))
        layer.bias.copy_(torch.tensor([0.0, 1.0]))
        batch_norm.running_mean.copy_(torch.tensor([1.0, 2.0]))
        batch_norm.running_var.copy_(torch.tensor([0.25, 4.0]))  # deviations 0.5 and 2
        batch_norm.weight.copy_(torch.tensor([1.5, 1.0]))  # gains 3 and 0.5
        batch_norm.bias.copy_(torch.tensor([0.0, 7.0]))
    return layer, batch_norm


def test_a_batch_norm_behind_a_layer_by_hand():
    layer, batch_norm = by_hand()
    fold_batch_norm(nn.Sequential(nn.Flatten(), layer, batch_norm))
    # (2x - 1) * 3 = 6x - 3;  (4x + 1 - 2) * 0.5 + 7 = 2x + 6.5
    assert layer.weight.tolist() == [[6.0], [2.0]]
    assert layer.bias.tolist() == [-3.0, 6.5]


def test_a_batch_norm_before_a_layer_by_hand():
    _, batch_norm = by_hand()
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[10.0, 100.0]]))
    model = nn.Sequential(batch_norm, layer)
    qmodel = wrap(model, weights_only(), example=torch.zeros(3, 2))
    # 10 * (x0 - 1) * 3 + 100 * ((x1 - 2) * 0.5 + 7) = 30 x0 + 50 x1 + 570
    assert qmodel[1].weight.tolist() == [[30.0, 50.0]]
    assert qmodel[1].bias.tolist() == [570.0]
    assert describe(qmodel).folded == {"0": "1"}


# ---- the axis -------------------------------------------------------------------------------------------------------


def test_a_linear_layer_of_unknown_dimensions_keeps_its_batch_norm():
    model = nn.Sequential(nn.Linear(8, 6), norm(nn.BatchNorm1d, 6))
    assert "number of dimensions" in reason(copy.deepcopy(model), vectors(4, 8), vectors(4, 6, 8))
    assert "example=" in reason(model, vectors(4, 8))


@pytest.mark.parametrize("shape", [(4, 8), (4, 6, 8)], ids=["vectors", "sequences"])
def test_an_example_tells_the_axis(shape):
    model = nn.Sequential(nn.Linear(8, 6), norm(nn.BatchNorm1d, 6))
    x = vectors(*shape)
    if len(shape) == 2:
        assert folded(model, x, example=x) == {"1": "0"}
    else:
        assert "another axis" in reason(model, x, example=x)


TWO_DIMENSIONS = {
    "flatten module": lambda m, x: m.norm(m.fc(m.flatten(x))),
    "flatten function": lambda m, x: m.norm(m.fc(torch.flatten(x, 1))),
    "flatten method": lambda m, x: m.norm(m.fc(x.flatten(start_dim=1))),
    "view": lambda m, x: m.norm(m.fc(x.view(x.size(0), -1))),
    "reshape": lambda m, x: m.norm(m.fc(x.reshape((x.shape[0], 8)))),
    "through an activation": lambda m, x: m.norm(m.fc(F.relu(m.relu(x.flatten(1))))),
    "through a layer": lambda m, x: m.norm(m.fc(m.first(x.flatten(1)))),
    "flattened behind": lambda m, x: m.norm(m.fc(x).flatten(0, -2)),
    "reshaped behind": lambda m, x: m.norm(m.fc(x).reshape(-1, 6)),
}


@pytest.mark.parametrize("how", TWO_DIMENSIONS)
def test_a_graph_may_tell_the_number_of_dimensions(how):
    model = Graph(
        TWO_DIMENSIONS[how],
        flatten=nn.Flatten(),
        relu=nn.ReLU(),
        first=nn.Linear(8, 8),
        fc=nn.Linear(8, 6),
        norm=norm(nn.BatchNorm1d, 6),
    )
    assert folded(model, vectors(4, 2, 4) if "behind" not in how else vectors(4, 8)) == {"norm": "fc"}


CHANNELS_MOVED = {
    "transpose": lambda m, x: m.norm(m.fc(x).transpose(1, 2)).transpose(1, 2),
    "transpose by keyword": lambda m, x: m.norm(m.fc(x).transpose(dim0=1, dim1=2)),
    "transpose counted from the end": lambda m, x: m.norm(m.fc(x).transpose(-1, 1)),
    "permute": lambda m, x: m.norm(m.fc(x).permute(0, 2, 1)),
    "permute of a tuple": lambda m, x: m.norm(m.fc(x).permute((0, 2, 1)).contiguous()),
    "torch.permute": lambda m, x: m.norm(torch.permute(m.fc(x), (0, 2, 1))),
}


@pytest.mark.parametrize("how", CHANNELS_MOVED)
def test_channels_are_followed_to_the_axis_of_the_batch_norm(how):
    model = Graph(CHANNELS_MOVED[how], fc=nn.Linear(8, 6), norm=norm(nn.BatchNorm1d, 6))
    assert folded(model, vectors(4, 6, 8)) == {"norm": "fc"}


CHANNELS_LOST = {
    "first and last": lambda m, x: m.norm(m.fc(x).transpose(0, 2)),
    "rows and columns": lambda m, x: m.norm(m.fc(x).permute(0, 1, 2)),
    "reinterpreted": lambda m, x: m.norm(m.fc(x).reshape(x.shape[0], 6, -1)),
    "twice": lambda m, x: m.norm(m.fc(x).transpose(1, 2).transpose(1, 2)),
    "viewed": lambda m, x: m.norm(m.fc(x).view(6, 6, -1)),
}


@pytest.mark.parametrize("example", [False, True], ids=["traced", "observed"])
@pytest.mark.parametrize("how", CHANNELS_LOST)
def test_channels_on_another_axis_are_not_normalized_by_the_layer(how, example):
    model = Graph(CHANNELS_LOST[how], fc=nn.Linear(8, 6), norm=norm(nn.BatchNorm1d, 6))
    x = vectors(6, 6, 8)
    reason(model, x, example=x if example else None)


def levit(m, x):
    """Norm a layer's output of any shape as LeViT does: flattened, and put back into shape."""
    y = m.fc(x)
    return m.norm(y.flatten(0, 1)).reshape_as(y)


def test_a_batch_norm_behind_a_flatten_needs_an_example():
    model = Graph(levit, fc=nn.Linear(8, 6), norm=norm(nn.BatchNorm1d, 6))
    x = vectors(4, 5, 8)
    assert "example=" in reason(copy.deepcopy(model), x)
    assert folded(model, x, example=x) == {"norm": "fc"}


def test_of_a_convolution_the_channels_are_followed_too():
    forward = lambda m, x: m.norm(m.conv(x).flatten(2))  # noqa: E731 - a model in one line
    model = Graph(forward, conv=conv(), norm=norm(nn.BatchNorm1d))
    assert folded(model) == {"norm": "conv"}


def test_reshapes_are_understood_by_their_shapes_in_a_run():
    forward = lambda m, x: m.norm(m.conv(x).reshape(x.shape[0], 4, -1))  # noqa: E731 - as above
    model = Graph(forward, conv=conv(), norm=norm(nn.BatchNorm1d))
    x = vectors(*IMAGE)
    assert folded(model, x, example=x) == {"norm": "conv"}


def test_a_reshape_that_an_example_can_not_tell_apart_is_left_alone():
    """Four channels, and four columns: the example could as well have put the columns where the channels are."""
    forward = lambda m, x: m.norm(m.conv(x).reshape(x.shape[0], 4, -1))  # noqa: E731 - as above
    model = Graph(forward, conv=nn.Conv2d(4, 4, 1), norm=norm(nn.BatchNorm1d))
    x = vectors(2, 4, 5, 4)
    assert "not known" in reason(model, x, example=x)


# ---- subclasses -----------------------------------------------------------------------------------------------------


class NormAct(nn.BatchNorm2d):
    def forward(self, x):
        return F.relu(super().forward(x))


class PaddedNorm(nn.BatchNorm2d):
    def _check_input_dim(self, x):
        x.mul_(2)


class ReadsNorm(nn.BatchNorm2d):
    @property
    def eps(self):
        return 0.5

    @eps.setter
    def eps(self, value):
        pass


class StaysNorm(nn.BatchNorm2d):
    def train(self, mode=True):
        del mode
        return super().train(True)


class CalledNorm(nn.BatchNorm2d):
    def __call__(self, x):
        return super().__call__(x) + 1


@pytest.mark.parametrize("example", [False, True], ids=["traced", "observed"])
@pytest.mark.parametrize("cls", [NormAct, PaddedNorm, ReadsNorm, CalledNorm])
def test_a_batch_norm_with_its_own_way_stays(cls, example):
    model = nn.Sequential(conv(), norm(cls))
    x = vectors(*IMAGE)
    assert cls.__name__ in reason(model, x, example=x if example else None)


def test_a_batch_norm_that_always_trains_stays():
    model = nn.Sequential(conv(), norm(StaysNorm))
    fold_batch_norm(model)
    assert type(model[1]) is StaysNorm


class PlainNorm(nn.BatchNorm2d):
    """A batch norm under another name."""

    flavor = "vanilla"

    def __init__(self, channels, **more):
        super().__init__(channels, **more)
        self.seen = 0

    def extra_repr(self):
        return "plain"

    def describe(self):
        return self.flavor


class PlainConv(nn.Conv2d):
    def reset_parameters(self):
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)


class PlainLinear(nn.Linear):
    pass


class Inherited(PlainConv):
    pass


@pytest.mark.parametrize("cls", [PlainConv, Inherited])
def test_a_subclass_that_computes_the_same_is_folded(cls):
    assert folded(nn.Sequential(conv(cls), norm(PlainNorm))) == {"1": "0"}


def test_a_subclass_of_the_linear_layer_is_folded():
    model = nn.Sequential(nn.Flatten(), PlainLinear(8, 6), norm(nn.BatchNorm1d, 6))
    assert folded(model, vectors(4, 8)) == {"2": "1"}


def test_the_synchronized_batch_norm_is_folded():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(conv(), norm()))
    assert type(model[1]) is nn.SyncBatchNorm
    assert folded(model) == {"1": "0"}


class SameConv(nn.Conv2d):
    """Pads first, then calls PyTorch's own forward."""

    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class FunctionalConv(nn.Conv2d):
    """Pads by what it needs, then calls the function itself."""

    def forward(self, x):
        more = max((x.shape[-1] + 1) // 2 * 2 - x.shape[-1], 0)
        x = F.pad(x, [0, more, 0, more])
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class OwnMethodConv(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x + 1, weight, bias)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("cls", [SameConv, OwnMethodConv])
def test_a_convolution_that_prepares_its_input_is_folded(cls, bias):
    assert folded(nn.Sequential(conv(cls, bias=bias), norm())) == {"1": "0"}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("cls", [SameConv, OwnMethodConv, FunctionalConv])
def test_so_it_is_where_only_an_example_shows_it(cls, bias):
    model = Graph(lambda m, x: after(m, x) if x.sum() > -1e9 else x, conv=conv(cls, bias=bias), norm=norm())
    x = vectors(*IMAGE)
    assert folded(model, x, example=x) == {"norm": "conv"}


class Standardized(nn.Conv2d):
    """Computes its weight, as BiT does."""

    def forward(self, x):
        weight = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding)


class Scaled(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight * 2, bias)


class Residual(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + x


class Twice(nn.Conv2d):
    def forward(self, x):
        return super().forward(super().forward(x))


class WithoutBias(nn.Conv2d):
    """Ignores a bias, so there is no place for the shift."""

    def forward(self, x):
        return F.conv2d(x, self.weight, None, self.stride, self.padding)


class Penalized(nn.Conv2d):
    """Reads its weight a second time."""

    def forward(self, x):
        return super().forward(x + self.weight.mean())


class Adapted(nn.Conv2d):
    """A low-rank adapter beside the convolution."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.down = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return super().forward(x) + self.down(x)


class ComputedWeight(nn.Conv2d):
    @property
    def weight(self):
        return self._parameters["weight"] * 2


@pytest.mark.parametrize("example", [False, True], ids=["traced", "observed"])
@pytest.mark.parametrize(
    "cls", [Standardized, Scaled, Residual, Twice, WithoutBias, Penalized, Adapted, ComputedWeight]
)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_a_convolution_that_does_more_keeps_its_batch_norm(cls, bias, example):
    if cls is ComputedWeight:
        layer = conv(bias=bias)
        layer.__class__ = cls
    else:
        layer = conv(cls, bias=bias)
    x = vectors(*IMAGE)
    assert cls.__name__ in reason(nn.Sequential(layer, norm()), x, example=x if example else None)


class FusedConv(nn.Conv2d):
    """Holds the batch norm that is applied to its output."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm = norm()

    def forward(self, x):
        return self.norm(super().forward(x))


@pytest.mark.parametrize("example", [False, True], ids=["traced", "observed"])
def test_a_batch_norm_inside_a_layer_stays(example):
    x = vectors(*IMAGE)
    reason(nn.Sequential(conv(FusedConv), nn.ReLU()), x, example=x if example else None)


def replaced_forward(module):
    own = module.forward
    module.forward = lambda x: own(x) + 1
    return module


@pytest.mark.parametrize("example", [False, True], ids=["traced", "observed"])
@pytest.mark.parametrize("which", [0, 1], ids=["layer", "norm"])
def test_a_forward_that_is_replaced_on_the_instance_is_not_the_classes(which, example):
    model = nn.Sequential(conv(), norm())
    replaced_forward(model[which])
    x = vectors(*IMAGE)
    assert "replaced" in reason(model, x, example=x if example else None)


def adds_its_input(model, x):
    return model.norm(model.conv(x) + x)


def test_the_forward_of_a_model_may_be_replaced_too():
    model = Graph(after, conv=conv(), norm=norm())
    model.forward = functools.partial(adds_its_input, model)
    assert "can't be traced" in reason(model)
    x = vectors(*IMAGE)
    assert "no layer" in reason(model, x, example=x)
    outputs = {"method": "UNIFORM", "n_bits": 8, "training_method": "STE", "placement": "outputs"}
    told = describe(wrap(model, weights_only(activations=outputs))).left_out["functional operations"]
    assert "replaced on the instance" in told
    assert "example=" in told


# ---- hooks ----------------------------------------------------------------------------------------------------------

HOOKS = {
    "forward": lambda module: module.register_forward_hook(lambda _module, _args, output: F.relu(output)),
    "pre": lambda module: module.register_forward_pre_hook(lambda _module, args: (args[0] * 2,)),
    "backward": lambda module: module.register_full_backward_hook(lambda _module, given, _: (2 * given[0],)),
    "backward pre": lambda module: module.register_full_backward_pre_hook(lambda _module, given: (2 * given[0],)),
}


@pytest.mark.parametrize("example", [False, True], ids=["traced", "observed"])
@pytest.mark.parametrize("which", [0, 1], ids=["layer", "norm"])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_keeps_a_batch_norm_where_it_is(hook, which, example):
    model = nn.Sequential(conv(), norm())
    HOOKS[hook](model[which])
    x = vectors(*IMAGE)
    told = reason(model, x, example=x if example else None)
    assert "hook" in told or (hook == "pre" and "no layer" in told)  # a run shows what the hook puts between


@pytest.mark.parametrize("example", [False, True], ids=["traced", "observed"])
@pytest.mark.parametrize("between", [nn.Identity, nn.Flatten], ids=["identity", "flatten"])
def test_a_hook_on_what_is_between_keeps_it_too(between, example):
    middle = between() if between is nn.Identity else nn.Flatten(2)
    model = nn.Sequential(conv(), middle, norm(nn.BatchNorm2d if between is nn.Identity else nn.BatchNorm1d))
    middle.register_forward_hook(lambda _module, _args, output: output + 1)
    x = vectors(*IMAGE)
    assert between.__name__ in reason(model, x, example=x if example else None)


# ---- what is between, and where else it goes ------------------------------------------------------------------------


@pytest.mark.parametrize("example", [False, True], ids=["traced", "observed"])
@pytest.mark.parametrize("between", [nn.Identity(), nn.Dropout(0.0), nn.Dropout2d(0.0)])
def test_what_passes_everything_on_is_looked_through(between, example):
    x = vectors(*IMAGE)
    assert folded(nn.Sequential(conv(), between, norm()), x, example=x if example else None) == {"2": "0"}


@pytest.mark.parametrize("example", [False, True], ids=["traced", "observed"])
@pytest.mark.parametrize("between", [nn.Dropout(0.5), nn.ReLU(), nn.ReLU(inplace=True), nn.MaxPool2d(1)])
def test_what_changes_values_is_not(between, example):
    x = vectors(*IMAGE)
    assert type(between).__name__ in reason(nn.Sequential(conv(), between, norm()), x, example=x if example else None)


def keeps(m, x):
    m.kept = m.conv(x)
    return m.norm(m.kept)


ELSEWHERE = {
    "added": lambda m, x: m.norm(y := m.conv(x)) + y,
    "added before": lambda m, x: (y := m.conv(x)).sum() + m.norm(y),
    "in place": lambda m, x: m.norm(m.conv(x).mul_(2)),
    "in place on a view": lambda m, x: ((y := m.conv(x)).view(-1)[:2].mul_(2), m.norm(y))[1],
    "in place by operator": lambda m, x: m.norm(doubled(m.conv(x))),
    "returned": lambda m, x: torch.stack([m.norm(y := m.conv(x)), y]),
    "to another layer": lambda m, x: m.norm(y := m.conv(x)) + m.other(y),
    "behind a flatten": lambda m, x: m.norm1(y := m.conv(x).flatten(2)) + y,
}


def doubled(y):
    y *= 2
    return y


@pytest.mark.parametrize("example", [False, True], ids=["traced", "observed"])
@pytest.mark.parametrize("how", ELSEWHERE)
def test_an_output_that_goes_elsewhere_too_is_not_changed(how, example):
    one = {"norm1": norm(nn.BatchNorm1d)} if "flatten" in how else {"norm": norm()}
    model = Graph(ELSEWHERE[how], conv=conv(), other=conv(), **one)
    x = vectors(*IMAGE)
    reason(model, x, example=x if example else None)


@pytest.mark.parametrize("example", [False, True], ids=["traced", "observed"])
def test_an_output_that_the_model_keeps_is_not_changed(example):
    model, x = Graph(keeps, conv=conv(), norm=norm()), vectors(*IMAGE)
    assert "other users" in reason(Untraced(model) if example else model, x, example=x if example else None)


@pytest.mark.parametrize("example", [False, True], ids=["traced", "observed"])
def test_the_size_of_an_output_may_be_read(example):
    forward = lambda m, x: m.norm(y := m.conv(x)) * y.shape[0] + torch.zeros_like(y)  # noqa: E731 - as above
    x = vectors(*IMAGE)
    model = Graph(forward, conv=conv(), norm=norm())
    assert folded(model, x, example=x if example else None) == {"norm": "conv"}


# ---- who else reads -------------------------------------------------------------------------------------------------

READERS = {
    "norm.weight": lambda m, x: after(m, x) * m.norm.weight.mean(),
    "norm.bias": lambda m, x: after(m, x) + m.norm.bias.view(1, -1, 1, 1),
    "norm.running_mean": lambda m, x: after(m, x) + m.norm.running_mean.view(1, -1, 1, 1),
    "norm.running_var by itself": lambda m, x: after(m, x) + float(m.norm.running_var.sum()),
    "conv.weight": lambda m, x: after(m, x) + m.conv.weight.sum(),
    "conv.weight in a function": lambda m, x: after(m, x) + F.conv2d(x, m.conv.weight, padding=1),
    "conv.bias": lambda m, x: after(m, x) + m.conv.bias.sum(),
    "a dictionary": lambda m, x: after(m, x) + dict(m.named_parameters())["conv.weight"].sum(),
    "all of them": lambda m, x: after(m, x) + sum(p.norm() for p in m.parameters()),
    "its data": lambda m, x: after(m, x) + m.conv.weight.data.sum(),
    "norm.weight's size, which is gone then": lambda m, x: after(m, x) * m.norm.weight.shape[0],
    "norm.running_mean's type": lambda m, x: after(m, x.to(m.norm.running_mean.dtype)),
    "a function of the norm": lambda m, x: after(m, x) + F.batch_norm(x, m.norm.running_mean, m.norm.running_var),
}


@pytest.mark.parametrize("example", [False, True], ids=["traced", "observed"])
@pytest.mark.parametrize("how", READERS)
def test_parameters_that_other_code_reads_stay(how, example):
    model = Graph(READERS[how], conv=conv(), norm=norm())
    x = vectors(*IMAGE)
    assert "read by other code" in reason(model if not example else Untraced(model), x, example=x if example else None)


@pytest.mark.parametrize("example", [False, True], ids=["traced", "observed"])
def test_type_and_size_of_a_layers_weight_may_be_read(example):
    forward = lambda m, x: after(m, x.to(m.conv.weight.dtype)) * m.conv.weight.shape[0]  # noqa: E731 - as above
    model, x = Graph(forward, conv=conv(), norm=norm()), vectors(*IMAGE)
    (layer,) = folded(Untraced(model) if example else model, x, example=x if example else None).values()
    assert layer.endswith("conv")


class Untraced(nn.Module):
    """A model around another one that tracing can't follow."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x) if x.sum() > -1e9 else x


def shared_parameters():
    first, second = norm(), norm()
    second.weight = first.weight
    return Graph(lambda m, x: m.second(m.conv(x)) + m.first(x), conv=conv(), first=first, second=second)


def shared_memory():
    model = Graph(lambda m, x: m.norm(m.conv(x)) + m.other(x), conv=conv(), other=conv(), norm=norm()).double()
    model.other.weight = nn.Parameter(model.conv.weight.detach())
    return model


@pytest.mark.parametrize("build", [shared_parameters, shared_memory])
def test_shared_parameters_stay(build):
    model = build().double().eval()
    x = vectors(*IMAGE).double()
    before = model(x)
    assert fold_batch_norm(model)[0] == {}
    assert torch.equal(model(x), before)


# ---- reached otherwise than by attribute ----------------------------------------------------------------------------


class Reaches(nn.Module):
    """A model that calls its layers by way of something else that holds them."""

    def __init__(self, hold, call):
        super().__init__()
        self.conv, self.norm = conv(), norm()
        self.held = hold(self)
        self.call = call

    def forward(self, x):
        return self.call(self, x)


def one_by_one(model, x):
    for layer in model.held:
        x = layer(x)
    return x


def by_parts(model, x):
    for key in sorted(model.held):
        x = model.held[key](x)
    return x


REACHED = {
    "list": (lambda m: [m.conv, m.norm], one_by_one),
    "tuple": (lambda m: (m.conv, m.norm), one_by_one),
    "dict": (lambda m: {"a": m.conv, "b": m.norm}, by_parts),
    "partials": (lambda m: [functools.partial(m.conv), functools.partial(m.norm)], one_by_one),
}


@pytest.mark.parametrize("example", [False, True], ids=["traced", "observed"])
@pytest.mark.parametrize("how", REACHED)
def test_a_pair_that_is_reached_by_other_means_is_folded_for_them_too(how, example):
    x = vectors(*IMAGE)
    model = Reaches(*REACHED[how])
    assert folded(Untraced(model) if example else model, x, example=x if example else None)


@pytest.mark.parametrize("example", [False, True], ids=["traced", "observed"])
@pytest.mark.parametrize("which", ["conv", "norm"])
def test_a_bound_forward_is_no_call_of_the_layer(which, example):
    hold = {"conv": lambda m: [m.conv.forward, m.norm], "norm": lambda m: [m.conv, m.norm.forward]}[which]
    x = vectors(*IMAGE)
    reason(Reaches(hold, one_by_one), x, example=x if example else None)


@pytest.mark.parametrize("example", [False, True], ids=["traced", "observed"])
def test_layers_that_are_not_registered_are_left_alone(example):
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [conv(), norm()]
            self.norm, self.last = norm(), conv()

        def forward(self, x):
            return self.last(self.norm(self.layers[1](self.layers[0](x))).relu())

    model, x = Hidden().eval(), vectors(*IMAGE)
    model.layers[1].eval()
    before = model(x)
    how = {**weights_only(), "rules": [{"match": {"name": "last"}, "skip": True}]}
    with pytest.warns(NothingQuantizedWarning):
        qmodel = wrap(model, how, **({"example": x} if example else {}))
    assert list(describe(qmodel).left_out) == ["layers[0]", "norm", "last"]
    assert torch.equal(qmodel.eval()(x), before)


# ---- parts of models that can't be traced ---------------------------------------------------------------------------


class Around(nn.Module):
    """Code that can't be traced, around a block that can."""

    def __init__(self, **held):
        super().__init__()
        self.block = nn.Sequential(conv(), norm())
        self.inner = Graph(after, conv=conv(), norm=norm())
        for name, value in held.items():
            setattr(self, name, value)

    def forward(self, x):
        if x.sum() > -1e9:
            return self.use(x)
        return x


class CallsParts(Around):
    def use(self, x):
        return self.inner(x=self.block(x))


class Indexes(Around):
    def use(self, x):
        return self.block[1](self.block[0](x) + x) + self.inner.norm(x) + self.inner.conv(x)


class Iterates(Around):
    def use(self, x):
        for layer in self.block:
            x = x + layer(x)
        return x + self.inner.norm(x) + self.inner.conv(x)


class ReadsInside(Around):
    def use(self, x):
        return self.block(x) * self.block[1].weight.mean() + self.inner(x) * self.inner.norm.weight.mean()


class Enumerates(Around):
    def use(self, x):
        return self.block(x) + self.inner(x) + sum(p.norm() for p in self.parameters())


class Names(Around):
    def use(self, x):
        return self.get_submodule("block.0")(x) + getattr(self.inner, "conv")(x) + self.block(x) + self.inner(x)  # noqa: B009 - what it is about


class Holds(Around):
    def __init__(self):
        super().__init__()
        self.also = [self.block[0], self.inner.conv]

    def use(self, x):
        return self.also[0](x) + self.also[1](x) + self.block(x) + self.inner(x)


class Listed(nn.Module):
    """Blocks in a ModuleList, each called as a whole."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(conv(), norm()) for _ in range(2)])

    def forward(self, x):
        for number, block in enumerate(self.blocks):
            if x.sum() > -1e9 + number:
                x = block(x)
        return x


class ListedAndOpened(Listed):
    def forward(self, x):
        for block in self.blocks:
            if x.sum() > -1e9:
                x = block[1](block[0](x) + x)
        return x


def test_a_part_that_is_called_as_a_whole_is_folded():
    assert folded(CallsParts()) == {"block.1": "block.0", "inner.norm": "inner.conv"}
    assert folded(Listed()) == {"blocks.0.1": "blocks.0.0", "blocks.1.1": "blocks.1.0"}


@pytest.mark.parametrize("cls", [Indexes, Iterates, ReadsInside, Enumerates, Names, Holds, ListedAndOpened])
def test_a_part_that_may_be_opened_is_left_alone(cls):
    done, kept = outcome(cls(), vectors(*IMAGE))
    assert done == {}
    assert len(kept) == 2
    assert all("otherwise" in text or "as well" in text for text in kept.values()), kept


# ---- norms in other states ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["training", "frozen", "no momentum", "statistics added later", "bias only"])
def test_what_a_batch_norm_does_in_eval_mode_is_folded_whatever_its_state(state):
    more = {"no momentum": {"momentum": None}, "bias only": {}}.get(state, {})
    model = nn.Sequential(conv(), norm(**more))
    if state == "frozen":
        model.train()
        model[1].eval()
    elif state == "statistics added later":
        model[1].track_running_stats = False
    elif state == "bias only":
        model[1].weight = None
    assert folded(model) == {"1": "0"}


def test_computed_weights_stay():
    for computed in (
        nn.Sequential(parametrizations.weight_norm(conv()), norm()),
        nn.Sequential(nn.utils.spectral_norm(conv()), norm()),
        nn.Sequential(conv(), parametrizations.weight_norm(norm(), dim=None)),
    ):
        reason(computed)


def test_a_parametrized_norm_stays():
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    batch_norm = norm()
    parametrize.register_parametrization(batch_norm, "weight", Doubled())
    assert "ParametrizedBatchNorm2d" in reason(nn.Sequential(conv(), batch_norm))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_example_works_in_half_precision(dtype):
    model = nn.Sequential(nn.Linear(8, 6), norm(nn.BatchNorm1d, 6)).to(dtype)
    qmodel = wrap(model, weights_only(), example=vectors(4, 8).to(dtype))
    assert describe(qmodel).folded == {"1": "0"}
    assert qmodel[0].weight.dtype == dtype


def test_an_example_works_on_the_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6))
        qmodel = wrap(model, weights_only(), example=vectors(4, 8))
    assert describe(qmodel).folded == {"1": "0"}


# ---- examples -------------------------------------------------------------------------------------------------------


class Asks(nn.Module):
    """Can't be traced, and takes what it is given by keyword or position."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = conv(), norm()

    def forward(self, image, scale=1.0):
        return self.norm(self.conv(image)) if image.sum() > -1e9 else image * scale


X = vectors(*IMAGE)
EXAMPLES = {
    "tensor": X,
    "keywords": {"image": X, "scale": 2.0},
    "with labels": (X, torch.zeros(2)),
    "list with labels": [X, torch.zeros(2)],
    "callable": lambda model: model(X, scale=2.0),
}


@pytest.mark.parametrize("how", EXAMPLES)
def test_an_example_is_a_batch_as_calibrate_takes_it_or_a_function(how):
    model = Asks().eval()
    state, before = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    qmodel = wrap(model, weights_only(), example=EXAMPLES[how])
    assert torch.equal(torch.get_rng_state(), before)
    assert describe(qmodel).folded == {"norm": "conv"}
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert not model.conv._forward_hooks  # noqa: SLF001 - nothing of the observation stays
    finalize(calibrate(qmodel))(X)


def test_an_example_that_the_model_can_not_be_called_with_is_refused():
    with pytest.raises(ModelError, match="example"):
        wrap(Asks(), weights_only(), example={"picture": X})


class Differs(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.conv, self.norm = conv(), norm()
        self.connect = forward

    def forward(self, x):
        return self.connect(self, x)


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.norm(m.conv(x)) if m.training else m.norm(m.conv(x) + x),
        lambda m, x: m.norm(m.conv(x) + x) if m.training else m.norm(m.conv(x)),
        lambda m, x: (m.norm(m.conv(x)), m.conv.weight.sum())[0] if m.training else m.norm(m.conv(x)),
        lambda m, x: m.norm(F.dropout(m.conv(x), 0.5, m.training)),
    ],
    ids=["more in eval", "more in training", "read in training", "dropout"],
)
def test_a_model_that_differs_between_its_modes_is_left_alone(forward):
    model = Untraced(Differs(forward))
    x = vectors(*IMAGE)
    reason(model, x, example=x)


def test_a_model_that_can_not_run_in_train_mode_is_left_alone():
    def needs_labels(model, x):
        if model.training:
            raise ValueError("no labels")
        return after(model, x)

    x = vectors(*IMAGE)
    assert "no labels" in reason(Untraced(Differs(needs_labels)), x, example=x)


def test_what_the_example_does_not_reach_stays():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = conv(), norm()

        def forward(self, x):
            return self.norm(self.conv(x)) if x.sum() > 1e9 else x

    x = vectors(*IMAGE)
    assert "did not reach" in reason(Branches(), x, example=x)


@pytest.mark.parametrize("padding", [0, "valid", 1])
def test_a_batch_norm_before_a_convolution_is_folded_where_no_zeros_are_put_between(padding):
    x = vectors(*IMAGE)
    for pads in ("zeros", "circular"):
        model = nn.Sequential(nn.ReLU(), norm(), nn.Conv2d(4, 6, 3, padding=padding, padding_mode=pads, groups=2))
        if padding == 1 and pads == "zeros":
            reason(model, x, example=x)
        else:
            assert folded(model, x, example=x) == {"1": "2"}


def test_both_neighbours_of_a_convolution_are_folded_into_it():
    x = vectors(*IMAGE)
    model = nn.Sequential(nn.ReLU(), norm(), nn.Conv2d(4, 6, 3, groups=2), norm(channels=6))
    assert folded(model, x, example=x) == {"1": "2", "3": "2"}


def test_a_batch_norm_before_a_layer_that_is_not_its_only_reader_stays():
    x = vectors(5, 4)
    model = Graph(lambda m, x: m.fc(y := m.norm(F.relu(x))) + y, fc=nn.Linear(4, 4), norm=norm(nn.BatchNorm1d))
    reason(model, x, example=x)


def test_a_batch_norm_stays_the_same_object_and_tells_its_size():
    model = nn.Sequential(conv(), norm())
    batch_norm = model[1]
    fold_batch_norm(model)
    assert model[1] is batch_norm
    assert isinstance(batch_norm, nn.Identity)
    assert batch_norm.num_features == 4
    assert list(model.state_dict()) == ["0.weight", "0.bias"]


# ---- files ----------------------------------------------------------------------------------------------------------


def test_a_file_remembers_what_was_folded_with_an_example(tmp_path):
    def build():
        return Untraced(Graph(levit, fc=nn.Linear(8, 6, bias=False), norm=norm(nn.BatchNorm1d, 6)))

    x = vectors(4, 5, 8)
    qmodel = calibrate(wrap(build(), weights_only(), example=x))
    for model in (qmodel, finalize(qmodel)):
        save(model, tmp_path / "model.safetensors")
        loaded = load(tmp_path / "model.safetensors", build())
        assert describe(loaded).folded == {"model.norm": "model.fc"}
        assert torch.equal(loaded.eval()(x), qmodel.eval()(x))


def test_a_file_for_another_model_is_refused(tmp_path):
    save(calibrate(wrap(nn.Sequential(conv(), norm()), weights_only())), tmp_path / "model.safetensors")
    with pytest.raises(DocumentError, match="another architecture"):
        load(tmp_path / "model.safetensors", nn.Sequential(conv(), nn.ReLU()))


# ---- what no function of PyTorch shows ------------------------------------------------------------------------------


def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


SCRIPTED: list[Any] = []
"""Filled by the test: scripting warns, and a script can't be copied with a model."""


class Doubles(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2


UNSEEN = {
    "a script": lambda m, x: m.norm(y := m.conv(x)) + SCRIPTED[0](y),
    "a script module": lambda m, x: m.norm(y := m.conv(x)) + m.script(y),
    "an autograd function": lambda m, x: m.norm(y := m.conv(x)) + Doubles.apply(y),
    "an operator": lambda m, x: m.norm(y := m.conv(x)) + torch.ops.aten.mul.Tensor(y, y),
    "an array": lambda m, x: m.norm(y := m.conv(x)) + torch.from_numpy(y.detach().numpy()),
    "a script of a parameter": lambda m, x: m.norm(m.conv(x)) + SCRIPTED[0](m.conv.weight).sum(),
    "a script of a statistic": lambda m, x: m.norm(m.conv(x)) + SCRIPTED[0](m.norm.running_mean).sum(),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # models that have them still exist
@pytest.mark.parametrize("how", UNSEEN)
def test_whoever_uses_an_output_or_a_parameter_below_pytorchs_functions_is_seen_too(how):
    script = torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()).double().eval())
    model, x = Graph(UNSEEN[how], conv=conv(), norm=norm(), script=script), vectors(*IMAGE)
    model = Untraced(model)
    SCRIPTED[:] = [torch.jit.script(twice)]
    assert ("other users" if "of a" not in how else "other code") in reason(model, x, example=x)
