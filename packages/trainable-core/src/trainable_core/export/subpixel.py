"""A transposed convolution as a convolution: its kernel split into phases, one for each position between two inputs.

Along one axis, with stride ``s``, kernel ``w`` of size ``K`` (zeros of the dilation written out), ``x`` of length
``L``, cut
``p`` at the begin: output ``j`` is ``sum(x[i] * w[k])`` over ``i * s + k = j + p``. With ``j + p = q * s + r`` this is
``sum(x[q - m] * w[m * s + r])``, a convolution over ``q`` for each phase ``r``. A kernel of ``M = ceil(K / s)`` taps is
enough; taps beyond the kernel are zero (Shi et al., 2016, appendix of "Is the deconvolution layer the same as a
convolutional layer?").
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainable_core.export.source import QuantizerRecord
from trainable_core.integer.products import Window
from trainable_core.qparams import QParams


class Phases:
    """The convolution that a transposed convolution is.

    Parameters
    ----------
    shape : sequence of int
        Shape of the transposed convolution's weight: (C, O / groups, *K).
    window : Window
        How its kernel moves.

    Notes
    -----
    The convolution's output channels are those of the transposed convolution for each phase, one phase after the other,
    ``(*phases, O)``, so that what belongs to one position lies together when channels come last. With groups they are
    ``(O, *phases)``, because the channels of a group must lie together.
    """

    def __init__(self, shape: Sequence[int], window: Window) -> None:
        self.shape, self.window = tuple(shape), window
        self.rank = len(shape) - 2
        self.strides = tuple(window.strides)
        self.outputs = shape[1] * window.groups
        self.number = prod(self.strides)
        self.are_first = window.groups == 1
        self.reach = [(k - 1) * d + 1 for k, d in zip(shape[2:], window.dilations, strict=True)]
        self.kernel = [-(-reach // s) for reach, s in zip(self.reach, self.strides, strict=True)]
        self.begins, self.ends = window.pads[: self.rank], window.pads[self.rank :]
        axes = range(self.rank)
        before = [max(self.kernel[a] - 1 - self.begins[a] // self.strides[a], 0) for a in axes]
        beyond = [self.reach[a] - self.ends[a] + window.output_padding[a] for a in axes]
        after = [max(-(-beyond[a] // self.strides[a]) - 1, 0) for a in axes]
        self.pads = [*before, *after]

    def counts(self, sizes: Sequence[int]) -> list[int]:
        """Return how many positions the convolution gives along each axis, for an input of these sizes."""
        spans = zip(sizes, self.pads[: self.rank], self.pads[self.rank :], self.kernel, strict=True)
        return [size + before + after - taps + 1 for size, before, after, taps in spans]

    def cut(self, sizes: Sequence[int]) -> tuple[list[int], list[int]]:
        """Return where the output begins among the interleaved phases, and its sizes, for an input of these sizes."""
        axes = range(self.rank)
        skipped = [self.kernel[a] - 1 - self.pads[a] for a in axes]
        begins = [self.begins[a] - skipped[a] * self.strides[a] for a in axes]
        whole = [(sizes[a] - 1) * self.strides[a] + self.reach[a] + self.window.output_padding[a] for a in axes]
        return begins, [whole[a] - self.begins[a] - self.ends[a] for a in axes]

    def spread(self, record: QuantizerRecord, name: str) -> QuantizerRecord:
        """Return the record of the convolution's weight."""
        assert record.codes is not None  # noqa: S101 - a weight's record
        grid, groups = record.grid, self.window.groups
        channels, per_group = self.shape[:2]
        zero = grid.along(record.codes.ndim).zero_point
        counted = record.codes - zero
        wide = np.zeros(
            (channels, per_group, *(m * s for m, s in zip(self.kernel, self.strides, strict=True))), np.int32
        )
        wide[
            (
                slice(None),
                slice(None),
                *(slice(0, r, d) for r, d in zip(self.reach, self.window.dilations, strict=True)),
            )
        ] = counted
        split: list[int] = list(itertools.chain.from_iterable(zip(self.kernel, self.strides, strict=True)))
        taps = wide.reshape(groups, channels // groups, per_group, *split)
        axes_m, axes_r = [3 + 2 * a for a in range(self.rank)], [4 + 2 * a for a in range(self.rank)]
        order = [*axes_r, 0, 2] if self.are_first else [0, 2, *axes_r]
        phases = taps.transpose(*order, 1, *axes_m)  # (G, O / G, *phases, C / G, *taps), or phases first
        flat = phases.reshape(self.outputs * self.number, channels // groups, *self.kernel)
        flat = np.flip(flat, tuple(range(2, 2 + self.rank)))
        spread_grid = self._grid(grid)
        codes = flat + spread_grid.along(flat.ndim).zero_point
        return replace(record, name=name, grid=spread_grid, codes=np.ascontiguousarray(codes, np.int32))

    def _grid(self, grid: QParams) -> QParams:
        if grid.channels_axis is None:
            return grid

        def spread(numbers: NDArray[Any]) -> NDArray[Any]:
            return self._for_phases(np.tile(numbers, self.window.groups))

        return QParams(spread(grid.scale), spread(grid.zero_point), grid.quant_min, grid.quant_max, 0)

    def spread_bias(self, bias: NDArray[Any]) -> NDArray[Any]:
        """Return the bias of the convolution's channels."""
        return self._for_phases(bias)

    def _for_phases(self, numbers: NDArray[Any]) -> NDArray[Any]:
        """Return numbers of the outputs as those of the convolution's channels."""
        return np.tile(numbers, self.number) if self.are_first else np.repeat(numbers, self.number)
