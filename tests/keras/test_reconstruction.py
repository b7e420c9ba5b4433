"""Roundings learned layer by layer: closer to the float model than the nearest codes, deployed as learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.keras.framework import ENGINE, keras, numpy
from tests.keras.models import call, flat, images, ready, recipe, same, spec, state
from trainable_core.errors import CalibrationError, ModelError, UnsupportedConfigError
from trainable_keras import finalize, load, reconstruct, save

BETA = {"t_start": 5, "t_end": 30, "initial_val": 20.0, "target_val": 2.0}
BATCHES = [images(16), images(16) + 1]


def learning(grid: str = "SYMMETRIC") -> dict[str, Any]:
    return {"weights": spec("ADAROUND", grid, 3, arguments={"beta": BETA}), "activations": spec("LSQ", n_bits=8)}


not_on_torch = pytest.mark.skipif(ENGINE == "torch", reason="on other engines than PyTorch only: it is refused there")


@not_on_torch
def test_layers_come_closer_to_the_float_model(tmp_path: Path) -> None:
    qmodel = ready(flat(), learning(), images())
    kernels = [numpy(qmodel.get_layer(name).kernel).copy() for name in ("conv", "head")]
    told = reconstruct(qmodel, BATCHES, learning_rate=0.03)
    assert [row.layer for row in told.rows] == ["conv", "head"]
    assert all(row.learned <= row.nearest for row in told.rows)
    assert told.rows[-1].learned < 0.9 * told.rows[-1].nearest
    for before, name in zip(kernels, ("conv", "head"), strict=True):
        assert np.array_equal(numpy(qmodel.get_layer(name).kernel), before)
    deployed = finalize(qmodel)
    assert same(call(deployed, images()), call(qmodel, images()))
    save(qmodel, tmp_path / "model.zip")
    assert state(load(tmp_path / "model.zip", flat())) == state(qmodel)
    qmodel.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert same(call(finalize(again), images()), call(deployed, images()))


@not_on_torch
def test_what_it_can_t_learn_from_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"reconstruct.*empty"):
        reconstruct(ready(flat(), learning(), images()), [])
    with pytest.raises(ModelError, match="ADAROUND"):
        reconstruct(ready(flat(), recipe("LSQ"), images()), BATCHES)


@pytest.mark.skipif(ENGINE != "torch", reason="on the PyTorch engine only")
def test_the_pytorch_engine_is_refused() -> None:
    with pytest.raises(UnsupportedConfigError, match="PyTorch engine"):
        reconstruct(ready(flat(), learning(), images()), BATCHES)
