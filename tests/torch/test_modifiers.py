"""Modifiers on PyTorch: the numbers of the reference, states that resume, deployment, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.torch.models import GRIDS, images, network, ready, spec, train
from trainable_core import hookimpl
from trainable_core.errors import QuantizerStateError, ShapeMismatchError, UnsupportedConfigError
from trainable_core.modifier import Modifier
from trainable_core.reference import gradual, oscillation
from trainable_core.registry.process import register, unregister
from trainable_core.schedule import CosineAnnealingScheduler
from trainable_torch import calibrate, describe, finalize, load, regularization, save, to_mctq, wrap
from trainable_torch.modifiers import AVERAGE, CODE, DIRECTION, FREQUENCY, FROZEN
from trainable_torch.quantizers.base import BasePytorchTrainableQuantizer
from trainable_torch.training import quantizers_of

COSINE = {"kind": "cosine", "t_start": 4, "t_end": 20, "initial_val": 0.2, "target_val": 0.02}
SCHEDULE = CosineAnnealingScheduler(4, 20, 0.2, 0.02)
FREEZING = {"oscillation_freezing": {"threshold": COSINE, "momentum": 0.1}}
DAMPENING = {"oscillation_dampening": {"strength": {**COSINE, "initial_val": 0.0, "target_val": 0.5}}}
GRADUAL = {"gradual_quantization": {"share": {"t_start": 0, "t_end": 12, "initial_val": 1.0, "target_val": 0.0}}}
STATE = ("code", CODE), ("direction", DIRECTION), ("frequency", FREQUENCY), ("average", AVERAGE), ("frozen", FROZEN)


def weights_with(modifiers: Any, rule: str = "LSQ", grid: str = "SYMMETRIC", **more: Any) -> dict[str, Any]:
    return {"weights": spec(rule, grid, 3, modifiers=modifiers, **more)}


def batches(count: int) -> list[Tensor]:
    return [images(4 + index % 3) for index in range(count)]


def weight_quantizers(qmodel: nn.Module) -> list[BasePytorchTrainableQuantizer]:
    return [each for each in quantizers_of(qmodel).values() if each.weights_quantization()]


def weight_of(qmodel: nn.Module, name: str) -> np.ndarray:
    return qmodel.get_submodule(name).weight.detach().numpy()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("rule", ["STE", "LSQ"])
def test_counts_and_frozen_codes_are_those_of_the_reference(rule: str, grid: str) -> None:
    qmodel = ready(network(), weights_with(FREEZING, rule, grid), images()).train()
    generator = torch.Generator().manual_seed(0)
    quantizer = qmodel.head.weights_quantizers["weight"]
    state = oscillation.Oscillations.none(tuple(qmodel.head.weight.shape))
    for step, batch in enumerate(batches(24)):
        now = oscillation.codes(weight_of(qmodel, "head"), quantizer.current_qparams())
        state = oscillation.counted(state, now, 0.1)
        if step >= SCHEDULE.t_start:
            state = oscillation.frozen(state, SCHEDULE(step))
        qmodel(batch)
        for field, name in STATE:
            # one rounding of each product and sum may be another, of numbers up to 4
            np.testing.assert_allclose(getattr(quantizer, name).numpy(), getattr(state, field), rtol=0, atol=2.0**-21)
        with torch.no_grad():  # back and forth, by about a step of the grid
            noise = torch.rand(qmodel.head.weight.shape, generator=generator)
            qmodel.head.weight.add_((-1) ** step * noise * quantizer.deployed_scale().view(-1, 1))
    assert np.isfinite(state.frozen).any()
    assert np.isnan(state.frozen).any()


def test_frozen_elements_have_their_codes_and_no_gradient() -> None:
    qmodel = ready(network(), weights_with(FREEZING), images()).train()
    weight, quantizer = qmodel.head.weight, qmodel.head.weights_quantizers["weight"]
    with torch.no_grad():
        quantizer.get_buffer(FROZEN)[0, :4] = torch.tensor([1.0, -2.0, 0.0, 3.0])
    value = qmodel.head.get_quantized_weights()["weight"]
    assert torch.equal(value[0, :4], quantizer.deployed_scale()[0] * torch.tensor([1.0, -2.0, 0.0, 3.0]))
    value.sum().backward()
    inside = weight.detach().abs() < quantizer.threshold.detach()[:, None] * 0.7
    assert not weight.grad[0, :4].any()
    assert bool((weight.grad[1:][inside[1:]] == 1).all())
    # a step of the threshold moves the frozen ones along
    with torch.no_grad():
        quantizer.threshold.mul_(1.7)
        moved = qmodel.head.get_quantized_weights()["weight"]
        assert torch.equal(moved[0, :4], quantizer.deployed_scale()[0] * torch.tensor([1.0, -2.0, 0.0, 3.0]))


def test_the_term_of_dampening_is_the_reference_s() -> None:
    qmodel = ready(network(), weights_with(DAMPENING), images()).train()
    for _ in range(12):
        qmodel(images())
    term = regularization(qmodel)
    term.backward()
    strength = CosineAnnealingScheduler(4, 20, 0.0, 0.5)(11)
    total = 0.0
    for name in ("stem.conv", "body", "head"):
        grid = qmodel.get_submodule(name).weights_quantizers["weight"].current_qparams()
        expected, gradient = oscillation.dampening(weight_of(qmodel, name), grid, strength)
        total += expected
        found = qmodel.get_submodule(name).weight.grad.numpy()
        # x - q(x) is exact up to the rounding of both, of magnitude 1 at most; the factors have two roundings
        np.testing.assert_allclose(found, gradient, rtol=1e-5, atol=2 * strength * 2.0**-22)
    assert term.item() == pytest.approx(total, rel=1e-5)


def test_dampening_counts_and_lets_the_fast_paths_be() -> None:
    plain = ready(network(), weights_with({}), images())
    qmodel = ready(network(), weights_with({"oscillation_dampening": {"strength": 0.0}}), images())
    one, other = (train(each, batches(6), lr=0.5) for each in (plain, qmodel))
    parameters = zip(one.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(first, second) for first, second in parameters)
    assert {row.modifiers["oscillation_dampening"]["oscillating"] > 0 for row in describe(other).rows} <= {True, False}
    assert other.head.weights_quantizers["weight"].fake_quantization(other.head.weight) is not None


def test_gradual_values_are_the_reference_s() -> None:
    recipe = {"activations": spec("LSQ", "SYMMETRIC", 3, modifiers=GRADUAL), "weights": spec("LSQ")}
    qmodel = ready(network(), recipe, images()).train()
    quantizer = qmodel.body.input_holders["input"].activation_holder_quantizer
    for step in range(14):
        qmodel(images())
        x = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(step), requires_grad=True)
        found, deployed = quantizer(x, True), quantizer(x, False)
        share = max(0.0, 1 - step / 12)
        expected = gradual.mixed(x.detach().numpy(), deployed.detach().numpy(), share, step)
        assert found.detach().numpy().tobytes() == expected.tobytes()
        if step < 12:
            found.sum().backward()
            outside = x.detach().abs() > 3 * quantizer.threshold.detach()
            kept = torch.from_numpy(expected == x.detach().numpy())
            assert bool((x.grad[outside & kept] == 1).all())
            assert not x.grad[outside & ~kept].any()
    assert torch.equal(found, deployed)  # its share has fallen to none


@pytest.mark.parametrize(
    "modifiers", [FREEZING, {**FREEZING, **DAMPENING}, DAMPENING], ids=["freezing", "both", "dampening"]
)
@pytest.mark.parametrize("grid", GRIDS)
def test_what_is_trained_is_deployed(grid: str, modifiers: Any) -> None:
    qmodel = train(ready(network(), weights_with(modifiers, grid=grid), images()), batches(24), lr=0.5).eval()
    if "oscillation_freezing" in modifiers:
        assert sum(row.modifiers["oscillation_freezing"]["frozen"] for row in describe(qmodel).rows) > 0
    deployed = finalize(qmodel)
    assert torch.equal(qmodel(images()), deployed(images()))
    assert torch.equal(to_mctq(deployed)(images()), deployed(images()))
    assert torch.equal(finalize(train(qmodel, batches(2))).eval()(images()), qmodel.eval()(images()))


def same_state(one: nn.Module, other: nn.Module) -> bool:
    """Tell whether two models hold the same bytes under the same names; what is not frozen is NaN."""
    first, second = ({k: v.numpy().tobytes() for k, v in each.state_dict().items()} for each in (one, other))
    return first == second


@pytest.mark.parametrize("stop", [1, 7, 13])
def test_training_resumes_bit_for_bit(stop: int, tmp_path: Any) -> None:
    recipe = {
        **weights_with({**FREEZING, **DAMPENING}),
        "activations": spec("LSQ", "UNIFORM", 4, modifiers=GRADUAL),
    }
    whole = train(ready(network(), recipe, images()), batches(20), lr=0.5)
    first = train(ready(network(), recipe, images()), batches(20)[:stop], lr=0.5)
    save(first, tmp_path / "model.safetensors")
    rest = train(load(tmp_path / "model.safetensors", network()), batches(20)[stop:], lr=0.5)
    assert same_state(whole, rest)
    copied = train(copy.deepcopy(first), batches(20)[stop:], lr=0.5)
    assert all(torch.equal(one, other) for one, other in zip(copied.parameters(), rest.parameters(), strict=True))


def test_a_quantizer_s_document_has_its_modifiers() -> None:
    quantizer = weight_quantizers(ready(network(), weights_with(FREEZING), images()))[0]
    again = type(quantizer).from_config(quantizer.get_config())
    assert again.modifiers == quantizer.modifiers
    assert again.get_config() == quantizer.get_config()
    assert again.get_buffer(FROZEN).shape == quantizer.get_buffer(FROZEN).shape


def test_tied_weights_are_looked_at_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x))

    seen = []
    qmodel = wrap(Tied(), weights_with(FREEZING, per_channel=False))
    calibrate(qmodel)
    quantizer = qmodel.head.weights_quantizers["weight"]
    assert quantizer is qmodel.embed.weights_quantizers["weight"]
    observe = quantizer.observe
    quantizer.observe = lambda x: (seen.append(x), observe(x))
    qmodel.train()(torch.tensor([1, 2]))
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        (weights_with(GRADUAL), "it is for activations"),
        ({"activations": spec("LSQ", modifiers=FREEZING), "weights": spec()}, "it is for weights"),
        (weights_with(FREEZING, "DQA"), "DQA does not train with the codes"),
        (weights_with({"oscilation_freezing": {}}), "did you mean 'oscillation_freezing'"),
    ],
)
def test_what_a_modifier_cant_stand_on_is_refused(recipe: Any, told: str) -> None:
    with pytest.raises(UnsupportedConfigError, match=told):
        wrap(network(), recipe)


def test_modifiers_come_before_variables() -> None:
    quantizer = weight_quantizers(ready(network(), weights_with(FREEZING), images()))[0]
    with pytest.raises(QuantizerStateError, match="modifiers come before"):
        quantizer.modify(quantizer.modifiers)


class Halving(Modifier):
    name = "halving"
    changes_values = True
    by: float = 2.0

    def leave(self, quantizer: Any, x: Any, quantized: Any, training: bool) -> Any:
        return quantized / self.by if training else quantized


class Plugin:
    @hookimpl
    def trainable_register_modifiers(self, backend: str) -> list[type]:
        return [Halving] if backend == "torch" else []


def test_a_plugin_s_modifier_is_one_like_any_other() -> None:
    register(Plugin(), "halves")
    try:
        qmodel = ready(network(), weights_with({"halving": {"by": 4.0}}), images())
        body = qmodel.eval().body
        deployed = body.get_quantized_weights()["weight"]
        assert torch.equal(body.train().get_quantized_weights()["weight"] * 4, deployed)
        with pytest.raises(ValueError, match="bye"):
            wrap(network(), weights_with({"halving": {"bye": 4.0}}))
    finally:
        unregister("halves")
    with pytest.raises(UnsupportedConfigError, match="no modifier is called 'halving'"):
        wrap(network(), weights_with({"halving": {}}))


def test_a_new_calibration_begins_anew() -> None:
    qmodel = train(ready(network(), weights_with(FREEZING), images()), batches(24), lr=0.5)
    assert any(q.get_buffer(FROZEN).isfinite().any() for q in weight_quantizers(qmodel))
    calibrate(qmodel, force=True)
    assert all(
        q.get_buffer(FROZEN).isnan().all() and not q.get_buffer(FREQUENCY).any() for q in weight_quantizers(qmodel)
    )


def test_modifiers_are_made_with_a_model_without_memory() -> None:
    with torch.device("meta"):
        qmodel = wrap(network(), weights_with(FREEZING))
    qmodel.load_state_dict(network().state_dict(), strict=False, assign=True)
    folded = wrap(network(), weights_with(FREEZING))
    qmodel.load_state_dict(
        {k: v for k, v in folded.state_dict().items() if "quantizers" not in k}, strict=False, assign=True
    )
    calibrate(qmodel)
    qmodel.train()(images())
    assert all(q.get_buffer(CODE).isfinite().all() for q in weight_quantizers(qmodel))


@pytest.mark.parametrize("rule", ["LSQ", "ADAROUND"])
def test_a_weight_of_another_shape_gets_state_of_its_shape(rule: str) -> None:
    modifiers = FREEZING if rule == "LSQ" else {}
    qmodel = ready(nn.Sequential(nn.Linear(4, 3)), weights_with(modifiers, rule, per_channel=False), torch.ones(2, 4))
    qmodel[0].weight = nn.Parameter(torch.randn(5, 4))
    qmodel[0].bias = nn.Parameter(torch.zeros(5))
    with pytest.raises(ShapeMismatchError, match=r"shape \(3, 4\)"):
        calibrate(qmodel)
    calibrate(qmodel, force=True)
    assert qmodel.train()(torch.ones(2, 4)).shape == (2, 5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of dynamo's own modules
def test_a_compiled_model_counts_and_freezes_as_an_eager_one() -> None:
    eager = ready(network(), weights_with(FREEZING), images())
    other = copy.deepcopy(eager)
    compiled = torch.compile(other, backend="eager", fullgraph=True)
    for model in (eager, compiled):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        model.train()
        for batch in [images()] * 10:
            optimizer.zero_grad()
            model(batch).square().sum().backward()
            optimizer.step()
    for one, two in zip(weight_quantizers(eager), weight_quantizers(other), strict=True):
        assert one.counted_steps == two.counted_steps == 10
        for _, name in STATE:
            np.testing.assert_allclose(getattr(one, name).numpy(), getattr(two, name).numpy(), rtol=1e-5)
