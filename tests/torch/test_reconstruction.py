"""Roundings learned layer by layer: closer to the float model than the nearest codes, deployed as learned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.torch.models import images, network, ready, recipe, same_state, spec
from trainable_core.errors import CalibrationError, InvalidArgumentError, ModelError
from trainable_core.reference import adaround
from trainable_torch import describe, finalize, load, reconstruct, regularization, save, to_mctq, wrap

BETA = {"t_start": 10, "t_end": 60, "initial_val": 20.0, "target_val": 2.0}
BATCHES = [images(16), images(12)]


def learning(grid: str = "SYMMETRIC", **more: Any) -> dict[str, Any]:
    return {"weights": spec("ADAROUND", grid, 3, arguments={"beta": BETA}), **more}


@pytest.mark.parametrize("grid", ["SYMMETRIC", "UNIFORM"])
def test_layers_come_closer_to_the_float_model(grid: str) -> None:
    qmodel = ready(network(), learning(grid, activations=spec("LSQ", n_bits=8)), images())
    before = {name: value.clone() for name, value in qmodel.named_parameters() if not name.endswith("rounding")}
    told = reconstruct(qmodel, BATCHES, learning_rate=0.05)
    assert [row.layer for row in told.rows] == ["stem.conv", "body", "head"]
    assert all(row.learned <= row.nearest for row in told.rows)
    assert told.rows[-1].learned < 0.9 * told.rows[-1].nearest
    assert str(told).splitlines()[1].split()[0] == "stem.conv"
    assert told.to_dict()["rows"][0]["layer"] == "stem.conv"
    model, nearest = network().eval(), ready(network(), {"weights": spec("STE", grid, 3)}, images()).eval()
    distances = [(each.eval()(images(32)) - model(images(32))).square().mean().item() for each in (qmodel, nearest)]
    assert distances[0] < distances[1]
    assert all(torch.equal(before[name], dict(qmodel.named_parameters())[name]) for name in before)
    assert qmodel.head.weight.grad is None
    assert qmodel.head.weights_quantizers["weight"].rounding.grad is None
    deployed = finalize(qmodel)
    assert torch.equal(deployed(images()), qmodel(images()))
    assert torch.equal(to_mctq(deployed)(images()), qmodel(images()))


def test_it_leaves_modes_and_can_begin_anew(tmp_path: Any) -> None:
    qmodel = ready(network(), learning(), images()).train()
    first = reconstruct(qmodel, BATCHES)
    assert qmodel.training
    assert all(module.training for module in qmodel.modules())
    assert reconstruct(qmodel, BATCHES) == first
    save(qmodel, tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors", network())
    assert same_state(again, qmodel)
    assert torch.equal(again.eval()(images()), qmodel.eval()(images()))


def test_the_method_learns_in_a_loop_too_and_ends_with_the_deployed_values() -> None:
    qmodel = ready(network(), learning(), images()).train()
    roundings = [p for name, p in qmodel.named_parameters() if name.endswith("rounding")]
    optimizer = torch.optim.Adam(roundings, lr=0.05)
    terms = []
    for step in range(62):
        optimizer.zero_grad()
        outputs = qmodel(images())
        term = regularization(qmodel)
        if step == 30:
            h = [
                adaround.soft_rounding(
                    layer.weight.detach().numpy(),
                    layer.weights_quantizers["weight"].current_qparams(),
                    layer.weights_quantizers["weight"].rounding.detach().numpy(),
                )
                for layer in (qmodel.stem.conv, qmodel.body, qmodel.head)
            ]
            beta = adaround.checked_beta(BETA, "")(30)
            expected = 0.01 * sum(adaround.regularizer(each.h, each.dh, beta)[0] for each in h)
            assert term.item() == pytest.approx(expected, rel=1e-4)  # of some hundred terms, powers of 17
        terms.append(term.item())
        if step < 60:
            (outputs.square().mean() + term).backward()
            optimizer.step()
    assert terms[9] == 0 < terms[10]
    assert terms[-1] == 0
    assert torch.equal(outputs, qmodel.eval()(images()))
    assert {row.training_method for row in describe(qmodel).rows} == {"ADAROUND"}


@pytest.mark.parametrize(
    ("batches", "told"), [([], "batches are empty"), (images(), r"pass \[batch\]"), (None, "none were given")]
)
def test_without_batches_nothing_is_learned(batches: Any, told: str) -> None:
    qmodel = ready(network(), learning(), images())
    with pytest.raises(CalibrationError, match=f"(?s)reconstruct.*{told}"):
        reconstruct(qmodel, batches)


def test_models_without_such_weights_are_told() -> None:
    with pytest.raises(ModelError, match="ADAROUND"):
        reconstruct(ready(network(), recipe("LSQ"), images()), BATCHES)
    with pytest.raises(ModelError, match="not made by"):
        reconstruct(network(), BATCHES)
    with pytest.raises(Exception, match="not calibrated"):
        reconstruct(wrap(network(), learning()), BATCHES)


@pytest.mark.parametrize("residual", [False, True])
def test_what_the_model_writes_into_in_place_is_learned_as_it_was(residual: bool) -> None:
    """A convolution's outputs that an activation overwrites, and its inputs that a sum overwrites."""

    class Chain(nn.Module):
        def __init__(self, in_place: bool) -> None:
            super().__init__()
            self.a, self.b, self.in_place = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, padding=1), in_place

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = nn.functional.relu(self.a(x), inplace=self.in_place and not residual)
            z = self.b(y)
            return y.add_(z) if self.in_place and residual else y + z

    torch.manual_seed(3)
    plain = Chain(in_place=False)
    writes = Chain(in_place=True)
    writes.load_state_dict(plain.state_dict())
    told = [reconstruct(ready(model, learning(), images()), BATCHES, learning_rate=0.05) for model in (plain, writes)]
    assert told[0] == told[1]


def block_of(width: int) -> nn.Module:
    """Return a residual block, whose layers depend on each other."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(width, 8, 3, padding=1), nn.Conv2d(8, width, 3, padding=1)
            self.in_place = False

        def forward(self, x: torch.Tensor, scales: tuple[torch.Tensor | None, ...] = (None,)) -> Any:
            x = nn.functional.relu(x, inplace=self.in_place)
            return x + self.b(nn.functional.relu(self.a(x))), scales

    return Block()


class Residual(nn.Module):
    """Two blocks between two layers; the second block is called with more than a tensor, and returns more."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.stem, self.head = nn.Conv2d(1, 4, 3), nn.Linear(64, 3)
        self.blocks = nn.ModuleList(block_of(4) for _ in range(2))
        self.given: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, _ = self.blocks[0](self.stem(x))
        y, _ = self.blocks[1](y, scales=(y, self.given))
        return self.head(y.flatten(1))


def distance_at(name: str, qmodel: nn.Module) -> float:
    """Return the mean squared distance of a module's outputs from those of the float model."""
    found: list[torch.Tensor] = []
    for model in (qmodel.eval(), Residual().eval()):
        handle = model.get_submodule(name).register_forward_hook(lambda _m, _x, output: found.append(output[0].clone()))
        with torch.no_grad():
            for batch in BATCHES:
                model(batch)
        handle.remove()
    pairs = zip(found[:2], found[2:], strict=True)
    return float(torch.stack([(one - other).double().square().mean() for one, other in pairs]).mean())


BLOCKS = ["blocks.0", "blocks.1"]


def test_layers_of_a_block_learn_together() -> None:
    """Told distances are the block's; alone, its layers end further from the float block."""
    how = learning(activations=spec("LSQ", n_bits=8))
    qmodel, by_layers = (ready(Residual(), how, images()).train() for _ in range(2))
    before = {name: value.clone() for name, value in qmodel.state_dict().items() if "weights_quantizers" not in name}
    nearest = distance_at("blocks.0", qmodel)  # the stem learns before
    told = reconstruct(qmodel.train(), BATCHES, learning_rate=0.05, blocks=BLOCKS)
    assert [row.layer for row in told.rows] == ["stem", "blocks.0", "blocks.1", "head"]
    assert all(module.training for module in qmodel.modules())
    assert all(torch.equal(value, qmodel.state_dict()[name]) for name, value in before.items())
    assert told.rows[1].learned < 0.9 * told.rows[1].nearest
    assert distance_at("blocks.0", qmodel) == pytest.approx(told.rows[1].learned, rel=1e-5)  # of sums in float32
    assert told.rows[1].learned < nearest
    assert torch.equal(finalize(qmodel)(images()), qmodel(images()))
    reconstruct(by_layers, BATCHES, learning_rate=0.05)
    assert distance_at("blocks.1", qmodel) < distance_at("blocks.1", by_layers)
    assert reconstruct(qmodel, BATCHES, learning_rate=0.05, blocks=BLOCKS) == told  # it begins anew


def test_a_block_of_one_layer_learns_as_the_layer() -> None:
    one, other = (ready(network(), learning(), images()) for _ in range(2))
    blocks = ["head", "stem"]  # in any order: the stem holds one layer that learns, and its batch norm is folded
    told = reconstruct(one, BATCHES, blocks=blocks), reconstruct(other, BATCHES)
    assert told[0].rows[1:] == told[1].rows[1:]
    assert [row.layer for row in told[0].rows] == ["stem", "body", "head"]


def test_a_block_may_write_into_its_inputs() -> None:
    told = []
    for in_place in (False, True):
        qmodel = ready(Residual(), learning(), images())
        for block in qmodel.blocks:
            block.in_place = in_place
        told.append(reconstruct(qmodel, BATCHES, blocks=["blocks.0"]))
    assert told[0].rows[:2] == told[1].rows[:2]


def test_in_a_block_a_rounding_rests_when_its_schedule_is_over() -> None:
    short = spec("ADAROUND", n_bits=3, arguments={"beta": {**BETA, "t_end": 12}})
    how = learning(rules=[{"match": {"name": "blocks.0.a"}, "weights": short}])
    qmodel, steps = ready(Residual(), how, images()), []
    quantizer = qmodel.blocks[0].a.weights_quantizers["weight"]
    advance = quantizer.advance

    def noted() -> None:
        advance()
        steps.append(quantizer.rounding.detach().clone())

    quantizer.advance = noted
    reconstruct(qmodel, BATCHES, blocks=["blocks.0"])
    end = adaround.schedule_end(adaround.checked_beta(short["arguments"]["beta"], ""))
    assert len(steps) == adaround.schedule_end(adaround.checked_beta(BETA, "")) > end + 1
    assert not torch.equal(steps[end], steps[end - 1])
    assert all(torch.equal(each, steps[end]) for each in steps[end:])


@pytest.mark.parametrize(
    ("blocks", "told"),
    [
        ("blocks.0", "list of names, got 'blocks.0'"),
        ({"blocks.0": 1}, "list of names"),
        (5, "list of names, got 5"),
        ([3], "no part 3"),
        (["blocks.2"], r"no part 'blocks.2'(?s:.*)did you mean 'blocks"),
        (["blocks.0", "blocks.0"], "in common"),
        (["blocks.1.a", "blocks.1"], "'blocks.1.a' and 'blocks.1' have a layer in common"),
        (["", "head"], "in common"),
        (["stem.weights_quantizers"], "no layer in 'stem.weights_quantizers'"),
    ],
)
def test_blocks_that_are_none_are_refused(blocks: Any, told: str) -> None:
    qmodel = ready(Residual(), learning(), images())
    with pytest.raises(InvalidArgumentError, match=f"reconstruct: blocks.*{told}"):
        reconstruct(qmodel, BATCHES, blocks=blocks)


def test_blocks_that_can_t_be_called_again_are_refused_before_anything_learns() -> None:
    qmodel = ready(Residual(), learning(), images())
    before = {name: value.clone() for name, value in qmodel.state_dict().items()}
    with pytest.raises(ModelError, match=r"no batch reached blocks\n.*calls"):
        reconstruct(qmodel, BATCHES, blocks=["blocks"])
    qmodel.given = object()
    with pytest.raises(ModelError, match=r"'blocks\.1' is called with a object"):
        reconstruct(qmodel, BATCHES, blocks=BLOCKS)
    qmodel.given = None
    qmodel.blocks[0].forward, forward = lambda x: {"y": x}, qmodel.blocks[0].forward
    with pytest.raises((ModelError, ValueError), match=r"'blocks\.0' gives a dict"):
        reconstruct(qmodel, BATCHES, blocks=BLOCKS)
    qmodel.blocks[0].forward = forward
    assert all(torch.equal(value, before[name]) for name, value in qmodel.state_dict().items())
