"""What leads to a layer without being the model's attribute: closures, bound methods, and names for its parameters."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name everyone reads
from torch.nn.utils import parametrizations

import trainable_torch
from trainable_torch import QuantizationWrapper

WEIGHTS = {"weights": {"method": "SYMMETRIC", "n_bits": 2, "training_method": "LSQ"}}
BOTH = {**WEIGHTS, "activations": {"method": "UNIFORM", "n_bits": 3, "training_method": "LSQ"}}


def x_of(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def ready(model, recipe=WEIGHTS, batches=None):
    return trainable_torch.calibrate(trainable_torch.wrap(model, recipe), batches)


class Model(nn.Module):
    """Two layers and what a subclass makes of them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.arrange()

    def arrange(self):
        pass

    def forward(self, x):
        return self.two(self.step(x))


def quantized(layer, x):
    """Return what a layer gives with the quantized weight, by the quantizer and not by the layer."""
    return F.linear(x, layer.weights_quantizers["weight"](dict(layer.named_parameters())["weight"]), layer.bias)


# ---- closures -------------------------------------------------------------------------------------------------------


class Lambda(Model):
    def arrange(self):
        self.step = lambda x: 1 * self.one(x)


class Default(Model):
    def arrange(self):
        self.step = lambda x, layer=self.one: 1 * layer(x)


class KeywordDefault(Model):
    def arrange(self):
        def step(x, *, layer=self.one):
            return layer(x)

        self.step = step


class ClosureOfAClosure(Model):
    def arrange(self):
        layers = [self.one]

        def inner(x):
            return layers[0](x)

        self.step = lambda x: 1 * inner(x)


class InAContainer(Model):
    def arrange(self):
        self.steps = {"a": [(lambda x: 1 * self.one(x),)]}

    def step(self, x):
        return self.steps["a"][0][0](x)


class PartialOfAClosure(Model):
    def arrange(self):
        self.step = functools.partial(lambda x, scale: self.one(x) * scale, scale=1)


class InAnObject(Model):
    def arrange(self):
        self.held = type("Held", (), {})()
        self.held.function = lambda x: 1 * self.one(x)

    def step(self, x):
        return self.held.function(x)


class ReadsInAClosure(Model):
    def arrange(self):
        one = self.one
        self.step = lambda x: F.linear(x, one.weight, one.bias)


class PatchedForward(Model):
    def arrange(self):
        own = self.one.forward
        self.one.forward = lambda x: 1 * own(x)

    def step(self, x):
        return self.one(x)


class Hooked(Model):
    def arrange(self):
        saved = {}

        def hook(_module, _args, output):
            saved["output"] = self.one(output)

        self.saved, self.identity = saved, nn.Identity()
        self.identity.register_forward_hook(hook)

    def step(self, x):
        self.identity(x)
        return self.saved.pop("output")


CLOSURES = [
    Lambda, Default, KeywordDefault, ClosureOfAClosure, InAContainer, PartialOfAClosure, InAnObject, ReadsInAClosure,
    PatchedForward, Hooked,
]  # fmt: skip
closures = pytest.mark.parametrize("make", CLOSURES)


@closures
def test_a_function_of_the_copy_uses_the_copys_layers(make):
    model, x = make(), x_of(4, 8)
    before = model(x)
    qmodel = ready(model)
    expected = quantized(qmodel.two, quantized(qmodel.one, x))
    assert torch.equal(qmodel(x), expected)
    deployed = trainable_torch.finalize(qmodel)
    assert torch.equal(deployed(x), expected)
    with torch.no_grad():
        qmodel.one.weight.zero_()  # the deployed model is another one
    assert torch.equal(deployed(x), expected)
    assert torch.equal(model(x), before)


@closures
def test_gradients_go_to_the_copy_and_not_to_the_given_model(make):
    model = make()
    qmodel = ready(model).train()
    qmodel(x_of(4, 8)).square().sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    learning = {name for name, p in qmodel.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {"one.weight", "one.weights_quantizers.weight.threshold", "two.weight"} <= learning


def test_a_closure_keeps_what_is_not_the_models():
    seen = []

    class Notes(Model):
        def arrange(self):
            self.one.register_forward_hook(lambda _module, _args, output: seen.append(output))

        def step(self, x):
            return self.one(x)

    qmodel = ready(Notes())
    seen.clear()
    y = qmodel.step(x_of(4, 8))
    assert seen[0] is y


def test_functions_that_lead_to_themselves_are_copied_once():
    class Recursive(Model):
        def arrange(self):
            def step(x, depth=2):
                return self.one(x) if depth == 0 else step(x, depth - 1)

            self.step = step

    qmodel, x = ready(Recursive()), x_of(4, 8)
    assert torch.equal(qmodel(x), quantized(qmodel.two, quantized(qmodel.one, x)))


GLOBAL = nn.Linear(8, 8)


def test_a_function_that_names_a_layer_globally_is_told():
    class ByName(Model):
        def arrange(self):
            self.shared = GLOBAL
            self.step = lambda x: F.linear(x, GLOBAL.weight)

    left_out = trainable_torch.describe(trainable_torch.wrap(ByName(), WEIGHTS)).left_out
    assert "'GLOBAL' of the given model" in left_out["step"]


# ---- bound methods --------------------------------------------------------------------------------------------------


class BoundForward(Model):
    def arrange(self):
        self.step = self.one.forward


class PartialForward(Model):
    def arrange(self):
        self.step = functools.partial(self.one.forward)


class ListedForward(Model):
    def arrange(self):
        self.steps = (("a", self.one.forward), [])

    def step(self, x):
        return self.steps[0][1](x)


@pytest.mark.parametrize("make", [BoundForward, PartialForward, ListedForward])
def test_a_bound_forward_quantizes_its_input_too(make):
    model, x = make(), x_of(4, 8)
    qmodel = ready(model, BOTH, [x]).eval()
    assert torch.equal(qmodel.step(x), qmodel.one(x))
    for other in (copy.deepcopy(qmodel), pickle.loads(pickle.dumps(qmodel)), trainable_torch.finalize(qmodel)):  # noqa: S301 - our own bytes
        assert torch.equal(other.step(x), qmodel.one(x))
    assert model.step(x).equal(model.one(x))


# ---- parameters under other names -----------------------------------------------------------------------------------


class SecondName(Model):
    def arrange(self):
        self.matrix = self.one.weight

    def step(self, x):
        return F.linear(x, self.matrix, self.one.bias)


class InAParameterList(Model):
    def arrange(self):
        self.matrices = nn.ParameterList([self.one.weight])

    def step(self, x):
        return F.linear(x, self.matrices[0], self.one.bias)


class InAParameterDict(Model):
    def arrange(self):
        self.matrices = nn.ParameterDict({"one": self.one.weight})

    def step(self, x):
        return F.linear(x, self.matrices["one"], self.one.bias)


class InAModule(Model):
    def arrange(self):
        self.head = nn.Module()
        self.head.matrix = self.one.weight

    def step(self, x):
        return F.linear(x, self.head.matrix, self.one.bias)


ALIASES = [SecondName, InAParameterList, InAParameterDict, InAModule]


@pytest.mark.parametrize("make", ALIASES)
def test_a_weight_is_quantized_under_every_name(make, tmp_path):
    model, x = make(), x_of(4, 8)
    qmodel = ready(model).eval()
    expected = quantized(qmodel.two, quantized(qmodel.one, x))
    assert isinstance(qmodel, make)
    trainable_torch.save(qmodel, tmp_path / "model")
    others = copy.deepcopy(qmodel), pickle.loads(pickle.dumps(qmodel)), trainable_torch.load(tmp_path / "model", make())  # noqa: S301 - our own bytes
    for each in (qmodel, trainable_torch.finalize(qmodel), *others):
        assert torch.equal(each(x), expected)
    qmodel.train()(x).square().sum().backward()
    assert qmodel.one.weights_quantizers["weight"].threshold.grad.abs().sum() > 0
    assert "one.weight" not in trainable_torch.describe(qmodel).left_out
    assert isinstance(dict(qmodel.one.named_parameters())["weight"], nn.Parameter)


def test_a_traced_model_reads_a_second_name_quantized():
    recipe = {**WEIGHTS, "activations": {**BOTH["activations"], "n_bits": 16, "placement": "outputs"}}

    class Both(SecondName):
        def step(self, x):
            return F.linear(self.one(x), self.matrix)

    x = x_of(4, 8)
    qmodel = ready(Both(), recipe, [x]).eval()
    seen = []
    handle = qmodel.two.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    qmodel(x)
    handle.remove()
    first = qmodel.one(x)
    assert torch.equal(seen[0], F.linear(first, qmodel.one.get_quantized_weights()["weight"]))


def test_a_name_in_a_part_that_a_rule_skips_stays_float():
    recipe = {**WEIGHTS, "rules": [{"match": {"name": "head"}, "skip": True}]}
    model = InAModule()
    model.head.inner = nn.Linear(8, 8)
    qmodel = ready(model, recipe)
    assert torch.equal(qmodel.step(x_of(4, 8)), model.step(x_of(4, 8)))


def test_what_a_parametrization_computes_from_a_shared_weight_is_quantized_and_not_what_it_reads():
    class Shares(Model):
        def arrange(self):
            self.two.weight = self.one.weight
            parametrizations.weight_norm(self.two)

        def step(self, x):
            return self.one(x)

    model, x = Shares(), x_of(4, 8)
    qmodel = ready(model)
    computed = qmodel.two.weights_quantizers["weight"](model.two.weight)
    assert torch.equal(qmodel.two(x), F.linear(x, computed, model.two.bias))


def test_layers_that_copy_copy_made_have_quantizers_of_their_own():
    layer = nn.Linear(8, 8)
    qmodel, x = ready(nn.Sequential(layer, copy.copy(layer))), x_of(4, 8)
    assert all(isinstance(each, QuantizationWrapper) for each in qmodel)
    assert torch.equal(qmodel(x), quantized(qmodel[0], quantized(qmodel[0], x)))


# ---- parameters' own attributes -------------------------------------------------------------------------------------


def test_a_parameter_keeps_its_attributes_and_hooks():
    model = nn.Linear(8, 8)
    model.weight.no_decay = True
    mask = torch.zeros(8, 8)
    model.weight.register_hook(lambda grad: grad * mask)
    seen = []
    model.bias.register_post_accumulate_grad_hook(seen.append)
    qmodel = ready(model).train()
    assert qmodel.weight.no_decay
    qmodel(x_of(4, 8)).sum().backward()
    assert qmodel.weight.grad.abs().sum() == 0
    assert qmodel.bias.grad.abs().sum() > 0
    assert seen[0] is qmodel.bias
