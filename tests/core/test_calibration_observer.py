"""The observer: exact ends, exact bins, and a state that depends on the values alone."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainable_core.calibration import Observer
from trainable_core.errors import CalibrationError, InvalidArgumentError

FINITE = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(-8, 8, width=32),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0**-149, -(2.0**-149), 3.4028234663852886e38]),
)
BATCHES = st.lists(st.lists(FINITE, max_size=12), max_size=6)
N_BINS = st.sampled_from([2, 3, 4, 7, 64, 8192])
BAD_NUMBERS = [0, 1, 65537, True, 4.0, "4", None]


def observed(*batches, n_bins=8192):
    observer = Observer(n_bins)
    for batch in batches:
        observer.update(batch)
    return observer


def assert_same(left, right):
    left, right = left.state(), right.state()
    assert left.keys() == right.keys()
    for key in left:
        np.testing.assert_array_equal(left[key], right[key], err_msg=key)


class TestHistogram:
    def test_golden_bins_on_both_sides_of_zero(self):
        observer = observed([-1.0, -0.25, 0.0, -0.0, 0.5, 0.999, 1.0, 2.75], n_bins=8)
        # width 1 holds 4 bins, width 0.5 holds [-2, 5]: 8 bins
        np.testing.assert_array_equal(observer.edges, np.arange(-2, 7) / 2)
        np.testing.assert_array_equal(observer.counts, [1, 1, 0, 2, 1, 0, 0, 1])
        assert (observer.zeros, observer.count) == (2, 8)
        assert (observer.minimum, observer.maximum) == (-1.0, 2.75)

    def test_golden_merge_by_powers_of_two(self):
        observer = observed(np.arange(1, 8), n_bins=8)
        np.testing.assert_array_equal(observer.counts, [0, 1, 1, 1, 1, 1, 1, 1])
        observer.update([-1])
        np.testing.assert_array_equal(observer.edges, np.arange(-2, 9, 2))  # 9 bins of width 1 are too many
        np.testing.assert_array_equal(observer.counts, [1, 1, 2, 2, 2])
        observer.update([100])
        np.testing.assert_array_equal(observer.edges, np.arange(-16, 113, 16))
        np.testing.assert_array_equal(observer.counts, [1, 7, 0, 0, 0, 0, 0, 1])

    @settings(max_examples=150, deadline=None)
    @given(BATCHES, N_BINS)
    def test_every_value_is_in_its_bin(self, batches, n_bins):
        observer = observed(*batches, n_bins=n_bins)
        values = np.array(list(itertools.chain(*batches)), np.float64)
        edges = observer.edges
        expected, _ = np.histogram(values[values != 0], np.append(edges[:-1], np.inf))
        np.testing.assert_array_equal(observer.counts, expected)
        assert observer.zeros == (values == 0).sum()
        assert observer.count == values.size == observer.counts.sum() + observer.zeros
        assert observer.counts.size <= n_bins
        assert observer.empty == (values.size == 0)
        if values.size:
            assert (observer.minimum, observer.maximum) == (values.min(), values.max())
            assert edges[0] <= min(values.min(), 0) <= max(values.max(), 0) < edges[-1]

    @settings(max_examples=150, deadline=None)
    @given(st.lists(FINITE, min_size=1), st.sampled_from([4, 7, 64, 8192]))
    def test_width_is_a_power_of_two_within_its_bound(self, values, n_bins):
        observer = observed(values, n_bins=n_bins)
        widths = np.diff(observer.edges)
        assert np.frexp(widths[0])[0] == 0.5
        np.testing.assert_array_equal(widths, widths[0])
        span = max(observer.maximum, 0.0) - min(observer.minimum, 0.0)
        assert widths[0] < 2 * span / (n_bins - 2) or span == 0

    @settings(max_examples=150, deadline=None)
    @given(BATCHES, N_BINS, st.randoms(use_true_random=False))
    def test_cuts_and_order_do_not_matter(self, batches, n_bins, random):
        values = list(itertools.chain(*batches))
        whole = observed(values, n_bins=n_bins)
        assert_same(observed(*batches, n_bins=n_bins), whole)
        random.shuffle(values)
        assert_same(observed(*values, n_bins=n_bins), whole)

    def test_large_tensors_are_counted_in_pieces(self):
        values = np.random.default_rng(0).normal(size=(3, 50_001)).astype(np.float32)
        values[1, ::7] = 0
        observer = observed(values)
        expected, _ = np.histogram(values[values != 0].astype(np.float64), observer.edges)
        np.testing.assert_array_equal(observer.counts, expected)
        assert observer.zeros == (values == 0).sum()

    def test_from_the_smallest_to_the_largest_number(self):
        observer = observed([2.0**-149], [-1.0], [np.finfo(np.float32).max], [np.finfo(np.float32).min])
        assert observer.count == 4
        assert observer.counts.sum() == 4
        assert (observer.minimum, observer.maximum) == (np.finfo(np.float32).min, np.finfo(np.float32).max)

    def test_counts_are_a_copy(self):
        observer = observed([1.0, 2.0])
        observer.counts[:] = 99
        assert observer.count == 2


class TestInputs:
    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int8, np.int64, np.uint16, np.bool_])
    def test_dtypes_give_the_same(self, dtype):
        assert_same(observed(np.array([[0, 1], [1, 0]], dtype)), observed([0.0, 1.0, 1.0, 0.0]))

    def test_wider_numbers_count_as_float32(self):
        observer = observed(np.array([0.1]))
        assert observer.maximum == np.float32(0.1)

    @pytest.mark.parametrize("empty", [[], np.zeros((0, 3)), np.zeros((2, 0), np.float16)])
    def test_empty_arrays_change_nothing(self, empty):
        assert observed(empty).empty
        assert_same(observed([1.0], empty), observed([1.0]))

    def test_scalar(self):
        assert_same(observed(np.float32(2.5)), observed([2.5]))

    def test_transposed_and_read_only(self):
        values = np.arange(6.0).reshape(2, 3).T
        values.setflags(write=False)
        assert_same(observed(values), observed(np.arange(6.0)))

    def test_values_are_not_changed(self):
        values = np.array([3.0, -1.0, 0.0], np.float32)
        observed(values)
        np.testing.assert_array_equal(values, np.array([3.0, -1.0, 0.0], np.float32))

    @pytest.mark.parametrize(
        ("values", "facts"),
        [
            ([1.0, np.nan, np.nan], ["2 NaN", "0 infinite", "3 values"]),
            ([np.inf, -np.inf, np.nan, 1.0], ["1 NaN", "2 infinite", "4 values"]),
            (np.array([np.inf], np.float16), ["0 NaN", "1 infinite"]),
            ([1e39], ["1 infinite"]),
            ([1j], ["complex128"]),
            (["a"], ["<U1"]),
            (np.array([None]), ["object"]),
        ],
    )
    def test_bad_values_leave_the_observer_as_it_was(self, values, facts):
        observer = observed([1.0, 2.0])
        with pytest.raises(CalibrationError) as caught:
            observer.update(values)
        assert all(fact in str(caught.value) for fact in facts)
        assert_same(observer, observed([1.0, 2.0]))

    @pytest.mark.parametrize("n_bins", BAD_NUMBERS)
    def test_bad_number_of_bins(self, n_bins):
        with pytest.raises(InvalidArgumentError, match="n_bins"):
            Observer(n_bins)

    def test_nothing_seen(self):
        observer = Observer()
        assert (observer.empty, observer.count, observer.zeros) == (True, 0, 0)
        for end in ("minimum", "maximum"):
            with pytest.raises(CalibrationError, match="no values"):
                getattr(observer, end)

    def test_repr_tells_what_was_seen(self):
        assert "empty" in repr(Observer())
        assert all(fact in repr(observed([1.5, -2.0])) for fact in ("2", "-2.0", "1.5"))


class TestMerge:
    @settings(max_examples=150, deadline=None)
    @given(st.lists(FINITE, max_size=12), st.lists(FINITE, max_size=12), N_BINS)
    def test_merge_is_having_seen_both(self, left, right, n_bins):
        mine, other = observed(left, n_bins=n_bins), observed(right, n_bins=n_bins)
        mine.merge(other)
        assert_same(mine, observed(left + right, n_bins=n_bins))
        assert_same(other, observed(right, n_bins=n_bins))

    def test_merge_with_itself_doubles(self):
        observer = observed([0.0, 1.0, -3.0])
        observer.merge(observer)
        assert_same(observer, observed([0.0, 1.0, -3.0] * 2))

    def test_different_bins(self):
        observer = observed([1.0])
        with pytest.raises(CalibrationError, match=r"16.*8192"):
            observer.merge(Observer(16))
        assert_same(observer, observed([1.0]))


class TestState:
    @settings(max_examples=100, deadline=None)
    @given(st.lists(FINITE, max_size=12), st.lists(FINITE, max_size=4), N_BINS)
    def test_round_trip_goes_on_like_the_original(self, values, more, n_bins):
        original = observed(values, n_bins=n_bins)
        restored = Observer.from_state(original.state())
        assert_same(restored, original)
        assert (restored.count, restored.zeros, restored.n_bins) == (original.count, original.zeros, n_bins)
        original.update(more)
        restored.update(more)
        assert_same(restored, original)

    def test_shapes_and_dtypes_are_always_the_same(self):
        expected = {
            "counts": ("int64", (16,)),
            "zeros": ("int64", ()),
            "minimum": ("float64", ()),
            "maximum": ("float64", ()),
        }
        for observer in (observed(n_bins=16), observed([0.0], n_bins=16), observed([-5.0, 7.0], n_bins=16)):
            assert {key: (value.dtype.name, value.shape) for key, value in observer.state().items()} == expected

    def test_state_is_a_copy(self):
        observer = observed([1.0])
        state = observer.state()
        restored = Observer.from_state(state)
        state["counts"][:] = 7
        assert_same(observer, observed([1.0]))
        assert_same(restored, observed([1.0]))

    @pytest.mark.parametrize(
        "change",
        [
            {"counts": None},
            {"maximum": None},
            {"counts": np.zeros((2, 4), np.int64)},
            {"counts": np.zeros(8)},
            {"counts": np.zeros(1, np.int64)},
            {"counts": np.array([0, 1, 0, 0, 0, 0, -1, 1])},
            {"counts": np.array([0, 1, 0, 0, 0, 0, 0, 0])},  # nothing where the maximum is
            {"zeros": np.asarray(1.0)},
            {"zeros": np.asarray([1])},
            {"zeros": np.asarray(-1)},
            {"zeros": np.asarray(0)},  # but the minimum is zero
            {"minimum": np.asarray(-1.0)},  # no count there
            {"minimum": np.asarray(1)},
            {"minimum": np.asarray([0.0])},
            {"minimum": np.asarray(0.5)},  # but zeros were seen
            {"minimum": np.asarray(9.0)},
            {"maximum": np.asarray(np.nan)},
            {"maximum": np.asarray(np.inf)},
            {"maximum": np.asarray(100.0)},
            {"maximum": np.asarray(2.0)},  # needs 5 bins of 0.5
        ],
    )
    def test_contradictions_are_refused(self, change):
        state = observed([0.0, 1.0, 7.0], n_bins=8).state()
        np.testing.assert_array_equal(state["counts"], [0, 1, 0, 0, 0, 0, 0, 1])
        state.update(change)
        state = {key: value for key, value in state.items() if value is not None}
        with pytest.raises(CalibrationError):
            Observer.from_state(state)

    def test_empty_state_with_counts_is_refused(self):
        state = Observer(8).state()
        state["counts"][0] = 1
        with pytest.raises(CalibrationError, match="empty"):
            Observer.from_state(state)
