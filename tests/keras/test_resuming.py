"""A training that is stopped at any step and goes on from a file: bit for bit the one that was not stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.keras.framework import keras
from tests.keras.models import call, dense, ready, same, state, vectors
from tests.scheduled import SCHEDULED, STEPS, STOPS, tried, with_schedules
from trainable_keras import finalize, load, save
from trainable_keras.modifiers import BUILTIN


def test_every_schedule_is_tried() -> None:
    assert tried() == with_schedules(BUILTIN)


def train(qmodel: Any, steps: range) -> Any:
    """Take steps of gradient descent, eagerly: a graph for each of many models takes longer than all of them."""
    qmodel.compile(keras.optimizers.SGD(0.3), "mse", run_eagerly=True)
    for step in steps:
        x = np.random.default_rng(step).normal(size=(4, 8)).astype(np.float32)
        qmodel.train_on_batch(x, np.ones((4, 3), np.float32))
    return qmodel


def start(recipe: Any) -> Any:
    return ready(dense(8), recipe, vectors(8, 8))


@pytest.fixture(params=sorted(SCHEDULED), scope="module")
def straight(request: Any) -> tuple[Any, list[bytes], Any]:
    """Return a recipe, and what it gives when nothing stops."""
    recipe = SCHEDULED[request.param]
    qmodel = start(recipe)
    before = state(qmodel)
    train(qmodel, range(STEPS))
    assert state(qmodel) != before
    return recipe, state(qmodel), call(finalize(qmodel), vectors(8, 8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    return tmp_path_factory.mktemp("resuming")


@settings(max_examples=2)
@given(stop=STOPS, own=st.booleans())
def test_a_training_resumes_bit_for_bit(straight: Any, folder: Path, stop: int, own: bool) -> None:
    recipe, trained, outputs = straight
    first = train(start(recipe), range(stop))
    if own:
        save(first, folder / "model.zip")
        rest = load(folder / "model.zip", dense(8))
    else:
        first.save(folder / "model.keras")
        rest = keras.models.load_model(folder / "model.keras")
    train(rest, range(stop, STEPS))
    assert state(rest) == trained
    assert same(call(finalize(rest), vectors(8, 8)), outputs)
