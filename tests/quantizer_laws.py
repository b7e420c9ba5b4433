"""What every backend's quantizers keep, and how far a float32 computation may be from the reference.

A law is a function of a `Backend`, a kind and hypothesis's data; each tree runs all of `LAWS` on all of its quantizers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from tests.strategies import (
    Kind,
    assert_same_bits,
    float32s,
    inputs,
    moderate_min_thresholds,
    quantizers,
    shapes,
    upstreams,
)
from trainable_core.constants import RANGE_MAX, RANGE_MIN, THRESHOLD
from trainable_core.enums import QuantizationMethod, TieRule, TrainingMethod, VariableGroup
from trainable_core.qparams import QParams, variable_gradients
from trainable_core.reference import affine, dqa, lsq, ste

UNIT = 2.0**-24  # relative error of one float32 operation
REFERENCES = {TrainingMethod.STE: ste.gradients, TrainingMethod.LSQ: lsq.gradients, TrainingMethod.DQA: ste.gradients}


@dataclass(frozen=True)
class Backend:
    """How a tree calls its quantizers: NumPy arrays in, NumPy arrays out.

    Parameters
    ----------
    call : callable
        ``call(quantizer, x, dtype, training=...)``, the last two optional.
    gradients : callable
        ``gradients(quantizer, x, upstream, dtype, training=...)`` returns those of the input and, by name, of the
        variables.
    numpy : callable
        A tensor's or a variable's value.
    end_schedule : callable
        Leads a quantizer with a schedule to its end.
    dtypes : tuple of str
        What NumPy has of the dtypes that quantizers take.
    tie_rule : TieRule
        The deployed kernels'.
    usual : callable
        ``usual(x, grid)`` returns `x` without what the framework takes for zero.
    """

    call: Callable[..., np.ndarray]
    gradients: Callable[..., tuple[np.ndarray, dict[str, np.ndarray]]]
    numpy: Callable[[Any], np.ndarray]
    end_schedule: Callable[[Any], None]
    dtypes: tuple[str, ...]
    tie_rule: TieRule
    usual: Callable[[np.ndarray, QParams], np.ndarray] = lambda x, grid: x


@dataclass(frozen=True)
class Drawn:
    """A quantizer with its schedule at the end, values for it, their dtype, and whether it trains."""

    quantizer: Any
    x: np.ndarray
    dtype: str
    training: bool

    @classmethod
    def of(cls, backend: Backend, kind: Kind, data: Any, *, dtypes: tuple[str, ...] = (), **limits: Any) -> Drawn:
        """Draw one; `limits` are those of the strategy `quantizers`."""
        shape = data.draw(shapes())
        quantizer = data.draw(quantizers(kind, shape, moved=data.draw(st.booleans()), **limits))
        backend.end_schedule(quantizer)
        dtype = data.draw(st.sampled_from(dtypes or backend.dtypes))
        with np.errstate(over="ignore", invalid="ignore"):  # invalid: a signalling NaN
            x = data.draw(inputs(quantizer.current_qparams(), shape)).astype(dtype)
        return cls(quantizer, x, dtype, data.draw(st.booleans()))


# ---- laws -----------------------------------------------------------------------------------------------------------


def what_is_trained_is_what_is_deployed(backend: Backend, kind: Kind, data: Any) -> None:
    """Compare every bit, right after initialization and after any training."""
    d = Drawn.of(backend, kind, data)
    deployed = backend.call(d.quantizer.convert2inferable(), d.x, d.dtype)
    assert_same_bits(backend.call(d.quantizer, d.x, d.dtype, training=d.training), deployed)


def values_are_those_of_the_reference(backend: Backend, kind: Kind, data: Any) -> None:
    """Compare every bit with core's reference."""
    d = Drawn.of(backend, kind, data)
    expected = affine.fake_quantize(d.x, d.quantizer.current_qparams(), tie_rule=backend.tie_rule)
    assert_same_bits(backend.call(d.quantizer, d.x, d.dtype, training=d.training), expected)


def tensor_grid_is_that_of_the_core(backend: Backend, kind: Kind, data: Any) -> None:
    """Compare the grid's numbers of every width."""
    shape = data.draw(shapes(least=1, empty=False))
    quantizer = data.draw(quantizers(kind, shape, moved=True))
    for width in quantizer.widths:
        grid, expected = quantizer.grid(len(shape), width), quantizer.current_qparams(width).along(len(shape))
        assert_same_bits(backend.numpy(grid.scale), expected.scale)
        assert np.array_equal(backend.numpy(grid.zero_point), expected.zero_point)
        assert (grid.quant_min, grid.quant_max) == (expected.quant_min, expected.quant_max)


def zero_stays_a_positive_zero(backend: Backend, kind: Kind, data: Any) -> None:
    """Quantize both zeros."""
    quantizer = data.draw(quantizers(kind, (), moved=data.draw(st.booleans())))
    backend.end_schedule(quantizer)
    y = backend.call(quantizer, np.array([0.0, -0.0], np.float32), training=data.draw(st.booleans()))
    assert_same_bits(y, np.zeros(2, np.float32))


def quantizing_again_changes_nothing(backend: Backend, kind: Kind, data: Any) -> None:
    """Quantize what was quantized."""
    d = Drawn.of(backend, kind, data, dtypes=("float32",))
    y = backend.call(d.quantizer, d.x, d.dtype)
    assert_same_bits(backend.call(d.quantizer, y, d.dtype), y)


def everything_beyond_the_grid_saturates_to_its_own_side(backend: Backend, kind: Kind, data: Any) -> None:
    """Quantize infinities and what is just beyond the ends."""
    quantizer = data.draw(quantizers(kind, (), moved=data.draw(st.booleans())))
    backend.end_schedule(quantizer)
    grid = quantizer.current_qparams()
    low, high = (
        float((end - grid.zero_point).astype(np.float32) * grid.scale) for end in (grid.quant_min, grid.quant_max)
    )
    beyond = np.array([np.inf, 3.4e38, 2 * high + 1.0, -np.inf, -3.4e38, 2 * low - 1.0], np.float32)
    assert backend.call(quantizer, beyond).tolist() == [high] * 3 + [low] * 3


def input_gradient_is_exactly_that_of_the_reference(backend: Backend, kind: Kind, data: Any) -> None:
    """Compare every bit with the method's reference."""
    d = Drawn.of(backend, kind, data, dtypes=("float32",))
    if hasattr(d.quantizer, "logits"):  # a softmax of infinite logits is NaN, by definition
        d.quantizer.assign(d.quantizer.logits, data.draw(upstreams(tuple(d.quantizer.logits.shape))))
    grid = d.quantizer.current_qparams()
    x = backend.usual(d.x, grid)
    upstream = data.draw(upstreams(x.shape))
    d_x, _ = backend.gradients(d.quantizer, x, upstream, d.dtype, training=d.training)
    expected = REFERENCES[kind.key.quantizer_id](x, upstream, grid)
    assert np.array_equal(d_x.astype(np.float64), expected.x)


def config_round_trip_is_json_and_keeps_everything(backend: Backend, kind: Kind, data: Any) -> None:
    """Compare a quantizer with the one made of its config."""
    quantizer = data.draw(quantizers(kind, data.draw(shapes()), moved=False))
    for name in quantizer.variable_names:
        variable = quantizer.get_quantizer_variable(name)
        moved = data.draw(float32s(int(np.prod(variable.shape)), finite=True)).reshape(tuple(variable.shape))
        quantizer.assign(variable, moved)
    quantizer.freeze(data.draw(st.booleans()))
    again = kind.cls.from_config(json.loads(json.dumps(quantizer.get_config())))
    assert again.get_config() == quantizer.get_config()
    assert again.quantization_config == quantizer.quantization_config
    assert again.freeze_quant_params == quantizer.freeze_quant_params
    for group in VariableGroup:
        trained = (each.get_trainable_variables(group) for each in (again, quantizer))
        assert len(next(trained)) == len(next(trained))


LAWS = (
    what_is_trained_is_what_is_deployed,
    values_are_those_of_the_reference,
    tensor_grid_is_that_of_the_core,
    zero_stays_a_positive_zero,
    quantizing_again_changes_nothing,
    everything_beyond_the_grid_saturates_to_its_own_side,
    input_gradient_is_exactly_that_of_the_reference,
    config_round_trip_is_json_and_keeps_everything,
)


# ---- how far from the reference -------------------------------------------------------------------------------------


def sums_of_magnitudes(
    x: np.ndarray, upstream: np.ndarray, grid: QParams, tie_rule: TieRule
) -> tuple[np.ndarray, np.ndarray]:
    """Return LSQ's sums for scale and zero point with every term's magnitude in the place of the term."""
    along = grid.along(x.ndim)
    # every element as a channel of its own: the reference's sums become its terms
    each = QParams(
        np.broadcast_to(along.scale, x.shape).reshape(-1),
        np.broadcast_to(along.zero_point, x.shape).reshape(-1),
        grid.quant_min,
        grid.quant_max,
        0,
    )
    terms = lsq.gradients(x.reshape(-1), upstream.reshape(-1), each, tie_rule=tie_rule)
    factor = lsq.gradient_scale(grid.sharing(x.size), grid.quant_max) / lsq.gradient_scale(1, grid.quant_max)
    scale, zero_point = (grid.reduce(np.abs(each).reshape(x.shape)) for each in (terms.scale, terms.zero_point))
    return scale * factor, zero_point * factor


def learned_gradients(
    quantizer: Any, x: np.ndarray, upstream: np.ndarray, tie_rule: TieRule
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the reference's gradients of an LSQ quantizer's variables, and the sums of magnitudes that they are of.

    A float32 sum of n terms is off by at most n units of the sum of their magnitudes.
    """
    config, grid, width = quantizer.quantization_config, quantizer.current_qparams(), quantizer.selected_width
    variables = {name: quantizer.to_numpy(quantizer.get_quantizer_variable(name)) for name in quantizer.variable_names}
    terms = lsq.gradients(x, upstream, grid, tie_rule=tie_rule)
    expected = variable_gradients(
        variables,
        config.quantization_method,
        width,
        terms.scale,
        terms.zero_point,
        signed=quantizer.signed,
        min_threshold=config.min_threshold,
    )
    scale_sum, zero_sum = sums_of_magnitudes(x, upstream, grid, tie_rule)
    if config.quantization_method is QuantizationMethod.UNIFORM:
        step = grid.scale.astype(np.float64)
        through_width = (scale_sum + zero_sum * grid.zero_point / step) / grid.quant_max
        return expected, {RANGE_MIN: through_width + zero_sum / step, RANGE_MAX: through_width}
    # p / t is below 2, and it is 1 unless a power of two was rounded up
    rounding = 2.0 if config.quantization_method is QuantizationMethod.POWER_OF_TWO else 1.0
    return expected, {THRESHOLD: scale_sum * rounding / 2.0 ** (width - int(quantizer.signed))}


class Mixture:
    """A DQA quantizer somewhere on its schedule, and the reference's view of it.

    Parameters
    ----------
    data : object
        Hypothesis's.
    kind : Kind
        The quantizer's.
    tie_rule : TieRule
        The backend's.
    start : callable
        Sets a step of the quantizer's schedule that is drawn, and returns the temperature there.
    usual : callable, optional
        See `Backend`.
    """

    def __init__(
        self,
        data: Any,
        kind: Kind,
        tie_rule: TieRule,
        start: Callable[[Any, Any], float],
        usual: Callable[[np.ndarray, QParams], np.ndarray] = lambda x, grid: x,
    ) -> None:
        self.tie_rule = tie_rule
        shape = data.draw(shapes())
        self.quantizer = data.draw(quantizers(kind, shape, bounds=moderate_min_thresholds))
        self.temperature = start(data, self.quantizer)
        self.logits = data.draw(upstreams((len(self.quantizer.widths),)))
        self.quantizer.assign(self.quantizer.logits, self.logits)
        self.grids = [self.quantizer.current_qparams(width) for width in self.quantizer.widths]
        x = data.draw(inputs(self.grids[data.draw(st.integers(0, len(self.grids) - 1))], shape, nan=False))
        for grid in self.grids:
            x = usual(x, grid)
        self.x = x
        self.weights = dqa.attention(self.logits, self.temperature)
        self.values = [affine.fake_quantize(x, grid, tie_rule=tie_rule).astype(np.float64) for grid in self.grids]

    @property
    def units(self) -> float:
        """Bound of an attention weight's relative error in float32, in float64 terms.

        The exponents, up to M = max|logit| / T, carry six roundings (temperature, quotient and difference, each in
        numerator and denominator), so a weight is off by 6 M units; exp, the sum of K and the quotient add K + 6.
        """
        largest = float(np.abs(self.logits).max()) / self.temperature
        return (6 * largest + len(self.logits) + 6) * UNIT

    def weighted(self, magnitudes: Any) -> Any:
        """Return the sum of magnitudes with the attention's weights."""
        return sum(weight * each for weight, each in zip(self.weights, magnitudes, strict=True))

    def check_values(self, values: np.ndarray) -> None:
        """Compare a float32 mixture with the reference's."""
        x = self.x.astype(np.float64)
        expected = dqa.fake_quantize(x, self.grids, self.logits, self.temperature, tie_rule=self.tie_rule)
        # each product and the sum of K: K + 1 units; weights below 2**-126 may be lost
        units = self.units + (len(self.grids) + 1) * UNIT
        magnitudes = [np.abs(value) for value in self.values]
        assert (np.abs(values - expected) <= units * self.weighted(magnitudes) + 2.0**-126 * sum(magnitudes)).all()

    def check_gradients(self, upstream: np.ndarray, d_x: np.ndarray, d_logits: np.ndarray) -> None:
        """Compare float32 gradients with the reference's."""
        expected = dqa.gradients(self.x, upstream, self.grids, self.logits, self.temperature, tie_rule=self.tie_rule)
        count = len(self.grids)
        # dL/dx: a sum of K weights times the upstream gradient
        error = np.abs(d_x - expected.x)
        assert (error <= (self.units + (count + 1) * UNIT) * np.abs(upstream) + 2.0**-126 * 16 * count).all()
        # dL/dlogit_k = a_k / T * (g_k - sum_j a_j g_j): g is a sum of n products, then the weights' errors (thrice: the
        # factor a_k, and a_j in the sum, which cancels by up to twice) and K + 6 operations
        sums = [np.abs(upstream * value).sum() for value in self.values]
        units = (upstream.size + count + 6) * UNIT + 3 * self.units
        bound = (self.weights / self.temperature) * (np.array(sums) + self.weighted(sums)) * units
        lost = 2.0**-126 * (1 + max(sums)) / self.temperature
        assert (np.abs(d_logits - expected.logits) <= bound + lost).all()
