"""The laws that every registered Keras 2 quantizer keeps, on every target and grid it answers to."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from mct_quantizers.keras import quantizers as mctq

from tests.strategies import (
    GRIDS,
    Kind,
    assert_same_bits,
    float32s,
    inputs,
    moderate_min_thresholds,
    quantizers,
    shapes,
    upstreams,
)
from tests.tfkeras.strategies import KINDS, end_schedule, every_kind, kinds_of
from tests.tfkeras.tensors import call, gradients, numpy, tensor
from trainable_core.config import TrainableQuantizerActivationConfig, TrainableQuantizerWeightsConfig
from trainable_core.constants import RANGE_MAX, RANGE_MIN, SIGNED, THRESHOLD
from trainable_core.enums import QuantizationMethod, TieRule, TrainingMethod, VariableGroup
from trainable_core.errors import QuantizerStateError
from trainable_core.qparams import QParams, variable_gradients
from trainable_core.reference import affine, dqa, lsq, ste

UNIT = 2.0**-24  # relative error of one float32 operation
REFERENCES = {TrainingMethod.STE: ste.gradients, TrainingMethod.LSQ: lsq.gradients, TrainingMethod.DQA: ste.gradients}
HALF_UP = TieRule.HALF_UP
DTYPES = ("float32", "float16", "float64")


def reference_values(x: np.ndarray, grid: QParams) -> np.ndarray:
    return affine.fake_quantize(x, grid, tie_rule=HALF_UP)


def drawn(data: Any, kind: Kind, *, moved: bool, dtypes: tuple[str, ...] = DTYPES, **limits: Any) -> Any:
    """Draw a quantizer with its schedule at the end, values for it, their dtype, and whether it trains."""
    shape = data.draw(shapes())
    quantizer = data.draw(quantizers(kind, shape, moved=moved, **limits))
    end_schedule(quantizer)
    dtype = data.draw(st.sampled_from(dtypes))
    with np.errstate(over="ignore"):
        x = data.draw(inputs(quantizer.current_qparams(), shape)).astype(dtype)
    return quantizer, x, dtype, data.draw(st.booleans())


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moved", [False, True], ids=["initialized", "moved"])
@every_kind
@given(st.data())
def test_what_is_trained_is_what_is_deployed(kind: Kind, moved: bool, data: Any) -> None:
    quantizer, x, dtype, training = drawn(data, kind, moved=moved)
    assert_same_bits(call(quantizer, x, dtype, training=training), call(quantizer.convert2inferable(), x, dtype))


@every_kind
@given(st.data())
def test_values_are_those_of_the_reference(kind: Kind, data: Any) -> None:
    quantizer, x, dtype, training = drawn(data, kind, moved=data.draw(st.booleans()))
    assert_same_bits(call(quantizer, x, dtype, training=training), reference_values(x, quantizer.current_qparams()))


@every_kind
@given(st.data())
def test_tensor_grid_is_that_of_the_core(kind: Kind, data: Any) -> None:
    shape = data.draw(shapes(least=1, empty=False))
    quantizer = data.draw(quantizers(kind, shape, moved=True))
    for width in quantizer.widths:
        grid, expected = quantizer.grid(len(shape), width), quantizer.current_qparams(width).along(len(shape))
        assert_same_bits(numpy(grid.scale), expected.scale)
        assert np.array_equal(numpy(grid.zero_point), expected.zero_point)
        assert (grid.quant_min, grid.quant_max) == (expected.quant_min, expected.quant_max)


@every_kind
@given(st.data())
def test_zero_stays_a_positive_zero(kind: Kind, data: Any) -> None:
    quantizer = data.draw(quantizers(kind, (), moved=data.draw(st.booleans())))
    end_schedule(quantizer)
    y = call(quantizer, np.array([0.0, -0.0], np.float32), training=data.draw(st.booleans()))
    assert_same_bits(y, np.zeros(2, np.float32))


@every_kind
@given(st.data())
def test_quantizing_again_changes_nothing(kind: Kind, data: Any) -> None:
    quantizer, x, dtype, _ = drawn(data, kind, moved=data.draw(st.booleans()), dtypes=("float32",))
    y = call(quantizer, x, dtype)
    assert_same_bits(call(quantizer, y, dtype), y)


@every_kind
@given(st.data())
def test_everything_beyond_the_grid_saturates_to_its_own_side(kind: Kind, data: Any) -> None:
    quantizer = data.draw(quantizers(kind, (), moved=data.draw(st.booleans())))
    end_schedule(quantizer)
    grid = quantizer.current_qparams()
    low, high = (
        float((end - grid.zero_point).astype(np.float32) * grid.scale) for end in (grid.quant_min, grid.quant_max)
    )
    beyond = np.array([np.inf, 3.4e38, 2 * high + 1.0, -np.inf, -3.4e38, 2 * low - 1.0], np.float32)
    assert call(quantizer, beyond).tolist() == [high] * 3 + [low] * 3


@every_kind
def test_nan_stays_nan_and_moves_nothing(kind: Kind) -> None:
    quantizer = simple(kind)
    x = np.array([np.nan, 0.25], np.float32)
    assert np.isnan(call(quantizer, x)).tolist() == [True, False]
    assert np.isnan(call(quantizer.convert2inferable(), x)).tolist() == [True, False]
    d_x, learned = gradients(quantizer, x, np.array([1.0, 1.0], np.float32))
    assert d_x[0] == 0
    assert all(np.isfinite(each).all() for name, each in learned.items() if name != "logits")


# ---- gradients ------------------------------------------------------------------------------------------------------


@every_kind
@given(st.data())
def test_input_gradient_is_exactly_that_of_the_reference(kind: Kind, data: Any) -> None:
    quantizer, x, dtype, training = drawn(data, kind, moved=data.draw(st.booleans()), dtypes=("float32",))
    if hasattr(quantizer, "logits"):  # a softmax of infinite logits is NaN, by definition
        quantizer.assign(quantizer.logits, data.draw(upstreams(tuple(quantizer.logits.shape))))
    upstream = data.draw(upstreams(x.shape))
    d_x, _ = gradients(quantizer, x, upstream, dtype, training=training)
    expected = REFERENCES[kind.key.quantizer_id](x, upstream, quantizer.current_qparams())
    assert np.array_equal(d_x.astype(np.float64), expected.x)


def sums_of_magnitudes(x: np.ndarray, upstream: np.ndarray, grid: QParams) -> tuple[np.ndarray, np.ndarray]:
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
    terms = lsq.gradients(x.reshape(-1), upstream.reshape(-1), each, tie_rule=HALF_UP)
    factor = lsq.gradient_scale(grid.sharing(x.size), grid.quant_max) / lsq.gradient_scale(1, grid.quant_max)
    scale, zero_point = (grid.reduce(np.abs(each).reshape(x.shape)) for each in (terms.scale, terms.zero_point))
    return scale * factor, zero_point * factor


@kinds_of("LSQ")
@given(st.data())
def test_threshold_and_range_gradients_are_those_of_the_reference(kind: Kind, data: Any) -> None:
    quantizer, x, dtype, training = drawn(
        data, kind, moved=data.draw(st.booleans()), dtypes=("float32",), bounds=moderate_min_thresholds
    )
    config, grid, width = quantizer.quantization_config, quantizer.current_qparams(), quantizer.selected_width
    upstream = data.draw(upstreams(x.shape))
    _, actual = gradients(quantizer, x, upstream, dtype, training=training)
    variables = {name: quantizer.to_numpy(quantizer.get_quantizer_variable(name)) for name in quantizer.variable_names}
    terms = lsq.gradients(x, upstream, grid, tie_rule=HALF_UP)
    expected = variable_gradients(
        variables,
        config.quantization_method,
        width,
        terms.scale,
        terms.zero_point,
        signed=quantizer.signed,
        min_threshold=config.min_threshold,
    )
    # A float32 sum of n terms is off by at most n units of the sum of their magnitudes; 10 more operations follow it.
    units = (x.size + 10) * UNIT
    scale_sum, zero_sum = sums_of_magnitudes(x, upstream, grid)
    if kind.uniform:
        step = grid.scale.astype(np.float64)
        through_width = (scale_sum + zero_sum * grid.zero_point / step) / grid.quant_max
        bounds = {RANGE_MIN: through_width + zero_sum / step, RANGE_MAX: through_width}
    else:
        # p / t is below 2, and it is 1 unless a power of two was rounded up
        rounding = 2.0 if config.quantization_method is QuantizationMethod.POWER_OF_TWO else 1.0
        bounds = {THRESHOLD: scale_sum * rounding / 2.0 ** (width - int(quantizer.signed))}
    assert set(expected) == set(actual)
    # TensorFlow flushes subnormal numbers: each term, at most 16 upstream, may lose 2**-126, and a quotient by the step
    largest = 1 + float(np.max((grid.zero_point + 2) / grid.scale.astype(np.float64), initial=0))
    lost = 2.0**-126 * 16 * (x.size + 10) * largest
    for name, gradient in expected.items():
        assert (np.abs(actual[name] - gradient) <= units * bounds[name] + lost).all(), name


@kinds_of("LSQ")
@given(st.data())
def test_a_gradient_that_is_not_finite_moves_no_threshold(kind: Kind, data: Any) -> None:
    shape = data.draw(shapes(least=1, empty=False))
    quantizer = data.draw(quantizers(kind, shape))
    x = data.draw(inputs(quantizer.current_qparams(), shape))
    upstream = np.full(shape, data.draw(st.sampled_from([np.nan, np.inf, -np.inf])), np.float32)
    _, learned = gradients(quantizer, x, upstream)
    assert all(np.isfinite(each).all() for each in learned.values())


@kinds_of("STE")
@given(st.data())
def test_straight_through_quantizers_learn_nothing(kind: Kind, data: Any) -> None:
    quantizer = data.draw(quantizers(kind, data.draw(shapes())))
    assert quantizer.trainable_variables == []
    assert all(quantizer.get_trainable_variables(group) == [] for group in VariableGroup)


@kinds_of("STE", "LSQ")
@given(st.data())
def test_a_graph_gives_the_same_bits(kind: Kind, data: Any) -> None:
    shape = data.draw(shapes(least=1, empty=False))
    quantizer = data.draw(quantizers(kind, shape, moved=data.draw(st.booleans())))
    x = data.draw(inputs(quantizer.current_qparams(), shape))
    deployed = quantizer.convert2inferable()
    trained, served = tf.function(lambda x: (quantizer(x, training=True), deployed(x)))(tensor(x))
    assert_same_bits(numpy(trained), call(quantizer, x))
    assert_same_bits(numpy(served), call(quantizer, x))


# ---- TensorFlow's own kernel ----------------------------------------------------------------------------------------


@kinds_of("LSQ")
@given(st.data())
def test_stock_kernel_gives_the_same_codes_but_next_to_ties(kind: Kind, data: Any) -> None:
    shape = data.draw(shapes(least=1, empty=False))
    # from 2 bits on, and thresholds for which TensorFlow's own arithmetic stays normal
    quantizer = data.draw(quantizers(kind, shape, bits=st.integers(2, 16), bounds=st.just(2.0**-10)))
    for name in quantizer.variable_names:
        variable = quantizer.get_quantizer_variable(name)
        quantizer.assign(variable, np.clip(quantizer.to_numpy(variable), -(2.0**20), 2.0**20))
    deployed = quantizer.convert2inferable()
    grid = quantizer.current_qparams()
    x = data.draw(inputs(grid, shape, finite=True))
    ours, stock = call(deployed, x), numpy(deployed.to_mctq()(tensor(x)))
    along = grid.along(x.ndim)
    steps = x.astype(np.float64) / along.scale
    codes, others = (np.rint(values.astype(np.float64) / along.scale) for values in (ours, stock))
    assert (np.abs(codes - others) <= 1).all()
    distance = np.abs(steps - np.floor(steps) - 0.5)
    assert (distance[codes != others] <= 2.0**quantizer.selected_width * UNIT).all()
    if kind.uniform:
        # every code times the snapped scale is exact, so the kernel finds the same scale and the same values
        assert np.array_equal(ours[codes == others], stock[codes == others])


# ---- attention over widths ------------------------------------------------------------------------------------------


class Mixture:
    """A DQA quantizer somewhere on its schedule, and the reference's view of it."""

    def __init__(self, data: Any, kind: Kind) -> None:
        shape = data.draw(shapes())
        self.quantizer = data.draw(quantizers(kind, shape, bounds=moderate_min_thresholds))
        # wrapper and holder count a step before they call the quantizer
        step = data.draw(st.integers(0, 1000))
        self.quantizer.step.assign(step + 1)
        self.logits = data.draw(upstreams((len(self.quantizer.widths),)))
        self.quantizer.assign(self.quantizer.logits, self.logits)
        self.grids = [self.quantizer.current_qparams(width) for width in self.quantizer.widths]
        self.x = data.draw(inputs(self.grids[data.draw(st.integers(0, len(self.grids) - 1))], shape, nan=False))
        self.temperature = float(numpy(self.quantizer.temperature(tensor(step))))
        self.weights = dqa.attention(self.logits, self.temperature)
        self.values = [affine.fake_quantize(self.x, grid, tie_rule=HALF_UP).astype(np.float64) for grid in self.grids]

    @property
    def units(self) -> float:
        """Bound of an attention weight's relative error in float32, in float64 terms.

        The exponents, up to M = max|logit| / T, carry six roundings (temperature, quotient and difference, each in
        numerator and denominator), so a weight is off by 6 M units; exp, the sum of K and the quotient add K + 6.
        """
        largest = float(np.abs(self.logits).max()) / self.temperature
        return (6 * largest + len(self.logits) + 6) * UNIT

    def weighted(self, magnitudes: Any) -> Any:
        return sum(weight * each for weight, each in zip(self.weights, magnitudes, strict=True))


@kinds_of("DQA")
@given(st.data())
def test_mixture_is_that_of_the_reference(kind: Kind, data: Any) -> None:
    mixture = Mixture(data, kind)
    expected = dqa.fake_quantize(
        mixture.x.astype(np.float64), mixture.grids, mixture.logits, mixture.temperature, tie_rule=HALF_UP
    )
    # each product and the sum of K: K + 1 units; weights below 2**-126 may be lost
    units = mixture.units + (len(mixture.grids) + 1) * UNIT
    magnitudes = [np.abs(value) for value in mixture.values]
    error = np.abs(call(mixture.quantizer, mixture.x, training=True) - expected)
    assert (error <= units * mixture.weighted(magnitudes) + 2.0**-126 * sum(magnitudes)).all()


@kinds_of("DQA")
@given(st.data())
def test_mixture_gradients_are_those_of_the_reference(kind: Kind, data: Any) -> None:
    mixture = Mixture(data, kind)
    upstream = data.draw(upstreams(mixture.x.shape))
    d_x, learned = gradients(mixture.quantizer, mixture.x, upstream, training=True)
    expected = dqa.gradients(mixture.x, upstream, mixture.grids, mixture.logits, mixture.temperature, tie_rule=HALF_UP)
    count = len(mixture.grids)
    # dL/dx: a sum of K weights times the upstream gradient
    error = np.abs(d_x - expected.x)
    assert (error <= (mixture.units + (count + 1) * UNIT) * np.abs(upstream) + 2.0**-126 * 16 * count).all()
    # dL/dlogit_k = a_k / T * (g_k - sum_j a_j g_j): g is a sum of n products, then the weights' errors (thrice: the
    # factor a_k, and a_j in the sum, which cancels by up to twice) and K + 6 operations
    sums = [np.abs(upstream * value).sum() for value in mixture.values]
    units = (upstream.size + count + 6) * UNIT + 3 * mixture.units
    bound = (mixture.weights / mixture.temperature) * (np.array(sums) + mixture.weighted(sums)) * units
    lost = 2.0**-126 * (1 + max(sums)) / mixture.temperature
    assert (np.abs(learned["logits"] - expected.logits) <= bound + lost).all()


@kinds_of("DQA")
def test_schedule_ends_in_the_winner(kind: Kind) -> None:
    quantizer = simple(kind, temperature={"t_start": 0, "t_end": 2, "initial_val": 4.0, "target_val": 0.5})
    x = np.linspace(-1.5, 1.5, 61, dtype=np.float32)
    quantizer.assign(quantizer.logits, np.array([0.0, 0.25, 0.125], np.float32))
    deployed = call(quantizer.convert2inferable(), x)
    # steps 0, 1, 2 of the schedule, and one after it
    reached = []
    for _ in range(4):
        quantizer.advance()
        reached.append(np.array_equal(call(quantizer, x, training=True), deployed))
    assert int(numpy(quantizer.step)) == 4
    assert reached == [False, False, True, True]


@kinds_of("DQA")
def test_bit_cost_is_a_loss_of_the_layer_while_it_trains(kind: Kind) -> None:
    quantizer = simple(kind, bit_cost_weight=0.5)
    call(quantizer, np.ones(3, np.float32))
    assert quantizer.losses == []
    call(quantizer, np.ones(3, np.float32), training=True)
    (loss,) = quantizer.losses
    assert float(numpy(loss)) == pytest.approx(0.5 * np.mean(quantizer.widths), rel=8 * UNIT)  # exp, sums, products


# ---- life -----------------------------------------------------------------------------------------------------------


def simple(kind: Kind, **arguments: Any) -> Any:
    """Return a 4-bit quantizer of [-1, 1] per tensor."""
    prefix = "weights" if kind.weights else "activation"
    config = {
        f"{prefix}_quantization_method": kind.key.method,
        f"{prefix}_n_bits": 4,
        f"{prefix}_quantization_params": {THRESHOLD: 1.0},
    }
    cls = TrainableQuantizerWeightsConfig if kind.weights else TrainableQuantizerActivationConfig
    quantizer = kind.cls(cls(**config), **arguments)
    quantizer.initialize_quantization((61,), "x", None)
    return quantizer


@every_kind
@given(st.data())
def test_config_round_trip_is_json_and_keeps_everything(kind: Kind, data: Any) -> None:
    quantizer = data.draw(quantizers(kind, data.draw(shapes()), moved=False))
    for name in quantizer.variable_names:
        variable = quantizer.get_quantizer_variable(name)
        moved = data.draw(float32s(int(np.prod(variable.shape)), finite=True)).reshape(tuple(variable.shape))
        quantizer.assign(variable, moved)
    quantizer.freeze(data.draw(st.booleans()))
    document = json.loads(json.dumps(quantizer.get_config()))
    again = kind.cls.from_config(document)
    assert again.get_config() == quantizer.get_config()
    assert again.quantization_config == quantizer.quantization_config
    assert again.freeze_quant_params == quantizer.freeze_quant_params
    assert len(again.trainable_variables) == len(quantizer.trainable_variables)


@every_kind
@given(st.data())
def test_deployed_config_round_trip_is_json_and_keeps_every_bit(kind: Kind, data: Any) -> None:
    shape = data.draw(shapes(least=1, empty=False))
    deployed = data.draw(quantizers(kind, shape, moved=True)).convert2inferable()
    again = type(deployed).from_config(json.loads(json.dumps(deployed.get_config())))
    assert again.get_config() == deployed.get_config()
    x = data.draw(inputs(deployed.qparams, shape))
    assert_same_bits(call(again, x), call(deployed, x))


@every_kind
def test_freezing_survives_a_trainable_switch(kind: Kind) -> None:
    quantizer = simple(kind)
    learned = len(quantizer.trainable_variables)
    quantizer.freeze()
    quantizer.trainable = False
    quantizer.trainable = True
    assert quantizer.trainable_variables == []
    quantizer.freeze(frozen=False)
    assert len(quantizer.trainable_variables) == learned


@every_kind
def test_a_call_before_calibration_says_so(kind: Kind) -> None:
    prefix = "weights" if kind.weights else "activation"
    cls = TrainableQuantizerWeightsConfig if kind.weights else TrainableQuantizerActivationConfig
    config = {
        f"{prefix}_quantization_method": kind.key.method,
        f"{prefix}_n_bits": 4,
        f"{prefix}_quantization_params": {},
    }
    quantizer = kind.cls(cls(**config))
    with pytest.raises(QuantizerStateError, match="not initialized"):
        quantizer(tensor([1.0]))
    quantizer.initialize_quantization((1,), "x", None)
    with pytest.raises(QuantizerStateError, match="no quantization params"):
        quantizer(tensor([1.0]))
    with pytest.raises(QuantizerStateError, match="no quantization params"):
        quantizer.convert2inferable()


def test_every_built_in_method_answers_on_every_grid() -> None:
    keys = {(kind.key.quantizer_id, kind.weights, kind.key.method) for kind in KINDS}
    assert keys == {
        (method.value, weights, grid) for method in TrainingMethod for weights in (True, False) for grid in GRIDS
    }


@every_kind
def test_deployed_is_an_instance_of_mctqs_class(kind: Kind) -> None:
    deployed = simple(kind).convert2inferable()
    assert isinstance(deployed, getattr(mctq, type(deployed).__name__))
    if kind.weights:
        assert SIGNED not in deployed.get_config()
