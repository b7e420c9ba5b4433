"""Observed values to params: golden vectors, laws for every method and grid, and refused input."""

import itertools
from enum import Enum
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainable_core.calibration import Observer, calibrate_activation, calibrate_weights
from trainable_core.config import TrainableQuantizerActivationConfig, TrainableQuantizerWeightsConfig
from trainable_core.constants import MIN_THRESHOLD, RANGE_MAX, RANGE_MIN, SIGNED, THRESHOLD
from trainable_core.enums import CalibrationMethod, QuantizationMethod
from trainable_core.errors import CalibrationError, InvalidArgumentError, TrainableError, UnsupportedConfigError
from trainable_core.qparams import SMALLEST_THRESHOLD, from_params, inferable_params
from trainable_core.reference import affine

METHODS = [method for method in CalibrationMethod if method is not CalibrationMethod.SAWB]  # it has few widths
GRIDS = [QuantizationMethod.SYMMETRIC, QuantizationMethod.POWER_OF_TWO, QuantizationMethod.UNIFORM]
PAIRS = list(itertools.product(METHODS, GRIDS))
SEARCHED = {CalibrationMethod.MSE: 2.0, CalibrationMethod.MAE: 1.0, CalibrationMethod.LP: 3.0}
ARGUMENTS = {"calibration_method": "mse", "quantization_method": "SYMMETRIC", "n_bits": 4}

EVERY = st.floats(width=32, allow_nan=False, allow_infinity=False)
USUAL = st.floats(-8, 8, width=32)
SAMPLES = st.one_of(
    st.lists(USUAL, min_size=1, max_size=30),
    st.lists(st.floats(0, 8, width=32), min_size=1, max_size=30),
    st.lists(EVERY, min_size=1, max_size=10),
    st.tuples(st.lists(USUAL, min_size=1, max_size=10), st.integers(2, 40)).map(lambda pair: pair[0] * pair[1]),
)
CASES = {
    "samples": SAMPLES,
    "method": st.sampled_from(METHODS),
    "grid": st.sampled_from(GRIDS),
    "n_bits": st.sampled_from([1, 2, 3, 4, 8, 10, 11, 13, 16]),
}


def observed(*batches):
    observer = Observer()
    for batch in batches:
        observer.update(batch)
    return observer


def activation(values, method="minmax", grid="SYMMETRIC", n_bits=8, **arguments):
    observer = values if isinstance(values, Observer) else observed(values)
    return calibrate_activation(
        observer, calibration_method=method, quantization_method=grid, n_bits=n_bits, **arguments
    )


def weights(values, method="minmax", grid="SYMMETRIC", n_bits=8, **arguments):
    return calibrate_weights(values, calibration_method=method, quantization_method=grid, n_bits=n_bits, **arguments)


def error(values, params, grid, n_bits, signed, p):
    """Mean error of the real fake quantization, to the power 1/p, in the units of the values over their largest."""
    values = np.asarray(values, np.float32)
    quantized = affine.fake_quantize(values, from_params(grid, n_bits, signed, params))
    unit = max(float(np.abs(values).max()), 2.0**-149)
    distance = np.abs(values.astype(np.float64) - quantized) / unit
    return float(np.mean(distance**p) ** (1 / p))


class TestMinmax:
    @pytest.mark.parametrize(
        ("values", "grid", "params"),
        [
            ([0.5, -2.0, 1.0], "SYMMETRIC", {THRESHOLD: 2.0, SIGNED: True}),
            ([0.5, 3.0, 0.0], "SYMMETRIC", {THRESHOLD: 3.0, SIGNED: False}),
            ([0.5, 3.0, -0.0], "SYMMETRIC", {THRESHOLD: 3.0, SIGNED: False}),
            ([0.5, 3.0], "POWER_OF_TWO", {THRESHOLD: 4.0, SIGNED: False}),
            ([-4.0, 3.0], "POWER_OF_TWO", {THRESHOLD: 4.0, SIGNED: True}),
            ([-4.0, 3.0], "UNIFORM", {RANGE_MIN: -4.0, RANGE_MAX: 3.0}),
            ([2.0, 3.0], "UNIFORM", {RANGE_MIN: 0.0, RANGE_MAX: 3.0}),
            ([-2.0, -3.0], "UNIFORM", {RANGE_MIN: -3.0, RANGE_MAX: 0.0}),
            ([-2.0, -3.0], "SYMMETRIC", {THRESHOLD: 3.0, SIGNED: True}),
            ([0.0, 0.0], "SYMMETRIC", {THRESHOLD: MIN_THRESHOLD, SIGNED: False}),
            ([0.0, 0.0], "UNIFORM", {RANGE_MIN: 0.0, RANGE_MAX: MIN_THRESHOLD}),
            ([1e30], "SYMMETRIC", {THRESHOLD: float(np.float32(1e30)), SIGNED: False}),
            ([1e-30], "SYMMETRIC", {THRESHOLD: MIN_THRESHOLD, SIGNED: False}),
            ([3e38, -1.0], "SYMMETRIC", {THRESHOLD: 2.0**100, SIGNED: True}),
            ([3e38, -3e38], "UNIFORM", {RANGE_MIN: -(2.0**99), RANGE_MAX: 2.0**99}),
        ],
    )
    def test_activation_golden(self, values, grid, params):
        result = activation(values, grid=grid)
        assert result == params
        assert {key: type(value) for key, value in result.items()} == {
            key: type(value) for key, value in params.items()
        }

    def test_signed_may_be_given(self):
        values = [-3.0, 2.0]
        assert activation(values, signed=False) == {THRESHOLD: 2.0, SIGNED: False}
        assert activation([3.0, 2.0], signed=True) == {THRESHOLD: 3.0, SIGNED: True}
        assert activation([-3.0], signed=np.bool_(False)) == {THRESHOLD: MIN_THRESHOLD, SIGNED: False}
        assert activation(values, grid="UNIFORM", signed=False) == {RANGE_MIN: 0.0, RANGE_MAX: 2.0}
        assert activation(values, grid="UNIFORM", signed=True) == {RANGE_MIN: -3.0, RANGE_MAX: 2.0}

    @pytest.mark.parametrize(
        ("axis", "grid", "params"),
        [
            (None, "SYMMETRIC", {THRESHOLD: 4.0}),
            (0, "SYMMETRIC", {THRESHOLD: [3.0, 4.0]}),
            (1, "SYMMETRIC", {THRESHOLD: [1.0, 4.0, 3.0]}),
            (-1, "POWER_OF_TWO", {THRESHOLD: [1.0, 4.0, 4.0]}),
            (0, "UNIFORM", {RANGE_MIN: [-3.0, 0.0], RANGE_MAX: [2.0, 4.0]}),
            (np.int64(1), "UNIFORM", {RANGE_MIN: [0.0, 0.0, -3.0], RANGE_MAX: [1.0, 4.0, 0.5]}),
        ],
    )
    def test_weights_golden(self, axis, grid, params):
        assert weights([[1.0, 2.0, -3.0], [0.0, 4.0, 0.5]], grid=grid, channels_axis=axis) == params

    def test_results_are_plain_numbers(self):
        result = weights(np.ones((2, 3), np.float16), channels_axis=0)
        assert [type(number) for number in result[THRESHOLD]] == [float, float]
        assert type(weights(np.ones(3))[THRESHOLD]) is float

    def test_scalar_weights(self):
        assert weights(np.float32(-2.0)) == {THRESHOLD: 2.0}
        assert weights(7) == {THRESHOLD: 7.0}


class TestPercentile:
    def test_weights_golden(self):
        values = np.append(np.arange(1.0, 10.0), -10.0)  # magnitudes 1 to 10
        for percentile, kept in [(100, 10.0), (91, 10.0), (90, 9.0), (89.9999, 9.0), (10, 1.0), (0.001, 1.0)]:
            assert weights(values, "percentile", percentile=percentile) == {THRESHOLD: kept}
        # half of what is left out at each end
        uniform = {"method": "percentile", "grid": "UNIFORM"}
        assert weights(values, **uniform, percentile=90) == {RANGE_MIN: -10.0, RANGE_MAX: 9.0}
        assert weights(values, **uniform, percentile=80) == {RANGE_MIN: 0.0, RANGE_MAX: 8.0}
        assert weights(-values, **uniform, percentile=80) == {RANGE_MIN: -8.0, RANGE_MAX: 0.0}

    def test_decimal_percentages_are_exact(self):
        # in float64, (100 - 99.99) / 100 * 10000 is 1.0000000000005116, and (100 - 99.9) / 100 * 1000 is below 1
        assert weights(np.arange(1, 10_001), "percentile", percentile=99.99) == {THRESHOLD: 9999.0}
        assert weights(np.arange(1, 1001), "percentile", percentile=99.9) == {THRESHOLD: 999.0}
        assert weights(np.arange(1, 1001), "percentile", percentile=np.float32(99.9)) == {THRESHOLD: 999.0}

    def test_activation_golden(self):
        # values are bins' lower edges: 8192 bins of width 1/32 up to 255, so the answer is one bin up
        values = np.arange(256)
        assert activation(values, "percentile", percentile=100) == {THRESHOLD: 255.0, SIGNED: False}
        assert activation(values, "percentile", percentile=99.99) == {THRESHOLD: 255.0, SIGNED: False}
        assert activation(values, "percentile", percentile=50) == {THRESHOLD: 127 + 1 / 32, SIGNED: False}
        assert activation(values, "percentile", "UNIFORM", percentile=50) == {RANGE_MIN: 0.0, RANGE_MAX: 191 + 1 / 32}

    def test_zeros_count(self):
        values = np.append(np.zeros(99), 5.0)
        assert activation(values, "percentile", percentile=99) == {THRESHOLD: MIN_THRESHOLD, SIGNED: False}
        assert activation(values, "percentile", percentile=99.5) == {THRESHOLD: 5.0, SIGNED: False}

    @settings(max_examples=120, deadline=None)
    @given(SAMPLES, st.sampled_from([0.01, 10, 50, 75, 99, 99.99, 100]), st.sampled_from([None, True, False]))
    def test_activation_is_at_most_one_bin_too_far_out(self, samples, percentile, signed):
        observer = observed(samples)
        values = np.float32(samples).astype(np.float64)
        width = np.diff(observer.edges)[0]
        limit, floor = 2.0**99, SMALLEST_THRESHOLD
        reaches_down = bool(values.min() < 0) if signed is None else signed
        cut = int((100 - Fraction(str(percentile))) * len(samples) / 100)
        magnitudes = np.sort(np.abs(values) if reaches_down else np.maximum(values, 0))[::-1]
        result = activation(observer, "percentile", percentile=percentile, signed=signed, min_threshold=0)
        exact, top = magnitudes[cut], 2.0**100
        # rounded to float32: half an ulp, of the threshold
        assert min(max(exact, floor), top) <= result[THRESHOLD] * (1 + 2**-24)
        assert result[THRESHOLD] <= min(max(min(exact + width, magnitudes[0]), floor), top) * (1 + 2**-24)
        result = activation(observer, "percentile", "UNIFORM", percentile=percentile, signed=signed, min_threshold=0)
        high = max(np.sort(values)[::-1][cut // 2], 0)
        assert min(high, limit) <= result[RANGE_MAX] * (1 + 2**-24)
        assert result[RANGE_MAX] <= min(max(high + width, floor), limit) * (1 + 2**-24)
        low = min(np.sort(values)[cut // 2], 0) if signed is not False else 0.0
        assert max(low, -limit) >= result[RANGE_MIN] * (1 + 2**-24)
        assert result[RANGE_MIN] >= max(min(low - (width if signed is not False else 0), -floor), -limit) * (1 + 2**-24)


class TestLaws:
    @settings(max_examples=120, deadline=None)
    @given(
        **CASES, min_threshold=st.sampled_from([0.0, MIN_THRESHOLD, 0.3]), signed=st.sampled_from([None, True, False])
    )
    def test_activation_params_are_legal(self, samples, method, grid, n_bits, min_threshold, signed):
        params = activation(samples, method, grid, n_bits, min_threshold=min_threshold, signed=signed)
        floor = max(min_threshold, SMALLEST_THRESHOLD)
        if grid is QuantizationMethod.UNIFORM:
            assert params.keys() == {RANGE_MIN, RANGE_MAX}
            assert -(2.0**99) <= params[RANGE_MIN] <= 0 <= params[RANGE_MAX] <= 2.0**99
            assert params[RANGE_MAX] - params[RANGE_MIN] >= floor
            assert signed is not False or params[RANGE_MIN] == 0
        else:
            assert params.keys() == {THRESHOLD, SIGNED}
            assert floor <= params[THRESHOLD] <= 2.0**100
            assert params[SIGNED] is (any(x < 0 for x in samples) if signed is None else signed)
            assert grid is QuantizationMethod.SYMMETRIC or np.frexp(params[THRESHOLD])[0] == 0.5
        assert all(number == np.float32(number) for number in params.values())
        config = TrainableQuantizerActivationConfig(
            activation_quantization_method=grid, activation_n_bits=n_bits, activation_quantization_params=params
        )
        assert config.quantization_params == params

    @settings(max_examples=120, deadline=None)
    @given(**CASES, min_threshold=st.sampled_from([0.0, MIN_THRESHOLD, 0.3]))
    def test_weights_params_are_legal(self, samples, method, grid, n_bits, min_threshold):
        tensor = np.stack([np.float32(samples), np.zeros(len(samples), np.float32)], axis=1)
        params = weights(tensor, method, grid, n_bits, min_threshold=min_threshold, channels_axis=1)
        floor = max(min_threshold, SMALLEST_THRESHOLD)
        if grid is QuantizationMethod.UNIFORM:
            low, high = np.array(params[RANGE_MIN]), np.array(params[RANGE_MAX])
            assert (low <= 0).all()
            assert (high >= 0).all()
            assert (high - low >= floor).all()
            assert low[1] == 0
            assert floor <= high[1] <= floor * (1 + 2**-23)  # all zero: the bound, rounded up to float32
        else:
            thresholds = np.array(params[THRESHOLD])
            assert (thresholds >= floor).all()
            assert (thresholds <= 2.0**100).all()
            expected = 2.0 ** np.ceil(np.log2(floor)) if grid is QuantizationMethod.POWER_OF_TWO else floor
            assert expected <= thresholds[1] <= expected * (1 + 2**-23)
            assert grid is QuantizationMethod.SYMMETRIC or (np.frexp(thresholds)[0] == 0.5).all()
        TrainableQuantizerWeightsConfig(
            weights_quantization_method=grid,
            weights_n_bits=n_bits,
            weights_quantization_params=params,
            weights_channels_axis=1,
            weights_per_channel_threshold=True,
        )

    @settings(max_examples=120, deadline=None)
    @given(**{**CASES, "method": st.sampled_from(list(SEARCHED))})
    def test_weights_error_is_never_worse_than_minmax(self, samples, method, grid, n_bits):
        p = SEARCHED[method]
        chosen = error(samples, weights(samples, method, grid, n_bits, p=p), grid, n_bits, True, p)
        minmax = error(samples, weights(samples, "minmax", grid, n_bits), grid, n_bits, True, p)
        # the very values and the very grid; two powers and a pairwise sum of up to 400 positive terms in float64
        assert chosen <= minmax * (1 + 100 * 2**-52)

    @settings(max_examples=120, deadline=None)
    @given(**{**CASES, "method": st.sampled_from(list(SEARCHED))}, signed=st.sampled_from([None, True, False]))
    def test_activation_error_is_never_worse_than_minmax(self, samples, method, grid, n_bits, signed):
        p = SEARCHED[method]
        observer = observed(samples)
        params = activation(observer, method, grid, n_bits, p=p, signed=signed)
        minmax = activation(observer, "minmax", grid, n_bits, signed=signed)
        reaches_down = params.get(SIGNED, True)
        chosen, reference = (error(samples, each, grid, n_bits, reaches_down, p) for each in (params, minmax))
        width = np.diff(observer.edges)[0] / max(abs(observer.minimum), abs(observer.maximum), 2.0**-149)
        # each of the two is measured half a bin off at most; a whole bin above 10 bits. (The distance to the nearest
        # grid point changes by no more than the value.) 2**-23: values and codes are float32
        assert chosen <= reference + width * (1 if n_bits <= 10 else 2) + 2**-23

    @settings(max_examples=120, deadline=None)
    @given(**{**CASES, "samples": st.lists(USUAL, min_size=1, max_size=30)}, exponent=st.integers(-20, 20))
    def test_powers_of_two_scale_everything(self, samples, method, grid, n_bits, exponent):
        values = np.float32(samples)
        values[np.abs(values) < 2.0**-40] = 0  # far from the bounds, so that nothing is cut
        factor = np.float32(2.0**exponent)
        for calibrate in (activation, weights):
            params = calibrate(values, method, grid, n_bits, min_threshold=0)
            scaled = calibrate(values * factor, method, grid, n_bits, min_threshold=0)
            for key, value in params.items():
                expected = value if key == SIGNED or not values.any() else value * factor
                assert scaled[key] == expected

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(st.lists(st.one_of(USUAL, EVERY), min_size=6, max_size=6), min_size=1, max_size=5),
        CASES["method"],
        CASES["grid"],
        CASES["n_bits"],
    )
    def test_channels_are_a_loop_over_channels(self, rows, method, grid, n_bits):
        tensor = np.float32([*rows, [0.0] * 6, [1.0] * 6, [0, 1, 2, 3, 4, 5]])
        together = weights(tensor, method, grid, n_bits, channels_axis=0)
        alone = [weights(row, method, grid, n_bits) for row in tensor]
        assert together == {key: [params[key] for params in alone] for key in together}

    @pytest.mark.parametrize(("method", "grid"), PAIRS)
    def test_where_the_channels_are_does_not_matter(self, method, grid):
        tensor = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
        expected = weights(tensor.transpose(1, 0, 2).reshape(4, 15), method, grid, 4, channels_axis=0)
        for axis in (1, -2):
            assert weights(tensor, method, grid, 4, channels_axis=axis) == expected
        assert weights(np.asfortranarray(tensor), method, grid, 4, channels_axis=1) == expected

    @pytest.mark.parametrize(("method", "grid"), PAIRS)
    def test_nothing_given_is_changed(self, method, grid):
        tensor = np.random.default_rng(0).normal(size=(3, 40)).astype(np.float32)
        kept = tensor.copy()
        tensor.setflags(write=False)
        weights(tensor, method, grid, 4, channels_axis=0)
        np.testing.assert_array_equal(tensor, kept)
        observer = observed(tensor)
        activation(observer, method, grid, 4)
        for key, value in observer.state().items():
            np.testing.assert_array_equal(value, observed(kept).state()[key])

    @pytest.mark.parametrize(("method", "grid"), PAIRS)
    def test_batches_and_ranks_do_not_matter(self, method, grid):
        values = np.random.default_rng(0).standard_t(3, size=3000).astype(np.float32)
        whole = activation(values, method, grid, 4)
        assert activation(observed(*np.split(values, 10)), method, grid, 4) == whole
        ranks = [observed(values[0::2]), observed(values[1::2])]
        ranks[0].merge(ranks[1])
        assert activation(ranks[0], method, grid, 4) == whole

    @pytest.mark.parametrize(("method", "grid"), PAIRS)
    @pytest.mark.parametrize("value", [0.7, -0.7, 1e-30, 1e30, 65504.0])
    def test_constant_data(self, method, grid, value):
        for n_bits in (1, 4, 16):
            for params in (activation([value] * 5, method, grid, n_bits), weights([value] * 5, method, grid, n_bits)):
                qparams = from_params(grid, n_bits, params.get(SIGNED, True), params)
                quantized = float(affine.fake_quantize(np.float32(value), qparams))
                numbers = inferable_params(qparams, grid)
                assert all(np.isfinite(number) for number in numbers.values())
                # zero is on the grid, so the nearest grid point is no further away
                assert abs(quantized - np.float32(value)) <= abs(np.float32(value))

    @pytest.mark.parametrize("method", ["mse", "mae", "lp"])
    @pytest.mark.parametrize("n_bits", [2, 4, 8])
    def test_constant_data_is_hit_by_a_search(self, method, n_bits):
        # the first coarse candidate puts the last code on the largest value, to float32 rounding of threshold and step
        for params in (activation([0.7] * 5, method, n_bits=n_bits), weights([0.7] * 5, method, n_bits=n_bits)):
            qparams = from_params(QuantizationMethod.SYMMETRIC, n_bits, params.get(SIGNED, True), params)
            assert float(affine.fake_quantize(np.float64(0.7), qparams)) == pytest.approx(0.7, rel=2**-22)

    @pytest.mark.parametrize(("method", "grid"), PAIRS)
    def test_no_floating_point_accident_at_any_scale(self, method, grid):
        values = np.array([1e-44, -3e38, 3e38, 1e-3, 1.0, -2.0, 0.0])
        with np.errstate(all="raise"):
            for subset, n_bits in itertools.product((values, values[3:]), (1, 4, 12)):
                activation(subset, method, grid, n_bits, p=1e3, min_threshold=0)
                weights(subset, method, grid, n_bits, p=1e3, min_threshold=0)

    @pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int16])
    def test_dtypes_give_the_same(self, dtype):
        values = np.random.default_rng(0).integers(-100, 100, (4, 50))
        for method, grid in itertools.product(METHODS, GRIDS):
            expected = weights(values.astype(np.float32), method, grid, 4, channels_axis=0)
            assert weights(values.astype(dtype), method, grid, 4, channels_axis=0) == expected

    def test_members_names_values_and_foreign_members(self):
        foreign = Enum("QuantizationMethod", {"POWER_OF_TWO": 0, "UNIFORM": 3})  # as mctq's own enum
        expected = weights([1.0, -2.0, 0.3], CalibrationMethod.MSE, QuantizationMethod.UNIFORM)
        for method, grid in itertools.product(["mse", "MSE"], ["UNIFORM", 3, foreign.UNIFORM]):
            assert weights([1.0, -2.0, 0.3], method, grid) == expected

    def test_values_of_the_enum(self):
        assert [str(method) for method in CalibrationMethod] == [
            *("minmax", "percentile", "mse", "mae", "lp", "kl"),
            *("lsq", "lsq_plus", "sawb"),
        ]
        assert CalibrationMethod("kl") == "kl"


class TestRefused:
    @pytest.mark.parametrize(
        ("argument", "value", "facts"),
        [
            ("calibration_method", "rmse", ["calibration_method", "MSE"]),
            ("calibration_method", None, ["calibration_method"]),
            ("quantization_method", "SYMETRIC", ["quantization_method", "SYMMETRIC"]),
            ("quantization_method", QuantizationMethod.LUT_SYM_QUANTIZER, ["quantization_method", "LUT_SYM_QUANTIZER"]),
            ("quantization_method", "LUT_POT_QUANTIZER", ["quantization_method", "UNIFORM"]),
            ("n_bits", 0, ["n_bits", "0"]),
            ("n_bits", 17, ["n_bits", "17"]),
            ("n_bits", 4.0, ["n_bits", "4.0"]),
            ("n_bits", True, ["n_bits"]),
            ("n_bits", None, ["n_bits"]),
            ("percentile", 0, ["percentile"]),
            ("percentile", 100.01, ["percentile", "100.01"]),
            ("percentile", np.nan, ["percentile"]),
            ("percentile", "99", ["percentile"]),
            ("percentile", True, ["percentile"]),
            ("p", 0, ["p must"]),
            ("p", -1.0, ["p must"]),
            ("p", np.inf, ["p must"]),
            ("p", 10**400, ["p must"]),
            ("min_threshold", -1e-9, ["min_threshold"]),
            ("min_threshold", np.nan, ["min_threshold"]),
            ("min_threshold", 2.0**101, ["min_threshold", "2**100"]),
            ("min_threshold", None, ["min_threshold"]),
        ],
    )
    @pytest.mark.parametrize("calibrate", [calibrate_activation, calibrate_weights])
    def test_bad_arguments_are_named(self, calibrate, argument, value, facts):
        given_values = observed([1.0]) if calibrate is calibrate_activation else [1.0]
        error = UnsupportedConfigError if str(value).startswith("LUT") else InvalidArgumentError
        with pytest.raises(error) as caught:
            calibrate(given_values, **{**ARGUMENTS, argument: value})
        assert all(fact in str(caught.value) for fact in [calibrate.__name__, *facts])

    def test_range_as_wide_as_a_config_may_say(self):
        with pytest.raises(InvalidArgumentError, match=r"min_threshold.*2\*\*99"):
            weights([1.0], grid="UNIFORM", min_threshold=2.0**100)
        assert weights([1.0], grid="UNIFORM", min_threshold=2.0**99) == {RANGE_MIN: 0.0, RANGE_MAX: 2.0**99}

    @pytest.mark.parametrize("signed", [1, "yes", 0.0])
    def test_bad_signed(self, signed):
        with pytest.raises(InvalidArgumentError, match="signed"):
            activation([1.0], signed=signed)

    @pytest.mark.parametrize(
        ("shape", "axis"), [((2, 3), 2), ((2, 3), -3), ((), 0), ((2, 3), 0.0), ((2,), True), ((2,), "0")]
    )
    def test_bad_axis(self, shape, axis):
        with pytest.raises(InvalidArgumentError, match="channels_axis") as caught:
            weights(np.ones(shape), channels_axis=axis)
        assert str(shape) in str(caught.value)

    @pytest.mark.parametrize(("values", "axis"), [([], None), (np.zeros((0, 3)), 0), (np.zeros((3, 0)), 0)])
    def test_empty_weights(self, values, axis):
        with pytest.raises(CalibrationError, match="empty"):
            weights(values, channels_axis=axis)

    @pytest.mark.parametrize(
        ("values", "facts"),
        [([1.0, np.nan], ["1 NaN"]), ([np.inf, -np.inf], ["2 infinite"]), ([1e39], ["1 infinite"]), (["x"], ["<U1"])],
    )
    def test_weights_that_are_no_finite_numbers(self, values, facts):
        with pytest.raises(CalibrationError) as caught:
            weights(values)
        assert all(fact in str(caught.value) for fact in ["calibrate_weights", *facts])

    def test_observer_of_nothing(self):
        for method in METHODS:
            with pytest.raises(CalibrationError, match="no values"):
                activation(Observer(), method)

    def test_values_instead_of_an_observer(self):
        with pytest.raises(CalibrationError, match="ndarray"):
            calibrate_activation(np.ones(3), **ARGUMENTS)

    def test_one_base(self):
        for leaf in (CalibrationError, InvalidArgumentError, UnsupportedConfigError):
            assert issubclass(leaf, TrainableError)
            assert issubclass(leaf, ValueError)
