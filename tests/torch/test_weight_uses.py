"""What a model does with a weight besides passing it to its layer's operation, and what reaches a quantizer."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name everyone reads
from torch.nn.utils import rnn

from trainable_torch import calibrate, describe, finalize, wrap

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")  # PyTorch's own, in jvp

WEIGHTS = {"weights": {"method": "SYMMETRIC", "n_bits": 3, "training_method": "LSQ"}}
BOTH = {**WEIGHTS, "activations": {"method": "UNIFORM", "n_bits": 4, "training_method": "LSQ"}}
OUTPUTS = {**WEIGHTS, "activations": {**BOTH["activations"], "placement": "outputs"}}


def x_of(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


# ---- writes ---------------------------------------------------------------------------------------------------------


class Assigns(nn.Linear):
    def forward(self, x):
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.3)
        return super().forward(x)


class Multiplies(nn.Linear):
    def forward(self, x):
        self.weight.data *= torch.ones(8, 8).triu()
        return super().forward(x)


class Copies(nn.Linear):
    def constrain(self):
        with torch.no_grad():
            self.weight.copy_(F.normalize(self.weight))

    def forward(this, x):  # noqa: N805 - the name is free
        this.constrain()
        return F.linear(x, this.weight)


class Initializes(nn.Linear):
    def forward(self, x):
        nn.init.zeros_(self.weight)
        return super().forward(x)


class Parent(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        self.fc.weight.data[0] = 0
        return self.last(self.fc(x))


class ParentOfAList(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8)])

    def forward(self, x):
        for layer in self.layers:
            layer.weight.data.clamp_(-0.1, 0.1)
            x = layer(x)
        return x


def constrained(make):
    return nn.Sequential(make(8, 8), nn.Linear(8, 8)) if issubclass(make, nn.Linear) else make()


@pytest.mark.filterwarnings("ignore::trainable_core.errors.NothingQuantizedWarning")
@pytest.mark.parametrize("make", [Assigns, Multiplies, Copies, Initializes, Parent, ParentOfAList])
def test_a_weight_that_the_forward_writes_into_stays_float_and_is_written(make):
    model = constrained(make)
    qmodel = calibrate(wrap(model, WEIGHTS))
    (name,) = [name for name, reason in describe(qmodel).left_out.items() if "writes into its weight" in reason]
    x = x_of(2, 8)
    qmodel(x)
    model(x)
    assert torch.equal(qmodel.get_submodule(name).weight, model.get_submodule(name).weight)


class SetsUp(nn.Linear):
    """Writes into its weight, but not in a forward; and into something else in it."""

    def reset_parameters(self):
        self.weight.data.normal_()

    def forward(self, x):
        y = super().forward(x)
        y.data.add_(1)
        self.weight.requires_grad_()
        return y


def test_other_writes_do_not_count():
    assert not describe(wrap(nn.Sequential(SetsUp(8, 8)), WEIGHTS)).left_out


# ---- what is computed of a weight -----------------------------------------------------------------------------------


class Standardizes(nn.Conv2d):
    def forward(self, x):
        weight = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True, momentum=0.0)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias)


class Equalizes(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight * 0.5, self.bias)


class Turns(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight.flip(-1).contiguous(), self.bias)


@pytest.mark.parametrize(("make", "operation"), [(Standardizes, "batch_norm"), (Equalizes, ""), (Turns, "")])
def test_a_layer_that_computes_something_of_its_weight_is_told(make, operation):
    left_out = describe(wrap(nn.Sequential(make(3, 4, 3)), WEIGHTS)).left_out
    assert (operation in left_out["0.weight"]) if operation else not left_out


class Cosine(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return F.linear(self.first(x), F.normalize(self.head.weight))


class Concatenates(Cosine):
    def forward(self, x):
        return F.linear(x, torch.cat([self.first.weight.t(), self.head.weight]))


@pytest.mark.parametrize(("make", "told"), [(Cosine, ["head.weight"]), (Concatenates, [])])
def test_what_a_parent_computes_of_a_weight_is_told_after_calibration(make, told):
    qmodel = calibrate(wrap(make(), BOTH), [x_of(2, 8)])
    reasons = describe(qmodel).left_out
    assert [name for name, reason in reasons.items() if "on no grid" in reason] == told
    read = [name for name, reason in reasons.items() if "read its weights directly" in reason]
    assert read == (["head: input"] if make is Cosine else ["first: input", "head: input"])


def test_weights_that_share_a_parameter_are_read_if_one_of_them_is():
    class Shares(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.used, self.unused = (nn.Embedding(9, 4) for _ in range(3))
            self.used.weight = self.shared.weight

        def forward(self, x):
            return self.used(x)

    qmodel = calibrate(wrap(Shares(), WEIGHTS))
    qmodel(torch.tensor([1]))
    assert list(describe(qmodel).left_out) == ["unused.weight"]


# ---- layers in layers -----------------------------------------------------------------------------------------------


class Lora(nn.Linear):
    def __init__(self, features):
        super().__init__(features, features)
        self.down, self.up = nn.Linear(features, 2), nn.Linear(2, features)
        self.matrix = nn.Parameter(torch.eye(features))

    def forward(self, x):
        return super().forward(x) + self.up(self.down(x)) @ self.matrix


def test_layers_inside_a_layer_are_quantized_and_its_other_parameters_told():
    qmodel, x = calibrate(wrap(nn.Sequential(Lora(8)), BOTH), [x_of(4, 8)]), x_of(4, 8)
    description = describe(qmodel)
    assert {row.layer for row in description.rows} == {"0", "0.down", "0.up"}
    assert list(description.left_out) == ["0.matrix"]
    assert torch.equal(finalize(qmodel)(x), qmodel.eval()(x))


def test_a_layer_that_is_not_registered_is_told():
    class Hides(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(8, 8)
            self.hidden = {"a": [self.one, nn.Linear(8, 8)]}

    assert list(describe(wrap(Hides(), WEIGHTS)).left_out) == ["hidden['a'][1]"]


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int8])
def test_weights_that_are_no_real_numbers_are_left_out(dtype):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.ones(4, 4, dtype=dtype), requires_grad=False)
    qmodel = wrap(model, WEIGHTS)
    assert str(dtype).removeprefix("torch.") in describe(qmodel).left_out["0"]
    assert [row.layer for row in describe(qmodel).rows] == ["1"]


# ---- what reaches a quantizer ---------------------------------------------------------------------------------------


def test_a_packed_sequence_is_quantized():
    x = x_of(5, 2, 8)
    packed = rnn.pack_padded_sequence(x, torch.tensor([5, 3]))
    qmodel = calibrate(wrap(nn.LSTM(8, 8), BOTH), [packed], forward=lambda model, batch: model(batch))
    holder = qmodel.eval().input_holders["input"]
    held = holder(packed)
    assert torch.equal(held.data, holder(packed.data))
    assert len(held.data.unique()) <= 2**4
    assert torch.equal(finalize(qmodel)(packed)[0].data, qmodel(packed)[0].data)
    qmodel.train()(packed)[0].data.sum().backward()
    assert all(parameter.grad is not None for parameter in qmodel.parameters())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_a_nested_tensor_is_quantized(layout):
    parts = [x_of(3, 8), 2 * x_of(5, 8)]
    nested = torch.nested.nested_tensor(parts, layout=layout)
    qmodel = calibrate(wrap(nn.Linear(8, 4), BOTH), [torch.cat(parts)]).eval()
    for model in (qmodel, finalize(qmodel)):
        for found, part in zip(model(nested).unbind(), parts, strict=True):
            # the two products may be summed in another order: 8 products, 2**-24 each
            torch.testing.assert_close(found, qmodel(part), rtol=0, atol=8 * 2**-24 * 8)
    qmodel.train()(nested).unbind()[0].sum().backward()
    assert qmodel.weights_quantizers["weight"].threshold.grad is not None


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


class GivesAPair(nn.Linear):
    def forward(self, x):
        return Pair(super().forward(x), x)


class GivesAList(nn.Linear):
    def forward(self, x):
        return [super().forward(x), x]


@pytest.mark.parametrize(("make", "kind"), [(GivesAPair, Pair), (GivesAList, list)])
def test_an_output_of_several_keeps_its_type_and_has_the_first_quantized(make, kind):
    x = x_of(4, 8)
    qmodel = calibrate(wrap(make(8, 8), OUTPUTS), [x]).eval()
    for model in (qmodel, finalize(qmodel)):
        found = model(x)
        assert type(found) is kind
        assert len(found[0].unique()) <= 2**4
        assert found[1] is x


# ---- forward-mode differentiation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["STE", "LSQ"])
@pytest.mark.parametrize("training", [False, True])
def test_forward_mode_has_the_derivatives_of_reverse_mode(method, training):
    recipe = {section: {**fields, "training_method": method} for section, fields in BOTH.items()}
    x, tangent = x_of(4, 8), torch.ones(4, 8)
    qmodel = calibrate(wrap(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)), recipe), [x]).train(training)
    y, found = torch.func.jvp(qmodel, (x,), (tangent,))
    assert torch.equal(y, qmodel(x))
    expected = torch.einsum("abcd,cd->ab", torch.func.jacrev(qmodel)(x), tangent)
    # 8 and 32 products, each way in another order; values below 8
    torch.testing.assert_close(found, expected, rtol=0, atol=40 * 8 * 2**-24)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.unpack_dual(qmodel(torch.autograd.forward_ad.make_dual(x, tangent)))
    torch.testing.assert_close(dual.tangent, expected, rtol=0, atol=40 * 8 * 2**-24)


def test_what_passes_through_a_transform_is_calibrated_by_all_of_it():
    class Transforms(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            batched = torch.vmap(lambda row: self.two(self.one(row)))(x)
            return batched + torch.func.jvp(lambda x: self.two(self.one(x)), (x,), (x,))[0]

    torch.manual_seed(0)
    model, x = Transforms(), x_of(4, 8)
    inner = calibrate(wrap(nn.Sequential(model.one, model.two), BOTH), [x])
    rows = describe(calibrate(wrap(model, BOTH), [x])).rows
    assert [row.params for row in rows] == [row.params for row in describe(inner).rows]
