"""A plugin's own formula gives the deployed kernel's values: eager, in a graph, and compiled where it can."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from mct_quantizers import QuantizationMethod, QuantizationTarget, mark_quantizer

from tests.keras.framework import ENGINE, FRAMEWORK, call, gradients, keras, numpy, only_keras, tensor, tf
from trainable_core.config import TrainableQuantizerWeightsConfig
from trainable_keras import BaseKerasTrainableQuantizer
from trainable_keras.quantizers.base import by_name

f = FRAMEWORK.functions
CHANNELS = 512
GRIDS = [QuantizationMethod.SYMMETRIC, QuantizationMethod.POWER_OF_TWO, QuantizationMethod.UNIFORM]


def ties_up(v: Any) -> Any:
    down = f.floor(v)
    return down + f.cast(v - down >= 0.5, "float32")


def clipped(steps: Any, grid: Any) -> Any:
    low, high = grid.quant_min - grid.zero_point, grid.quant_max - grid.zero_point
    return f.minimum(f.maximum(steps, low), high)


def by_one_sum(x: Any, grid: Any) -> Any:
    """Multiply by the inverse, add one half: what comes to mind first."""
    return clipped(f.floor(x * (1 / grid.scale) + 0.5), grid)


def by_comparing(x: Any, grid: Any) -> Any:
    """Compare the rest with one half."""
    return ties_up(clipped(x * (1 / grid.scale), grid))


def by_steps(x: Any, grid: Any) -> Any:
    """Take what the grid offers, as the tutorial does."""
    return ties_up(clipped(grid.steps(x), grid))


def by_steps_and_a_sum(x: Any, grid: Any) -> Any:
    """Take what the grid offers, and add one half."""
    return clipped(f.floor(grid.steps(x) + 0.5), grid)


FORMULAS = [by_one_sum, by_comparing, by_steps, by_steps_and_a_sum]


def made(formula: Callable[[Any, Any], Any], method: QuantizationMethod, n_bits: int, *, per_channel: bool) -> Any:
    """Return a calibrated quantizer of this formula, for weights of shape (N, CHANNELS)."""

    @mark_quantizer(QuantizationTarget.Weights, [method], "TEMPLATE")
    class Template(BaseKerasTrainableQuantizer):
        learns_grid = True

        def fake_quantize(self, x: Any, grid: Any, training: bool) -> Any:
            return (formula(x, grid) + 0.0) * grid.scale

    random = np.random.default_rng(n_bits)
    shape = CHANNELS if per_channel else None
    if method is QuantizationMethod.UNIFORM:
        params = {"range_min": -random.uniform(0.1, 3, shape), "range_max": random.uniform(0.1, 3, shape)}
    else:
        params = {"threshold": random.uniform(0.1, 3, shape)}
    config = TrainableQuantizerWeightsConfig(
        weights_quantization_method=method.name,
        weights_n_bits=n_bits,
        weights_quantization_params={key: np.asarray(value).tolist() for key, value in params.items()},
        weights_per_channel_threshold=per_channel,
        weights_channels_axis=1 if per_channel else None,
    )
    quantizer = Template(config)
    quantizer.initialize_quantization((1, CHANNELS), "weight", None)
    return quantizer


def at_ties(quantizer: Any) -> np.ndarray:
    """Return every tie of a grid and its neighbours, for each channel, and a few values far away."""
    qparams = quantizer.current_qparams()
    first, last = (np.max(each) for each in (qparams.zero_point - qparams.quant_min, qparams.quant_max))
    halves = np.unique(np.linspace(-first - 2, last + 2, 300).round().astype(np.float32)) + np.float32(0.5)
    halves = np.concatenate([halves, np.float32([-1.5, -0.5, 0.5, 1.5])])
    scale = np.broadcast_to(qparams.along(2).scale, (1, CHANNELS))
    ties = halves[:, None] * scale
    far = np.broadcast_to(np.float32([[0.0], [-0.0], [1e30], [-1e30], [np.inf], [-np.inf]]), (6, CHANNELS))
    return np.concatenate([ties, np.nextafter(ties, np.float32(9)), np.nextafter(ties, np.float32(-9)), far])


def graph_of(function: Callable[[Any], Any], *, compiled: bool) -> Callable[[Any], Any]:
    """Return a function as one graph of the engine, optimized as the engine does."""
    if ENGINE == "tensorflow":
        return tf.function(function, autograph=False, jit_compile=compiled)
    import jax

    return jax.jit(function)


each_case = pytest.mark.parametrize(
    ("method", "n_bits", "per_channel"),
    [
        *((method, n_bits, True) for method in GRIDS for n_bits in (1, 3, 8)),
        *((method, 8, False) for method in GRIDS),
        (QuantizationMethod.SYMMETRIC, 16, True),
    ],
    ids=str,
)


@each_case
@pytest.mark.parametrize("formula", FORMULAS, ids=lambda formula: formula.__name__)
def test_its_values_are_those_of_the_deployed_kernel(
    formula: Any, method: QuantizationMethod, n_bits: int, per_channel: bool
) -> None:
    quantizer = made(formula, method, n_bits, per_channel=per_channel)
    x = at_ties(quantizer)
    expected = call(quantizer.convert2inferable(), x)
    assert np.array_equal(call(quantizer, x), expected)
    if ENGINE == "tensorflow":  # JAX's graphs are compiled, and the torch engine has none
        assert np.array_equal(numpy(graph_of(quantizer, compiled=False)(tensor(x))), expected)


@pytest.mark.skipif(ENGINE == "torch", reason="Keras does not compile on the torch engine unless asked to")
@each_case
# by_one_sum is not here: compilers contract its product and its sum, and so round once instead of twice
@pytest.mark.parametrize("formula", [by_comparing, by_steps, by_steps_and_a_sum], ids=lambda each: each.__name__)
def test_compiled_its_values_are_the_same(
    formula: Any, method: QuantizationMethod, n_bits: int, per_channel: bool
) -> None:
    quantizer = made(formula, method, n_bits, per_channel=per_channel)
    x = at_ties(quantizer)
    expected = call(quantizer.convert2inferable(), x)
    assert np.array_equal(numpy(graph_of(quantizer, compiled=True)(tensor(x))), expected)


@pytest.mark.skipif(
    ENGINE == "tensorflow" or importlib.util.find_spec("tensorflow") is None,
    reason="needs TensorFlow beside another engine",
)
@each_case
def test_tensorflows_functions_compute_in_its_graphs_whatever_the_engine(
    method: QuantizationMethod, n_bits: int, per_channel: bool
) -> None:
    """The numbers of the grid are constants there; everything else of the method is TensorFlow's."""
    tensorflow = importlib.import_module("tensorflow")

    def formula(x: Any, grid: Any) -> Any:
        steps = tensorflow.floor(x * (1 / grid.scale) + 0.5)
        return tensorflow.clip_by_value(steps, grid.quant_min - grid.zero_point, grid.quant_max - grid.zero_point)

    quantizer = made(formula, method, n_bits, per_channel=per_channel)
    x = at_ties(quantizer)
    expected = call(quantizer.convert2inferable(), x)
    run = tensorflow.function(quantizer, autograph=False)
    assert np.array_equal(run(tensorflow.constant(x)).numpy(), expected)


def test_the_inverse_is_correctly_rounded_in_a_graph() -> None:
    """``1 / scale`` and ``grid.inverse``, also of a scale that was trained."""
    quantizer = made(by_steps, QuantizationMethod.SYMMETRIC, 8, per_channel=True)
    expected = np.float32(1) / quantizer.current_qparams().along(2).scale

    def inverses(_: Any) -> Any:
        grid = quantizer.grid(2)
        return f.stack([1 / grid.scale, grid.inverse])

    run = graph_of(inverses, compiled=False) if ENGINE != "torch" else inverses
    found = numpy(run(tensor(np.zeros(1))))
    assert np.array_equal(found, np.stack([expected, expected]))


@pytest.mark.parametrize("method", GRIDS, ids=str)
def test_gradients_reach_input_and_grid(method: QuantizationMethod) -> None:
    """Inside, ``clip(x / scale) * scale`` has the gradient 1 by x; beyond an end, 0, and the end's own by the grid."""

    def without_rounding(x: Any, grid: Any) -> Any:
        return clipped(grid.steps(x), grid)

    quantizer = made(without_rounding, method, 8, per_channel=True)
    scale = np.broadcast_to(quantizer.current_qparams().along(2).scale, (1, CHANNELS))
    x = np.concatenate([0.3 * scale, -300 * scale, 300 * scale]).astype(np.float32)
    d_x, learned = gradients(quantizer, x, np.float32([[1], [1], [2]]) * np.ones((3, CHANNELS), np.float32))
    assert np.abs(d_x - [[1.0], [0.0], [0.0]]).max() <= 2.0**-23  # ``u * scale * (1 / scale)``: two roundings
    assert learned
    assert all(gradient.any() for gradient in learned.values())


def test_the_value_at_the_edge_moves_by_its_last_bit_only() -> None:
    """The one input that ways of rounding disagree on; all others stay as they are, NaN and infinities too."""
    edge = np.float32(0.5) - np.float32(2.0**-25)
    x = np.float32([edge, 0.5, np.nextafter(edge, np.float32(0)), -edge, np.nan, np.inf, -np.inf, -0.0])
    found = numpy(FRAMEWORK.quantizer.ops.off_the_edge(tensor(x), tensor(np.ones(1))))
    expected = x.copy()
    expected[0] = np.nextafter(edge, np.float32(0))
    assert np.array_equal(found.view(np.int32), expected.view(np.int32))


@only_keras(3, "Keras 2 has no seed generators")
def test_two_generators_whose_states_have_one_name_are_both_saved() -> None:
    @mark_quantizer(QuantizationTarget.Weights, [QuantizationMethod.SYMMETRIC], "TWO_DICE")
    class TwoDice(BaseKerasTrainableQuantizer):
        def __init__(self, quantization_config: Any, freeze_quant_params: bool = False) -> None:
            super().__init__(quantization_config, freeze_quant_params)
            self.first, self.second = (keras.random.SeedGenerator(seed) for seed in (1, 2))

        def fake_quantize(self, x: Any, grid: Any, training: bool) -> Any:
            return x

    config = TrainableQuantizerWeightsConfig(
        weights_quantization_method="SYMMETRIC", weights_n_bits=4, weights_quantization_params={"threshold": 1.0}
    )
    saved, loaded = TwoDice(config), TwoDice(config)
    for each in (saved, loaded):
        each.initialize_quantization((3,), "kernel", None)
    saved.first.state.assign([3, 4])
    saved.second.state.assign([5, 6])
    store: dict[str, Any] = {}
    saved.save_own_variables(store)
    loaded.load_own_variables(store)
    assert [np.asarray(each.state).tolist() for each in (loaded.first, loaded.second)] == [[3, 4], [5, 6]]


def test_variables_of_one_name_get_numbers() -> None:
    assert by_name([("a", 1), ("a", 2), ("a_1", 3), ("b", 4)]) == {"a": 1, "a_1": 2, "a_1_1": 3, "b": 4}
