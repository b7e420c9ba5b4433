"""Granularity: which elements of a tensor share one scale, where this is finer than its channels along one axis.

A tensor is cut into *blocks*, and each block has a scale of its own: the elements of one output channel that belong to
one group of inputs, or the elements of one channel of one expert. Laid out with one block per row, such a tensor is
quantized per channel along axis 0 of a matrix. So every method, kernel and calibration that knows channels knows
blocks, and no formula is written twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainable_core.errors import ShapeMismatchError


class Layout(NamedTuple):
    """How a tensor becomes rows, one per block, and comes back.

    ``x.reshape(split).transpose(order).reshape(rows)``, and ``rows.reshape(permuted).transpose(back).reshape(shape)``.

    Parameters
    ----------
    shape : tuple of int
        Shape of the tensor.
    split : tuple of int
        The same with the group axis as two: number of groups, elements of a group.
    order : tuple of int
        The axes of `split`, those that number the blocks first.
    permuted : tuple of int
        `split` in this order.
    back : tuple of int
        The inverse of `order`.
    rows : tuple of int
        Number of blocks, elements of a block.
    """

    shape: tuple[int, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]
    permuted: tuple[int, ...]
    back: tuple[int, ...]
    rows: tuple[int, int]


@dataclass(frozen=True)
class Blocks:
    """Which elements of a tensor share one scale: those with the same index along some axes, and in the same group.

    Parameters
    ----------
    axes : tuple of int
        Axes of which every index has scales of its own; negative ones count from the end.
    group_axis : int or None
        Axis that is cut into groups; None for no groups.
    group_size : int or None
        Number of neighbours along the group axis that form a group. An axis that is not longer is one group.

    Notes
    -----
    Blocks are numbered in the order of `axes` and then by group, the last one fastest. So the numbers of a tensor are
    the same wherever a framework keeps its axes: of a linear layer, ``(outputs, groups)`` for both ``(outputs,
    inputs)`` and ``(inputs, outputs)``.

    Examples
    --------
    >>> blocks = Blocks((0,), group_axis=1, group_size=32)
    >>> blocks.counts((64, 128)), blocks.layout((64, 128)).rows
    ((64, 4), (256, 32))
    >>> blocks.layout((64, 3, 5, 5)).rows
    (64, 75)
    >>> Blocks((1,), group_axis=0, group_size=2).rows(np.arange(8).reshape(4, 2)).tolist()
    [[0, 2], [4, 6], [1, 3], [5, 7]]
    """

    axes: tuple[int, ...]
    group_axis: int | None = None
    group_size: int | None = None

    def counts(self, shape: tuple[int, ...], subject: str = "blocks") -> tuple[int, ...]:
        """Return the number of blocks along each of the axes, and of groups.

        Raises
        ------
        ShapeMismatchError
            When the tensor lacks an axis, or an axis is longer than a group and no multiple of it.
        """
        axes = [self._axis(axis, shape, subject) for axis in self.axes]
        counts = [shape[axis] for axis in axes]
        if self.group_axis is not None:
            axis = self._axis(self.group_axis, shape, subject)
            size = self._size(shape[axis])
            if shape[axis] % size:
                expected = f"a group_size that divides the {shape[axis]} elements of axis {axis}, or holds all of them"
                divisors = [each for each in (16, 32, 64, 128, 256) if shape[axis] % each == 0 and each < shape[axis]]
                hint = f"sizes that do: {', '.join(map(str, divisors))}." if divisors else ""
                raise ShapeMismatchError(subject, expected, self.group_size, hint)
            axes.append(axis)
            counts.append(shape[axis] // size)
        if len(set(axes)) < len(axes):
            raise ShapeMismatchError(subject, "an axis of its own for channels, groups and experts", axes)
        return tuple(counts)

    def layout(self, shape: tuple[int, ...], subject: str = "blocks") -> Layout:
        """Return how a tensor of this shape becomes rows.

        Raises
        ------
        ShapeMismatchError
            As `counts` does.
        """
        counts = self.counts(shape, subject)
        ndim = len(shape)
        grouped = None if self.group_axis is None else self.group_axis % ndim
        split: list[int] = []
        places: list[int] = []  # of each axis of the tensor in `split`
        for axis, size in enumerate(shape):
            places.append(len(split))
            split += [counts[-1], self._size(size)] if axis == grouped else [size]
        first = [places[axis % ndim] for axis in self.axes] + ([] if grouped is None else [places[grouped]])
        order = [*first, *(each for each in range(len(split)) if each not in first)]
        permuted = tuple(split[each] for each in order)
        back = tuple(order.index(each) for each in range(len(order)))
        blocks = math.prod(counts)
        within = math.prod(permuted[len(first) :])
        return Layout(tuple(shape), tuple(split), tuple(order), permuted, back, (blocks, within))

    def rows(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return an array with one row per block."""
        layout = self.layout(values.shape)
        return np.ascontiguousarray(values.reshape(layout.split).transpose(layout.order).reshape(layout.rows))

    def tensor(self, rows: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        """Return the array of a shape that `rows` was called on."""
        layout = self.layout(shape)
        return np.ascontiguousarray(rows.reshape(layout.permuted).transpose(layout.back).reshape(shape))

    def shape_with(self, ndim: int, count: int) -> tuple[int, ...]:
        """Return a shape of `ndim` dimensions that has `count` blocks.

        Raises
        ------
        ShapeMismatchError
            When there are too few dimensions.
        """
        shape = [1] * ndim
        shape[self._axis(self.axes[-1], tuple(shape), "blocks")] = count
        if self.group_axis is not None and self.group_size is not None:
            shape[self._axis(self.group_axis, tuple(shape), "blocks")] = self.group_size
        return tuple(shape)

    def _axis(self, axis: int, shape: tuple[int, ...], subject: str) -> int:
        if not -len(shape) <= axis < len(shape):
            raise ShapeMismatchError(subject, f"an axis of shape {shape}", axis)
        return axis % len(shape)

    def _size(self, length: int) -> int:
        """Return the number of elements of a group on an axis of this length."""
        assert self.group_size is not None  # noqa: S101 - there is a group axis
        return max(min(self.group_size, length), 1)
