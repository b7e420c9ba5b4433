"""What every backend's tests draw from: its registered quantizers, hostile variables, inputs full of ties.

Arrays are decoded from drawn bytes: one draw for a whole array keeps a thousand cases in seconds, and they shrink.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from tests.kit import is_whole
from trainable_core.config import TrainableQuantizerActivationConfig, TrainableQuantizerWeightsConfig
from trainable_core.constants import RANGE_MAX, RANGE_MIN, SIGNED, THRESHOLD
from trainable_core.enums import QuantizationMethod, QuantizationTarget
from trainable_core.key import Key
from trainable_core.qparams import QParams, from_variables
from trainable_core.registry.process import list_quantizers

F32 = np.finfo(np.float32)
GRIDS = (QuantizationMethod.SYMMETRIC, QuantizationMethod.POWER_OF_TWO, QuantizationMethod.UNIFORM)


@dataclass(frozen=True)
class Kind:
    """A registered quantizer class on one of its grids."""

    cls: type[Any]
    key: Key

    def __str__(self) -> str:
        return f"{self.key.quantizer_id}-{self.key.target}-{self.key.method}"

    @property
    def weights(self) -> bool:
        return self.key.target is QuantizationTarget.Weights

    @property
    def uniform(self) -> bool:
        return self.key.method is QuantizationMethod.UNIFORM


class Kinds(list[Kind]):
    """A backend's quantizers on which everything is tested, on each of their targets and grids; see `tests.kit`."""

    def __init__(self, backend: str) -> None:
        rows = [row for row in list_quantizers(backend) if is_whole(row.training_method)]
        super().__init__(Kind(row.cls, key) for row in rows for key in row.keys)

    @property
    def every(self) -> pytest.MarkDecorator:
        """Parametrize a test with all of them."""
        return pytest.mark.parametrize("kind", self, ids=str)

    def of(self, *training_methods: str, weights_only: bool = False) -> pytest.MarkDecorator:
        """Parametrize a test with the quantizers of some training methods."""
        kinds = [kind for kind in self if kind.key.quantizer_id in training_methods and kind.weights >= weights_only]
        return pytest.mark.parametrize("kind", kinds, ids=str)


# ---- numbers --------------------------------------------------------------------------------------------------------

n_bits = st.integers(1, 16)

# 0 and what is below 2**-100 leave the bound to the library; 0.1 and 1e-3 are no float32 numbers.
min_thresholds = st.sampled_from([2.0**-16, 0.0, 2.0**-120, 1e-3, 0.1, 1.0, 2.0**100])
# With these no intermediate of a gradient leaves the normal float32 numbers: see `SUM_ERROR` of the tests of `ops`.
moderate_min_thresholds = st.sampled_from([2.0**-16, 1e-3, 0.1, 1.0])

_POWERS = [2.0**e for e in (-149, -120, -100, -99, -30, -16, -1, 0, 1, 10, 99, 100, 101)]
HOSTILE = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, F32.max, -F32.max, -F32.tiny, -1.0, *_POWERS], np.float32)


def _nudged(values: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Return float32 values moved by a few units in the last place; what is not finite stays."""
    moved = values.copy()
    for ulps in (-2, -1, 1, 2):
        here = by == ulps
        for _ in range(abs(ulps)):
            moved[here] = np.nextafter(moved[here], np.float32(np.copysign(np.inf, ulps)))
    return np.where(np.isfinite(values), moved, values)


@st.composite
def float32s(draw: Any, size: int, *, finite: bool = False) -> np.ndarray:
    """Return float32 numbers of every kind: any bits, special ones, powers of two and their neighbours, decimals."""
    drawn = np.frombuffer(draw(st.binary(min_size=6 * size, max_size=6 * size)), np.uint8).reshape(size, 6)
    which, ulps = drawn[:, 0] % 4, drawn[:, 1].astype(np.int64) % 5 - 2
    payload = drawn[:, 2:].copy().view(np.uint32).reshape(size)
    decimals = ((payload % 20001).astype(np.float32) - np.float32(6000)) * np.float32(1e-3)
    powers = np.exp2((payload % 41).astype(np.float32) - np.float32(20))
    values = np.select(
        [which == 0, which == 1, which == 2],
        [decimals, _nudged(powers, ulps), HOSTILE[payload % len(HOSTILE)]],
        payload.view(np.float32),
    ).astype(np.float32)
    return np.where(np.isfinite(values), values, np.float32(1)) if finite else values


@st.composite
def upstreams(draw: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Return multiples of 1/8 in [-16, 16): exact in every dtype, so that a gradient is what was drawn."""
    size = int(np.prod(shape, dtype=np.int64))
    drawn = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.int8)
    return (drawn.astype(np.float32) / np.float32(8)).reshape(shape)


@st.composite
def positives(draw: Any, size: int) -> np.ndarray:
    """Return legal thresholds: positive finite float32 numbers up to 2**100."""
    values = np.abs(draw(float32s(size, finite=True)))
    return np.clip(values, F32.smallest_subnormal, np.float32(2.0**100))


def without_subnormals(values: np.ndarray) -> np.ndarray:
    """Return `values` with zeros for subnormal numbers, which TensorFlow and XLA take for zeros."""
    return np.where(np.abs(values) < F32.tiny, np.zeros_like(values), values)


# ---- quantizers -----------------------------------------------------------------------------------------------------


@st.composite
def shapes(draw: Any, *, least: int = 0, empty: bool = True) -> tuple[int, ...]:
    """Return a tensor shape of up to three dimensions; 0-d and empty ones too."""
    return tuple(draw(st.lists(st.integers(0 if empty else 1, 4), min_size=least, max_size=3)))


@st.composite
def legal_params(draw: Any, method: QuantizationMethod, channels: int | None) -> dict[str, Any]:
    """Return calibrated params: one number each, or one per channel."""
    size = 1 if channels is None else channels

    def plain(values: np.ndarray) -> Any:
        return float(values[0]) if channels is None else values.astype(float).tolist()

    first = draw(positives(size))
    if method is not QuantizationMethod.UNIFORM:
        return {THRESHOLD: plain(first)}
    second = draw(positives(size))
    if draw(st.booleans()):
        return {THRESHOLD: plain(first), SIGNED: draw(st.booleans())}
    low, high = draw(st.sampled_from([(-first, second), (np.zeros_like(first), first), (-first, np.zeros_like(first))]))
    return {RANGE_MIN: plain(low), RANGE_MAX: plain(high)}


@st.composite
def configs(draw: Any, kind: Kind, shape: tuple[int, ...], bits: Any = n_bits, bounds: Any = min_thresholds) -> Any:
    """Return a calibrated config for a tensor of this shape, in every granularity, sign and with candidates."""
    prefix = "weights" if kind.weights else "activation"
    # a channel axis must have channels: no grid has none
    axes = [axis for axis in range(-len(shape), len(shape)) if shape[axis] > 0] if kind.weights else []
    axis = draw(st.sampled_from([None, *axes]))
    channels = None if axis is None else shape[axis]
    params = draw(legal_params(kind.key.method, channels))
    if not kind.weights and not kind.uniform:
        params[SIGNED] = draw(st.booleans())
    fields: dict[str, Any] = {
        f"{prefix}_quantization_method": kind.key.method,
        f"{prefix}_n_bits": draw(bits),
        f"{prefix}_quantization_params": params,
        "min_threshold": draw(bounds),
    }
    if axis is not None:
        fields |= {"weights_per_channel_threshold": True, "weights_channels_axis": axis}
    if draw(st.booleans()):
        widths = draw(st.lists(bits, min_size=1, max_size=3, unique=True))
        fields[f"{prefix}_quantization_candidates"] = [{"n_bits": width} for width in widths]
    return (TrainableQuantizerWeightsConfig if kind.weights else TrainableQuantizerActivationConfig)(**fields)


@st.composite
def quantizers(
    draw: Any,
    kind: Kind,
    shape: tuple[int, ...],
    *,
    moved: bool = False,
    bits: Any = n_bits,
    bounds: Any = min_thresholds,
) -> Any:
    """Return an initialized quantizer; `moved`: with variables that no config allows, as after wild training."""
    quantizer = kind.cls(draw(configs(kind, shape, bits, bounds)))
    quantizer.initialize_quantization(shape, "x", None)
    if moved:
        for name in quantizer.variable_names:
            variable = quantizer.get_quantizer_variable(name)
            quantizer.assign(variable, draw(float32s(int(np.prod(variable.shape)))).reshape(tuple(variable.shape)))
    return quantizer


@st.composite
def grids(draw: Any, shape: tuple[int, ...], *, per_channel: bool | None = None) -> QParams:
    """Return any grid that a tensor of this shape may have, per tensor or per channel, centered or not."""
    axes = [axis for axis in range(-len(shape), len(shape)) if shape[axis] > 0]
    choices = [None, *axes] if per_channel is None else axes if per_channel else [None]
    axis = draw(st.sampled_from(choices))
    size = 1 if axis is None else shape[axis]
    variables = (THRESHOLD,) if draw(st.booleans()) else (RANGE_MIN, RANGE_MAX)
    return from_variables(
        {name: draw(float32s(size)).reshape(() if axis is None else (size,)) for name in variables},
        QuantizationMethod.SYMMETRIC if len(variables) == 1 else QuantizationMethod.UNIFORM,
        draw(n_bits),
        signed=draw(st.booleans()),
        min_threshold=draw(min_thresholds),
        channels_axis=axis,
    )


# ---- inputs ---------------------------------------------------------------------------------------------------------

_MAGNITUDES = [0.0, np.inf, F32.max, F32.tiny, F32.smallest_subnormal, 1e-30, 1e30, 1.0]
SPECIAL = np.array([sign * magnitude for magnitude in _MAGNITUDES for sign in (1.0, -1.0)], np.float32)


@st.composite
def inputs(draw: Any, grid: QParams, shape: tuple[int, ...], *, nan: bool = True, finite: bool = False) -> np.ndarray:
    """Return a float32 array full of ties, grid points and ends of the grid, a few units in the last place around them.

    The rest is any bits and special numbers: infinities, both zeros, denormals, the largest numbers; NaN if asked for.
    """
    size = int(np.prod(shape, dtype=np.int64))
    drawn = np.frombuffer(draw(st.binary(min_size=6 * size, max_size=6 * size)), np.uint8).reshape(size, 6)
    which, ulps = drawn[:, 0] % 8, drawn[:, 1].astype(np.int64) % 5 - 2
    payload = drawn[:, 2:].copy().view(np.uint32).reshape(size)
    along = grid.along(len(shape))
    low, high = (
        np.broadcast_to(end - along.zero_point, shape).reshape(size) for end in (grid.quant_min, grid.quant_max)
    )
    code = low - 3 + payload % (high - low + 7)  # up to three steps beyond either end
    end = np.where(payload % 2, low, high) + (payload // 2 % 3).astype(np.float32) * np.float32(0.5) - np.float32(0.5)
    anywhere = low + (payload.astype(np.float64) / 2.0**32 * 1.5 - 0.25) * (high - low)
    steps = np.select([which <= 2, which == 3, which == 4], [code + 0.5, code, end], anywhere).astype(np.float32)
    with np.errstate(over="ignore", under="ignore"):
        values = (steps.reshape(shape) * along.scale).astype(np.float32).reshape(size)
    values = _nudged(values, ulps)
    values = np.where(which == 6, SPECIAL[payload % len(SPECIAL)], values)
    values = np.where(which == 7, payload.view(np.float32), values)
    allowed = np.isfinite(values) if finite else np.isfinite(values) | np.isinf(values) | (np.isnan(values) & nan)
    return np.where(allowed, values, np.float32(-1.5)).reshape(shape)


# ---- comparisons ----------------------------------------------------------------------------------------------------


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    """Check dtype, shape and every bit; one NaN is as good as another."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    nan = np.isnan(expected)
    assert np.array_equal(np.isnan(actual), nan)
    actual, expected = (np.where(nan, np.zeros_like(value), value) for value in (actual, expected))
    assert np.array_equal(actual, expected), (actual, expected)
    assert np.array_equal(np.signbit(actual), np.signbit(expected)), "the sign of a zero differs"
