"""Hypothesis strategies: configs on every grid, variables that moved, tensors full of ties, ends and special numbers.

Arrays are decoded from drawn bytes: one draw for a whole array costs little, and it shrinks. Zero bytes decode to the
plainest value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from numpy.typing import NDArray

from trainable_core import qparams
from trainable_core.checks import MAX_THRESHOLD
from trainable_core.config import TrainableQuantizerActivationConfig, TrainableQuantizerWeightsConfig
from trainable_core.conformance.case import Case, Config, Subject
from trainable_core.constants import RANGE_MAX, RANGE_MIN, SIGNED, THRESHOLD
from trainable_core.enums import QuantizationMethod
from trainable_core.qparams import Float32, QParams

F32 = np.finfo(np.float32)
LONGEST = 3  # dimensions: enough to have an axis in the middle


@dataclass(frozen=True)
class Kind:
    """Which cases a law wants.

    Parameters
    ----------
    bits : tuple of int
        Fewest and most bits of the grid.
    exact : bool
        Whether every scale is a power of two: then ``x / scale`` is exact, and ties are where they seem to be.
    moderate : bool
        Whether thresholds stay between 2**-10 and 2**10 and move by less than 4, so that no sum of gradients leaves the
        normal float32 numbers; otherwise they are anything that a config takes.
    finite : bool
        Whether the input has neither infinities nor numbers beyond ``2**60``.
    per_channel : bool or None
        Whether there is one threshold per channel; None: both.
    least : int
        Fewest dimensions of the tensor.
    """

    bits: tuple[int, int] = (1, 16)
    exact: bool = False
    moderate: bool = False
    finite: bool = False
    per_channel: bool | None = None
    least: int = 0


# 0 and what is below 2**-100 leave the bound to the library; 1e-3 and 0.1 are no float32 numbers.
MIN_THRESHOLDS = st.sampled_from([2.0**-16, 0.0, 1e-3, 0.1, 1.0, 2.0**-120, 2.0**100])


EXACT_FACTORS = st.sampled_from([1.0, 2.0, 0.5, 8.0])
FACTORS = st.lists(st.sampled_from([1.0, 0.75, 1.3, 2.0, 0.51, 1.0 + 2.0**-23, 3.7]), min_size=1, max_size=3)
SIZES = st.sampled_from([2, 1, 3, 4, 0])
SHAPES = [st.lists(SIZES, min_size=least, max_size=LONGEST) for least in range(LONGEST + 1)]


def words(draw: DrawFn, size: int) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.uint32]]:
    """Draw for each of `size` numbers which kind it is, by how many ulps it is moved, and 32 bits."""
    drawn = np.frombuffer(draw(st.binary(min_size=6 * size, max_size=6 * size)), np.uint8).reshape(size, 6)
    ulps = (drawn[:, 1].astype(np.int64) + 2) % 5 - 2
    return drawn[:, 0], ulps, drawn[:, 2:].copy().view(np.uint32).reshape(size)


def nudged(values: Float32, ulps: NDArray[np.int64]) -> Float32:
    """Return float32 values moved by a few units in the last place; what is not finite stays."""
    moved = values.copy()
    for by in (-2, -1, 1, 2):
        for _ in range(abs(by)):
            moved[ulps == by] = np.nextafter(moved[ulps == by], np.float32(np.copysign(np.inf, by)))
    return np.where(np.isfinite(values), moved, values)


def positives(draw: DrawFn, size: int, kind: Kind) -> Float32:
    """Draw legal thresholds: ones, decimals, powers of two and their neighbours, any float32 up to 2**100."""
    which, ulps, payload = words(draw, size)
    if kind.exact:
        return np.exp2(((payload + 10) % 21).astype(np.float32) - 10).astype(np.float32)
    decimals = ((payload % 4000).astype(np.float32) + 1) * np.float32(1e-2)
    powers = nudged(np.exp2((payload % 20).astype(np.float32) - 10).astype(np.float32), ulps)
    anything = np.abs(payload.view(np.float32))
    which = which % (2 if kind.moderate else 4)
    extreme = np.exp2(np.where(payload % 2, 100, -149).astype(np.float64)).astype(np.float32)
    values = np.choose(which, [decimals, powers, extreme, anything]).astype(np.float32)
    values = np.where(np.isfinite(values), values, np.float32(1))
    return np.clip(values, F32.smallest_subnormal, np.float32(MAX_THRESHOLD))


@st.composite
def shapes(draw: DrawFn, least: int = 0) -> tuple[int, ...]:
    """Return a tensor's shape: up to three dimensions, 0-d and empty ones too."""
    return tuple(draw(SHAPES[least]))


@st.composite
def configs(draw: DrawFn, subject: Subject, shape: tuple[int, ...], kind: Kind) -> Config:
    """Return a calibrated config for a tensor of this shape."""
    axes = [axis for axis in range(-len(shape), len(shape)) if shape[axis] > 0] if subject.weights else []
    if kind.per_channel is None:
        axis = draw(st.sampled_from([None, *axes]))
    else:
        axis = draw(st.sampled_from(axes)) if kind.per_channel and axes else None
    n_bits = draw(st.integers(*kind.bits))
    params = _params(draw, subject, 1 if axis is None else shape[axis], n_bits, kind)
    if axis is None:
        params = {key: value[0] if isinstance(value, list) else value for key, value in params.items()}
    prefix = "weights" if subject.weights else "activation"
    fields: dict[str, Any] = {
        f"{prefix}_quantization_method": subject.key.method,
        f"{prefix}_n_bits": n_bits,
        f"{prefix}_quantization_params": params,
    }
    if not (kind.exact or kind.moderate):
        fields["min_threshold"] = draw(MIN_THRESHOLDS)
    if axis is not None:
        fields |= {"weights_per_channel_threshold": True, "weights_channels_axis": axis}
    if draw(st.booleans()):
        widths = draw(st.lists(st.integers(*kind.bits), min_size=1, max_size=3, unique=True))
        fields[f"{prefix}_quantization_candidates"] = [{"n_bits": width} for width in widths]
    return (TrainableQuantizerWeightsConfig if subject.weights else TrainableQuantizerActivationConfig)(**fields)


def _params(draw: DrawFn, subject: Subject, size: int, n_bits: int, kind: Kind) -> dict[str, Any]:
    """Draw params, each a list with one number per channel."""
    first = positives(draw, size, kind)
    if subject.key.method is not QuantizationMethod.UNIFORM:
        params: dict[str, Any] = {THRESHOLD: first.astype(float).tolist()}
        if not subject.weights:
            params[SIGNED] = draw(st.booleans())
        return params
    if kind.exact:  # `first` is the scale; both ends are multiples of it
        below = words(draw, size)[2] % 2**n_bits
        low, high = -(below * first), (2**n_bits - 1 - below) * first
        return {RANGE_MIN: low.astype(float).tolist(), RANGE_MAX: high.astype(float).tolist()}
    form = draw(st.sampled_from(["range", "low", "high", THRESHOLD]))
    if form == THRESHOLD:
        return {THRESHOLD: first.astype(float).tolist(), SIGNED: draw(st.booleans())}
    second, zero = positives(draw, size, kind), np.zeros_like(first)
    low, high = {"range": (-first, second), "low": (-first, zero), "high": (zero, first)}[form]
    return {RANGE_MIN: low.astype(float).tolist(), RANGE_MAX: high.astype(float).tolist()}


def grid_after(config: Config, factors: tuple[float, ...], width: int) -> QParams:
    """Return the grid that a config's params stand for after the variables moved; see `case.move`."""
    values = qparams.variables_from_params(config.quantization_params, config.quantization_method)
    size = max(value.size for value in values.values())
    names = qparams.variable_names(config.quantization_method)
    moved: dict[str, Float32] = {}
    for index, name in enumerate(names):
        value = values[name] if config.channels_axis is None else np.broadcast_to(values[name].reshape(-1), size)
        by = np.resize(np.roll(np.array(factors, np.float32), -index), value.shape).astype(np.float32)
        moved[name] = np.asarray(value * by, np.float32)
    return qparams.from_variables(
        moved,
        config.quantization_method,
        width,
        signed=config.signed,
        min_threshold=config.min_threshold,
        channels_axis=config.channels_axis,
    )


_MAGNITUDES = [0.0, 1.0, np.inf, float(F32.max), float(F32.tiny), float(F32.smallest_subnormal), 1e-30, 1e30]
SPECIAL = np.array([sign * magnitude for magnitude in _MAGNITUDES for sign in (1.0, -1.0)], np.float32)
FINITE_LIMIT = np.float32(2.0**60)


def inputs(draw: DrawFn, grid: QParams, shape: tuple[int, ...], kind: Kind) -> Float32:
    """Draw a tensor: codes and ties of the grid with their neighbours, its ends, anything around, special numbers."""
    size = int(np.prod(shape, dtype=np.int64))
    which, ulps, payload = words(draw, size)
    which = which % 8
    along = grid.along(len(shape))
    low, high = (
        np.broadcast_to(end - along.zero_point, shape).reshape(size) for end in (grid.quant_min, grid.quant_max)
    )
    code = low + (payload.astype(np.int64) - low + 3) % (high - low + 7) - 3  # payload 0 is zero; 3 steps beyond
    end = np.where(payload % 2, low, high) + (payload // 2 % 3).astype(np.float32) * np.float32(0.5) - np.float32(0.5)
    anywhere = low + (payload.astype(np.float64) / 2.0**32 * 1.5 - 0.25) * (high - low)
    # Of eight kinds: a code, two of ties, an end, two of anything around the range; then special numbers, any bits.
    steps = np.choose(which, [code, code + 0.5, code + 0.5, end, anywhere, anywhere, code, code])
    with np.errstate(over="ignore", under="ignore"):
        values = (steps.astype(np.float32).reshape(shape) * along.scale).astype(np.float32).reshape(size)
    values = nudged(values, np.where(which == 0, 0, ulps))
    special = SPECIAL[payload % len(SPECIAL)]
    values = np.choose(which, [values] * 6 + [special, payload.view(np.float32)])
    values = np.where(np.isnan(values), np.float32(-1.5), values)
    if kind.finite:
        values = np.clip(values, -FINITE_LIMIT, FINITE_LIMIT)
    return values.astype(np.float32).reshape(shape)


def upstreams(draw: DrawFn, shape: tuple[int, ...]) -> Float32:
    """Draw a gradient: eighths between -4 and 4, so that products with small integers are exact."""
    size = int(np.prod(shape, dtype=np.int64))
    drawn = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8)
    return (((drawn.astype(np.float32) + 40) % 65 - 32) / 8).astype(np.float32).reshape(shape)


def _factors(draw: DrawFn, kind: Kind) -> tuple[float, ...]:
    """Draw how the variables have moved: not at all, or by a few odd numbers; by a power of two on exact grids."""
    if kind.exact:
        return (draw(EXACT_FACTORS),)
    return tuple(draw(FACTORS))


@st.composite
def cases(draw: DrawFn, subject: Subject, kind: Kind) -> Case:
    """Return a case for a quantizer class on one of its grids."""
    shape = draw(shapes(max(kind.least, int(kind.per_channel or 0))))
    if kind.per_channel and not any(shape):
        shape = (*shape, 2)
    config = draw(configs(subject, shape, kind))
    factors = _factors(draw, kind)
    arguments = draw(st.sampled_from([*getattr(subject.cls, "conformance_arguments", ()), {}]))
    widths = [config.n_bits, *(candidate.n_bits for candidate in config.candidates or [])]
    grid = grid_after(config, factors, draw(st.sampled_from(widths)))
    x = inputs(draw, grid, shape, kind)
    return Case(config, x, upstreams(draw, shape), factors, draw(st.integers(0, 4)), dict(arguments))
