"""How tensors use their grids: samples of weights, codes of activations, ends."""

from __future__ import annotations

import numpy as np
import pytest

from tests.core.home_view import HomeView
from trainable_core.backend.codes import CodeCounter, beyond, ends_of, number_of_codes, places_of, sample_of
from trainable_core.granularity import Blocks
from trainable_core.qparams import QParams
from trainable_core.reference.affine import fake_quantize, quantize

SIGNED = QParams(np.float32(0.5), np.int32(0), -8, 7)
UNIFORM = QParams(np.float32(0.25), np.int32(3), 0, 15)
TABLE = QParams(np.float32(1 / 128), np.int32(0), -128, 127, levels=(-128, -32, 32, 127))
CHANNELS = QParams(np.float32([0.5, 2.0, 0.25]), np.int32([0, 0, 0]), -8, 7, 1)


@pytest.mark.parametrize(("size", "limit"), [(0, 4), (1, 4), (5, 5), (4096, 100), (2**18, 2**16), (10007, 64), (12, 1)])
def test_places_are_few_and_spread_over_every_channel(size: int, limit: int) -> None:
    places = places_of(size, limit)
    assert len(places) <= limit
    assert len(np.unique(places)) == len(places)
    assert size == 0 or (places[0] == 0 and places[-1] < size)
    if size == 4096:  # of 64 channels along the last axis each has its share
        assert len(np.unique(places % 64)) > 30


@pytest.mark.parametrize("grid", [SIGNED, UNIFORM, CHANNELS], ids=["signed", "uniform", "channels"])
def test_a_sample_has_the_codes_of_the_reference(grid: QParams) -> None:
    x = np.random.default_rng(0).normal(0, 2, (4, 3, 5)).astype(np.float32)
    found = sample_of(x, np.asarray(fake_quantize(x, grid)), grid, None)
    assert np.array_equal(found.codes, quantize(x, grid).reshape(-1))
    assert np.array_equal(found.values, x.reshape(-1))


def test_a_sample_of_blocks_has_the_grid_of_each_block() -> None:
    blocks = Blocks((0,), group_axis=1, group_size=2)
    grid = QParams(np.float32([1, 2, 4, 8]), np.zeros(4, np.int32), -8, 7, 0)
    x = np.float32([[1, 2, 3, 4], [5, 6, 7, 8]])
    quantized = blocks.tensor(np.asarray(fake_quantize(blocks.rows(x), grid)), x.shape)
    assert sample_of(x, quantized, grid, blocks).codes.tolist() == [1, 2, 2, 2, 1, 2, 1, 1]


def test_what_a_step_rounds_is_not_clipped() -> None:
    # the ends are -4.0 and 3.5; half a step beyond is -4.25 and 3.75
    x = np.float32([-4.25, -4.26, 3.75, 3.76, np.inf, np.nan, 0.0])
    assert beyond(x, SIGNED).tolist() == [False, True, False, True, True, False, False]


def test_ends_and_number_of_codes() -> None:
    assert ends_of(SIGNED) == (-4.0, 3.5)
    assert ends_of(UNIFORM) == (-0.75, 3.0)
    assert ends_of(TABLE) == (-1.0, 127 / 128)
    assert [number_of_codes(grid) for grid in (SIGNED, UNIFORM, TABLE)] == [16, 16, 4]


def test_codes_are_counted_over_calls() -> None:
    counter = CodeCounter(UNIFORM)
    x = np.random.default_rng(1).normal(0, 2, (7, 9)).astype(np.float32)
    for part in (x[:3], x[3:], np.zeros((0, 9), np.float32)):
        counter.update(part)
    assert np.array_equal(counter.counts, np.bincount(quantize(x, UNIFORM).reshape(-1), minlength=16))
    # ends -0.75 and 3.0, and half a step of 0.25 beyond
    assert counter.clipped == int(((x < -0.875) | (x > 3.125)).sum())
    assert counter.count == x.size


def test_a_tensor_without_numbers_has_no_grid() -> None:
    view = HomeView()
    weight, of_input = view.tensors()
    assert (weight.name, of_input.name) == ("fc.weight", "fc: input")
    assert weight.grid is not None
    assert weight.grid.scale.tolist() == [0.125, 0.25]
    view.weights.switch_off()
    view.activations.calibrated = False
    assert (weight.grid, of_input.grid) == (None, None)
