"""Large tensors are quantized by functions that XLA compiles: the reference's bits both ways, and when it happens."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.keras.framework import ENGINE, internal, tf
from trainable_core.enums import TieRule
from trainable_core.qparams import QParams
from trainable_core.reference import affine, lsq, ste
from trainable_keras import Grid
from trainable_keras import fusion as shared

if ENGINE != "tensorflow":
    pytest.skip("only the TensorFlow engine compiles them", allow_module_level=True)

fusion, ops = internal("functions").fusion, internal("ops")

HALF_UP = TieRule.HALF_UP
CHANNELS = 16
GRIDS = {
    "signed, 8 bits": QParams(np.float32(0.0317), np.int32(0), -128, 127),
    "signed, 1 bit": QParams(np.float32(0.77), np.int32(0), -1, 0),
    "unsigned, 4 bits": QParams(np.float32(0.131), np.int32(0), 0, 15),
    "zero point, 8 bits": QParams(np.float32(0.0229), np.int32(117), 0, 255),
    "zero point at an end": QParams(np.float32(0.3), np.int32(3), 0, 3),
    "16 bits": QParams(np.float32(1.1e-4), np.int32(0), -(2**15), 2**15 - 1),
    "channels": QParams(np.linspace(0.01, 0.05, CHANNELS, dtype=np.float32), np.zeros(CHANNELS, np.int32), -8, 7, 1),
    "channels with zero points": QParams(
        np.linspace(0.01, 0.05, CHANNELS, dtype=np.float32), np.arange(CHANNELS, dtype=np.int32), 0, 15, 1
    ),
}
every_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
MODES = {"eager": lambda function: function, "graph": tf.function, "XLA": lambda f: tf.function(f, jit_compile=True)}


def values(grid: QParams) -> np.ndarray:
    """Return numbers of every kind, shape (N, channels): ties, ends and their neighbours, any bits, NaN, infinities."""
    rng = np.random.default_rng(0)
    half = np.arange(2 * (grid.quant_min - grid.quant_max) - 4, 2 * (grid.quant_max - grid.quant_min) + 5) / 2
    near = rng.choice(half, (2000, CHANNELS)).astype(np.float32) * grid.along(2).scale
    bits = rng.integers(0, 2**32, (2000, CHANNELS), np.uint64).astype(np.uint32).view(np.float32)
    normal = rng.normal(size=(2000, CHANNELS)) * grid.along(2).scale * (grid.quant_max - grid.quant_min + 1) / 2
    special = np.resize(np.float32([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, -1e-40, 3e38]), (1, CHANNELS))
    everything = [near, np.nextafter(near, np.inf), np.nextafter(near, -np.inf), bits, normal, special]
    return np.concatenate([each.astype(np.float32, copy=False) for each in everything])


def assert_same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    both_nan = np.isnan(found) & np.isnan(expected)
    assert np.array_equal(np.where(both_nan, 0, found.view(np.int32)), np.where(both_nan, 0, expected.view(np.int32)))


def on_tensors(grid: QParams) -> Any:
    along = grid.along(2)
    centered = not along.zero_point.any()
    numbers = (tf.constant(each, tf.float32) for each in (along.scale, along.zero_point))
    return Grid(*numbers, grid.quant_min, grid.quant_max, centered)


def run(rule: Any, x: np.ndarray, grid: QParams, upstream: np.ndarray, mode: str) -> list[np.ndarray]:
    """Return output and gradients of input, scale and zero point."""
    on = on_tensors(grid)

    def both(*given: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(given)
            output = rule(given[0], Grid(given[1], given[2], on.quant_min, on.quant_max, on.centered))
        zero = tf.UnconnectedGradients.ZERO
        return output, *tape.gradient(output, given, output_gradients=upstream, unconnected_gradients=zero)

    return [each.numpy() for each in MODES[mode](both)(tf.constant(x), on.scale, on.zero_point)]


@every_grid
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_values_are_those_of_the_reference(grid: QParams, mode: str) -> None:
    x = values(grid)
    assert fusion.pays(tf.constant(x))
    expected = affine.fake_quantize(x, grid, tie_rule=HALF_UP)
    for rule in (ops.ste_fake_quantize, ops.lsq_fake_quantize):
        assert_same_bits(run(rule, x, grid, np.ones_like(x), mode)[0], expected)


@every_grid
@pytest.mark.parametrize("mode", ["eager", "graph", "XLA"])
def test_gradients_are_those_of_the_reference(grid: QParams, mode: str) -> None:
    x = values(grid)
    with np.errstate(invalid="ignore", over="ignore"):
        tiny = np.minimum(np.abs(x), np.abs(affine.steps(x, grid))) < np.finfo(np.float32).tiny
    x = np.where(tiny, np.float32(0), x)  # the engine takes those for zeros
    upstream = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    assert_same_bits(
        run(ops.ste_fake_quantize, x, grid, upstream, mode)[1],
        np.float32(ste.gradients(x, upstream, grid).x),
    )
    _, d_x, d_scale, d_zero = run(ops.lsq_fake_quantize, x, grid, upstream, mode)
    expected = lsq.gradients(x, upstream, grid, tie_rule=HALF_UP)
    assert_same_bits(d_x, np.float32(expected.x))
    # A float32 sum of N terms, each with a few roundings, is within (N + 16) * 2**-24 of their magnitudes' sum.
    low, high = affine.ends(grid, 2)
    g = lsq.gradient_scale(grid.sharing(x.size), grid.quant_max)
    allowed = (grid.sharing(x.size) + 16) * 2.0**-24 * g
    sizes = grid.reduce(np.abs(upstream).astype(np.float64) * np.maximum(np.abs(low), np.abs(high)))
    assert (np.abs(d_scale.reshape(expected.scale.shape) - expected.scale) <= allowed * sizes).all()
    if on_tensors(grid).centered:
        assert not d_zero.any()
    else:
        sizes = grid.reduce(np.abs(upstream).astype(np.float64) * grid.along(2).scale)
        assert (np.abs(d_zero.reshape(expected.scale.shape) - expected.zero_point) <= allowed * sizes).all()


@every_grid
def test_sums_are_those_of_the_plain_expression(grid: QParams, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are TensorFlow's own in either case, of equal terms."""
    x = values(grid)
    upstream = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    compiled = run(ops.lsq_fake_quantize, x, grid, upstream, "graph")
    monkeypatch.setattr(shared, "LEAST", x.size + 1)
    for found, expected in zip(run(ops.lsq_fake_quantize, x, grid, upstream, "eager"), compiled, strict=True):
        assert_same_bits(found, expected)


def operations(shape: list[int | None], rule: Any = None) -> list[Any]:
    """Return the operations of the graph that quantizes a tensor of a static shape, gradients included."""

    @tf.function
    def both(x: Any, scale: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch([x, scale])
            output = (rule or ops.lsq_fake_quantize)(x, Grid(scale, tf.zeros(()), -8, 7, centered=True))
        assert output.shape.as_list() == shape
        return output, *tape.gradient(output, [x, scale])

    made = both.get_concrete_function(tf.TensorSpec(shape), tf.TensorSpec(()))
    return made.graph.get_operations()


def calls(shape: list[int | None]) -> list[Any]:
    return [each for each in operations(shape) if each.type in {"PartitionedCall", "StatefulPartitionedCall"}]


def test_a_compiled_function_returns_only_what_is_used() -> None:
    """With a tape looking inside, every intermediate tensor would be written, and kept for backward."""
    forward, backward = calls([None, 256, 256])
    assert len(forward.outputs) == 1
    assert len(backward.outputs) == 2  # the gradient, and the terms of the scale's


def test_tensors_that_may_change_their_shape_are_not_compiled() -> None:
    assert calls([None, 256, 256])  # a batch of any size
    assert not calls([8, None, 256])
    assert not calls([None, None])


def test_an_unknown_batch_counts_as_one_of_usual_size() -> None:
    assert calls([None, shared.LEAST // shared.BATCH])
    assert not calls([None, shared.LEAST // shared.BATCH - 1])
    assert not fusion.pays(tf.zeros([0, shared.LEAST]))


def test_small_tensors_are_not_compiled() -> None:
    assert not calls([4, 4])
    assert not fusion.pays(tf.zeros([]))
    assert fusion.pays(tf.zeros([shared.LEAST]))
    assert not fusion.pays(tf.zeros([shared.LEAST - 1]))


def test_the_number_of_compiled_shapes_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion, "compiled_shapes", set())
    monkeypatch.setattr(shared, "SHAPES", 2)
    assert [fusion.pays(tf.zeros([shared.LEAST + i])) for i in (0, 1, 2, 0)] == [
        True,
        True,
        False,
        True,
    ]


@pytest.fixture
def asked_again() -> Iterator[None]:
    fusion.possible.cache_clear()
    yield
    fusion.possible.cache_clear()


@pytest.mark.usefixtures("asked_again")
def test_an_accelerator_keeps_the_plain_expression(monkeypatch: pytest.MonkeyPatch) -> None:
    device = tf.config.PhysicalDevice("/physical_device:GPU:0", "GPU")
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda *_: [device])
    assert not fusion.pays(tf.zeros([shared.LEAST]))


@pytest.mark.usefixtures("asked_again")
def test_another_processor_keeps_the_plain_expression(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert not fusion.pays(tf.zeros([shared.LEAST]))


def test_another_batch_size_gives_what_the_reference_gives() -> None:
    """A graph for batches of any size compiles again for the last, smaller one."""
    grid = GRIDS["signed, 8 bits"]
    on = on_tensors(grid)
    quantize = tf.function(lambda x: ops.ste_fake_quantize(x, on), input_signature=[tf.TensorSpec([None, 64, 1024])])
    for batch in (4, 3, 1):
        x = np.random.default_rng(batch).normal(size=(batch, 64, 1024)).astype(np.float32)
        assert_same_bits(quantize(tf.constant(x)).numpy(), affine.fake_quantize(x, grid, tie_rule=HALF_UP))
