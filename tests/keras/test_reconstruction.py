"""Roundings learned layer by layer: closer to the float model than the nearest codes, deployed as learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.keras.framework import functions, keras, kl, numpy
from tests.keras.models import call, flat, images, ready, recipe, same, spec, state, vectors
from trainable_core.errors import CalibrationError, InvalidArgumentError, ModelError
from trainable_keras import finalize, load, reconstruct, save
from trainable_keras.wrapping import trainable_quantizers

BETA = {"t_start": 5, "t_end": 30, "initial_val": 20.0, "target_val": 2.0}
BATCHES = [images(16), images(16) + 1]


def learning(grid: str = "SYMMETRIC") -> dict[str, Any]:
    return {"weights": spec("ADAROUND", grid, 3, arguments={"beta": BETA}), "activations": spec("LSQ", n_bits=8)}


def drawn(model: Any) -> Any:
    """Return a model with weights that are the same on every engine."""
    random = np.random.default_rng(7)
    model.set_weights([random.normal(size=each.shape).astype(np.float32) for each in model.get_weights()])
    return model


def test_layers_come_closer_to_the_float_model(tmp_path: Path) -> None:
    qmodel = ready(drawn(flat()), learning(), images())
    kernels = [numpy(qmodel.get_layer(name).kernel).copy() for name in ("conv", "head")]
    told = reconstruct(qmodel, BATCHES, learning_rate=0.03)
    assert [row.layer for row in told.rows] == ["conv", "head"]
    assert all(row.learned <= row.nearest for row in told.rows)
    assert told.rows[0].learned < 0.95 * told.rows[0].nearest
    for before, name in zip(kernels, ("conv", "head"), strict=True):
        assert np.array_equal(numpy(qmodel.get_layer(name).kernel), before)
    deployed = finalize(qmodel)
    assert same(call(deployed, images()), call(qmodel, images()))
    save(qmodel, tmp_path / "model.zip")
    assert state(load(tmp_path / "model.zip", flat())) == state(qmodel)
    qmodel.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert same(call(finalize(again), images()), call(deployed, images()))


def test_what_it_can_t_learn_from_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"reconstruct.*empty"):
        reconstruct(ready(flat(), learning(), images()), [])
    with pytest.raises(ModelError, match="ADAROUND"):
        reconstruct(ready(flat(), recipe("LSQ"), images()), BATCHES)


@keras.saving.register_keras_serializable(package="tests")
class Block(kl.Layer):
    """A residual block, whose layers depend on each other; it is called with one tensor or two."""

    def __init__(self, returns: str = "tensor", **arguments: Any) -> None:
        super().__init__(**arguments)
        self.returns = returns
        self.a, self.b = kl.Conv2D(8, 3, padding="same", activation="relu"), kl.Conv2D(4, 3, padding="same")
        self.drop = kl.Dropout(0.5)

    def build(self, shape: Any) -> None:
        """Build the two layers."""
        self.a.build(shape)
        self.b.build((*shape[:-1], 8))
        super().build(shape)

    def call(self, x: Any, other: Any = None, training: bool | None = None) -> Any:
        """Return the output."""
        y = self.drop(self.b(self.a(x)), training=training) + (x if other is None else other)
        return y if self.returns == "tensor" else functions.cast(y, "int32")

    def get_config(self) -> dict[str, Any]:
        """Return what makes the layer again."""
        return {**super().get_config(), "returns": self.returns}


def residual(returns: str = "tensor") -> keras.Model:
    """Return a layer, a block that is a layer, one in a model within the model, and a layer."""
    given = keras.Input((4, 4, 4))
    stage = keras.Model(given, Block(name="block")(given, other=given), name="stage")
    x = keras.Input((6, 6, 1))
    y = kl.Conv2D(4, 3, name="stem")(x)
    y = stage(Block(returns, name="first")(y))
    return drawn(keras.Model(x, kl.Dense(3, name="head")(kl.Flatten()(y))))


SKIPPED = {"match": {"name": "head"}, "skip": True}
"""To learn less in a test."""


def blockwise() -> dict[str, Any]:
    """Return a recipe in which one layer of a block has a shorter schedule than the other."""
    short = spec("ADAROUND", n_bits=3, arguments={"beta": {**BETA, "t_end": 12}})
    return {**learning(), "rules": [{"match": {"name": "stage.block.a"}, "weights": short}, SKIPPED]}


def test_layers_of_a_block_learn_together() -> None:
    qmodel = ready(residual(), blockwise(), images())
    learned = {id(q.rounding): q for q in trainable_quantizers(qmodel) if "rounding" in q.variable_names}
    counted = {id(q.step) for q in learned.values()}
    rest = [each for each in qmodel.variables if not {id(each)} & {*learned, *counted}]
    before = [numpy(each).copy() for each in rest]
    told = reconstruct(qmodel, BATCHES, learning_rate=0.1, blocks=["stage.block", "first"])
    assert [row.layer for row in told.rows] == ["stem", "first", "stage.block"]
    assert all(row.learned < 0.95 * row.nearest for row in told.rows[1:3])
    assert all(np.array_equal(numpy(each), value) for each, value in zip(rest, before, strict=True))
    deployed = finalize(qmodel)
    assert same(call(deployed, images()), call(qmodel, images()))

    def outputs(model: Any) -> np.ndarray:
        inner = keras.Model(model.inputs, model.get_layer("first").output)
        return np.stack([call(inner, batch)[0] for batch in BATCHES])

    found = np.square(outputs(qmodel) - outputs(residual()), dtype=np.float64).mean()
    assert found == pytest.approx(told.rows[1].learned, rel=1e-4)  # of sums in float32


def test_blocks_that_are_none_are_refused_before_anything_learns() -> None:
    qmodel = ready(residual("int32"), learning(), images())
    before = state(qmodel)
    for blocks, told in {
        "first": "list of names, got 'first'",
        ("frist",): r"no part 'frist'(?s:.*)did you mean 'first'",
        ("stage", "stage.block"): "'stage' and 'stage.block' have a layer in common",
        ("first.drop",): "no layer in 'first.drop'",
    }.items():
        with pytest.raises(InvalidArgumentError, match=f"reconstruct: blocks.*{told}"):
            reconstruct(qmodel, BATCHES, blocks=blocks)
    with pytest.raises(ModelError, match=r"'first' gives .*not a floating tensor"):
        reconstruct(qmodel, BATCHES, blocks=["first"])
    assert state(qmodel) == before


def test_a_layer_of_several_tensors_learns() -> None:
    """Attention is called with two, and a mask."""
    x = keras.Input((5, 4))
    y = kl.MultiHeadAttention(2, 4, name="attention")(x, x * 2, use_causal_mask=True)
    qmodel = ready(drawn(keras.Model(x, y)), learning(), vectors(8, 5, 4))
    told = reconstruct(qmodel, [vectors(8, 5, 4)], learning_rate=0.3)
    assert [row.layer for row in told.rows] == ["attention"]
    assert told.rows[0].learned < told.rows[0].nearest
