"""Oscillating weights: codes that change back and forth, how they are counted, dampened and frozen.

With a straight-through estimator, a weight whose best value lies between two codes is pushed across the boundary by
each of them in turn. Its code then changes every few steps, which spoils the statistics of batch normalization and the
last epochs of training, most of all in depthwise layers with few bits.

References
----------
Nagel, Fournarakis, Bondarenko and Blankevoort, "Overcoming Oscillations in Quantization-Aware Training", ICML 2022,
arXiv:2203.11086.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainable_core.enums import TieRule
from trainable_core.qparams import Float32, QParams
from trainable_core.reference import affine

OSCILLATING = 0.005
"""Frequency from which on `describe` counts a weight among the oscillating ones: that of the paper's figures."""


@dataclass(frozen=True)
class Oscillations:
    """What is remembered of the codes of a weight; each field is a float32 array of its shape.

    Parameters
    ----------
    code : array
        Last code, counted from zero; NaN before the first step.
    direction : array
        Sign of the last change; 0 before the first one.
    frequency : array
        Moving average of how often a change goes back the way of the last one.
    average : array
        Moving average of the code.
    frozen : array
        The code that is frozen; NaN where none is.
    """

    code: Float32
    direction: Float32
    frequency: Float32
    average: Float32
    frozen: Float32

    @classmethod
    def none(cls, shape: tuple[int, ...]) -> Oscillations:
        """Return the state before the first step."""
        nan, zeros = np.full(shape, np.nan, np.float32), np.zeros(shape, np.float32)
        return cls(nan, zeros, zeros, zeros, nan)


def codes(x: ArrayLike, grid: QParams, *, tie_rule: TieRule = TieRule.HALF_EVEN) -> Float32:
    """Return the codes of a tensor, counted from the code of zero.

    Examples
    --------
    >>> codes([-0.6, 0.2, 0.9], QParams(np.float32(0.5), np.int32(0), -2, 1))
    array([-1.,  0.,  1.], dtype=float32)
    """
    values = affine.fake_quantize(affine.to_float32(np.asarray(x)), grid, tie_rule=tie_rule)
    return np.asarray(np.rint(values / grid.along(np.ndim(x)).scale), np.float32)


def counted(state: Oscillations, codes: Float32, momentum: float) -> Oscillations:
    """Return the state after one training step with these codes; where a code is frozen, that one.

    Notes
    -----
    Section 4.1: a change is an oscillation when its sign is opposite to that of the last change, ``o_t``, and
    ``f_t = m o_t + (1 - m) f_(t-1)`` (equations 4 and 5). The average code is that of equation 8.

    Examples
    --------
    >>> state = Oscillations.none((1,))
    >>> for code in (0, 1, 1, 0, 1):
    ...     state = counted(state, np.array([code], np.float32), 0.5)
    >>> state.frequency, state.direction
    (array([0.75], dtype=float32), array([1.], dtype=float32))
    """
    codes = np.where(np.isnan(state.frozen), codes, state.frozen).astype(np.float32)
    first = np.isnan(state.code)
    change = np.where(first, np.float32(0), codes - state.code)
    turned = (change != 0) & (np.sign(change) == -state.direction)
    kept, new = np.float32(1 - momentum), np.float32(momentum)
    return replace(
        state,
        code=codes,
        direction=np.where(change != 0, np.sign(change), state.direction).astype(np.float32),
        frequency=(new * turned + kept * state.frequency).astype(np.float32),
        average=np.where(first, codes, new * codes + kept * state.average).astype(np.float32),
    )


def frozen(state: Oscillations, threshold: float) -> Oscillations:
    """Return the state with the codes frozen whose frequency exceeds a threshold, at the rounded average code.

    Notes
    -----
    Section 4.3, algorithm 1. A frozen code stays frozen.
    """
    freezes = (state.frequency > np.float32(threshold)) & np.isnan(state.frozen)
    return replace(state, frozen=np.where(freezes, np.rint(state.average), state.frozen).astype(np.float32))


def held(x: ArrayLike, grid: QParams, state: Oscillations) -> Float32:
    """Return the weight with the centres of their codes in the place of frozen elements: what is quantized.

    Notes
    -----
    The threshold still learns, and a frozen element's value follows it. *Deviation:* the gradient of the threshold is
    the method's for a weight at the centre of its code, so for LSQ ``round(v) - v = 0`` inside the range; the paper's
    code differentiates ``scale * code``.
    """
    x = affine.to_float32(np.asarray(x))
    return np.where(np.isnan(state.frozen), x, state.frozen * grid.along(x.ndim).scale).astype(np.float32)


def dampening(
    x: ArrayLike, grid: QParams, strength: float, *, tie_rule: TieRule = TieRule.HALF_EVEN
) -> tuple[float, NDArray[np.float64]]:
    """Return the term that dampens oscillations, and its gradient.

    Notes
    -----
    Section 4.2, equation 6: ``strength * sum((stop(q(x)) - clip(x, s n, s p))**2)``, where `q` quantizes and nothing of
    it gets a gradient. So ``dx = 2 strength (x - q(x))`` inside the range, 0 outside, and at an end, where both are
    equal, 0.

    Examples
    --------
    >>> dampening([0.3, 9.0], QParams(np.float32(0.5), np.int32(0), -2, 1), 1.0)[0].__round__(6)
    0.04
    """
    x = affine.to_float32(np.asarray(x))
    values = affine.fake_quantize(x, grid, tie_rule=tie_rule).astype(np.float64)
    low, high = affine.ends(grid, x.ndim)
    scale = grid.along(x.ndim).scale.astype(np.float64)
    distance = np.clip(x.astype(np.float64), low * scale, high * scale) - values
    inside = (x > low * scale) & (x < high * scale)
    return float(strength * (distance**2).sum()), np.where(inside, 2 * strength * distance, 0.0)
