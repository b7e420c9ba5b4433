"""The laws that every registered Keras quantizer keeps, on every target and grid it answers to."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mct_quantizers.common.base_inferable_quantizer import BaseInferableQuantizer

from tests.keras.framework import ENGINE, KERAS_VERSION, call, gradients, needs_mctq, numpy, only_tensorflow, tensor, tf
from tests.keras.strategies import KINDS, end_schedule, every_kind, kinds_of
from tests.kit import WHOLE
from tests.quantizer_laws import LAWS, UNIT, Backend, Drawn, Mixture, learned_gradients
from tests.strategies import (
    GRIDS,
    Kind,
    assert_same_bits,
    inputs,
    moderate_min_thresholds,
    quantizers,
    shapes,
    upstreams,
    without_subnormals,
)
from trainable_core.config import TrainableQuantizerActivationConfig, TrainableQuantizerWeightsConfig
from trainable_core.constants import SIGNED, THRESHOLD
from trainable_core.enums import TieRule, VariableGroup
from trainable_core.errors import QuantizerStateError
from trainable_core.qparams import QParams
from trainable_core.reference import affine

DTYPES = ("float32", "float16", "float64") if ENGINE != "jax" else ("float32", "float16")


def without_subnormal_steps(x: np.ndarray, grid: QParams) -> np.ndarray:
    """Return `x` with zeros where it or ``x / scale`` is subnormal: TensorFlow takes those for zeros."""
    tiny = np.finfo(np.float32).tiny
    return np.where((np.abs(x) < tiny) | (np.abs(affine.steps(x, grid)) < tiny), np.float32(0), x)


SUBJECT = Backend(call, gradients, numpy, end_schedule, DTYPES, TieRule.HALF_UP, without_subnormal_steps)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@every_kind
@given(st.data())
def test_law(kind: Kind, law: Any, data: Any) -> None:
    law(SUBJECT, kind, data)


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


@kinds_of("LSQ")
@given(st.data())
def test_threshold_and_range_gradients_are_those_of_the_reference(kind: Kind, data: Any) -> None:
    d = Drawn.of(SUBJECT, kind, data, dtypes=("float32",), bounds=moderate_min_thresholds)
    quantizer = d.quantizer
    for name in quantizer.variable_names:  # a range end just above zero is out of bounds, unless taken for zero
        variable = quantizer.get_quantizer_variable(name)
        quantizer.assign(variable, without_subnormals(quantizer.to_numpy(variable)))
    grid = quantizer.current_qparams()
    x = without_subnormal_steps(d.x, grid)
    upstream = data.draw(upstreams(x.shape))
    _, actual = gradients(quantizer, x, upstream, d.dtype, training=d.training)
    expected, bounds = learned_gradients(quantizer, x, upstream, TieRule.HALF_UP)
    units = (x.size + 10) * UNIT  # 10 more operations follow the sum
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


@only_tensorflow("the graph is one of tf.function")
@kinds_of("STE", "LSQ")
@given(st.data())
@settings(max_examples=5)  # each traces a graph: half a second
def test_a_graph_gives_the_same_bits(kind: Kind, data: Any) -> None:
    shape = data.draw(shapes(least=1, empty=False))
    quantizer = data.draw(quantizers(kind, shape, moved=data.draw(st.booleans())))
    deployed = quantizer.convert2inferable()
    # one graph for many values: each of them is a tie, an end, or something special
    batches = [data.draw(inputs(quantizer.current_qparams(), shape)) for _ in range(20)]
    graph = tf.function(lambda x: (quantizer(x, training=True), deployed(x)), reduce_retracing=True)
    for x in batches:
        trained, served = graph(tensor(x))
        assert_same_bits(numpy(trained), call(quantizer, x))
        assert_same_bits(numpy(served), call(quantizer, x))


# ---- TensorFlow's own kernel ----------------------------------------------------------------------------------------


@needs_mctq
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
    # The kernel rounds five times in float32: the distance from the lowest value, the inverse of the scale, their
    # product, that minus the zero point, and that plus one half; none of them exceeds 2**bits steps.
    assert (distance[codes != others] <= 5 * 2.0**quantizer.selected_width * UNIT).all()
    if kind.uniform:
        # every code times the snapped scale is exact, so the kernel finds the same scale and the same values
        assert np.array_equal(ours[codes == others], stock[codes == others])


# ---- attention over widths ------------------------------------------------------------------------------------------


def start(data: Any, quantizer: Any) -> float:
    # In a call with training=True a quantizer of Keras 3 counts one step and uses the number before it. On Keras 2
    # wrapper and holder count that step before they call the quantizer.
    step = data.draw(st.integers(0, 999))  # from 1000 on it is the winner
    quantizer.step.assign(step if KERAS_VERSION == 3 else step + 1)
    return float(numpy(quantizer.temperature(tensor(step))))


def mixture_of(data: Any, kind: Kind) -> Mixture:
    return Mixture(data, kind, TieRule.HALF_UP, start, without_subnormal_steps)


@kinds_of("DQA")
@given(st.data())
def test_mixture_is_that_of_the_reference(kind: Kind, data: Any) -> None:
    mixture = mixture_of(data, kind)
    mixture.check_values(call(mixture.quantizer, mixture.x, training=True))


@kinds_of("DQA")
@given(st.data())
def test_mixture_gradients_are_those_of_the_reference(kind: Kind, data: Any) -> None:
    mixture = mixture_of(data, kind)
    upstream = data.draw(upstreams(mixture.x.shape))
    d_x, learned = gradients(mixture.quantizer, mixture.x, upstream, training=True)
    mixture.check_gradients(upstream, d_x, learned["logits"])


@kinds_of("DQA")
def test_a_schedule_ends_in_the_winner(kind: Kind) -> None:
    quantizer = simple(kind, temperature={"t_start": 0, "t_end": 2, "initial_val": 4.0, "target_val": 0.5})
    x = np.linspace(-1.5, 1.5, 61, dtype=np.float32)
    quantizer.assign(quantizer.logits, np.array([0.0, 0.25, 0.125], np.float32))
    deployed = call(quantizer.convert2inferable(), x)
    # steps 0, 1, 2 of the schedule, and one after it
    reached = []
    for _ in range(4):
        if KERAS_VERSION == 2:  # where wrapper and holder count the step, before they call the quantizer
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
    assert keys == {(method, weights, grid) for method in WHOLE for weights in (True, False) for grid in GRIDS}


@every_kind
def test_deployed_is_an_instance_of_mctqs_class_where_that_runs(kind: Kind) -> None:
    deployed = simple(kind).convert2inferable()
    assert isinstance(deployed, BaseInferableQuantizer)
    if ENGINE == "tensorflow":
        from mct_quantizers.keras import quantizers as mctq

        assert isinstance(deployed, getattr(mctq, type(deployed).__name__))
    if kind.weights:
        assert SIGNED not in deployed.get_config()
