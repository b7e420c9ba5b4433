"""What the search measures, against independent arithmetic, and what it finds, against brute force."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainable_core.calibration import Observer, calibrate_activation, calibrate_weights
from trainable_core.calibration.measure import SMOOTHING, kl_divergence, power_error
from trainable_core.calibration.objective import observed_power_objective, points_of
from trainable_core.calibration.observer import CHUNK
from trainable_core.calibration.search import COARSE, FINE, OCTAVES, GridKind, search
from trainable_core.constants import RANGE_MAX, RANGE_MIN, THRESHOLD
from trainable_core.enums import CalibrationMethod, QuantizationMethod
from trainable_core.errors import CalibrationError
from trainable_core.qparams import QParams, from_params
from trainable_core.reference import affine

SYMMETRIC, POWER_OF_TWO, UNIFORM = (QuantizationMethod[name] for name in ("SYMMETRIC", "POWER_OF_TWO", "UNIFORM"))


def grid(scale, zero_point, quant_min, quant_max):
    scale = np.atleast_1d(np.float32(scale))
    return QParams(scale, np.broadcast_to(np.int32(zero_point), scale.shape), quant_min, quant_max, 0)


def nearest_error(values, points, p=2.0):
    """Mean error to the power p when each value goes to the nearest grid point: no code of the library."""
    return np.mean(np.abs(np.asarray(values, np.float64)[:, None] - np.asarray(points)).min(axis=1) ** p)


def symmetric_points(threshold, n_bits):
    return np.arange(-(2 ** (n_bits - 1)), 2 ** (n_bits - 1)) * (threshold / 2 ** (n_bits - 1))


def bell(size, tail):
    """A smooth sample without chance: normal quantiles by the logistic approximation, stretched to a heavier tail."""
    u = (np.arange(size) + 0.5) / size
    z = np.log(u / (1 - u)) / 1.702
    return (np.sign(z) * np.abs(z) ** tail).astype(np.float32)


class TestPowerError:
    def test_golden(self):
        values = np.float32([[0.25, 1.75, -2.5, 0.0]])
        # codes -2 .. 1 of width 1: 0.25 -> 0, 1.75 -> 1, -2.5 -> -2, 0 -> 0; the unit is 4
        unit = grid(1.0, 0, -2, 1)
        assert power_error(values, None, [unit], 1.0) == (0.25 + 0.75 + 0.5) / 4 / 4
        assert power_error(values, None, [unit], 2.0) == (0.0625 + 0.5625 + 0.25) / 4 / 16
        assert power_error(values, np.array([4.0, 0.0, 1.0, 3.0]), [unit], 1.0) == (4 * 0.25 + 0.5) / 8 / 4

    def test_candidates_and_channels(self):
        values = np.float32([[1.0, 0.5], [0.0, 0.0], [3.0, -3.0]])
        grids = [grid([1.0, 1.0, 1.0], 0, -2, 1), grid([0.5, 2.0, 3.0], [0, 1, 3], 0, 7)]
        errors = power_error(values, None, grids, 1.0)
        # units 2, 1, 4; 0.5 is a tie: to 0 or to 1, the error is the same
        np.testing.assert_array_equal(errors, [[0.5 / 2 / 2, 0, (2 + 1) / 2 / 4], [0, 0, 0]])

    @pytest.mark.parametrize("p", [1.0, 2.0, 2.5])
    def test_tiles_do_not_change_a_channel(self, p):
        values = np.random.default_rng(0).normal(size=(5, CHUNK + 77)).astype(np.float32)
        weights = np.random.default_rng(1).integers(1, 9, CHUNK + 77).astype(np.float64)
        whole = power_error(values, weights, [grid(np.full(5, 0.25), 0, -8, 7)], p)[0]
        alone = [power_error(row[None], weights, [grid(0.25, 0, -8, 7)], p)[0, 0] for row in values]
        np.testing.assert_array_equal(whole, alone)
        distance = np.abs(values - np.clip(np.rint(values * 4), -8, 7) / 4).astype(np.float64)
        unit = 2.0 ** np.ceil(np.log2(np.abs(values).max(axis=1).astype(np.float64)))
        expected = (distance**p) @ weights / weights.sum() / unit**p
        # float64 sums of 32845 positive terms in another order
        np.testing.assert_allclose(whole, expected, rtol=32845 * 2**-52)

    @settings(max_examples=100, deadline=None)
    @given(
        st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20),
        st.floats(2.0**-100, 2.0**100, width=32),
        st.integers(1, 16),
        st.sampled_from([0.1, 1.0, 2.0, 1e4]),
    )
    def test_no_value_moves_by_more_than_itself(self, values, threshold, n_bits, p):
        qparams = from_params(SYMMETRIC, n_bits, True, {THRESHOLD: [threshold]}, 0.0, 0)
        (error,) = power_error(np.float32([values]), None, [qparams], p)[0]
        assert 0 <= error <= 1


class TestKl:
    def test_golden(self):
        # codes 1, 1 and 3, which is beyond the grid: clipped above
        result = kl_divergence(np.float32([0.6, 1.4, 3.0]), np.array([1.0, 3.0, 4.0]), grid(1.0, 0, -2, 1))
        kept, floor = (1 - SMOOTHING) / 2 + SMOOTHING / 3, SMOOTHING / 3
        expected = 1 / 8 * math.log(1 / 8 / kept) + 3 / 8 * math.log(3 / 8 / kept) + 1 / 2 * math.log(1 / 2 / floor)
        assert result == pytest.approx([expected], rel=1e-14)  # a dozen float64 operations

    def test_bins_of_a_code_share_its_counts(self):
        # codes -1, 1, 1: Q has 6 of 10 on the first bin and 2 of 10 on each of the others
        result = kl_divergence(np.float32([-1.0, 0.6, 1.4]), np.array([6.0, 1.0, 3.0]), grid(1.0, 0, -2, 1))
        shares = [(1 - SMOOTHING) * share + SMOOTHING / 3 for share in (0.6, 0.2, 0.2)]
        expected = sum(p * math.log(p / q) for p, q in zip((0.6, 0.1, 0.3), shares, strict=True))
        assert result == pytest.approx([expected], rel=1e-13)  # a dozen operations; the terms cancel to a tenth

    def test_clipped_on_both_sides_and_everything(self):
        points, counts = np.float32([-9.0, -1.0, 1.0, 9.0]), np.array([1.0, 1.0, 1.0, 1.0])
        inside, floor = (1 - SMOOTHING) / 2 + SMOOTHING / 4, SMOOTHING / 4
        expected = 2 / 4 * math.log(1 / 4 / inside) + 2 / 4 * math.log(1 / 4 / floor)
        result = kl_divergence(points, counts, grid([1.0, 2.0**-10], 0, -2, 1))
        assert result[0] == pytest.approx(expected, rel=1e-14)
        assert result[1] == np.inf

    def test_nothing_is_lost_when_codes_tell_bins_apart(self):
        result = kl_divergence(np.float32([-1, 1, 2]), np.array([5.0, 5.0, 5.0]), grid(1.0, 4, 0, 7))
        # P = Q up to smoothing, which leaves an even distribution as it is; rounding errors of three logarithms
        assert 0 <= result[0] < 1e-15

    def test_zeros_only(self):
        np.testing.assert_array_equal(kl_divergence(np.float32([]), np.zeros(0), grid([1.0, 2.0], 0, -2, 1)), [0, 0])

    def test_many_candidates_are_measured_in_pieces(self):
        points = (np.arange(8000, dtype=np.float32) + 1) / 8000
        counts = np.random.default_rng(0).integers(1, 100, 8000).astype(np.float64)
        scales = np.linspace(0.01, 0.3, 23, dtype=np.float32)
        whole = kl_divergence(points, counts, grid(scales, 0, 0, 15))
        alone = [kl_divergence(points, counts, grid(scale, 0, 0, 15))[0] for scale in scales]
        np.testing.assert_array_equal(whole, alone)

    def test_one_bin_kept_is_not_free(self):
        # added to the last bin kept, the clipped mass would make the divergence of the finer grid 0
        points, counts = np.float32([0.07, 1.0]), np.array([1.0, 26.0])
        fine, coarse = kl_divergence(points, counts, grid([0.07, 0.25], 0, -2, 4))
        assert fine > coarse


class TestPoints:
    def test_parts_of_a_bin(self):
        observer = Observer(n_bins=4)
        observer.update([-1.0, 0.0, 0.5, 0.5, 1.75])
        points, counts = points_of(observer, 2)
        np.testing.assert_array_equal(points, np.float32([-0.75, -0.25, 0.25, 0.75, 1.25, 1.75]))
        np.testing.assert_array_equal(counts, [0.5, 0.5, 1, 1, 0.5, 0.5])

    def test_constant_data_is_represented_exactly(self):
        observer = Observer()
        observer.update([0.7] * 5)
        points, counts = points_of(observer, 1)
        np.testing.assert_array_equal(points, np.float32([0.7]))
        np.testing.assert_array_equal(counts, [5.0])

    @pytest.mark.parametrize("n_bits", [8, 11, 13, 16])
    def test_measured_error_is_the_data_error_at_every_width(self, n_bits):
        # even data on a power-of-two range: the worst for centres, because bin edges and grid points coincide
        values = np.random.default_rng(0).uniform(-1, 1, 100_000).astype(np.float32)
        observer = Observer()
        observer.update(values)
        kind = GridKind(POWER_OF_TWO, n_bits, signed=True, min_threshold=0.0)
        ends = np.array([[-1.0], [1.0]])
        measured = observed_power_objective(kind, observer, 2.0)(ends[None])[0, 0]
        step = 2.0 ** (1 - n_bits)
        # rounding error of even data: step**2 / 12. The points are a lattice of at least 8 per step (CENTRE_BITS),
        # whose variance differs by 1/8**2; the sample's by 1/sqrt(n). The last code is missing: one step in 2**n_bits
        # is clipped
        assert measured == pytest.approx(step**2 / 12, rel=1 / 64 + 0.02 + 2.0 ** (2 - n_bits))


class TestGridKind:
    @pytest.mark.parametrize(
        ("method", "n_bits", "signed", "reach"),
        [
            (SYMMETRIC, 1, True, 1.0),
            (SYMMETRIC, 2, True, 2.0),
            (SYMMETRIC, 4, True, 8 / 7),
            (SYMMETRIC, 1, False, 2.0),
            (POWER_OF_TWO, 2, False, 4 / 3),
            (UNIFORM, 2, True, 1.0),
        ],
    )
    def test_reach(self, method, n_bits, signed, reach):
        assert GridKind(method, n_bits, signed, 0.0).reach == reach

    @pytest.mark.parametrize(
        ("method", "given_ends", "ends"),
        [
            (SYMMETRIC, (-1.0, 1.0), (-1.0, 1.0)),
            (SYMMETRIC, (0.0, 0.0), (-0.25, 0.25)),
            (SYMMETRIC, (0.0, 1e38), (-(2.0**100), 2.0**100)),
            (SYMMETRIC, (0.0, 0.3), (-np.float32(0.3), np.float32(0.3))),
            (POWER_OF_TWO, (0.0, 0.3), (-0.5, 0.5)),
            (POWER_OF_TWO, (0.0, 0.5), (-0.5, 0.5)),
            (UNIFORM, (-1.0, 2.0), (-1.0, 2.0)),
            (UNIFORM, (1.0, 2.0), (0.0, 2.0)),
            (UNIFORM, (-2.0, -1.0), (-2.0, 0.0)),
            (UNIFORM, (0.0, 0.0), (0.0, 0.25)),
            (UNIFORM, (-0.125, 0.0), (-0.25, 0.0)),
            (UNIFORM, (-0.125, 0.0625), (-0.25, 0.0625)),
            (UNIFORM, (-0.0625, 0.125), (-0.0625, 0.25)),
            (UNIFORM, (-1e38, 1e38), (-(2.0**99), 2.0**99)),
        ],
    )
    def test_bounds(self, method, given_ends, ends):
        kind = GridKind(method, 8, signed=True, min_threshold=0.25)
        np.testing.assert_array_equal(kind.bounded(np.array(given_ends)[:, None])[:, 0], ends)

    @pytest.mark.parametrize("method", [SYMMETRIC, POWER_OF_TWO, UNIFORM])
    @pytest.mark.parametrize("n_bits", [1, 4, 8, 16])
    @pytest.mark.parametrize("signed", [True, False])
    def test_levels_are_those_of_the_qparams(self, method, n_bits, signed):
        kind = GridKind(method, n_bits, signed, min_threshold=0.25)
        rng = np.random.default_rng(0)
        sizes = np.append(np.exp2(rng.uniform(-140, 110, 400)), [0.0, 0.125, 0.25, 0.3, 0.5, 2.0**99, 2.0**100, 1e38])
        low, high = -rng.permutation(sizes), rng.permutation(sizes)
        extremes = kind.extremes(low, high)
        octaves = np.array([0.0, -0.3, -2.0, 1.0])[:, None, None]
        with np.errstate(over="ignore"):
            multiples = (extremes * np.exp2(octaves)).astype(np.float32)
        bounded = kind.bounded(multiples.astype(np.float64))
        np.testing.assert_array_equal(kind.bound_in_place(multiples.copy()), bounded)
        for candidate, levels in zip(bounded, zip(*kind.levels(bounded), strict=True), strict=True):
            grid = kind.qparams(candidate)
            expected = grid.scale, grid.quant_min - grid.zero_point, grid.quant_max - grid.zero_point
            for found, number in zip(levels, expected, strict=True):
                np.testing.assert_array_equal(found, number)

    def test_unsigned_extremes(self):
        low, high = np.array([-3.0, -3.0]), np.array([2.0, -1.0])
        np.testing.assert_array_equal(GridKind(SYMMETRIC, 8, True, 0.0).extremes(low, high), [[-3, -3], [3, 3]])
        np.testing.assert_array_equal(GridKind(SYMMETRIC, 8, False, 0.0).extremes(low, high), [[0, 0], [2, 0]])
        np.testing.assert_array_equal(GridKind(UNIFORM, 8, True, 0.0).extremes(low, high), [[-3, -3], [2, 0]])
        np.testing.assert_array_equal(GridKind(UNIFORM, 8, False, 0.0).extremes(low, high), [[0, 0], [2, 0]])


class TestSearch:
    def test_the_documented_candidates(self):
        tried = {SYMMETRIC: [], POWER_OF_TWO: [], UNIFORM: []}
        for method, seen in tried.items():

            def objective(ends, seen=seen):
                seen.append(ends)
                return (np.abs(ends[:, 1] - 0.3) + np.abs(ends[:, 0] + 0.2)).reshape(len(ends), -1)

            search(GridKind(method, 4, signed=True, min_threshold=0.0), np.array([[-1.0], [1.0]]), objective)
        first, coarse, fine = tried[SYMMETRIC]
        assert (first.shape, coarse.shape, fine.shape) == ((1, 2, 1), (149, 2, 1), (30, 2, 1))
        np.testing.assert_array_equal(first[0, 1], [1.0])
        np.testing.assert_allclose(coarse[:, 1, 0], 8 / 7 * 2.0**-COARSE, rtol=2**-23)  # rounded to float32
        best = coarse[np.abs(coarse[:, 1, 0] - 0.3).argmin(), 1, 0]  # the objective's minimum is anywhere in [0.2, 0.3]
        assert fine[:, 1, 0].min() < best
        first, powers = tried[POWER_OF_TWO]
        np.testing.assert_array_equal(powers[:, 1, 0], 2.0 ** (1 - OCTAVES))
        assert [len(ends) for ends in tried[UNIFORM]] == [1, 149, 149, 149, 30, 30, 30]
        assert len(FINE) == 30

    def test_uniform_moves_each_end_alone(self):
        # a smooth bowl around [-0.3, 3]: the joint sweep can't reach it
        target = np.array([[-0.3], [3.0]])

        def bowl(ends):
            return (np.log(ends / target) ** 2).sum(axis=1)

        ends = search(GridKind(UNIFORM, 4, signed=True, min_threshold=0.0), np.array([[-100.0], [4.0]]), bowl)
        # fine spacing: NEAR / 16 of an octave for the upper end, FAR / 16 for the lower; the nearest is half of it away
        # at most
        np.testing.assert_allclose(np.log2(ends / target)[:, 0], 0, atol=0.5 / 4 / 16)

    def test_ties_keep_the_extremes(self):
        for method in (SYMMETRIC, POWER_OF_TWO, UNIFORM):
            kind = GridKind(method, 4, signed=True, min_threshold=0.0)
            ends = search(kind, np.array([[-4.0], [4.0]]), lambda ends: np.ones((len(ends), 1)))
            np.testing.assert_array_equal(ends, [[-4.0], [4.0]])

    @pytest.mark.parametrize("tail", [1.0, 1.5])
    @pytest.mark.parametrize("n_bits", [2, 3, 4])
    @pytest.mark.parametrize(("method", "p"), [("mse", 2.0), ("mae", 1.0), ("lp", 3.0)])
    def test_symmetric_against_brute_force(self, tail, n_bits, method, p):
        values = bell(4001, tail)
        params = calibrate_weights(
            values, calibration_method=method, quantization_method="SYMMETRIC", n_bits=n_bits, p=p
        )
        largest = float(values.max())
        everywhere = [
            nearest_error(values, symmetric_points(t, n_bits), p) for t in np.linspace(0.004, 2, 500) * largest
        ]
        chosen = nearest_error(values, symmetric_points(params[THRESHOLD], n_bits), p)
        # the search's spacing is finer than brute force's 0.4 % of the largest, and both are near the bottom of a bowl
        assert chosen <= min(everywhere) * (1 + 1e-3)
        assert chosen < nearest_error(values, symmetric_points(largest, n_bits), p)

    @pytest.mark.parametrize("n_bits", [2, 3])
    def test_uniform_against_brute_force(self, n_bits):
        values = np.concatenate([bell(601, 1.0), np.abs(bell(600, 1.5))])
        params = calibrate_weights(values, calibration_method="mse", quantization_method="UNIFORM", n_bits=n_bits)

        def error(low, high):
            qparams = from_params(UNIFORM, n_bits, True, {RANGE_MIN: low, RANGE_MAX: high})
            codes = np.arange(qparams.quant_min, qparams.quant_max + 1)
            return nearest_error(values, affine.dequantize(codes, qparams))

        lows, highs = np.linspace(float(values.min()), 0, 60), np.linspace(0, float(values.max()), 120)[1:]
        best = min(error(low, high) for low in lows for high in highs)
        # coordinate descent on a surface with steps (the zero point is an integer): a good range, not always the best
        assert error(params[RANGE_MIN], params[RANGE_MAX]) <= best * 1.05

    def test_outlier_on_one_side_moves_one_end(self):
        values = np.append(np.linspace(-1, 1, 2001), 30.0)
        params = calibrate_weights(values, calibration_method="mae", quantization_method="UNIFORM", n_bits=4)
        # clipped, the outlier costs 29; kept, steps of 31 / 15 cost 0.5 on average, 1000 in all. Ends to within 1.5
        # steps: the last code stands for half a step more, and with zero among 16 codes one side has one less
        assert params[RANGE_MIN] == pytest.approx(-1, abs=1.5 * 2 / 15)
        assert params[RANGE_MAX] == pytest.approx(1, abs=1.5 * 2 / 15)

    def test_power_of_two_golden(self):
        # multiples of 1/4 are exact with t = 1 at 3 bits: what is left is the outlier's clipping, 1.5 - 0.75
        values = [*([-1.0, -0.75, -0.25, 0.25, 0.75] * 20), 1.5]
        for method in ("mse", "mae", "lp"):
            params = calibrate_weights(
                values, calibration_method=method, quantization_method="POWER_OF_TWO", n_bits=3, p=0.5
            )
            assert params == {THRESHOLD: 1.0}
        # an outlier of 20 is 4 off with t = 32 (codes 16 and 24), 8 off with t = 16 (code 12), 19.25 off with t = 1.
        # All else goes to 0 with t >= 16: 60 in all, 45 squared. So mae: 64, 68 or 19.25; mse: 61, 109 or 371
        values[-1] = 20.0
        for method, threshold in (("mse", 32.0), ("mae", 1.0)):
            params = calibrate_weights(values, calibration_method=method, quantization_method="POWER_OF_TWO", n_bits=3)
            assert params == {THRESHOLD: threshold}

    def test_threshold_beyond_the_largest_value(self):
        # 2 bits: codes -2, -1, 0, 1. Only with t = 2 is the value 1.0 on the grid
        for method in ("SYMMETRIC", "POWER_OF_TWO"):
            params = calibrate_weights([1.0, -1.0], calibration_method="mse", quantization_method=method, n_bits=2)
            assert params == {THRESHOLD: 2.0}

    def test_exponents(self):
        values = bell(2001, 1.5)
        thresholds = {
            p: calibrate_weights(values, calibration_method="lp", quantization_method="SYMMETRIC", n_bits=3, p=p)[
                THRESHOLD
            ]
            for p in (0.5, 1.0, 2.0, 4.0, 8.0)
        }
        assert sorted(thresholds.values()) == list(thresholds.values())  # larger errors weigh more: less is clipped
        assert len(set(thresholds.values())) == len(thresholds)
        for name, p in (("mae", 1.0), ("mse", 2.0)):
            params = calibrate_weights(values, calibration_method=name, quantization_method="SYMMETRIC", n_bits=3)
            assert params[THRESHOLD] == thresholds[p]

    def test_kl_leaves_an_outlier_out(self):
        values = np.append(bell(20_000, 1.0), np.float32(50.0))
        observer = Observer()
        observer.update(values)
        for params in (
            calibrate_activation(observer, calibration_method="kl", quantization_method="SYMMETRIC", n_bits=8),
            calibrate_weights(values, calibration_method="kl", quantization_method="SYMMETRIC", n_bits=8),
        ):
            assert 2 < params[THRESHOLD] < 10  # the rest ends at 6.2

    def test_kl_of_weights_is_kl_of_their_histogram(self):
        values = bell(3000, 1.5)
        observer = Observer()
        observer.update(values)
        arguments = {"calibration_method": CalibrationMethod.KL, "quantization_method": UNIFORM, "n_bits": 4}
        assert calibrate_weights(values, **arguments) == calibrate_activation(observer, **arguments)

    def test_zeros_do_not_sway_kl(self):
        values = np.abs(bell(5000, 1.5))
        with_zeros = np.append(values, np.zeros(50_000, np.float32))
        results = []
        for seen in (values, with_zeros):
            observer = Observer()
            observer.update(seen)
            results.append(
                calibrate_activation(observer, calibration_method="kl", quantization_method="SYMMETRIC", n_bits=4)
            )
        assert results[0] == results[1]

    def test_empty_observer(self):
        with pytest.raises(CalibrationError, match="no values"):
            calibrate_activation(Observer(), calibration_method="kl", quantization_method="SYMMETRIC", n_bits=8)
