"""Batch-norm statistics estimated anew: averages of the batches, of the quantized model, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.torch.models import images, network, ready, recipe, same_state, spec
from trainable_core.errors import CalibrationError, ModelError
from trainable_torch import reestimate_batch_norm

BATCHES = [images(8), images(5), images(16)]
KEPT = recipe("LSQ", fold_batch_norm=False)


def kept() -> nn.Module:
    return ready(network(), KEPT, images())


def test_statistics_are_the_averages_over_the_batches_of_the_quantized_model() -> None:
    qmodel = kept().train()
    inputs: list[torch.Tensor] = []
    qmodel.stem.norm.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    assert reestimate_batch_norm(qmodel, BATCHES) is qmodel
    assert qmodel.training
    assert qmodel.stem.norm.training
    qmodel.eval()
    expected = [qmodel.stem.conv(batch) for batch in BATCHES]
    assert all(torch.equal(one, other) for one, other in zip(inputs, expected, strict=True))
    means = torch.stack([each.mean((0, 2, 3)) for each in expected]).mean(0)
    variances = torch.stack([each.var((0, 2, 3)) for each in expected]).mean(0)  # unbiased, as in training
    # three averages of up to 256 float32 numbers below 8, in another order
    torch.testing.assert_close(qmodel.stem.norm.running_mean, means, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(qmodel.stem.norm.running_var, variances, rtol=1e-5, atol=1e-6)


def test_nothing_else_changes() -> None:
    qmodel, other = kept().train(), kept().train()
    reestimate_batch_norm(qmodel, BATCHES)
    for name, value in other.state_dict().items():
        changes = name.endswith(("running_mean", "running_var"))
        assert torch.equal(qmodel.state_dict()[name], value) is not changes
    assert qmodel.stem.norm.momentum == 0.1
    assert all(parameter.grad is None for parameter in qmodel.parameters())


def test_schedules_don_t_advance() -> None:
    how = {"weights": spec("DQA"), "fold_batch_norm": False}
    qmodel = ready(network(), how, images()).train()
    reestimate_batch_norm(qmodel, BATCHES)
    assert qmodel.head.weights_quantizers["weight"].counted_steps == 0


@pytest.mark.parametrize(
    ("batches", "told"),
    [([], "batches are empty"), (images(), r"pass \[batch\]"), (None, "none were given"), ({}, r"pass \[batch\]")],
)
def test_without_batches_everything_stays(batches: Any, told: str) -> None:
    qmodel = kept()
    with pytest.raises(CalibrationError, match=f"(?s)reestimate_batch_norm.*{told}"):
        reestimate_batch_norm(qmodel, batches)
    assert same_state(qmodel, kept())


def test_a_failure_in_the_middle_puts_everything_back() -> None:
    qmodel = kept().train()
    with pytest.raises(RuntimeError):
        reestimate_batch_norm(qmodel, [images(), torch.zeros(1, 1, 2, 2)])
    assert same_state(qmodel, kept())
    assert qmodel.training
    assert qmodel.stem.norm.momentum == 0.1


def test_a_batch_norm_that_is_not_reached_is_named() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.other = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.BatchNorm2d(2)

        def forward(self, x: torch.Tensor, second: bool = False) -> torch.Tensor:
            return (self.other if second else self.norm)(self.conv(x))

    qmodel = ready(Branches(), KEPT, images())
    with pytest.raises(CalibrationError, match="no batch reached other"):
        reestimate_batch_norm(qmodel, BATCHES)
    assert torch.equal(qmodel.norm.running_mean, torch.zeros(2))
    reestimate_batch_norm(qmodel, BATCHES, forward=lambda model, x: (model(x), model(x, second=True)))
    assert torch.equal(qmodel.other.running_mean, qmodel.norm.running_mean)


def test_a_model_without_batch_norms_is_told() -> None:
    with pytest.raises(ModelError, match="fold_batch_norm: after"):
        reestimate_batch_norm(ready(network(), recipe("LSQ"), images()), BATCHES)
    with pytest.raises(ModelError, match="not made by"):
        reestimate_batch_norm(network(), BATCHES)
