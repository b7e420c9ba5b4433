"""A training that is stopped at any step and goes on from its file: bit for bit the one that was not stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import nn

from tests.scheduled import SCHEDULED, STEPS, STOPS, tried, with_schedules
from tests.torch.models import images, network, ready
from trainable_torch import finalize, load, parameter_groups, regularization, save
from trainable_torch.modifiers import BUILTIN


def test_every_schedule_is_tried() -> None:
    assert tried() == with_schedules(BUILTIN)


def optimizer_of(qmodel: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameter_groups(qmodel, qparams={"lr": 0.02}), lr=0.05)


def train(qmodel: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    qmodel.train()
    for step in steps:
        optimizer.zero_grad()
        (qmodel(images(3 + step)).square().mean() + regularization(qmodel)).backward()
        optimizer.step()


def state(qmodel: nn.Module) -> dict[str, bytes]:
    """Return the bytes of all tensors: a weight that is not frozen has NaN in the place of its code."""
    return {name: value.numpy().tobytes() for name, value in qmodel.state_dict().items()}


@pytest.fixture(params=sorted(SCHEDULED), scope="module")
def straight(request: Any) -> tuple[Any, dict[str, bytes], torch.Tensor]:
    """Return a recipe, and what it gives when nothing stops."""
    recipe = SCHEDULED[request.param]
    qmodel = ready(network(), recipe, images())
    before = state(qmodel)
    train(qmodel, optimizer_of(qmodel), range(STEPS))
    assert state(qmodel) != before
    return recipe, state(qmodel), finalize(qmodel)(images())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    return tmp_path_factory.mktemp("resuming")


@settings(max_examples=3)
@given(stop=STOPS)
def test_a_training_resumes_bit_for_bit(straight: Any, folder: Path, stop: int) -> None:
    recipe, trained, outputs = straight
    first = ready(network(), recipe, images())
    optimizer = optimizer_of(first)
    train(first, optimizer, range(stop))
    save(first, folder / "model.safetensors")
    torch.save(optimizer.state_dict(), folder / "optimizer")
    rest = load(folder / "model.safetensors", network())
    optimizer = optimizer_of(rest)
    optimizer.load_state_dict(torch.load(folder / "optimizer", weights_only=True))
    train(rest, optimizer, range(stop, STEPS))
    assert state(rest) == trained
    assert torch.equal(finalize(rest)(images()), outputs)
