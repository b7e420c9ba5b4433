"""From a float model and a recipe to a quantized model: what is wrapped where, and what stays as it was."""

from __future__ import annotations

import copy
import json
import warnings
from collections import OrderedDict

import pydantic
import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F  # noqa: N812 - the name everyone reads

from tests.torch.models import (
    images,
    network,
    quantizer_at,
    ready,
    recipe,
    same_state,
    spec,
    train,
    vectors,
    weights_only,
)
from trainable_core import QuantizationRecipe
from trainable_core.errors import (
    DocumentError,
    InvalidArgumentError,
    ModelError,
    NothingQuantizedWarning,
    QuantizerStateError,
    RuleError,
    TrainableError,
    UnknownQuantizerError,
    UnsupportedConfigError,
)
from trainable_torch import ActivationQuantizationHolder, QuantizationWrapper, calibrate, describe, finalize, wrap
from trainable_torch.training import quantizers_of
from trainable_torch.wrapping import state_of

AT_OUTPUTS = spec(placement="outputs", n_bits=8)


def rows(qmodel):
    """Return (layer, tensor, bits) of each quantizer."""
    return [(row.layer, row.tensor, row.n_bits) for row in describe(qmodel).rows]


def activations(qmodel):
    """Return (layer, tensor) of each activation quantizer."""
    return [(row.layer, row.tensor) for row in describe(qmodel).rows if row.target == "Activation"]


def rule(name=None, op=None, **changes):
    match = {key: value for key, value in (("name", name), ("op", op)) if value is not None}
    return {"match": match, **changes}


# ---- the model that was given ---------------------------------------------------------------------------------------


def fingerprint(model):
    """Return all that wrapping might change in a model."""
    return {
        "state": {name: (value.data_ptr(), value._version) for name, value in model.state_dict().items()},  # noqa: SLF001
        "modules": [(name, type(module), id(module)) for name, module in model.named_modules()],
        "modes": [module.training for module in model.modules()],
        "hooks": [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()],  # noqa: SLF001
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "gradients": [(p.requires_grad, p.grad) for p in model.parameters()],
    }


@pytest.mark.parametrize("how", [recipe(), recipe(activations=AT_OUTPUTS)], ids=["inputs", "outputs"])
def test_the_given_model_is_untouched(how):
    model = network()
    model.stem.eval()
    model.head.weight.requires_grad_(False)
    model.register_forward_hook(lambda *_: None)
    before, state = fingerprint(model), copy.deepcopy(model.state_dict())
    train(ready(model, how, images()), [images()])
    assert fingerprint(model) == before
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_the_wrapped_model_shares_no_tensor_with_the_given_one():
    model = network()
    pointers = {value.data_ptr() for value in model.state_dict().values()}
    assert not pointers & {value.data_ptr() for value in wrap(model, recipe()).state_dict().values()}


def test_modes_and_frozen_weights_are_taken_over():
    model = network()
    model.stem.eval()
    model.head.weight.requires_grad_(False)
    qmodel = wrap(model, recipe())
    assert (qmodel.training, qmodel.stem.training, qmodel.stem.conv.training) == (True, False, False)
    assert not qmodel.head.weight.requires_grad
    assert qmodel.head.bias.requires_grad


def test_it_is_the_models_own_class_with_its_attributes():
    class Special(nn.Sequential):
        answer = 42

    qmodel = wrap(Special(nn.Linear(3, 3)), recipe())
    assert type(qmodel) is Special
    assert qmodel.answer == 42
    assert isinstance(qmodel[0], QuantizationWrapper)


def test_names_in_the_state_dict_are_the_float_models_and_the_quantizers():
    model = nn.Sequential(OrderedDict(fc=nn.Linear(3, 4)))
    assert list(wrap(model, recipe("LSQ")).state_dict()) == [
        "fc.weight",
        "fc.bias",
        "fc.weights_quantizers.weight.threshold",
        "fc.input_holders.input.activation_holder_quantizer.threshold",
        "fc.input_holders.input.activation_holder_quantizer.is_signed",
    ]


def test_a_float_checkpoint_loads_into_a_wrapped_model():
    model = network()
    qmodel = wrap(model, recipe(fold_batch_norm=False))
    incompatible = qmodel.load_state_dict(model.state_dict(), strict=False)
    assert incompatible.unexpected_keys == []
    quantizers = ("threshold", "is_signed")
    assert [name for name in incompatible.missing_keys if not name.endswith(quantizers)] == []
    with torch.no_grad():
        model.head.weight.zero_()
    qmodel.load_state_dict(model.state_dict(), strict=False)
    assert qmodel.head.weight.abs().sum() == 0


def test_wrapping_is_deterministic_and_draws_no_random_numbers():
    torch.manual_seed(3)
    expected = torch.rand(1)
    model = network()
    torch.manual_seed(3)
    one = ready(model, recipe(activations=AT_OUTPUTS), images())
    assert torch.rand(1) == expected
    assert same_state(one, ready(model, recipe(activations=AT_OUTPUTS), images()))


# ---- what is wrapped ------------------------------------------------------------------------------------------------


def test_layers_are_found_at_every_depth():
    model = nn.Sequential(nn.Linear(3, 3), nn.ModuleDict({"a": nn.ModuleList([nn.Sequential(nn.Linear(3, 3))])}))
    assert [layer for layer, tensor, _ in rows(wrap(model, weights_only()))] == ["0", "1.a.0.0"]


def test_only_weights():
    qmodel = ready(network(), weights_only())  # no batches are needed
    assert rows(qmodel) == [(name, "weight", 4) for name in ("stem.conv", "body", "head")]
    assert not any(isinstance(module, ActivationQuantizationHolder) for module in qmodel.modules())
    assert qmodel(images()).shape == (8, 3)


def test_only_activations():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), vectors(5, 3)
    qmodel = ready(model, {"activations": spec(n_bits=2)}, x)
    assert activations(qmodel) == [("0", "input"), ("1", "input")]
    assert len(rows(qmodel)) == 2
    first, second = (m for m in qmodel.modules() if isinstance(m, ActivationQuantizationHolder))
    assert torch.equal(qmodel(x), model[1](second(model[0](first(x)))))


def test_nothing():
    with pytest.warns(NothingQuantizedWarning, match="stem.conv, body, head: the recipe quantizes neither"):
        qmodel = wrap(network(), {})
    assert rows(qmodel) == []
    assert not any(isinstance(module, QuantizationWrapper) for module in qmodel.modules())
    assert set(describe(qmodel).left_out) == {"stem.conv", "body", "head"}
    x = images()
    torch.testing.assert_close(qmodel.eval()(x), network().eval()(x))  # the batch norm was folded: default tolerance


@pytest.mark.parametrize(
    ("part", "left"),
    [("weights", {("0", "input")}), ("activations", {("0", "weight")})],
    ids=["weights", "activations"],
)
def test_a_part_that_is_not_enabled_stays_float(part, left):
    how = recipe()
    how[part]["enabled"] = False
    qmodel = ready(nn.Sequential(nn.Linear(3, 4)), how, vectors(5, 3))
    assert {(layer, tensor) for layer, tensor, _ in rows(qmodel)} == left
    assert qmodel(vectors(5, 3)).shape == (5, 4)


@pytest.mark.parametrize("how", [weights_only(), recipe(), recipe(activations=AT_OUTPUTS)])
def test_a_model_that_is_a_layer_itself_is_called_model(how):
    model, x = nn.Linear(3, 4), vectors(5, 3)
    qmodel = ready(model, {**how, "rules": [rule("model", weights={"n_bits": 2})]}, x)
    assert isinstance(qmodel, QuantizationWrapper)
    assert rows(qmodel)[0] == ("model", "weight", 2)
    train(qmodel, [x])
    assert torch.equal(finalize(qmodel)(x), qmodel.eval()(x))


def test_an_activation_can_be_the_whole_model():
    qmodel = ready(nn.ReLU(), {"activations": AT_OUTPUTS}, vectors(5, 3))
    assert rows(qmodel) == [("model", "output", 8)]


# ---- the same module, the same weight, several times ----------------------------------------------------------------


class Twice(nn.Module):
    """Calls one layer twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        return self.fc(torch.tanh(self.fc(x)))


def test_a_module_called_twice_has_one_quantizer_for_both_calls():
    qmodel, x = ready(Twice(), recipe("LSQ"), vectors(5, 3)), vectors(5, 3)
    assert rows(qmodel) == [("fc", "weight", 4), ("fc", "input", 4)]
    train(qmodel, [x])
    assert torch.equal(finalize(qmodel)(x), qmodel.eval()(x))


def test_a_module_under_two_names_stays_one_module():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.others = nn.ModuleList([self.first, nn.Linear(3, 3)])

        def forward(self, x):
            return self.others[1](self.others[0](self.first(x)))

    qmodel, x = ready(Shared(), recipe("LSQ"), vectors(5, 3)), vectors(5, 3)
    assert qmodel.first is qmodel.others[0]
    assert {layer for layer, _, _ in rows(qmodel)} == {"first", "others.1"}
    train(qmodel, [x])
    assert torch.equal(finalize(qmodel)(x), qmodel.eval()(x))


class Tied(nn.Module):
    """An embedding and a head that share their weight, as language models do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 3)
        self.head = nn.Linear(3, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, indices):
        return self.head(self.embed(indices))


INDICES = torch.tensor([[0, 6, 3]])


def by_deepcopy(qmodel):
    return copy.deepcopy(qmodel)


def by_dtype(qmodel):
    return qmodel.to(torch.float64)


def by_state(qmodel):
    qmodel.load_state_dict(copy.deepcopy(qmodel.state_dict()))
    return qmodel


@pytest.mark.parametrize("after", [lambda qmodel: qmodel, by_deepcopy, by_dtype, by_state, finalize])
def test_tied_weights_stay_one_parameter_with_one_quantizer(after):
    qmodel = after(ready(Tied(), weights_only("LSQ")))
    assert qmodel.head.weight is qmodel.embed.weight
    assert qmodel.head.layer.weight is qmodel.embed.layer.weight is qmodel.embed.weight
    assert qmodel.head.weights_quantizers["weight"] is qmodel.embed.weights_quantizers["weight"]
    assert len(list(qmodel.parameters())) == (2 if quantizers_of(qmodel) else 1)


def test_tied_weights_train_as_one():
    qmodel = ready(Tied(), weights_only("LSQ"))
    before = qmodel.head.weight.detach().clone()
    train(qmodel, [INDICES])
    assert not torch.equal(qmodel.head.weight, before)
    quantized = qmodel.head.get_quantized_weights()["weight"]
    assert torch.equal(qmodel.eval()(INDICES), F.linear(F.embedding(INDICES, quantized), quantized))
    assert torch.equal(finalize(qmodel)(INDICES), qmodel(INDICES))


def test_tied_weights_with_different_plans_have_a_quantizer_each():
    qmodel = ready(Tied(), weights_only(rules=[rule("head", weights={"n_bits": 8})]))
    assert qmodel.head.weight is qmodel.embed.weight
    assert rows(qmodel) == [("embed", "weight", 4), ("head", "weight", 8)]
    assert qmodel.head.weights_quantizers["weight"] is not qmodel.embed.weights_quantizers["weight"]


def test_a_tied_weight_stays_tied_when_one_layer_is_skipped():
    qmodel = ready(Tied(), weights_only(rules=[rule("embed", skip=True)]))
    assert qmodel.head.weight is qmodel.embed.weight
    assert torch.equal(qmodel.embed(INDICES), Tied().embed(INDICES))


# ---- rules ----------------------------------------------------------------------------------------------------------


def small():
    return nn.Sequential(
        OrderedDict(
            stem=nn.Sequential(nn.Linear(3, 3), nn.ReLU()),
            body=nn.Sequential(nn.Linear(3, 3), nn.ReLU()),
            head=nn.Linear(3, 3),
        )
    )


def bits(*rules, **more):
    """Return the width of each layer's weights."""
    qmodel = wrap(small(), {**weights_only(), **more, "rules": list(rules)})
    return {layer: n_bits for layer, tensor, n_bits in rows(qmodel) if tensor == "weight"}


def test_a_rule_changes_what_it_names():
    assert bits(rule("stem.*", weights={"n_bits": 8})) == {"stem.0": 8, "body.0": 4, "head": 4}


def test_later_rules_win_field_by_field():
    rules = [rule("*", weights={"n_bits": 8, "per_channel": False}), rule("body.*", weights={"n_bits": 2})]
    assert bits(*rules) == {"stem.0": 8, "body.0": 2, "head": 8}
    assert bits(*reversed(rules)) == {"stem.0": 8, "body.0": 8, "head": 8}
    qmodel = wrap(small(), weights_only(rules=rules))
    assert {row.channels_axis for row in describe(qmodel).rows} == {None}


def test_names_are_shell_patterns_whose_star_matches_dots():
    assert bits(rule("[sb]*", weights={"n_bits": 8})) == {"stem.0": 8, "body.0": 8, "head": 4}
    assert bits(rule("????", weights={"n_bits": 8})) == {"stem.0": 4, "body.0": 4, "head": 8}
    assert bits(rule("s*0", weights={"n_bits": 8})) == {"stem.0": 8, "body.0": 4, "head": 4}


def test_names_are_case_sensitive():
    with pytest.raises(RuleError):
        bits(rule("HEAD", skip=True))


def test_skip_leaves_a_layer_alone_and_says_so():
    qmodel = wrap(small(), recipe(rules=[rule("body.*", skip=True)]))
    assert isinstance(qmodel.body[0], nn.Linear)
    assert {layer for layer, _, _ in rows(qmodel)} == {"stem.0", "head"}
    assert "rule" in describe(qmodel).left_out["body.0"]


@pytest.mark.filterwarnings("ignore::trainable_core.errors.NothingQuantizedWarning")  # that is what it is about
def test_a_skip_can_be_taken_back():
    skip, unskip = rule("*", skip=True), rule("head", skip=False)
    assert bits(skip, unskip) == {"head": 4}
    assert bits(unskip, skip) == {}


def test_what_a_skipping_rule_says_holds_once_the_skip_is_taken_back():
    assert bits(rule("*", skip=True, weights={"n_bits": 8}), rule("head", skip=False)) == {"head": 8}


def test_a_rule_by_op_and_name_wants_both():
    assert bits(rule("s*", "linear", weights={"n_bits": 8})) == {"stem.0": 8, "body.0": 4, "head": 4}
    with pytest.raises(RuleError):
        bits(rule("head", "conv", weights={"n_bits": 8}))


def test_rules_alone_can_quantize():
    qmodel = wrap(small(), {"rules": [rule("head", weights=spec())]})
    assert rows(qmodel) == [("head", "weight", 4)]
    assert "neither" in describe(qmodel).left_out["stem.0"]


def test_rules_that_add_up_to_half_a_config_are_refused_with_the_layer():
    with pytest.raises(UnsupportedConfigError, match=r"head.*n_bits") as raised:
        wrap(small(), {"rules": [rule("head", weights={"method": "SYMMETRIC", "training_method": "STE"})]})
    assert "weights" in str(raised.value)


def test_a_rule_that_matches_nothing_lists_the_layers():
    with pytest.raises(RuleError, match=r"stem\.0, stem\.1, body\.0, body\.1, head"):
        wrap(small(), weights_only(rules=[rule("tail", skip=True)]))


def test_a_rule_that_matches_nothing_in_an_untraceable_model_says_that_operations_are_unseen():
    class Chooses(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            return self.fc(x) if x.sum() > 0 else x

    with pytest.raises(RuleError, match="control flow"):
        wrap(Chooses(), weights_only(rules=[rule(op="add", activations=spec())]))


def test_a_rule_for_weights_where_there_are_none_is_an_error():
    with pytest.raises(RuleError, match=r"no.* weights"):
        wrap(small(), weights_only(rules=[rule(op="activation", weights={"n_bits": 8})]))


# ---- activations by rule --------------------------------------------------------------------------------------------


def test_a_pattern_of_names_changes_only_the_layers_quantized_anyway():
    """`stem.*` is a group of whatever is there: its ReLU, which has no weights, stays as it was."""
    qmodel = wrap(small(), recipe(rules=[rule("stem.*", activations={"n_bits": 8})]))
    assert activations(qmodel) == [("stem.0", "input"), ("body.0", "input"), ("head", "input")]
    assert [n for layer, tensor, n in rows(qmodel) if tensor == "input"] == [8, 4, 4]


@pytest.mark.parametrize("match", [{"name": "stem.1"}, {"op": "activation", "name": "stem.*"}])
def test_a_full_name_or_an_op_quantizes_layers_without_weights_too(match):
    qmodel = wrap(small(), recipe(rules=[rule(**match, activations={"n_bits": 8})]))
    assert ("stem.1", "input") in activations(qmodel)
    assert ("body.1", "input") not in activations(qmodel)


def test_a_rule_can_give_an_input_quantizer_to_an_operation_of_the_graph():
    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            return torch.matmul(self.fc(x), x.transpose(0, 1)) + 1

    x = vectors(4, 3)
    qmodel = ready(Adds(), weights_only(rules=[rule(op="matmul", activations=spec(n_bits=8))]), x)
    assert isinstance(qmodel, fx.GraphModule)
    assert rows(qmodel) == [("fc", "weight", 4), ("matmul", "input 0", 8), ("matmul", "input 1", 8)]
    first, second = (m for m in qmodel.modules() if isinstance(m, ActivationQuantizationHolder))
    expected = torch.matmul(first(qmodel.fc(x)), second(x.transpose(0, 1))) + 1
    assert torch.equal(qmodel(x), expected)
    train(qmodel, [x])
    assert torch.equal(finalize(qmodel)(x), qmodel.eval()(x))


def test_a_rule_can_name_an_operation_of_the_graph():
    class Adds(nn.Module):
        def forward(self, x):
            return (x + 1) * (x + 2)

    qmodel = ready(Adds(), {"rules": [rule("add_1", activations=spec())]}, vectors(4, 3))
    assert rows(qmodel) == [("add_1", "input 0", 4)]


def test_an_input_used_twice_by_an_operation_has_one_quantizer():
    class Cats(nn.Module):
        def forward(self, x):
            return torch.cat([x, x, 2 * x])

    qmodel = ready(Cats(), {"rules": [rule(op="cat", activations=spec())]}, vectors(4, 3))
    assert [(layer, tensor) for layer, tensor, _ in rows(qmodel)] == [("cat", "input 0"), ("cat", "input 1")]


def test_signed_is_taken_from_the_recipe_or_else_looked_at():
    x = vectors(5, 3)
    for signed, expected in ((True, True), (False, False), (None, False)):
        how = {"activations": spec(signed=signed)}
        assert (
            quantizer_at(ready(nn.Linear(3, 3), how, x.abs()), "input_holders.input.activation_holder_quantizer").signed
            is expected
        )
    seen = ready(nn.Linear(3, 3), {"activations": spec()}, x)
    assert quantizer_at(seen, "input_holders.input.activation_holder_quantizer").signed is True


# ---- outputs --------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block with functional operations."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.conv2 = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        y = F.relu(self.conv1(x))
        y = self.conv2(y) + x
        y = torch.cat([y, x], dim=1)
        return self.fc(F.adaptive_avg_pool2d(y, 1).flatten(1))


def test_outputs_of_layers_and_operations_are_quantized():
    x = vectors(2, 2, 4, 4)
    qmodel = ready(Block(), {"activations": AT_OUTPUTS}, x)
    assert isinstance(qmodel, fx.GraphModule)
    at = ["conv2", "fc", "relu", "add", "cat", "adaptive_avg_pool2d"]
    assert activations(qmodel) == [(name, "output") for name in at]
    holders = dict(zip(at, (m for m in qmodel.modules() if isinstance(m, ActivationQuantizationHolder)), strict=True))
    model = Block()
    y = holders["relu"](F.relu(model.conv1(x)))  # conv1 is quantized after its activation only
    y = holders["add"](holders["conv2"](model.conv2(y)) + x)
    y = holders["cat"](torch.cat([y, x], dim=1))
    y = holders["adaptive_avg_pool2d"](F.adaptive_avg_pool2d(y, 1))
    assert torch.equal(qmodel(x), holders["fc"](model.fc(y.flatten(1))))


def test_a_block_with_functional_operations_trains_and_deploys():
    x = vectors(2, 2, 4, 4)
    qmodel = ready(Block(), {"weights": spec("LSQ"), "activations": spec("LSQ", placement="outputs")}, x)
    train(qmodel, [x, x])
    assert torch.equal(finalize(qmodel)(x), qmodel.eval()(x))


@pytest.mark.parametrize("between", [(), (nn.Identity(),), (nn.Dropout(0.1), nn.Identity())])
def test_a_layer_before_an_activation_is_quantized_after_it(between):
    model = nn.Sequential(nn.Linear(3, 3), *between, nn.ReLU(), nn.Linear(3, 3))
    qmodel = wrap(model, {"activations": AT_OUTPUTS})
    last = len(model) - 1
    assert activations(qmodel) == [(str(last - 1), "output"), (str(last), "output")]
    assert "after its activation" in describe(qmodel).left_out["0"]


def test_a_layer_used_by_more_than_an_activation_is_quantized_itself():
    class Uses(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            y = self.fc(x)
            return F.relu(y) * y

    assert ("fc", "output") in activations(wrap(Uses(), {"activations": AT_OUTPUTS}))


def test_a_layer_followed_by_an_activation_in_one_call_only_is_quantized_itself():
    class Uses(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            return self.fc(F.relu(self.fc(x)))

    assert activations(wrap(Uses(), {"activations": AT_OUTPUTS})) == [("fc", "output"), ("relu", "output")]


def test_a_layer_followed_by_an_activation_in_every_call_is_quantized_after_it():
    model = nn.Sequential(fc := nn.Linear(3, 3), nn.ReLU(), fc, nn.ReLU())
    assert activations(wrap(model, {"activations": AT_OUTPUTS})) == [("1", "output"), ("3", "output")]


@pytest.mark.parametrize("change", [{"skip": True}, {"activations": {"enabled": False}}])
def test_a_layer_before_an_activation_that_is_not_quantized_is_quantized_itself(change):
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    qmodel = wrap(model, {"activations": AT_OUTPUTS, "rules": [rule(op="activation", **change)]})
    assert activations(qmodel) == [("0", "output")]


def test_in_an_untraceable_model_a_layer_before_an_activation_function_is_quantized_itself():
    """The function is not seen as an operation, so nothing is quantized behind it."""

    class Chooses(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, x):
            return self.block(x) if x.sum() > 0 else x

    qmodel = wrap(Chooses(), {"activations": AT_OUTPUTS})
    assert type(qmodel) is Chooses
    assert activations(qmodel) == [(f"block.{name}", "output") for name in ("conv1", "conv2", "fc")]


def test_an_operation_and_a_module_of_the_same_name_are_told_apart():
    class Clash(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.fc, self.relu = nn.Linear(3, 3), nn.ReLU()

        def forward(self, x):
            return self.relu(F.relu(self.fc(x)) - 0.5)

    x = vectors(5, 3)
    qmodel = ready(Clash(), {"activations": AT_OUTPUTS}, x)
    assert activations(qmodel) == [("relu", "output"), ("relu_function", "output")]
    outer, inner = (m for m in qmodel.modules() if isinstance(m, ActivationQuantizationHolder))
    assert torch.equal(qmodel(x), outer(F.relu(inner(F.relu(Clash().fc(x))) - 0.5)))


def test_of_a_layer_that_returns_a_tuple_the_first_is_quantized():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.attention = nn.MultiheadAttention(4, 2)

        def forward(self, x):
            return self.attention(x, x, x)

    x = vectors(3, 2, 4)
    qmodel = ready(Attends(), {"activations": spec(placement="outputs", n_bits=2)}, x)
    out, weights = qmodel(x)
    assert out.unique().numel() <= 4
    assert weights.unique().numel() > 4


def test_inputs_and_outputs_can_be_mixed_by_rule():
    qmodel = wrap(small(), recipe(rules=[rule("head", activations={"placement": "outputs"})]))
    assert activations(qmodel) == [("stem.0", "input"), ("body.0", "input"), ("head", "output")]


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [None, "model", torch.zeros(2), nn.Linear, [nn.Linear(2, 2)]])
def test_what_is_no_module_is_refused(model):
    with pytest.raises(ModelError, match="Module"):
        wrap(model, recipe())


@pytest.mark.parametrize("deployed", [False, True])
def test_a_wrapped_model_is_not_wrapped_again(deployed):
    qmodel = ready(nn.Sequential(nn.Linear(3, 3)), weights_only())
    with pytest.raises(QuantizerStateError, match="wrapped already"):
        wrap(nn.Sequential(finalize(qmodel) if deployed else qmodel), weights_only())


def test_a_model_that_cant_be_copied_is_told():
    model = nn.Sequential(nn.Linear(2, 2))
    model.stream = (number for number in range(3))
    with pytest.raises(ModelError, match=r"copied.*generator") as raised:
        wrap(model, recipe())
    assert isinstance(raised.value.__cause__, TypeError)


@pytest.mark.parametrize("lazy", [nn.LazyLinear(3), nn.LazyConv2d(3, 2), nn.LazyBatchNorm1d()])
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")  # that there are some is the test
def test_a_lazy_module_must_be_called_first(lazy):
    with pytest.raises(ModelError, match=r"1\..*no shape.*\n.*call the model once"):
        wrap(nn.Sequential(nn.Linear(3, 3), lazy), recipe())


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")  # as above
def test_a_lazy_module_that_was_called_is_an_ordinary_one():
    model = nn.Sequential(nn.LazyLinear(3))
    model(vectors(5, 4))
    assert rows(wrap(model, weights_only())) == [("0", "weight", 4)]


def test_an_unknown_training_method_is_told_with_those_that_exist():
    with pytest.raises(UnknownQuantizerError, match="LSQ"):
        wrap(network(), recipe("LSX"))


def test_an_argument_that_the_method_does_not_take_is_told_with_the_layer():
    with pytest.raises(InvalidArgumentError, match=r"stem\.conv\.weight.*temperature"):
        wrap(network(), {"weights": spec("LSQ", arguments={"temperature": {}})})


def test_an_argument_reaches_the_method():
    schedule = {"t_start": 0, "t_end": 5, "initial_val": 2.0, "target_val": 0.5}
    qmodel = wrap(nn.Linear(3, 3), {"weights": spec("DQA", arguments={"temperature": schedule})})
    assert quantizer_at(qmodel, "weights_quantizers.weight").get_arguments()["temperature"] == schedule


def test_a_grid_that_the_target_cant_express_is_told_with_the_layer():
    with pytest.raises(UnsupportedConfigError, match=r"stem\.conv\.weight"):
        wrap(network(), weights_only(method="LUT_SYM_QUANTIZER", n_bits=12))


@pytest.mark.parametrize(
    "wrong", [{"weights": spec(n_bits=17)}, {"weigths": spec()}, {"weights": {"method": "LINEAR"}}]
)
def test_a_wrong_recipe_is_refused_with_the_field(wrong):
    with pytest.raises(pydantic.ValidationError, match=r"n_bits|weigths|method"):
        wrap(network(), wrong)


def test_a_recipe_may_be_a_mapping_an_object_or_a_file(tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe()))
    expected = describe(wrap(network(), recipe()))
    for same in (QuantizationRecipe.model_validate(recipe()), path, str(path)):
        assert describe(wrap(network(), same)) == expected
    with pytest.raises(DocumentError):
        wrap(network(), tmp_path / "missing.json")


def test_what_was_not_wrapped_has_no_state():
    for model in (network(), None, 3):
        with pytest.raises(ModelError, match="wrap") as raised:
            state_of(model)
        assert isinstance(raised.value, TrainableError)


def test_before_calibration_a_forward_says_so():
    with pytest.raises(QuantizerStateError, match=r"stem\.conv.*\n.*calibrate"):
        wrap(network(), recipe())(images())


# ---- steps ----------------------------------------------------------------------------------------------------------


def steps(qmodel):
    return {int(quantizer.step) for quantizer in quantizers_of(qmodel).values()}


@pytest.mark.parametrize("placement", ["inputs", "outputs"])
def test_each_training_forward_counts_one_step_for_every_schedule(placement):
    qmodel = ready(network(), recipe("DQA", activations=spec("DQA", placement=placement)), images())
    assert steps(qmodel) == {0}
    for _ in range(3):
        qmodel.train()(images())
    assert steps(qmodel) == {3}
    qmodel.eval()(images())
    assert steps(qmodel) == {3}


def test_a_layer_called_twice_counts_one_step():
    qmodel = ready(Twice(), recipe("DQA"), vectors(5, 3)).train()
    qmodel(vectors(5, 3))
    assert steps(qmodel) == {1}


def test_a_forward_that_is_refused_counts_no_step():
    qmodel = wrap(network(), recipe("DQA"))
    with pytest.raises(QuantizerStateError):
        qmodel.train()(images())
    assert steps(qmodel) == {0}


def test_a_calibration_counts_no_step():
    qmodel = ready(network(), recipe("DQA"), images(), images()).train()
    calibrate(qmodel, [images()], force=True)
    assert steps(qmodel) == {0}


# ---- rules for what can't be quantized, and for quantizers that moved -----------------------------------------------


class Flow(nn.Module):
    """Layers of all sorts, one inside the other."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 8, sparse=True)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Flatten(1), nn.Linear(8, 8))
        self.norm = nn.BatchNorm1d(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.scale = nn.ParameterList([nn.Parameter(torch.ones(8))])

    def forward(self, x):
        x = self.norm(self.block(self.embed(x))) * self.scale[0]
        return self.attention(x[:, None], x[:, None], x[:, None])[0]


@pytest.mark.parametrize("name", ["embed", "block.2", "scale", "norm"])
def test_any_module_can_be_skipped_by_its_name(name):
    qmodel = wrap(Flow(), weights_only(rules=[rule(name, skip=True)]))
    assert {layer for layer, *_ in rows(qmodel)} == {"block.0", "block.3", "attention"}
    assert describe(qmodel).left_out[name] == "skipped by a rule"


def test_a_module_is_skipped_with_all_that_is_inside_of_it():
    qmodel = wrap(Flow(), weights_only(rules=[rule("block", skip=True)]))
    assert {layer for layer, *_ in rows(qmodel)} == {"attention"}


def test_a_rule_for_a_module_holds_for_all_that_is_inside_of_it():
    qmodel = wrap(Flow(), weights_only(rules=[rule("block", weights={"n_bits": 8})]))
    assert {layer: n_bits for layer, _, n_bits in rows(qmodel)} == {"block.0": 8, "block.3": 8, "attention": 4}


def test_a_batch_norm_that_was_folded_is_still_a_normalization_for_rules():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    qmodel = wrap(model, weights_only(rules=[rule(op="normalization", skip=True)]))
    assert describe(qmodel).folded == {"1": "0"}


def test_widths_asked_of_what_can_not_be_quantized_are_refused_with_the_reason():
    with pytest.raises(RuleError, match="embed: its weight has sparse gradients"):
        wrap(Flow(), weights_only(rules=[rule("embed", weights={"n_bits": 8})]))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(RuleError, match="1: it is folded into 0"):
        wrap(model, weights_only(rules=[rule("1", activations=spec())]))


def test_a_part_of_a_layer_is_refused_with_the_layers_name():
    with pytest.raises(RuleError, match="'attention' is quantized as a whole"):
        wrap(Flow(), weights_only(rules=[rule("attention.out_proj", skip=True)]))


OUTPUTS = {"activations": spec(placement="outputs", n_bits=8)}


def outputs(model, *rules):
    """Return the width of each output's quantizer."""
    return {layer: n_bits for layer, tensor, n_bits in rows(wrap(model, {**OUTPUTS, "rules": list(rules)}))}


def relu_net():
    return nn.Sequential(nn.Linear(3, 3), nn.Dropout(), nn.ReLU(), nn.Linear(3, 3))


def test_a_rule_reaches_a_quantizer_that_moved_behind_an_activation():
    first, second = rule("0", activations={"n_bits": 3}), rule("2", activations={"n_bits": 5})
    assert outputs(relu_net()) == {"2": 8, "3": 8}
    assert outputs(relu_net(), first) == {"2": 3, "3": 8}
    assert outputs(relu_net(), first, second) == {"2": 5, "3": 8}
    assert outputs(relu_net(), second, first) == {"2": 3, "3": 8}


def test_a_rule_reaches_it_behind_a_function_too():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            return nn.functional.relu(self.fc(x) + x)

    assert outputs(Functional(), rule("add", activations={"n_bits": 3})) == {"fc": 8, "relu": 3}
    assert outputs(Functional(), rule("fc", activations={"n_bits": 3})) == {"fc": 3, "relu": 8}


def test_layers_before_one_activation_that_ask_for_different_widths_keep_their_quantizers():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.act = nn.Linear(3, 3), nn.Linear(3, 3), nn.ReLU()

        def forward(self, x):
            return self.act(self.second(self.act(self.first(x))))

    assert outputs(Shared()) == {"act": 8}
    assert outputs(Shared(), rule("first", activations={"n_bits": 3})) == {"first": 3, "act": 8}
    both = rule(op="linear", activations={"n_bits": 3})
    assert outputs(Shared(), both) == {"act": 3}


# ---- what is not a model to wrap ------------------------------------------------------------------------------------


SCRIPTS = {
    "scripted": torch.jit.script,
    "traced": lambda model: torch.jit.trace(model, vectors(2, 3)),
    "frozen": lambda model: torch.jit.freeze(torch.jit.script(model.eval())),
}
each_script = pytest.mark.parametrize("how", SCRIPTS)
torchscript = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch.jit itself is deprecated


@torchscript
@each_script
def test_a_script_is_refused_and_told_what_to_wrap_instead(how):
    with pytest.raises(ModelError, match="wrap the model that was scripted or traced"):
        wrap(SCRIPTS[how](nn.Sequential(nn.Linear(3, 3))), weights_only())


@torchscript
@each_script
def test_a_script_inside_a_model_is_left_out_and_works(how):
    x = vectors(5, 3)
    model = nn.Sequential(nn.Linear(3, 3), SCRIPTS[how](nn.Sequential(nn.Linear(3, 3))))
    qmodel = ready(model, recipe(), x)
    assert {layer for layer, *_ in rows(qmodel)} == {"0"}
    assert "TorchScript" in describe(qmodel).left_out["1"]
    qmodel(x).sum().backward()
    assert torch.equal(finalize(qmodel.eval())(x), qmodel(x))
    wrap(model, weights_only(rules=[rule("1", skip=True)]))


# ---- models in which nothing is quantized ---------------------------------------------------------------------------

NOTHING = {
    "no layer with weights": (lambda: nn.Sequential(nn.ReLU(), nn.LayerNorm(3)), {}, "it has no weights"),
    "unknown layers": (lambda: nn.Sequential(nn.Flatten()), {}, "Flatten has no weights and is of no known kind"),
    "skipped": (network, {"rules": [rule("*", skip=True)]}, "head: skipped by a rule"),
    "switched off": (network, {"rules": [rule("*", weights={"enabled": False})]}, "neither its weights nor"),
    "left out": (lambda: nn.Embedding(3, 3, sparse=True), {}, "model: its weight has sparse gradients"),
    "empty": (nn.Sequential, {}, "no known kind"),
}


@pytest.mark.parametrize("name", NOTHING)
def test_a_model_in_which_nothing_is_quantized_warns_and_says_what_was_looked_at(name):
    build, more, said = NOTHING[name]
    with pytest.warns(NothingQuantizedWarning, match=said) as told:
        qmodel = wrap(build(), weights_only(**more))
    assert rows(qmodel) == []
    assert told[0].filename == __file__  # the line that called wrap


def test_activations_alone_are_something():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrap(nn.Sequential(nn.ReLU(), nn.LayerNorm(3)), OUTPUTS)
