"""What a candidate grid costs: the error of the fake-quantized values, or the divergence of their histogram."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from trainable_core.calibration.observer import CHUNK, Float32, Float64
from trainable_core.enums import TieRule
from trainable_core.qparams import QParams
from trainable_core.reference import affine

SMOOTHING = 1e-4
"""Share of the quantized distribution that `kl_divergence` spreads evenly over all outcomes."""


def power_error(values: Float32, weights: Float64 | None, grids: list[QParams], p: float) -> Float64:
    """Return the weighted mean of ``(|x - fake_quantize(x)| / unit)**p``, for each candidate grid and channel.

    Parameters
    ----------
    values : float32 array, shape (C, n)
        One row per channel.
    weights : float64 array, shape (n,), or None
        Multiplicity of the columns; None counts each once.
    grids : list of R QParams
        Candidates, each with C scales along axis 0.
    p : float
        Exponent, > 0.

    Returns
    -------
    float64 array, shape (R, C)
        In ``[0, 1]``: zero is on every grid, so no value moves by more than its own magnitude, and ``unit`` is the
        smallest power of two not below a channel's largest magnitude. Dividing by it is exact and keeps the power
        finite at any scale.

    Notes
    -----
    Works on tiles of at most `CHUNK` elements; a row is cut and summed in the same way whatever the number of rows, so
    the result for a channel doesn't depend on the other channels, to the last bit.
    """
    channels, size = values.shape
    columns = min(size, CHUNK)
    rows = max(CHUNK // columns, 1)
    seen = values if values.strides[0] else values[:1]  # one row that is broadcast for all channels
    largest = np.maximum(seen.max(axis=1), -seen.min(axis=1)).astype(np.float64)
    exponents = np.broadcast_to(np.frexp(largest)[1], channels)  # 0 for an all-zero channel
    errors = np.zeros((len(grids), channels))
    # |x|**1 and |x|**2 of float32 numbers fit into float64 at any scale, and units are powers of two: divided by last
    divided_first = p not in (1, 2)
    with np.errstate(under="ignore"):  # far below a step or a unit is nothing, even where NumPy is told to raise
        for top in range(0, channels, rows):
            part = slice(top, top + rows)
            inverse_unit = np.ldexp(1.0, -exponents[part])
            candidates = [replace(grid, scale=grid.scale[part], zero_point=grid.zero_point[part]) for grid in grids]
            for left in range(0, size, columns):
                tile = np.ascontiguousarray(values[part, left : left + columns])
                for row, grid in enumerate(candidates):
                    moved = np.subtract(tile, affine.fake_quantize(tile, grid), dtype=np.float64)
                    if divided_first:
                        moved *= inverse_unit[:, None]
                    cost = _power(moved, p)
                    if weights is not None:
                        cost *= weights[left : left + columns]
                    errors[row, part] += cost.sum(axis=1)
            if not divided_first:
                errors[:, part] *= inverse_unit**p
        return np.asarray(errors / (size if weights is None else weights.sum()))


def _power(distance: Float64, p: float) -> Float64:
    """Return ``|distance|**p``, in place; without NumPy's general power, which is slow, where p is 1 or 2."""
    if p == 2:  # noqa: PLR2004 - the squared error
        return np.square(distance, out=distance)
    np.abs(distance, out=distance)
    return distance if p == 1 else np.power(distance, p, out=distance)


def kl_divergence(points: Float32, counts: Float64, grid: QParams) -> Float64:
    """Return the Kullback-Leibler divergence of a histogram from its quantized version, for each candidate grid.

    Parameters
    ----------
    points : float32 array, shape (M,)
        Bin centres, ascending, none of them zero.
    counts : float64 array, shape (M,)
        Their counts, all positive; M = 0 for data of zeros only.
    grid : QParams
        With R scales along axis 0, one per candidate.

    Returns
    -------
    float64 array, shape (R,)
        In nats, >= 0; infinity for a grid that clips everything.

    Notes
    -----
    A bin is *clipped* when its centre rounds to a code beyond the grid. The reference distribution P has the unclipped
    bins and, as outcomes of their own, what is clipped below and what is clipped above. For Q, the counts of the
    unclipped bins that share a code are spread evenly over these (occupied) bins, as after quantization nothing tells
    them apart; the clipped outcomes have none. With K outcomes in P, Q is smoothed to
    ``(1 - SMOOTHING) * Q + SMOOTHING / K``, and the result is ``sum(P * log(P / Q))``.

    *Deviation* from Migacz, who adds what is clipped to the last bin kept: when few bins are occupied, a range that
    keeps just one of them would then have divergence 0, however much it clips. Exact zeros are left out on both sides:
    every grid holds zero, while spreading them over their neighbours would outweigh everything else after a ReLU.

    References
    ----------
    Migacz, "8-bit Inference with TensorRT", GPU Technology Conference, 2017.
    """
    candidates, bins = grid.scale.size, points.size
    rows = max(CHUNK // max(bins, 1), 1)
    if candidates > rows:
        parts = [slice(top, top + rows) for top in range(0, candidates, rows)]
        split = [replace(grid, scale=grid.scale[part], zero_point=grid.zero_point[part]) for part in parts]
        return np.concatenate([kl_divergence(points, counts, part) for part in split])
    if not bins:
        return np.zeros(candidates)
    with np.errstate(under="ignore"):  # far below a step: code 0
        steps = affine.steps(np.broadcast_to(points, (candidates, bins)), grid)
    codes = affine.round_steps(steps, TieRule.HALF_EVEN)
    first, last = affine.ends(grid, 2)
    below, above = codes < first, codes > last
    kept = ~(below | above)
    # points ascend, so the bins of one code are neighbours: number the runs through all rows
    run = np.ones(codes.shape, np.bool_)
    run[:, 1:] = codes[:, 1:] != codes[:, :-1]
    runs = run.ravel().cumsum() - 1
    mass = np.bincount(runs, np.broadcast_to(counts, codes.shape).ravel()) / np.bincount(runs)
    quantized = np.where(kept, mass[runs].reshape(codes.shape), 0.0)
    total = quantized.sum(axis=1, keepdims=True)
    clipped = np.stack([(counts * below).sum(axis=1), (counts * above).sum(axis=1)], axis=1) / counts.sum()
    outcomes = kept.sum(axis=1, keepdims=True) + (clipped > 0).sum(axis=1, keepdims=True)
    floor = SMOOTHING / outcomes
    smooth = (1 - SMOOTHING) * quantized / np.where(total > 0, total, 1.0) + floor
    share = counts / counts.sum()
    divergence = np.where(kept, share * np.log(share / smooth), 0.0).sum(axis=1)
    divergence += np.where(clipped > 0, clipped * np.log(np.where(clipped > 0, clipped, 1.0) / floor), 0.0).sum(axis=1)
    return np.where(total[:, 0] > 0, np.maximum(divergence, 0.0), np.inf)  # rounding may leave -1e-17 for equals
