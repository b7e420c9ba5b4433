"""Roundings learned layer by layer: closer to the float model than the nearest codes, deployed as learned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.torch.models import images, network, ready, recipe, same_state, spec
from trainable_core.errors import CalibrationError, ModelError
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
