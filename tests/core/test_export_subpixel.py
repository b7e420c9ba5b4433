"""A transposed convolution as a convolution: phases interleaved and cut give its definition."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from trainable_core.export.source import QuantizerRecord
from trainable_core.export.subpixel import Phases
from trainable_core.integer.products import Window, convolve_codes, convolve_transposed_codes
from trainable_core.qparams import QParams

CASES = [
    (kernel, stride, begin, end, extra, dilation)
    for kernel, stride, begin, end, extra, dilation in itertools.product(
        (1, 2, 3, 4, 5), (1, 2, 3), (0, 1, 2), (0, 1), (0, 1), (1, 2)
    )
    if extra < max(stride, dilation) and begin + end < (kernel - 1) * dilation + 1
]


def interleaved(y, phases, sizes, window_has_groups):
    """Return the output from the convolution's channels."""
    counts, rank = phases.counts(sizes), len(sizes)
    if window_has_groups:
        split = y.reshape(y.shape[0], phases.outputs, *phases.strides, *counts)
    else:
        split = np.moveaxis(y.reshape(y.shape[0], *phases.strides, phases.outputs, *counts), 1 + rank, 1)
    order = [0, 1, *itertools.chain.from_iterable((2 + rank + axis, 2 + axis) for axis in range(rank))]
    wide = split.transpose(order).reshape(
        y.shape[0], phases.outputs, *(n * s for n, s in zip(counts, phases.strides, strict=True))
    )
    begins, lengths = phases.cut(sizes)
    return wide[(..., *(slice(b, b + n) for b, n in zip(begins, lengths, strict=True)))]


def check(shape, window, sizes, zero=0):
    rng = np.random.default_rng(0)
    counted, x = rng.integers(-8, 8, shape), rng.integers(-100, 100, (2, shape[0], *sizes))
    window = window.of_rank(len(sizes))
    phases = Phases(shape, window)
    grid = QParams(np.float32(1), np.int32(zero), -100, 100)
    spread = phases.spread(QuantizerRecord("w", "up", "weight", 8, grid, (counted + zero).astype(np.int32)), "spread")
    inner = Window(pads=tuple(phases.pads), groups=window.groups)
    y = interleaved(convolve_codes(x, spread.codes - zero, inner), phases, list(sizes), window.groups > 1)
    assert np.array_equal(y, convolve_transposed_codes(x, counted, window))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_phases_are_a_transposed_convolution(case):
    kernel, stride, begin, end, extra, dilation = case
    check((2, 3, kernel), Window((stride,), (dilation,), (begin, end), 1, (extra,)), (4,))


@pytest.mark.parametrize("groups", [1, 2])
def test_axes_differ_and_groups_stay_apart(groups):
    check((4, 3, 3, 2), Window((2, 3), (1, 1), (1, 0, 0, 1), groups, (1, 0)), (3, 4), zero=5)


def test_scales_of_channels_go_to_all_phases_of_all_groups():
    window = Window((2,), groups=2).of_rank(1)
    phases = Phases((2, 3, 2), window)
    grid = QParams(np.float32([1, 2, 3]), np.int32([0, 0, 0]), -8, 7, 1)
    spread = phases.spread(QuantizerRecord("w", "up", "weight", 4, grid, np.ones((2, 3, 2), np.int32)), "spread")
    assert spread.grid.channels_axis == 0
    assert spread.grid.scale.tolist() == [1, 1, 2, 2, 3, 3] * 2
    assert phases.spread_bias(np.arange(6)).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_without_groups_all_outputs_of_a_phase_lie_together():
    phases = Phases((2, 3, 2), Window((2,)).of_rank(1))
    grid = QParams(np.float32([1, 2, 3]), np.int32([0, 0, 0]), -8, 7, 1)
    codes = np.arange(12, dtype=np.int32).reshape(2, 3, 2) - 6
    spread = phases.spread(QuantizerRecord("w", "up", "weight", 4, grid, codes), "spread")
    assert spread.grid.scale.tolist() == [1, 2, 3] * 2
    assert phases.spread_bias(np.arange(3)).tolist() == [0, 1, 2] * 2
    assert spread.codes[:, :, 0].T.tolist() == codes.transpose(0, 2, 1).reshape(2, 6).tolist()
