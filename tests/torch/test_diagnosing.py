"""What hurts a model and what to change: damaged layers are found, figures are those of their definitions."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import trainable_torch
from tests.torch.models import images, network, ready, recipe, same_state, spec, train
from trainable_core import QuantizationRecipe
from trainable_core.errors import (
    CalibrationError,
    InvalidArgumentError,
    ModelError,
    QuantizerStateError,
)
from trainable_torch import diagnose, finalize, load, register_layer, save, suggest, wrap
from trainable_torch.training import quantizers_of
from trainable_torch.viewing import TorchView

EIGHT = {"weights": spec("LSQ", n_bits=8), "activations": spec("LSQ", "UNIFORM", 8)}
ACTIVATIONS = {"activations": spec(), "rules": [{"match": {"op": "linear"}, "activations": {"n_bits": 8}}]}
BATCHES = [images(64), images(32)]


class AlongInputs(nn.Conv2d):
    """A convolution whose thresholds go along its inputs."""


register_layer(AlongInputs, "conv", weights={"weight": 1})


def two_convolutions(first: type[nn.Conv2d] = nn.Conv2d) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(first(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(16, 3))


@pytest.fixture(scope="module")
def eight() -> nn.Module:
    return ready(network(), EIGHT, *BATCHES).train()


def everything(model: nn.Module) -> dict[str, Any]:
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "gradients": [None if each.grad is None else each.grad.clone() for each in model.parameters()],
        "needs": [each.requires_grad for each in model.parameters()],
        "modes": [each.training for each in model.modules()],
        "random": torch.random.get_rng_state(),
        "modules": [id(each) for each in model.modules()],
        "description": str(trainable_torch.describe(model)),
        "attributes": [sorted(vars(each)) for each in model.modules()],
    }


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        assert_same(list(one.values()), list(other.values()))
    elif isinstance(one, list):
        assert len(one) == len(other)
        for each, its in zip(one, other, strict=True):
            assert_same(each, its)
    else:
        assert one == other


# ---- figures ---------------------------------------------------------------------------------------------------------


def with_some_quantized(qmodel: nn.Module, quantized: set[str]) -> nn.Module:
    """Return a model in which only some layers have quantizers, by a recipe that skips the others."""
    rules = [{"match": {"name": name}, "skip": True} for name in ("stem.conv", "body", "head") if name not in quantized]
    other = ready(network(), {**recipe("LSQ", "UNIFORM", 3), "rules": rules}, *BATCHES)
    for name, quantizer in quantizers_of(other).items():
        quantizer.load_state_dict(quantizers_of(qmodel)[name].state_dict())
    return other.eval()


@torch.no_grad()
def test_costs_are_those_of_models_that_are_wrapped_that_way() -> None:
    qmodel = ready(network(), recipe("LSQ", "UNIFORM", 3), *BATCHES)
    found = diagnose(qmodel, BATCHES, metric="mse")
    x = torch.cat(BATCHES)
    reference = network().eval()(x).double()

    def cost(model: nn.Module) -> float:
        return float((model.eval()(x).double() - reference).square().sum() / reference.square().sum())

    names = {"stem.conv", "body", "head"}
    assert {each.layer for each in found.layers} == names
    # a folded batch norm is rounded otherwise than one that was not folded: by some units in 2**24
    assert found.total == pytest.approx(cost(qmodel), rel=1e-4)
    for each in found.layers[:2]:
        alone, rest = (with_some_quantized(qmodel, which) for which in ({each.layer}, names - {each.layer}))
        assert each.alone == pytest.approx(cost(alone), rel=1e-4)
        assert each.within == pytest.approx(cost(qmodel) - cost(rest), rel=1e-3, abs=1e-5)


def test_a_quantizer_s_figures_are_those_of_all_its_values() -> None:
    qmodel = ready(network(), recipe("LSQ", "SYMMETRIC", 3), *BATCHES).eval()
    seen: list[tuple[Tensor, Tensor]] = []
    hook = qmodel.head.input_holders["input"].register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        for batch in BATCHES:
            qmodel(batch)
    hook.remove()
    x, q = (torch.cat(each).double() for each in zip(*seen, strict=True))
    figures = {each.name: each for each in diagnose(qmodel, BATCHES).quantizers}["head: input"].quality
    assert figures is not None
    assert figures.count == x.numel()
    assert figures.sqnr == pytest.approx(10 * math.log10(x.square().sum() / (q - x).square().sum()), abs=1e-6)
    assert figures.unused == 1 - len(q.unique()) / 8
    assert (figures.minimum, figures.maximum) == (x.min().item(), x.max().item())


def test_gradients_are_those_of_training_and_movement_is_since_calibration() -> None:
    qmodel = ready(network(), recipe("LSQ"), *BATCHES)
    variable = qmodel.head.weights_quantizers["weight"].threshold
    with torch.no_grad():
        before = variable.clone()
        variable.mul_(1.5)
    found = {(each.quantizer, each.name): each for each in diagnose(qmodel, [BATCHES[0]], metric="mse").variables}
    row = found["head.weight", "threshold"]
    reference = network().eval()(BATCHES[0]).detach()
    loss = (qmodel.eval()(BATCHES[0]) - reference).square().sum() / reference.square().sum()
    (gradient,) = torch.autograd.grad(loss, [variable])
    # the batch norm is folded in one and not in the other
    assert row.gradient == pytest.approx(gradient.square().mean().sqrt().item(), rel=1e-3)
    assert row.moved == pytest.approx(0.5, rel=1e-6)
    assert row.value == pytest.approx((1.5 * before).square().mean().sqrt().item(), rel=1e-6)
    assert found["body: input", "threshold"].moved == 0.0
    assert row.relative_gradient == pytest.approx(row.gradient / row.value)


def test_a_model_from_a_file_does_not_know_how_far_it_moved(tmp_path: Any) -> None:
    save(ready(network(), recipe("LSQ"), *BATCHES), tmp_path / "model.safetensors")
    found = diagnose(load(tmp_path / "model.safetensors", network()), BATCHES)
    assert {each.moved for each in found.variables} == {None}
    assert {
        each.moved for each in diagnose(copy.deepcopy(ready(network(), recipe("LSQ"), *BATCHES)), BATCHES).variables
    } == {0.0}


class Detached(nn.Module):
    """A layer whose second weight no gradient reaches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.two(x).detach()


def test_a_threshold_without_a_gradient_is_told() -> None:
    x = torch.randn(16, 4)
    found = diagnose(ready(Detached(), {"weights": spec("LSQ")}, x), [x])
    assert [each.gradient is None for each in found.variables] == [False, True]
    told = [each for each in found.findings if each.kind == "gradient"]
    assert [(each.layer, each.tensor) for each in told] == [("two", "threshold")]
    assert diagnose(ready(Detached(), {"weights": spec("LSQ")}, x), [x], gradients=False).variables == ()


# ---- damages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["stem.conv", "body", "head"])
def test_a_layer_of_two_bits_among_eight_is_first(layer: str) -> None:
    qmodel = ready(network(), {**EIGHT, "rules": [{"match": {"name": layer}, "weights": {"n_bits": 2}}]}, *BATCHES)
    first = diagnose(qmodel, BATCHES).findings[0]
    assert (first.layer, first.tensor, first.kind) == (layer, "weight", "bits")
    assert "give it 8 bits" in first.sentence


@pytest.mark.parametrize(("layer", "tensor"), [("stem.conv", "input"), ("body", "weight"), ("head", "input")])
def test_a_threshold_ten_times_too_small_is_first(layer: str, tensor: str) -> None:
    qmodel = ready(network(), EIGHT, *BATCHES)
    place = next(
        each for each in TorchView(qmodel, "diagnose").tensors() if (each.layer.name, each.tensor) == (layer, tensor)
    )
    with torch.no_grad():
        for name in place.quantizer.variable_names:
            place.quantizer.get_quantizer_variable(name).mul_(0.1)
    first = diagnose(qmodel, BATCHES).findings[0]
    assert (first.layer, first.tensor, first.kind) == (layer, tensor, "range")


def test_thresholds_along_the_wrong_axis_are_first() -> None:
    first = diagnose(ready(two_convolutions(AlongInputs), EIGHT, *BATCHES), BATCHES).findings[0]
    assert (first.layer, first.tensor, first.kind) == ("0", "weight", "axis")
    assert "along axis 1, and its output channels lie along axis 0" in first.sentence
    whole = diagnose(ready(two_convolutions(), EIGHT, *BATCHES), BATCHES)
    assert not [each for each in whole.findings if each.kind in {"axis", "range"}]


class Faint(nn.Module):
    """A model whose outputs hardly depend on what is before them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, x: Tensor) -> Tensor:
        """Return small logits."""
        return self.body(x) * 1e-4


def test_gradients_of_half_precision_do_not_underflow() -> None:
    how = {"weights": spec("LSQ"), "activations": spec("LSQ", "UNIFORM")}
    qmodel = ready(Faint(), how, *BATCHES).eval()
    whole = {(each.quantizer, each.name): each.gradient for each in diagnose(qmodel, BATCHES).variables}
    half = diagnose(qmodel.half(), [batch.half() for batch in BATCHES])
    assert len(half.variables) == len(whole) > 6
    # logits of some 1e-5 in steps of 2**-24 have 7 significant bits or so, and their differences, which the gradients
    # start from, fewer
    for each in half.variables:
        assert each.gradient == pytest.approx(whole[each.quantizer, each.name], rel=0.25, abs=0)
    assert not [each for each in half.findings if each.kind == "gradient"]


# ---- what is left alone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm], ids=["weight_norm", "spectral_norm"])
@pytest.mark.filterwarnings("ignore::FutureWarning")  # PyTorch's, of both
def test_a_weight_that_a_hook_computes_is_read_as_it_is_now_and_stays_what_it_was(norm: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 6)
    qmodel = ready(nn.Sequential(norm(nn.Linear(6, 3))), {"weights": spec("LSQ")}, x).train()
    loss = qmodel(x).sum()
    computed, state = vars(qmodel[0])["weight"], {name: each.clone() for name, each in qmodel.state_dict().items()}
    view = TorchView(qmodel, "diagnose")
    (tensor,) = view.tensors()
    view.quantized(tensor)
    assert np.array_equal(view.values(tensor), computed.detach().numpy())
    assert vars(qmodel[0])["weight"] is computed
    assert all(torch.equal(state[name], each) for name, each in qmodel.state_dict().items())
    loss.backward()
    with torch.no_grad():
        for parameter in qmodel.parameters():
            parameter.mul_(1.5)
    now = view.values(tensor)
    qmodel.eval()(x)
    assert np.array_equal(now, vars(qmodel[0])["weight"].detach().numpy())


class Noisy(nn.Module):
    """A model with dropout and a batch norm that is not folded."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.drop = nn.Conv2d(1, 4, 3), nn.Dropout()
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.drop(self.conv(x)).relu()).flatten(1))


@pytest.mark.parametrize(("rule", "training"), [("LSQ", True), ("DQA", False), ("DOREFA", True)])
def test_nothing_of_the_model_changes(rule: str, *, training: bool) -> None:
    how = {"weights": spec(rule, n_bits=4), "activations": spec("STE"), "fold_batch_norm": False}
    if rule == "LSQ":
        how["weights"]["modifiers"] = {"oscillation_dampening": {"strength": 0.01}}
    qmodel = train(ready(Noisy(), how, *BATCHES), [images(4)]).train(training)
    twin = copy.deepcopy(qmodel)
    before, gradients = everything(qmodel), [each.grad for each in qmodel.parameters()]
    diagnose(qmodel, iter(BATCHES))
    suggest(qmodel, iter(BATCHES), {"bytes": 1000})
    assert_same(everything(qmodel), before)
    assert all(one is other for one, other in zip([each.grad for each in qmodel.parameters()], gradients, strict=True))
    for each in (qmodel, twin):
        torch.manual_seed(1)  # for dropout
        train(each, [images(4), images(8)])
    assert same_state(qmodel, twin)


def test_an_error_in_a_batch_leaves_everything_as_it_was() -> None:
    qmodel = ready(network(), EIGHT, *BATCHES).train()
    before = everything(qmodel)
    for call in (diagnose, lambda *given: suggest(*given, 4)):
        with pytest.raises(RuntimeError):
            call(qmodel, [images(8), torch.zeros(2, 5, 6, 6)])
        assert_same(everything(qmodel), before)


def test_it_is_the_same_twice_and_for_a_finalized_model(eight: nn.Module) -> None:
    first = diagnose(eight, BATCHES)
    assert str(diagnose(eight, BATCHES)) == str(first)
    deployed = diagnose(finalize(eight), BATCHES)
    assert [(each.layer, each.alone) for each in deployed.layers] == [(each.layer, each.alone) for each in first.layers]
    assert deployed.variables == ()
    assert json.loads(first.to_json())["batches"] == 2


# ---- other models ----------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """A model that reads one weight in two layers, adds, and returns a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.mix, self.out = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 12, bias=False)
        self.out.weight = self.words.weight

    def forward(self, ids: Tensor, scale: Tensor) -> dict[str, Tensor]:
        h = self.words(ids) * scale
        return {"hidden": h, "logits": self.out(self.mix(h) + h)}


def tied_batches() -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        yield {"ids": torch.randint(0, 12, (4, 5), generator=generator), "scale": torch.ones(())}


def test_tied_weights_functional_operations_and_dictionaries() -> None:
    how = {**EIGHT, "rules": [{"match": {"op": "add"}, "activations": {"n_bits": 4}}]}
    qmodel = trainable_torch.calibrate(wrap(Tied(), how), tied_batches())
    found = diagnose(qmodel, tied_batches())
    assert {each.layer for each in found.layers} >= {"words", "mix", "out"}
    assert any(each.op == "add" for each in found.layers)
    chosen = suggest(qmodel, tied_batches(), 4)
    assert [row.layers for row in chosen.rows] == [("words", "out"), ("mix",)]
    assert chosen.rows[0].size == 96
    assert chosen.widths["words"] == chosen.widths["out"]
    again = wrap(Tied(), chosen.recipe)
    widths = {row.layer: row.n_bits for row in trainable_torch.describe(again).rows if row.target == "Weights"}
    assert widths == chosen.widths


def test_recurrent_layers_and_attention() -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.rnn = nn.GRU(6, 8, batch_first=True)
            self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h, _ = self.rnn(x)
            return self.head(self.attend(h, h, h)[0].mean(1))

    x = torch.randn(6, 5, 6, generator=torch.Generator().manual_seed(0))
    qmodel = ready(Sequence(), EIGHT, x)
    found = diagnose(qmodel, [x])
    assert {each.layer for each in found.layers} == {"rnn", "attend", "head"}
    assert not [each for each in found.findings if each.kind in {"axis", "gradient"}]
    chosen = suggest(qmodel, [x], 3.5)
    assert chosen.average_bits <= 3.5
    assert finalize(trainable_torch.calibrate(wrap(Sequence(), chosen.recipe), [x])) is not None


class Branches(nn.Module):
    """A model with a layer that the batches don't reach."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor, *, other: bool = False) -> Tensor:
        return self.two(x) if other else self.one(x)


def test_a_layer_that_is_not_reached_costs_nothing_and_a_bad_batch_is_told() -> None:
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    qmodel = wrap(Branches(), EIGHT)
    trainable_torch.calibrate(qmodel, [False, True], forward=lambda model, other: model(x, other=other))
    found = diagnose(qmodel, [x])
    qualities = {each.name: each.quality for each in found.quantizers}
    assert qualities["two: input"] is None
    assert qualities["one: input"] is not None
    assert next(each for each in found.layers if each.layer == "two").cost == 0
    assert "no value seen" in str(found)
    told = [(each.layer, each.kind) for each in found.findings if each.layer == "two"]
    assert told == [("two", "gradient")] * 3  # of the weight's threshold, and of both ends of the input's range


def test_a_metric_of_the_user_s_and_a_teacher() -> None:
    labels = network().eval()(BATCHES[0]).argmax(1)

    def accuracy(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> float:
        return float((outputs.argmax(1) == batch[1]).float().mean())

    qmodel = ready(network(), recipe("LSQ", n_bits=2), *BATCHES)
    found = diagnose(qmodel, [(BATCHES[0], labels)], metric=accuracy)
    own = accuracy(qmodel.eval()(BATCHES[0]), (BATCHES[0], labels))
    assert found.metric == "accuracy"
    assert found.float_cost == -1.0
    assert found.total == pytest.approx(1.0 - own, abs=1e-7)
    assert "(The float model: 1.)" in str(found)
    with torch.no_grad():
        for parameter in qmodel.parameters():
            parameter.mul_(1.1)
    against = diagnose(qmodel, BATCHES, network())
    assert against.float_cost > 0  # the model without quantization is another one than the teacher
    assert diagnose(qmodel, BATCHES).float_cost == 0


class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    """Batches of which nobody knows how many there are."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter(BATCHES)


def test_a_loader_without_a_length(eight: nn.Module) -> None:
    loader = torch.utils.data.DataLoader(Stream(), batch_size=None)
    assert str(diagnose(eight, loader)) == str(diagnose(eight, BATCHES))
    assert str(suggest(eight, loader, 4)) == str(suggest(eight, BATCHES, 4))


def test_a_call_of_the_user_s() -> None:
    qmodel = ready(network(), EIGHT, *BATCHES)
    found = diagnose(qmodel, [(1, batch) for batch in BATCHES], forward=lambda model, batch: model(batch[1]))
    assert str(found) == str(diagnose(qmodel, BATCHES))


# ---- suggestions -----------------------------------------------------------------------------------------------------


def test_widths_are_within_the_budget_and_no_worse_than_one_for_all(eight: nn.Module) -> None:
    for budget in (3.0, 8.0):
        chosen = suggest(eight, BATCHES, budget)
        assert chosen.average_bits <= budget
        assert chosen.used == pytest.approx(chosen.average_bits)
        assert all(chosen.predicted <= cost + 1e-12 for cost in chosen.uniform.values())
    assert set(chosen.uniform) == {2, 3, 4, 5, 6, 8}
    assert chosen.predicted == pytest.approx(chosen.present, abs=1e-12)
    sizes = {"stem.conv": 36, "body": 36, "head": 48}
    assert {row.layers[0]: row.size for row in chosen.rows} == sizes
    assert json.loads(chosen.to_json())["rows"][0]["added"]["8"] == pytest.approx(0.0, abs=1e-9)
    assert QuantizationRecipe.model_validate(chosen.to_dict()["recipe"]) == chosen.recipe


def test_what_a_width_adds_is_what_a_model_of_that_width_costs_more() -> None:
    qmodel = ready(network(), EIGHT, *BATCHES)
    row = next(row for row in suggest(qmodel, BATCHES, 8).rows if row.layers == ("head",))
    other = ready(network(), {**EIGHT, "rules": [{"match": {"name": "head"}, "weights": {"n_bits": 3}}]}, *BATCHES)
    more = diagnose(other, BATCHES).total - diagnose(qmodel, BATCHES).total
    assert row.added[3] == pytest.approx(more, rel=1e-4, abs=1e-9)


def test_a_table_of_costs_and_bytes(eight: nn.Module) -> None:
    chosen = suggest(eight, BATCHES, {"costs": {"head": {2: 1, 8: 5}, "body": {4: 1}}, "limit": 5})
    assert chosen.widths == {"stem.conv": 8, "body": 4, "head": 2}
    assert chosen.used == 2
    small = suggest(eight, BATCHES, {"bytes": 60})
    assert small.bytes <= 60
    assert small.bytes == sum(math.ceil(row.size * row.n_bits / 8) for row in small.rows)


def test_widths_that_the_target_lacks_are_left_out() -> None:
    how = {**EIGHT, "target": "onnx"}  # from 2 bits to 8
    chosen = suggest(ready(network(), how, *BATCHES), BATCHES, 8, widths=[1, 4, 8, 9])
    assert all(set(row.added) == {4, 8} for row in chosen.rows)
    wrap(network(), chosen.recipe)


def test_the_widest_codes_are_those_of_the_target_or_of_the_table() -> None:
    table = {"method": "LUT_SYM_QUANTIZER", "n_bits": 2, "training_method": "PARETOQ"}
    for how, most in (({**EIGHT, "target": "onnx"}, (8, 16)), ({**EIGHT, "weights": table}, (2, 16))):
        found = diagnose(ready(network(), how, *BATCHES), BATCHES)
        told = {each.target: each.most_bits for each in found.quantizers}
        assert (told["Weights"], told["Activation"]) == most
        assert not any("16" in each.sentence for each in found.findings if each.tensor == "weight")


def test_names_that_look_like_patterns_are_taken_as_names() -> None:
    model = nn.Sequential()
    torch.manual_seed(0)
    model.add_module("a[0]", nn.Linear(4, 4))
    model.add_module("a0", nn.Linear(4, 4))
    x = torch.randn(16, 4)
    chosen = suggest(ready(model, {"weights": spec(n_bits=8)}, x), [x], {"costs": {"a[0]": {2: 0}}, "limit": 0})
    assert chosen.widths["a[0]"] == 2
    rows = trainable_torch.describe(wrap(model, chosen.recipe)).rows
    assert {row.layer: row.n_bits for row in rows} == chosen.widths


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "fact"),
    [
        (lambda m: diagnose(network(), BATCHES), ModelError, "wrap"),
        (lambda m: diagnose(wrap(network(), EIGHT), BATCHES), QuantizerStateError, "not calibrated"),
        (lambda m: diagnose(m, []), CalibrationError, "empty"),
        (lambda m: diagnose(m, images(4)), CalibrationError, "Tensor"),
        (lambda m: diagnose(m, None), CalibrationError, "none were given"),
        (lambda m: diagnose(m, BATCHES, "teacher"), ModelError, "str"),
        (lambda m: diagnose(m, BATCHES, metric="accuracy"), InvalidArgumentError, "'accuracy'"),
        (lambda m: diagnose(m, BATCHES, axis=5), InvalidArgumentError, "axis 5"),
        (lambda m: diagnose(m, BATCHES, metric=lambda outputs, batch: "good"), InvalidArgumentError, "not a number"),
        (lambda m: diagnose(m, BATCHES, forward=3), CalibrationError, "forward"),
        (lambda m: diagnose(m, BATCHES, forward=lambda model, batch: "text"), ModelError, "str"),
        (lambda m: diagnose(m, [torch.full((2, 1, 6, 6), torch.nan)]), CalibrationError, "not finite"),
        (lambda m: suggest(finalize(m), BATCHES, 4), QuantizerStateError, "finalized"),
        (lambda m: suggest(m, [], 4), CalibrationError, "empty"),
        (lambda m: suggest(m, BATCHES, 1.5), InvalidArgumentError, "too small"),
        (lambda m: suggest(m, BATCHES, "4"), InvalidArgumentError, "'4'"),
        (lambda m: suggest(m, BATCHES, math.nan), InvalidArgumentError, "nan"),
        (lambda m: suggest(m, BATCHES, {"bits": 4}), InvalidArgumentError, "average_bits"),
        (lambda m: suggest(m, BATCHES, {"bytes": 4, "average_bits": 2}), InvalidArgumentError, "bytes"),
        (lambda m: suggest(m, BATCHES, {"costs": {"tail": {2: 1}}, "limit": 1}), InvalidArgumentError, "tail"),
        (lambda m: suggest(m, BATCHES, {"costs": {"head": {7: 1}}, "limit": 1}), InvalidArgumentError, "head"),
        (lambda m: suggest(m, BATCHES, {"costs": {"head": 4}, "limit": 1}), InvalidArgumentError, "costs"),
        (lambda m: suggest(m, BATCHES, 4, widths=[4, 17]), InvalidArgumentError, "17"),
        (lambda m: suggest(m, BATCHES, 4, widths=[]), InvalidArgumentError, "widths"),
        (lambda m: suggest(ready(network(), ACTIVATIONS, *BATCHES), BATCHES, 4), ModelError, "no weights"),
    ],
)
def test_what_is_refused(eight: nn.Module, call: Any, error: type[Exception], fact: str) -> None:
    before = everything(eight)
    with pytest.raises(error) as caught:
        call(eight)
    assert fact in str(caught.value)
    torch.random.set_rng_state(before["random"])  # which `network` sets
    assert_same(everything(eight), before)


def test_figures_are_numbers_of_python(eight: nn.Module) -> None:
    found = diagnose(eight, BATCHES)
    numbers = [value for row in found.rows for value in row.values() if not isinstance(value, str | list | dict)]
    assert not any(isinstance(value, np.generic) for value in numbers)
