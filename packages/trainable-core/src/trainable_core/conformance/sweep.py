"""Tensors that sweep over a quantizer's range, for laws that need no reference."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trainable_core.conformance.case import Case, Subject, ends, grid

SWEEP = 33
"""Elements of a channel."""


def on_sweep(
    subject: Subject, case: Case, where: Literal["over", "beyond", "inside"] = "over", turn: int = 0
) -> tuple[Any, NDArray[np.float32]]:
    """Return a quantizer with the case's variables, and values over and beyond its range, only beyond, or only inside.

    Parameters
    ----------
    subject, case
        The quantizer, and what it is tried on.
    where : {"over", "beyond", "inside"}
        Where the values are.
    turn : int
        Another one gives other values.
    """
    axis, shape = (case.config.channels_axis or 0) % max(case.x.ndim, 1), [1] * max(case.x.ndim, 2)
    if case.config.channels_axis is not None:
        shape = [1] * max(case.x.ndim, 1)
        shape[axis] = case.x.shape[axis]
    longest = next((at for at in range(len(shape)) if case.config.channels_axis is None or at != axis), None)
    if longest is not None:
        shape[longest] = SWEEP
    quantizer = subject.quantizer(case, tuple(shape))
    at = grid(quantizer)
    low, high = ends(at, len(shape))
    scale = at.along(len(shape)).scale
    share = ((np.arange(int(np.prod(shape))) + turn) * 0.618).reshape(shape) % 1.0
    if where == "beyond":
        steps = np.where(share < 0.5, low - 4 - 8 * share, high + 4 + 8 * share)  # noqa: PLR2004 - one half
    elif where == "inside":
        steps = low + 0.25 + (high - low - 0.5) * share
    else:
        steps = low - 3 + (high - low + 6) * share
    return quantizer, np.asarray(steps * scale, np.float32)
