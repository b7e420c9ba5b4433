"""Modifiers on both Kerases: the numbers of the reference, in eager mode, `fit` and XLA; states that resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.keras.framework import ENGINE, keras, numpy, only_keras, pull_back, tensor, tf
from tests.keras.models import call, dense, images, network, quantizer_at, ready, same, spec, state, vectors
from trainable_core.enums import TieRule
from trainable_core.errors import UnsupportedConfigError
from trainable_core.reference import gradual, oscillation
from trainable_core.schedule import CosineAnnealingScheduler
from trainable_keras import describe, finalize, load, regularization, save, wrap
from trainable_keras.modifiers import AVERAGE, CODE, DIRECTION, FREQUENCY, FROZEN

COSINE = {"kind": "cosine", "t_start": 3, "t_end": 10, "initial_val": 0.2, "target_val": 0.02}
SCHEDULE = CosineAnnealingScheduler(3, 10, 0.2, 0.02)
FREEZING = {"oscillation_freezing": {"threshold": COSINE, "momentum": 0.1}}
DAMPENING = {"oscillation_dampening": {"strength": {**COSINE, "initial_val": 0.0, "target_val": 0.5}}}
GRADUAL = {"gradual_quantization": {"share": {"t_start": 0, "t_end": 4, "initial_val": 1.0, "target_val": 0.0}}}
STATE = ("code", CODE), ("direction", DIRECTION), ("frequency", FREQUENCY), ("average", AVERAGE), ("frozen", FROZEN)


def weights_with(modifiers: Any, rule: str = "LSQ", grid: str = "SYMMETRIC", **more: Any) -> dict[str, Any]:
    return {"weights": spec(rule, grid, 3, modifiers=modifiers, **more)}


def shake(variable: Any, step: int, size: float) -> None:
    """Move a variable back and forth."""
    noise = np.random.default_rng(step).random(tuple(variable.shape)).astype(np.float32)
    variable.assign(numpy(variable) + np.float32((-1) ** step * size) * noise)


@pytest.mark.parametrize("grid", ["SYMMETRIC", "UNIFORM"])
def test_counts_and_frozen_codes_are_those_of_the_reference(grid: str) -> None:
    qmodel = ready(dense(16, 8), weights_with(FREEZING, grid=grid), vectors(8, 16))
    quantizer, kernel = quantizer_at(qmodel, "fc.kernel"), qmodel.get_layer("fc").kernel
    expected = oscillation.Oscillations.none((16, 8))
    for step in range(11):
        now = oscillation.codes(numpy(kernel), quantizer.current_qparams(), tie_rule=TieRule.HALF_UP)
        expected = oscillation.counted(expected, now, 0.1)
        if step >= SCHEDULE.t_start:
            expected = oscillation.frozen(expected, SCHEDULE(step))
        call(qmodel, vectors(8, 16), training=True)
        for field, name in STATE:
            # one rounding of each product and sum may be another, of numbers up to 4
            found = numpy(getattr(quantizer, name))
            np.testing.assert_allclose(found, getattr(expected, field), rtol=0, atol=2.0**-21)
        shake(kernel, step, 0.3)
    assert np.isfinite(expected.frozen).any()
    assert np.isnan(expected.frozen).any()


def test_the_term_of_dampening_is_the_reference_s() -> None:
    qmodel = ready(dense(16, 8), weights_with(DAMPENING), vectors(8, 16))
    for _ in range(7):
        call(qmodel, vectors(8, 16), training=True)
    strength = CosineAnnealingScheduler(3, 10, 0.0, 0.5)(6)
    quantizer, kernel = quantizer_at(qmodel, "fc.kernel"), numpy(qmodel.get_layer("fc").kernel)
    total, gradient = oscillation.dampening(kernel, quantizer.current_qparams(), strength, tie_rule=TieRule.HALF_UP)
    assert float(numpy(regularization(qmodel))) == pytest.approx(total, rel=1e-5)
    (found,) = pull_back(quantizer.regularization_of, [tensor(kernel)], tensor(1.0))
    # x - q(x) is exact up to the rounding of both, of magnitude 1 at most; the factors have two roundings
    np.testing.assert_allclose(found, gradient, rtol=1e-5, atol=2 * strength * 2.0**-22)


def test_gradual_values_are_the_reference_s() -> None:
    recipe = {"activations": spec("LSQ", "SYMMETRIC", 3, modifiers=GRADUAL), "weights": spec("LSQ")}
    qmodel = ready(dense(), recipe, vectors(8, 4))
    quantizer = quantizer_at(qmodel, "fc: inputs")
    for step in range(6):
        call(qmodel, vectors(8, 4), training=True)
        x = np.random.default_rng(step).normal(size=(3, 5, 7)).astype(np.float32)
        share, deployed = max(0.0, 1 - step / 4), numpy(quantizer.quantized(tensor(x), False))
        found = numpy(quantizer.modified_values(tensor(x), True))
        # the share is a float32 number on most engines: a draw within its rounding may fall on the other side
        near = np.abs(gradual.draws(x.shape, step) - share) < 2.0**-22
        assert np.array_equal(found[~near], gradual.mixed(x, deployed, share, step)[~near])
    assert np.array_equal(found, deployed)  # its share has fallen to none


def test_fit_freezes_and_what_is_trained_is_deployed() -> None:
    recipe = {**weights_with({**FREEZING, **DAMPENING}), "activations": spec("LSQ", modifiers=GRADUAL)}
    qmodel = ready(network(), recipe, images())
    qmodel.compile(keras.optimizers.SGD(0.3), "mse")
    targets = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32) * 4
    qmodel.fit(images(), targets, batch_size=2, epochs=4, shuffle=False, verbose=0)
    told = {row.layer: row.modifiers for row in describe(qmodel).rows if row.target == "Weights"}
    assert all(quantizer_at(qmodel, f"{name}.kernel").counted_steps == 16 for name in ("stem.conv", "head"))
    assert sum(each["oscillation_freezing"]["frozen"] for each in told.values()) > 0
    assert same(call(qmodel, images()), call(finalize(qmodel), images()))
    assert {
        row.modifiers["gradual_quantization"]["float"] for row in describe(qmodel).rows if row.tensor == "inputs"
    } == {0}


@pytest.mark.skipif(ENGINE != "tensorflow", reason="other engines have no variables in their graphs")
@pytest.mark.parametrize(
    ("rule", "grid"), [("LSQ", "SYMMETRIC"), ("LSQ", "UNIFORM"), ("LSQ_PLUS", "UNIFORM"), ("TQT", "POWER_OF_TWO")]
)
def test_the_term_and_the_values_see_one_read_of_each_variable(rule: str, grid: str) -> None:
    # Grappler may move another read behind the update of the threshold; see `reading_once`.
    qmodel = ready(dense(16, 8), weights_with(DAMPENING, rule, grid), vectors(8, 16))
    quantizer, kernel = quantizer_at(qmodel, "fc.kernel"), tf.constant(vectors(16, 8))
    graph = tf.function(lambda x: (quantizer(x, training=True), quantizer.losses)).get_concrete_function(kernel).graph
    reads = [each.inputs[0] for each in graph.get_operations() if each.type == "ReadVariableOp"]
    handles = [getattr(each, "_value", each).handle for each in quantizer.trainable_weights]  # Keras 3 wraps variables
    assert handles
    for handle in handles:
        captured = next(inside for outside, inside in graph.captures if outside is handle)
        assert sum(each is captured for each in reads) == 1


def test_training_resumes_bit_for_bit(tmp_path: Path) -> None:
    recipe = {**weights_with({**FREEZING, **DAMPENING}), "activations": spec("LSQ", modifiers=GRADUAL)}

    def trained(qmodel: Any, steps: range) -> Any:
        qmodel.compile(keras.optimizers.SGD(0.3), "mse")
        for step in steps:
            x = np.random.default_rng(step).normal(size=(4, 16)).astype(np.float32)
            qmodel.train_on_batch(x, np.ones((4, 8), np.float32))
        return qmodel

    whole = trained(ready(dense(16, 8), recipe, vectors(8, 16)), range(12))
    first = trained(ready(dense(16, 8), recipe, vectors(8, 16)), range(7))
    save(first, tmp_path / "model.zip")
    first.save(tmp_path / "model.keras")
    for other in (load(tmp_path / "model.zip", dense(16, 8)), keras.models.load_model(tmp_path / "model.keras")):
        assert state(trained(other, range(7, 12))) == state(whole)


@only_keras(3, "Keras 2 copies layers by their configs alone")
def test_a_copy_of_a_quantizer_has_its_state() -> None:
    import copy

    qmodel = ready(dense(), weights_with(FREEZING), vectors(8, 4))
    call(qmodel, vectors(8, 4), training=True)
    quantizer = quantizer_at(qmodel, "fc.kernel")
    other = copy.deepcopy(quantizer)
    assert other.modifiers == quantizer.modifiers
    assert np.array_equal(numpy(getattr(other, CODE)), numpy(getattr(quantizer, CODE)))


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
        wrap(dense(), recipe)
