"""Differentiable k-means: the levels of a look-up table learn, by soft assignments of the values to them.

References
----------
Cho, Alizadeh-Vahid, Adya and Rastegari, "DKM: Differentiable K-Means Clustering Layer for Neural Network Compression",
ICLR 2022, arXiv:2108.12659.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from trainable_core.enums import LUT_METHODS, QuantizationTarget
from trainable_core.errors import UnsupportedConfigError
from trainable_core.qparams import TABLE_STEPS, Float32, Float64, QParams, table_ends
from trainable_core.reference import affine, dqa
from trainable_core.reference.method import Method, Option
from trainable_core.reference.oracle import EPSILON, ExpectedGradients, ExpectedValues, Oracle, State
from trainable_core.schedule import LinearAnnealingScheduler

MOST_BITS = 4
"""The paper's largest table, too: each level costs a pass over the values."""

CODES = 2 * TABLE_STEPS
"""How many codes a table chooses its levels from."""

TEMPERATURE = {"t_start": 0, "t_end": 1000, "initial_val": 0.2, "target_val": 0.02}
"""Default schedule, in squared mean gaps between levels: from soft to nearly hard within 1000 training steps."""


@dataclass(frozen=True)
class Gradients:
    """Gradients of a loss through one soft assignment to levels.

    Parameters
    ----------
    x : float64 array, shape of the input
        With respect to the input.
    centroids : float64 array, shape (K,)
        With respect to the levels, in codes.
    """

    x: Float64
    centroids: Float64


def count_of(n_bits: int, subject: str) -> int:
    """Return the number of levels, ``2**n_bits``.

    Raises
    ------
    UnsupportedConfigError
        For more than 4 bits.

    Examples
    --------
    >>> count_of(3, "q")
    8
    """
    if n_bits > MOST_BITS:
        problem = f"DKM learns the levels of 1 to {MOST_BITS} bits, not of {n_bits}"
        raise UnsupportedConfigError(subject, problem, "with more bits, LSQ's even steps are as good.")
    return int(2**n_bits)


def initial_centroids(n_bits: int, *, signed: bool = True) -> Float32:
    """Return levels with equal gaps, which calibration replaces.

    Examples
    --------
    >>> initial_centroids(2), initial_centroids(2, signed=False)
    (array([-96., -32.,  32.,  96.], dtype=float32), array([ 32.,  96., 160., 224.], dtype=float32))
    """
    gap, first = CODES / 2**n_bits, table_ends(signed=signed)[0]
    return np.asarray(gap * (np.arange(2**n_bits) + 0.5) + first, np.float32)


def bounded(centroids: ArrayLike, *, signed: bool = True) -> Float64:
    """Return centroids clipped to what a table can hold, float64; NaN, as one bad batch leaves it, counts as zero.

    Examples
    --------
    >>> bounded([np.nan, np.inf, -1e9, 31.6])
    array([   0. ,  127. , -128. ,   31.6])
    """
    numbers = np.asarray(centroids, np.float64)
    return np.asarray(np.clip(np.where(np.isnan(numbers), 0.0, numbers), *table_ends(signed=signed)))


def levels_of(centroids: ArrayLike, *, signed: bool = True) -> tuple[int, ...]:
    """Return the table that is deployed: the whole numbers next to the centroids, each once, ascending.

    Examples
    --------
    >>> levels_of([31.6, -200.0, 32.4, 32.6]), levels_of([31.6, -200.0, 300.0], signed=False)
    ((-128, 32, 33), (0, 32, 255))
    """
    codes = np.rint(bounded(centroids, signed=signed))
    return tuple(sorted({int(code) for code in codes.ravel()}))


def centroids_of(levels: tuple[int, ...], n_bits: int) -> Float32:
    """Return centroids whose table has these levels; where there are fewer than centroids, the last one several times.

    Examples
    --------
    >>> centroids_of((-64, 0, 64), 2)
    array([-64.,   0.,  64.,  64.], dtype=float32)
    """
    return np.asarray([*levels, *[levels[-1]] * (2**n_bits - len(levels))], np.float32)


def temperature_schedule(temperature: Any, subject: str, scheduler: Any = LinearAnnealingScheduler) -> Any:
    """Return the schedule of the temperature; InvalidArgumentError unless its values are positive."""
    return dqa.temperature_schedule(scheduler, TEMPERATURE if temperature is None else temperature, subject)


def bounds_of_steps(*, signed: bool) -> tuple[float, float]:
    """Return how far inputs are looked at, in steps: as far beyond the middle of the codes as there are codes.

    Examples
    --------
    >>> bounds_of_steps(signed=True), bounds_of_steps(signed=False)
    ((-256.0, 256.0), (-128.0, 384.0))
    """
    middle = 0.0 if signed else float(TABLE_STEPS)
    return middle - CODES, middle + CODES


def _assigned(
    x: ArrayLike, qparams: QParams, centroids: ArrayLike, temperature: float
) -> tuple[Float64, Float64, Float64, Float64]:
    """Return steps with an axis for the levels, the levels, the soft assignments, and the mean levels."""
    x = affine.to_float32(np.asarray(x)).astype(np.float64)
    levels = np.rint(bounded(centroids, signed=qparams.signed))
    steps = np.clip(x / qparams.along(x.ndim).scale, *bounds_of_steps(signed=qparams.signed))[..., np.newaxis]
    logits = -((steps - levels) ** 2) / (temperature * (CODES / len(levels)) ** 2)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights = weights / weights.sum(-1, keepdims=True)
    return steps, levels, weights, (weights * levels).sum(-1, keepdims=True)


def fake_quantize(x: ArrayLike, qparams: QParams, centroids: ArrayLike, temperature: float) -> Float32:
    """Return the soft values of training; for temperature 0, those of the nearest level, which are deployed.

    Parameters
    ----------
    x : float array, any shape
        The weights, or an activation.
    qparams : QParams
        The table; its scale is a 128th of the threshold, or a 256th where it is not signed.
    centroids : float array, shape (K,)
        The levels that learn, in such steps.
    temperature : float
        Of the softmax, in squared mean gaps between levels; 0 for the deployed values.

    Returns
    -------
    float32 array, shape of `x`

    Notes
    -----
    With ``v = x / scale``, bounded to twice the table's range, the levels ``c = round(clip(centroids, -128, 127))``, or
    from 0 to 255 where the table is not signed, and the gap ``256 / K``: ``scale * sum(a * c)``, where
    ``a = softmax(-(v - c)**2 / (temperature * gap**2))`` (equations 1 to 3 of the paper, with the squared distance).
    *Deviations:* the paper computes the centroids of each step from the weights, by k-means that is differentiated
    through; here they are variables, which k-means initializes once, in calibration. They are rounded to the whole
    numbers that a deployed table has, with the gradient 1, so that nothing is rounded for the first time when the model
    is deployed. The paper is about weights alone; of activations every level costs a copy in memory.
    """
    if not temperature:
        return affine.fake_quantize(x, qparams)
    *_, means = _assigned(x, qparams, centroids, temperature)
    x = np.asarray(x)
    values: Float32 = (means[..., 0] * qparams.along(x.ndim).scale).astype(np.float32)
    return values


def gradients(
    x: ArrayLike, upstream: ArrayLike, qparams: QParams, centroids: ArrayLike, temperature: float
) -> Gradients:
    """Return the gradients of the soft assignment.

    Parameters
    ----------
    x : float array, any shape
        What was quantized.
    upstream : float array, shape of `x`
        Gradient of the loss with respect to the quantized values.
    qparams, centroids, temperature
        As in `fake_quantize`; the temperature is positive.

    Returns
    -------
    Gradients

    Notes
    -----
    With ``T = temperature * gap**2`` and the mean level ``m = sum(a * c)``:

    - ``dy/dx = 2 / T * sum(a * (c - m)**2)`` while v is not bounded, and 0 beyond;
    - ``dy/dc = scale * a * (1 + 2 / T * (v - c) * (c - m))``, and 0 where the centroid is clipped.

    The threshold does not learn: the levels do. NaN gives zero everywhere.
    """
    x, upstream = np.asarray(x), np.asarray(upstream, np.float64)
    known = ~np.isnan(x)
    steps, levels, weights, means = _assigned(np.where(known, x, 0), qparams, centroids, temperature)
    sharpness = 2.0 / (temperature * (CODES / len(levels)) ** 2)
    first, last = bounds_of_steps(signed=qparams.signed)
    v = x / qparams.along(x.ndim).scale
    inside = known & (v >= first) & (v <= last)
    spread = (weights * (levels - means) ** 2).sum(-1)
    scale = qparams.along(x.ndim).scale.astype(np.float64)
    of_levels = weights * (1.0 + sharpness * (steps - levels) * (levels - means))
    given = np.where(known, upstream * scale, 0.0)[..., np.newaxis]
    numbers = np.asarray(centroids, np.float64)
    free = (numbers >= qparams.quant_min) & (numbers <= qparams.quant_max)
    total = (given * of_levels).reshape(-1, len(levels)).sum(0)
    return Gradients(np.where(inside, upstream * sharpness * spread, 0.0), np.where(free, total, 0.0))


def _temperature(state: State) -> float:
    """Return the temperature of a training step; that of the last one once the schedule has ended."""
    schedule = LinearAnnealingScheduler.from_dict(state.arguments["temperature"])
    return float(schedule(max(state.steps - 1, 0)))


def _schedule_end(arguments: Mapping[str, Any]) -> int:
    return dqa.schedule_end(LinearAnnealingScheduler.from_dict(arguments["temperature"]))


def _expected_values(x: Float32, state: State, training: bool) -> ExpectedValues:  # noqa: FBT001 - the signature of `Oracle.values`
    soft = training and state.steps < _schedule_end(state.arguments)
    grid = state.grid
    values = fake_quantize(x, grid, state.variables["centroids"], _temperature(state) if soft else 0.0)
    # Steps, distances and the exponent have a rounding each, of arguments of up to 104 where a weight is not zero.
    reach = grid.threshold_steps * grid.along(x.ndim).scale.astype(np.float64)
    return ExpectedValues(values, np.broadcast_to(reach * 108 * EPSILON if soft else 0.0 * reach, x.shape))


def _expected_gradients(x: Float32, upstream: Float32, state: State) -> ExpectedGradients:
    temperature, centroids = _temperature(state), state.variables["centroids"]
    found = gradients(x, upstream, state.grid, centroids, temperature)
    # Assignments and mean levels have 108 roundings, as in `_expected_values`; a distance from the mean is as far off
    # as a number of the size of the table is, and the slope of x is a sum of such distances times steps of that size. A
    # sum over the elements has a rounding for each more.
    known = np.nan_to_num(x, nan=0.0)
    steps, levels, weights, means = _assigned(known, state.grid, centroids, temperature)
    sharpness = 2.0 / (temperature * (CODES / len(levels)) ** 2)
    sizes, scale = np.abs(upstream).astype(np.float64), state.grid.along(x.ndim).scale.astype(np.float64)
    of_x = sharpness * CODES * (108 * (weights * np.abs(levels - means)).sum(-1) + 4 * 2 * state.grid.threshold_steps)
    of_levels = weights * (1.0 + sharpness * np.abs(steps - levels) * CODES)
    sums = ((sizes * scale)[..., np.newaxis] * of_levels).reshape(-1, len(levels)).sum(0)
    # A weight below the normal numbers may be zero in float32, and so may its product with the scale and the upstream
    # gradient; the factor that either still gets is at most this.
    smallest = float(np.finfo(np.float32).tiny) * (1.0 + sharpness * CODES**2)
    allowed = {"centroids": sums * (108 + x.size) * EPSILON + smallest * float(np.maximum(sizes * scale, 1.0).sum())}
    return ExpectedGradients(found.x, sizes * of_x * EPSILON, {"centroids": found.centroids}, allowed)


METHOD = Method(
    name="DKM",
    title="Differentiable k-means",
    reference="Cho et al., ICLR 2022, arXiv:2108.12659",
    module=__name__,
    own_variables=("centroids",),
    options=(
        Option("temperature", None, "arguments of `LinearAnnealingScheduler`, all positive, in squared gaps of levels"),
    ),
    targets=(QuantizationTarget.Weights, QuantizationTarget.Activation),
    grids=LUT_METHODS,
    training_forward="soft",
    schedule_end=_schedule_end,
    counts_steps=True,
    oracle=Oracle(_expected_gradients, _expected_values),
)
