"""From wrap to finalize and back from files, on the engine that Keras runs on; KERAS_BACKEND selects it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import trainable_keras
from tests.keras.framework import ENGINE, KERAS_VERSION, gradients, internal, keras, numpy, only_keras
from tests.keras.framework import call as call_layer
from tests.keras.models import (
    GRIDS,
    MODELS,
    TRAINED_BY,
    call,
    dense,
    images,
    moved,
    network,
    ready,
    recipe,
    same,
    spec,
    state,
    train,
    vectors,
)
from trainable_core.config import TrainableQuantizerWeightsConfig
from trainable_core.enums import TieRule
from trainable_core.reference import affine, lsq
from trainable_keras.training import quantizers_of

pytestmark = only_keras(3, "Keras 2 has one engine, on which everything else is tested")
# The unit in the last place by which compilers may differ, as a share of the value before it is rounded: DESIGN 5.4.
NEAR_A_TIE = 2.0**-24


def test_the_engine_is_the_one_asked_for() -> None:
    asked = "tensorflow" if KERAS_VERSION == 2 else os.environ.get("KERAS_BACKEND", ENGINE)
    assert asked == ENGINE


@pytest.mark.parametrize("name", list(MODELS))
def test_wrap_calibrate_fit_finalize_and_files(name: str, tmp_path: Path) -> None:
    make, batches = MODELS[name]
    model = make()
    qmodel = ready(model, recipe("LSQ", "UNIFORM"), batches())
    before = state(qmodel)
    train(qmodel, batches(), lr=0.5)
    assert state(qmodel) != before
    deployed = trainable_keras.finalize(qmodel)
    expected = call(qmodel, batches(5))
    assert np.isfinite(expected[0]).all()
    assert same(call(deployed, batches(5)), expected)
    for saved in (qmodel, deployed):
        trainable_keras.save(saved, tmp_path / "model.trainable")
        assert same(call(trainable_keras.load(tmp_path / "model.trainable", model), batches(5)), expected)
        if name != "subclassed":  # Keras makes those from their own class
            saved.save(tmp_path / "model.keras")
            assert same(call(keras.models.load_model(tmp_path / "model.keras"), batches(5)), expected)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("training_method", TRAINED_BY)
def test_every_method_and_grid_deploys_what_it_trained(training_method: str, grid: str) -> None:
    qmodel = moved(ready(dense(), recipe(training_method, grid), vectors(16, 4)))
    train(qmodel, vectors(16, 4))
    assert same(call(trainable_keras.finalize(qmodel), vectors(32, 4)), call(qmodel, vectors(32, 4)))


def test_values_and_gradients_are_those_of_the_reference() -> None:
    config = TrainableQuantizerWeightsConfig(
        weights_quantization_method="UNIFORM",
        weights_n_bits=4,
        weights_quantization_params={"range_min": [-1.0, -0.3], "range_max": [0.7, 2.0]},
        weights_per_channel_threshold=True,
        weights_channels_axis=-1,
    )
    quantizer = internal("quantizers").LsqWeightsQuantizer(config)
    x, upstream = vectors(40, 2), np.round(vectors(40, 2) * 8).astype(np.float32) / 8
    quantizer.initialize_quantization((40, 2), "x", None)
    grid = quantizer.current_qparams()
    assert np.array_equal(call_layer(quantizer, x), affine.fake_quantize(x, grid, tie_rule=TieRule.HALF_UP))
    d_x, _ = gradients(quantizer, x, upstream)
    assert np.array_equal(d_x, lsq.gradients(x, upstream, grid, tie_rule=TieRule.HALF_UP).x.astype(np.float32))


def test_a_schedule_counts_and_resumes(tmp_path: Path) -> None:
    arguments = {"temperature": {"t_start": 0, "t_end": 4, "initial_val": 1.0, "target_val": 0.1}}
    how = {"weights": spec("DQA", candidates=[2, 8], arguments=arguments)}
    qmodel = train(ready(dense(), how), vectors(8, 4))
    trainable_keras.save(qmodel, tmp_path / "model")
    loaded = trainable_keras.load(tmp_path / "model", dense())
    for each in (qmodel, loaded):
        train(each, vectors(8, 4))
    assert state(loaded) == state(qmodel)
    assert [int(numpy(quantizer.step)) for quantizer in quantizers_of(loaded).values()] == [2]


@pytest.mark.skipif(ENGINE == "torch", reason="Keras does not compile on the torch engine unless asked to")
def test_a_compiled_model_differs_next_to_ties_only() -> None:
    """JAX always compiles `fit` and `predict`, TensorFlow when asked: DESIGN 5.4 says by how much it may differ.

    One activation quantizer before one dense layer: a code that moves is one step of the activation, 2**-8 of the
    range, which a weight of at most 1 carries to the output. Sums in another order add 5 units in the last place.
    """
    qmodel = moved(ready(dense(), {"activations": spec("LSQ", "UNIFORM", 8)}, vectors(4096, 4)))
    qmodel.compile("sgd", "mse", jit_compile=True)
    compiled, eager = qmodel.predict(vectors(4096, 4), batch_size=4096, verbose=0), call(qmodel, vectors(4096, 4))[0]
    difference = np.abs(compiled - eager)
    largest = np.abs(eager).max()
    (quantizer,) = quantizers_of(qmodel).values()
    step = float(quantizer.current_qparams().scale)
    assert difference.max() <= step + 5 * NEAR_A_TIE * 4 * largest
    # a value is next to a tie in 2 * 2**8 * 2**-24 of the cases: of 16,384 values, 0.5 on average
    assert (difference > 5 * NEAR_A_TIE * 4 * largest).sum() <= 8 * 3


def test_training_goes_down() -> None:
    qmodel = ready(network(), recipe("LSQ"), images())
    qmodel.compile(keras.optimizers.SGD(0.05), "mse")
    losses = qmodel.fit(images(), np.ones((8, 3), np.float32), epochs=8, batch_size=8, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
