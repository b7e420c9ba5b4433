"""Along which axis of a weight the output channels lie: told by what changes at a layer's output with a part of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

UNCHANGED = 1e-4
"""How small a change is beside the largest one where there is none: kernels may add up in another order."""


def changed(weight: Array, axis: int, *, first: bool = False) -> Array:
    """Return a weight that is larger in the second half of an axis, or the first, by its own root mean square."""
    size = float(np.sqrt(np.square(weight, dtype=np.float64).mean())) or 1.0
    result = weight.copy()
    half: list[slice | int] = [slice(None)] * weight.ndim
    middle = weight.shape[axis] // 2
    half[axis] = slice(None, middle) if first else slice(middle, None)
    result[tuple(half)] += np.float32(size)
    return result


def is_of_outputs(before: Array, after: Array, length: int, *, first: bool = False) -> bool:
    """Return whether the second half of the channels of an output changed, or the first, and nothing else.

    Parameters
    ----------
    before, after : float array
        Output of a layer with a weight, and with `changed` of it.
    length : int
        Length of the axis of the weight; the output's channels are as many, or a multiple of it.
    first : bool
        Whether it is the first half of the weight that was changed.

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
        lower, upper = bool(moved[:middle].any()), bool(moved[middle:].any())
        if lower is first and upper is not first:
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
    None too where no axis is: the weight of a recurrent layer reaches every output, for instance. Another axis has to
    pass the test with both halves: a weight that reaches only the second half of the outputs, as that of the backward
    direction of a recurrent layer does, passes it with one half along any axis.
    """
    before = output(weight)
    if before is None:
        return None
    axis %= weight.ndim

    def passes(each: int, *, first: bool) -> bool:
        after = output(changed(weight, each, first=first)) if weight.shape[each] > 1 else None
        return after is not None and is_of_outputs(before, after, weight.shape[each], first=first)

    if passes(axis, first=False):
        return None
    others = (each for each in range(weight.ndim) if each != axis)
    return next((each for each in others if passes(each, first=False) and passes(each, first=True)), None)
