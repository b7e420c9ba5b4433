"""Along which axis of a weight the output channels lie: told by what changes at a layer's output with a part of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

UNCHANGED = 1e-4
"""How small a change is beside the largest one where there is none: kernels may add up in another order."""


def changed(weight: Array, axis: int) -> Array:
    """Return a weight that is larger in the second half of an axis, by its own root mean square."""
    size = float(np.sqrt(np.square(weight, dtype=np.float64).mean())) or 1.0
    result = weight.copy()
    half: list[slice | int] = [slice(None)] * weight.ndim
    half[axis] = slice(weight.shape[axis] // 2, None)
    result[tuple(half)] += np.float32(size)
    return result


def is_of_outputs(before: Array, after: Array, length: int) -> bool:
    """Return whether the second half of the channels of an output changed, and nothing else.

    Parameters
    ----------
    before, after : float array
        Output of a layer with a weight, and with `changed` of it.
    length : int
        Length of the axis of the weight; the output's channels are as many, or a multiple of it.

    Examples
    --------
    >>> x, w = np.ones((5, 3)), np.ones((4, 3))
    >>> outputs = [x @ each.T for each in (w, changed(w, 0), changed(w, 1))]
    >>> is_of_outputs(outputs[0], outputs[1], 4), is_of_outputs(outputs[0], outputs[2], 3)
    (True, False)
    """
    if before.shape != after.shape or length < 2:  # noqa: PLR2004 - two halves
        return False
    distance = np.abs(after.astype(np.float64) - before)
    if not distance.size or not np.isfinite(distance).all() or distance.max() == 0:
        return False
    for axis, count in enumerate(before.shape):
        if count % length:
            continue
        others = tuple(each for each in range(before.ndim) if each != axis)
        moved = distance.max(axis=others) > UNCHANGED * distance.max()
        middle = count * (length // 2) // length
        if not moved[:middle].any() and moved[middle:].any():
            return True
    return False


def output_axis(weight: Array, axis: int, output: Callable[[Array], Array | None]) -> int | None:
    """Return the axis of a weight's output channels where it is another than the given one; else None.

    Parameters
    ----------
    weight : float array
        The weight.
    axis : int
        The axis that is thought to be that of the output channels; it is tried first.
    output : callable
        Returns the layer's output with a weight; None where the layer is not called.

    Notes
    -----
    None too where no axis is: the weight of a recurrent layer reaches every output, for instance.
    """
    before = output(weight)
    if before is None:
        return None
    axis %= weight.ndim
    for each in (axis, *(other for other in range(weight.ndim) if other != axis)):
        after = output(changed(weight, each)) if weight.shape[each] > 1 else None
        if after is not None and is_of_outputs(before, after, weight.shape[each]):
            return None if each == axis else each
    return None
