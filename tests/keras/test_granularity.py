"""Weights with a scale per group, and activations with scales of their own, in either Keras."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.keras.framework import (
    BACKEND,
    call,
    gradients,
    keras,
    kl,
    only_keras,
    only_tensorflow,
    to_numpy,
)
from tests.keras.models import GRIDS, ready, same, spec, train
from trainable_core import get_trainable_quantizer_class
from trainable_core.config import TrainableQuantizerActivationConfig, TrainableQuantizerWeightsConfig
from trainable_core.enums import QuantizationMethod, TieRule
from trainable_core.errors import InvalidArgumentError, ModelError, ShapeMismatchError, UnsupportedConfigError
from trainable_core.granularity import Blocks
from trainable_core.recipe.layers import WeightAxes
from trainable_core.reference import affine, dynamic, lsq
from trainable_keras import calibrate, describe, finalize, load, register_layer, save, to_mctq, wrap
from trainable_keras.training import quantizers_of


def network() -> keras.Sequential:
    keras.utils.set_random_seed(0)
    layers = [
        keras.Input((6, 6, 8)),
        kl.Conv2D(4, 3, name="conv"),
        kl.DepthwiseConv2D(3, name="depthwise"),
        kl.Flatten(name="flatten"),
        kl.Dense(3, name="fc"),
    ]
    return keras.Sequential(layers)


def batch(count: int = 5) -> np.ndarray:
    return np.random.default_rng(count).normal(size=(count, 6, 6, 8)).astype(np.float32)


def recipe(training_method: str = "LSQ", method: str = "SYMMETRIC", **more: Any) -> dict[str, Any]:
    return {"weights": {**spec(training_method, method), "group_size": 4}, "target": "native", **more}


def quantizer_of(target: str, training_method: str, config: Any, shape: Any = None, **arguments: Any) -> Any:
    cls = get_trainable_quantizer_class(target, training_method, config.quantization_method, backend=BACKEND)
    quantizer = cls(config, **arguments)
    quantizer.initialize_quantization(shape, "x", None)
    return quantizer


@pytest.mark.parametrize(
    ("training_method", "method"), [("STE", "POWER_OF_TWO"), ("LSQ", "UNIFORM"), ("DQA", "SYMMETRIC")]
)
def test_what_was_trained_is_what_is_deployed_and_saved(training_method: str, method: str, tmp_path: Path) -> None:
    activations = spec("DYNAMIC", method, 8)
    qmodel = ready(network(), recipe(training_method, method, activations=activations), batch())
    train(qmodel, batch(4))
    deployed = finalize(qmodel)
    expected = call(qmodel, batch(7))
    assert same(call(deployed, batch(7)), expected)
    for model in (qmodel, deployed):
        save(model, tmp_path / "model")
        assert same(call(load(tmp_path / "model", network()), batch(7)), expected)
        model.save(tmp_path / "model.keras")
        assert same(call(keras.models.load_model(tmp_path / "model.keras"), batch(7)), expected)
    told = {row.layer: row.granularity for row in describe(deployed).rows if row.target == "Weights"}
    assert told == {
        "conv": "channel (axis 3), group of 4 (axis 2)",
        "depthwise": "channel (axis 2)",
        "fc": "channel (axis 1), group of 4 (axis 0)",
    }


@pytest.mark.parametrize("method", GRIDS)
def test_values_and_gradients_of_groups_are_the_references(method: str) -> None:
    random = np.random.default_rng(1)
    x, upstream = (random.normal(size=(8, 3)).astype(np.float32) for _ in range(2))
    blocks = Blocks((1,), 0, 4)
    rows = np.abs(blocks.rows(x)).max(1) * 0.7
    params: dict[str, Any] = {"threshold": rows.tolist()}
    if method == "UNIFORM":
        params = {"range_min": (-rows).tolist(), "range_max": (rows * 1.2).tolist()}
    config = TrainableQuantizerWeightsConfig(
        weights_quantization_method=method,
        weights_n_bits=3,
        weights_quantization_params=params,
        weights_channels_axis=1,
        weights_per_channel_threshold=True,
        weights_group_size=4,
        weights_group_axis=0,
    )
    quantizer = quantizer_of("Weights", "LSQ", config, x.shape)
    grid = quantizer.current_qparams()
    expected = blocks.tensor(affine.fake_quantize(blocks.rows(x), grid, tie_rule=TieRule.HALF_UP), x.shape)
    assert np.array_equal(call(quantizer, x), expected)
    assert np.array_equal(call(quantizer.convert2inferable(), x), expected)
    wanted = lsq.gradients(blocks.rows(x), blocks.rows(upstream), grid, tie_rule=TieRule.HALF_UP)
    found, variables = gradients(quantizer, x, upstream, training=True)
    assert np.array_equal(found, blocks.tensor(wanted.x, x.shape).astype(np.float32))
    if method == "SYMMETRIC":
        # four float32 terms per group, each with three roundings
        np.testing.assert_allclose(variables["threshold"], wanted.scale / 4, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("layer", "shape", "thresholds"),
    [
        (kl.Conv2DTranspose(4, 3), (5, 5, 8), 4 * 2),
        (kl.Embedding(5, 8), None, 5 * 2),
        (kl.Dense(3), (8,), 3 * 2),
        (kl.Dense(3), (3,), 3),
        (kl.EinsumDense("ab,dbc->adc", (2, 3)), (8,), 3 * 2),
    ],
)
def test_groups_lie_along_the_inputs_of_a_layer(layer: Any, shape: Any, thresholds: int) -> None:
    given = keras.Input(shape) if shape is not None else keras.Input((3,), dtype="int32")
    qmodel = calibrate(wrap(keras.Sequential([given, layer]), recipe("STE")))
    (quantizer,) = quantizers_of(qmodel).values()
    assert tuple(quantizer.threshold.shape) == (thresholds,)


def test_a_registered_layer_may_hold_experts() -> None:
    class Experts(kl.Layer):
        def build(self, input_shape: Any) -> None:
            self.up = self.add_weight(name="up", shape=(2, 8, 3), initializer="random_normal")
            self.built = True

        def call(self, inputs: Any) -> Any:
            return inputs @ self.up

        def compute_output_shape(self, input_shape: Any) -> Any:
            return (*input_shape[:-1], 3)

    register_layer(Experts, "linear", {"up": WeightAxes(2, inputs=1, experts=0)})
    qmodel = calibrate(wrap(keras.Sequential([keras.Input((2, 5, 8)), Experts()]), recipe("STE")))
    (quantizer,) = quantizers_of(qmodel).values()
    assert tuple(quantizer.threshold.shape) == (2 * 3 * 2,)
    x = np.random.default_rng(0).normal(size=(4, 2, 5, 8)).astype(np.float32)
    assert same(call(finalize(qmodel), x), call(qmodel, x))


def test_another_shape_is_refused() -> None:
    config = TrainableQuantizerWeightsConfig(
        weights_quantization_method="SYMMETRIC",
        weights_n_bits=3,
        weights_quantization_params={"threshold": 1.0},
        weights_channels_axis=1,
        weights_per_channel_threshold=True,
        weights_group_size=4,
        weights_group_axis=0,
    )
    quantizer = quantizer_of("Weights", "STE", config, (8, 3))
    with pytest.raises(ShapeMismatchError, match="6 blocks with a scale each"):
        call(quantizer, np.zeros((8, 4), np.float32))


@only_keras(2, "mctq's own classes can't be built on Keras 3")
def test_mctq_has_no_counterparts() -> None:
    activations = spec("DYNAMIC", n_bits=8)
    deployed = finalize(ready(network(), recipe(activations=activations), batch()))
    with pytest.raises(UnsupportedConfigError, match="mctq has no counterpart of"):
        to_mctq(deployed)


# ---- dynamic activations --------------------------------------------------------------------------------------------


def activation_quantizer(granularity: str = "token", method: str = "SYMMETRIC", n_bits: int = 4, **params: Any) -> Any:
    config = TrainableQuantizerActivationConfig(
        activation_quantization_method=method, activation_n_bits=n_bits, activation_quantization_params=params
    )
    return quantizer_of("Activation", "DYNAMIC", config, granularity=granularity)


@pytest.mark.parametrize("shape", [(4, 3, 5), (7,), (), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("granularity", ["token", "tensor"])
@pytest.mark.parametrize("method", GRIDS)
def test_dynamic_values_are_the_references(method: str, granularity: str, shape: tuple[int, ...]) -> None:
    x = (np.random.default_rng(3).normal(size=shape) * 5).astype(np.float32)
    quantizer = activation_quantizer(granularity, method)
    expected = x
    if x.size:
        grid = dynamic.grid_of(x, QuantizationMethod[method], 4, min_threshold=2.0**-16, granularity=granularity)
        expected = dynamic.fake_quantize(x, grid, tie_rule=TieRule.HALF_UP)
    for training in (False, True):
        assert np.array_equal(call(quantizer, x, training=training), expected)
    assert np.array_equal(call(quantizer.convert2inferable(), x), expected)


def test_the_gradient_passes_as_it_is() -> None:
    random = np.random.default_rng(4)
    x, upstream = (random.normal(size=(3, 5)).astype(np.float32) for _ in range(2))
    found, variables = gradients(activation_quantizer(), x * 9, upstream, training=True)
    assert np.array_equal(found, upstream)
    assert variables == {}
    found, _ = gradients(activation_quantizer().convert2inferable(), x * 9, upstream)
    assert np.array_equal(found, upstream)


def test_calibration_needs_no_batches_and_leaves_dynamic_activations_alone() -> None:
    activations = spec("DYNAMIC", n_bits=8, arguments={"granularity": "tensor"})
    qmodel = calibrate(wrap(network(), recipe(activations=activations)))
    calibrate(qmodel, force=True)
    rows = [row for row in describe(qmodel).rows if row.target == "Activation"]
    assert {(row.granularity, row.state, len(row.params)) for row in rows} == {("tensor, computed", "trainable", 0)}


def test_a_deployed_quantizer_comes_back_from_its_config() -> None:
    x = np.random.default_rng(5).normal(size=(3, 5)).astype(np.float32)
    deployed = activation_quantizer("tensor", "UNIFORM").convert2inferable()
    again = type(deployed).from_config(deployed.get_config())
    assert np.array_equal(call(again, x), call(deployed, x))
    with pytest.raises(ModelError, match="mctq has no counterpart"):
        deployed.to_mctq()


def test_what_a_dynamic_quantizer_can_not_be_told() -> None:
    with pytest.raises(UnsupportedConfigError, match="computes its grid from the tensor itself"):
        activation_quantizer(threshold=1.0)
    with pytest.raises(InvalidArgumentError, match=r"granularity.*token, tensor"):
        activation_quantizer("channel")


@only_tensorflow("graphs of another engine are tested by the kit")
def test_a_graph_with_an_unknown_batch_has_the_values_of_an_eager_call() -> None:
    activations = spec("DYNAMIC", n_bits=4)
    qmodel = ready(network(), recipe(activations=activations), batch())
    assert same(qmodel.predict(batch(3), verbose=0), to_numpy(qmodel(batch(3))))
