"""The deployed quantizers: mctq's classes where they run, and each of their faults mended."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.keras.framework import (
    ENGINE,
    call,
    dtype_name,
    functions,
    internal,
    needs_mctq,
    numpy,
    only_tensorflow,
    pull_back,
    symbolic,
    tensor,
    tf,
)
from tests.strategies import GRIDS, assert_same_bits, float32s, inputs, min_thresholds, n_bits, shapes
from trainable_core import qparams
from trainable_core.config import TrainableQuantizerActivationConfig, TrainableQuantizerWeightsConfig
from trainable_core.constants import RANGE_MAX, RANGE_MIN, THRESHOLD
from trainable_core.enums import QuantizationMethod, QuantizationTarget, TieRule
from trainable_core.errors import ModelError
from trainable_core.reference import affine, ste
from trainable_keras.inferable import grid_of_arguments, mctq_arguments

class_of = internal("inferable").class_of

SYMMETRIC, POWER_OF_TWO, UNIFORM = GRIDS
SHORT = {SYMMETRIC: "Symmetric", POWER_OF_TWO: "POT", UNIFORM: "Uniform"}

every_class = pytest.mark.parametrize(
    ("target", "method"),
    [(target, method) for target in QuantizationTarget for method in GRIDS],
    ids=[f"{target}-{method}" for target in QuantizationTarget for method in GRIDS],
)


@st.composite
def deployed(draw: Any, target: QuantizationTarget, method: QuantizationMethod, shape: tuple[int, ...]) -> Any:
    """Return a deployed quantizer for a tensor of this shape, made from any variables, and its grid."""
    weights = target is QuantizationTarget.Weights
    axes = [axis for axis in range(-len(shape), len(shape)) if shape[axis] > 0] if weights else []
    axis = draw(st.sampled_from([None, *axes]))
    size = 1 if axis is None else shape[axis]
    bits = draw(n_bits)
    grid = qparams.from_variables(
        {
            name: draw(float32s(size)).reshape(() if axis is None else (size,))
            for name in qparams.variable_names(method)
        },
        method,
        bits,
        signed=weights or draw(st.booleans()),
        min_threshold=draw(min_thresholds),
        channels_axis=axis,
    )
    return class_of(target, method)(grid, bits, len(shape) if weights else 0), grid


def simple(target: QuantizationTarget, method: QuantizationMethod, *, bits: int = 4, threshold: float = 1.0) -> Any:
    variables = {RANGE_MIN: -threshold, RANGE_MAX: threshold} if method is UNIFORM else {THRESHOLD: threshold}
    return class_of(target, method)(qparams.from_variables(variables, method, bits), bits, 1)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@every_class
def test_gradients_of_activations_pass_inside_the_range(
    target: QuantizationTarget, method: QuantizationMethod, dtype: str
) -> None:
    """As STE's: powers of two, so that quotients are exact and the ends themselves are among the inputs."""
    variables = {RANGE_MIN: -1.0, RANGE_MAX: 2.75} if method is UNIFORM else {THRESHOLD: 1.0}
    grid = qparams.from_variables(variables, method, 4, signed=True)
    quantizer = class_of(target, method)(grid, 4, 1)
    x, upstream = np.linspace(-4, 4, 65, dtype=np.float32), np.arange(65, dtype=np.float32) - 30
    # of a sum, because an engine may refuse to differentiate what no gradient reaches, as deployed weights
    (found,) = pull_back(lambda each: each + quantizer(each), [tensor(x, dtype)], tensor(upstream, dtype))
    passed = ste.gradients(x, upstream, grid).x if target is QuantizationTarget.Activation else 0
    np.testing.assert_array_equal(found, upstream + passed)


@every_class
@given(st.data())
def test_values_are_those_of_the_reference(target: QuantizationTarget, method: QuantizationMethod, data: Any) -> None:
    shape = data.draw(shapes())
    quantizer, grid = data.draw(deployed(target, method, shape))
    x = data.draw(inputs(grid, shape))
    assert_same_bits(call(quantizer, x), affine.fake_quantize(x, grid, tie_rule=TieRule.HALF_UP))


@every_class
@given(st.data())
def test_numbers_come_back_from_the_variables_and_from_json(
    target: QuantizationTarget, method: QuantizationMethod, data: Any
) -> None:
    quantizer, grid = data.draw(deployed(target, method, data.draw(shapes(least=1, empty=False))))
    again = type(quantizer).from_config(json.loads(json.dumps(quantizer.get_config())))
    for back in (quantizer.qparams, again.qparams):
        assert back.scale.tolist() == grid.scale.tolist()
        assert back.zero_point.tolist() == grid.zero_point.tolist()
        assert (back.quant_min, back.quant_max) == (grid.quant_min, grid.quant_max)


@needs_mctq
@every_class
def test_it_is_an_instance_of_mctqs_class_and_makes_the_stock_one(
    target: QuantizationTarget, method: QuantizationMethod
) -> None:
    from mct_quantizers.keras import quantizers as mctq

    quantizer = simple(target, method)
    stock = getattr(mctq, f"{target}{SHORT[method]}InferableQuantizer")
    assert isinstance(quantizer, stock)
    assert type(quantizer).__name__ == stock.__name__
    assert type(quantizer.to_mctq()) is stock
    assert quantizer.identifier is stock.identifier
    # away from ties the two agree
    x = np.float32([-2.0, -0.7, -0.3, 0.1, 0.3, 0.7, 2.0])
    assert np.array_equal(numpy(quantizer.to_mctq()(tensor(x))), call(quantizer, x))


@needs_mctq
@every_class
def test_one_bit_works_where_mctqs_own_class_fails(target: QuantizationTarget, method: QuantizationMethod) -> None:
    quantizer = simple(target, method, bits=1)
    x = np.float32([-9.0, -0.1, 0.1, 9.0])
    assert_same_bits(call(quantizer, x), affine.fake_quantize(x, quantizer.qparams, tie_rule=TieRule.HALF_UP))
    with pytest.raises(ModelError, match="2 to 16 bits"):
        quantizer.to_mctq()
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError)):
        type(quantizer).mctq_class(**quantizer.mctq_arguments())(tensor(x))


@needs_mctq
@every_class
def test_mctqs_own_class_takes_the_config_and_gives_the_same_codes_except_next_to_ties(
    target: QuantizationTarget, method: QuantizationMethod
) -> None:
    quantizer = simple(target, method, bits=8, threshold=0.7)
    steps = np.linspace(-140, 280, 4201) + 0.03  # at least 0.02 steps from every tie
    x = (steps * quantizer.qparams.scale).astype(np.float32)
    # the same codes; the values of mctq carry a few roundings of its own
    difference = np.abs(call(quantizer, x) - numpy(quantizer.to_mctq()(tensor(x))))
    assert difference.max() < 1e-3 * quantizer.qparams.scale


@needs_mctq
def test_next_to_ties_values_are_those_of_the_reference_and_mctqs_own_are_a_step_off() -> None:
    quantizer = simple(QuantizationTarget.Activation, SYMMETRIC, threshold=0.7)
    ties = ((np.arange(-8, 7) + 0.5) * np.float64(quantizer.qparams.scale)).astype(np.float32)
    x = np.concatenate([ties, np.nextafter(ties, np.float32(9)), np.nextafter(ties, np.float32(-9))])
    reference = affine.fake_quantize(x, quantizer.qparams, tie_rule=TieRule.HALF_UP)
    assert_same_bits(call(quantizer, x), reference)
    off = np.abs(numpy(quantizer.to_mctq()(tensor(x))) - reference) > quantizer.qparams.scale / 2
    assert off.any()


@needs_mctq
@pytest.mark.filterwarnings("ignore:.*casting to float:UserWarning")
@every_class
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_every_floating_dtype_is_taken_and_given_back_where_mctqs_own_class_refuses(
    target: QuantizationTarget, method: QuantizationMethod, dtype: str
) -> None:
    quantizer, x = simple(target, method), tensor([0.3, -0.2], dtype)
    assert dtype_name(quantizer(x)) == dtype
    with pytest.raises(AssertionError, match="float"):
        quantizer.to_mctq()(x)


@needs_mctq
def test_mctqs_own_config_is_not_json() -> None:
    from mct_quantizers.keras import quantizers as mctq

    stock = mctq.WeightsSymmetricInferableQuantizer(num_bits=4, threshold=[np.float32(0.7)], per_channel=False)
    with pytest.raises(TypeError, match="float32"):
        json.dumps(stock.get_config())


@only_tensorflow("the graph is one of tf.function")
@every_class
def test_a_graph_that_multiplies_around_it_treats_trained_and_deployed_quantizers_alike(
    target: QuantizationTarget, method: QuantizationMethod
) -> None:
    """How a graph compiler orders the multiplications around a quantizer is its own business."""
    prefix = "weights" if target is QuantizationTarget.Weights else "activation"
    variables = {RANGE_MIN: -0.3, RANGE_MAX: 1.1} if method is UNIFORM else {THRESHOLD: 1.0}
    fields = {f"{prefix}_quantization_method": method, f"{prefix}_n_bits": 4}
    fields[f"{prefix}_quantization_params"] = variables
    config = TrainableQuantizerWeightsConfig if prefix == "weights" else TrainableQuantizerActivationConfig
    trained = getattr(internal("quantizers"), f"Lsq{target}Quantizer")(config(**fields))
    trained.initialize_quantization((64, 64), "x", None)
    x = tensor(np.random.default_rng(1).normal(size=(64, 64)))
    runs = [tf.function(lambda x, q=each: q(x * 3.0) * 0.1) for each in (trained, trained.convert2inferable())]
    assert np.array_equal(*(numpy(run(x)) for run in runs))


@every_class
def test_infinities_saturate_to_their_own_side_and_nan_stays(
    target: QuantizationTarget, method: QuantizationMethod
) -> None:
    y = call(simple(target, method), np.float32([np.inf, -np.inf, 3e38, -3e38, np.nan]))
    top, bottom = call(simple(target, method), np.float32([100.0, -100.0]))
    assert y[:4].tolist() == [top, bottom, top, bottom]
    assert np.isnan(y[4])
    assert bottom < 0 < top


@every_class
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_computed_in_float32_and_comes_back(
    target: QuantizationTarget, method: QuantizationMethod, dtype: str
) -> None:
    quantizer, x = simple(target, method), np.linspace(-1.5, 1.5, 41).astype(np.float32)
    given_to = functions.cast(tensor(x), dtype)
    y = quantizer(given_to)
    assert dtype_name(y) == dtype
    expected = functions.cast(quantizer(functions.cast(given_to, "float32")), dtype)
    assert np.array_equal(numpy(y), numpy(expected))


@every_class
def test_there_is_nothing_to_train(target: QuantizationTarget, method: QuantizationMethod) -> None:
    quantizer = simple(target, method)
    assert quantizer.trainable_variables == []
    assert len(quantizer.non_trainable_variables) == 2


@every_class
def test_a_symbolic_call_keeps_shape_and_dtype(target: QuantizationTarget, method: QuantizationMethod) -> None:
    passed = simple(target, method)(symbolic((None, 4), "float16"))
    assert (tuple(passed.shape), dtype_name(passed)) == ((None, 4), "float16")


@pytest.mark.parametrize("method", GRIDS, ids=str)
@pytest.mark.parametrize("axis", [-3, -2, -1, 0, 1, 2])
def test_any_channel_axis(method: QuantizationMethod, axis: int) -> None:
    shape = (2, 3, 4)
    ends = np.linspace(0.5, 2.0, shape[axis]).astype(np.float32)
    variables = {RANGE_MIN: -ends, RANGE_MAX: ends} if method is UNIFORM else {THRESHOLD: ends}
    grid = qparams.from_variables(variables, method, 4, channels_axis=axis)
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    quantizer = class_of(QuantizationTarget.Weights, method)(grid, 4, 3)
    assert_same_bits(call(quantizer, x), affine.fake_quantize(x, grid, tie_rule=TieRule.HALF_UP))
    assert quantizer.get_config()["channel_axis"] == axis % 3


def test_a_range_that_mctq_would_nudge_another_way_is_deployed_as_trained() -> None:
    """[-1, 1] at 4 bits: the framework's own nudging lands a whole step apart; core nudges first."""
    grid = qparams.from_variables({RANGE_MIN: -1.0, RANGE_MAX: 1.0}, UNIFORM, 4)
    quantizer = class_of(QuantizationTarget.Activation, UNIFORM)(grid, 4, 0)
    x = np.linspace(-1.2, 1.2, 101).astype(np.float32)
    expected = affine.fake_quantize(x, grid, tie_rule=TieRule.HALF_UP)
    assert_same_bits(call(quantizer, x), expected)
    if ENGINE == "tensorflow":
        assert np.abs(numpy(quantizer.to_mctq()(tensor(x))) - expected).max() <= float(grid.scale)


# ---- mctq's arguments -----------------------------------------------------------------------------------------------

WEIGHTS, ACTIVATION = QuantizationTarget.Weights, QuantizationTarget.Activation


def test_weights_per_channel_have_an_axis_that_is_counted_from_the_front() -> None:
    grid = qparams.from_params(SYMMETRIC, 4, signed=True, params={"threshold": [1.0, 2.0]}, channels_axis=-1)
    assert mctq_arguments(grid, 4, 3, WEIGHTS, SYMMETRIC) == {
        "num_bits": 4,
        "threshold": [1.0, 2.0],
        "per_channel": True,
        "channel_axis": 2,
        "input_rank": 3,
    }


def test_activations_tell_their_sign_and_ranges_do_not() -> None:
    grid = qparams.from_params(SYMMETRIC, 4, signed=False, params={"threshold": 3.0})
    assert mctq_arguments(grid, 4, 0, ACTIVATION, SYMMETRIC) == {"num_bits": 4, "threshold": [3.0], "signed": False}
    grid = qparams.from_params(UNIFORM, 2, signed=True, params={"range_min": -1.0, "range_max": 2.0})
    assert mctq_arguments(grid, 2, 0, ACTIVATION, UNIFORM) == {"num_bits": 2, "min_range": [-1.0], "max_range": [2.0]}


magnitudes = st.floats(2.0**-40, 2.0**60, width=32)


@pytest.mark.parametrize("method", GRIDS, ids=str)
@given(st.lists(st.tuples(magnitudes, magnitudes), min_size=1, max_size=3), st.integers(1, 16))
def test_the_round_trip_of_arguments_through_json_keeps_every_bit(method: Any, pairs: Any, bits: int) -> None:
    lows, highs = zip(*pairs, strict=True)
    ranges = {"range_min": [-low for low in lows], "range_max": list(highs)}
    params = ranges if method is UNIFORM else {"threshold": list(highs)}
    grid = qparams.from_params(method, bits, signed=True, params=params, channels_axis=1)
    document = json.loads(json.dumps(mctq_arguments(grid, bits, 2, WEIGHTS, method)))
    again, width, ndim = grid_of_arguments(document, method)
    assert (width, ndim, again.channels_axis) == (bits, 2, 1)
    assert (again.quant_min, again.quant_max) == (grid.quant_min, grid.quant_max)
    assert np.array_equal(again.scale, grid.scale)
    assert np.array_equal(again.zero_point, grid.zero_point)


def test_the_grid_is_read_from_the_variables() -> None:
    grid = qparams.from_params(SYMMETRIC, 4, signed=True, params={"threshold": [1.0, 2.0]}, channels_axis=-1)
    quantizer = class_of(WEIGHTS, SYMMETRIC)(grid, 4, 2)
    assert tuple(quantizer.grid_scale.shape) == (1, 2)
    assert (quantizer.params, quantizer.per_channel) == ({"threshold": [1.0, 2.0], "is_signed": True}, True)
    assert quantizer.initialize_quantization((2, 2), "x", None) == {}
    quantizer.grid_scale.assign(numpy(quantizer.grid_scale) * 2)  # as loading a file does
    assert quantizer.mctq_arguments()["threshold"] == [2.0, 4.0]
