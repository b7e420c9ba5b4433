"""What calibration remembers of the values that passed by: exact ends, exact zeros and a histogram."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainable_core.errors import CalibrationError, InvalidArgumentError

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

MIN_BINS, N_BINS, MAX_BINS = 2, 8192, 2**16
"""Bounds and default of the number of bins. By default, one 8-bit step of the full range holds 16 to 32 of them."""

CHUNK = 2**15
"""Elements worked on at once, so that temporaries stay in the cache whatever the size of a tensor."""


def finite_float32(values: ArrayLike, subject: str) -> Float32:
    """Return values as a float32 array, the precision quantizers compute in.

    Raises
    ------
    CalibrationError
        When the values aren't real numbers, or any is NaN, infinite or beyond float32; the message says how many.
    """
    given = np.asarray(values)
    if given.dtype.kind not in "biuf":
        problem = f"values must be real numbers, got dtype {given.dtype}"
        raise CalibrationError(subject, problem, "convert to float32 first.")
    with np.errstate(over="ignore", under="ignore"):  # float64 beyond float32 turns to infinity and is counted below
        array = given.astype(np.float32, copy=False)
    with np.errstate(invalid="ignore"):  # the ends of an array with NaN are NaN: looked for, not an accident
        ends = (array.min(), array.max()) if array.size else (0.0, 0.0)
    if not np.isfinite(ends).all():
        nan = int(np.isnan(array).sum())
        infinite = int(np.isinf(array).sum())
        problem = f"{nan} NaN and {infinite} infinite (or beyond float32) among {array.size} values"
        raise CalibrationError(subject, problem, "look for the layer whose output diverges, or the bad batch.")
    return array


def _window(low: float, high: float, n_bins: int) -> tuple[int, int, int]:
    """Return the finest ``(exponent, first, last)`` whose bins of width ``2**exponent`` hold zero and both ends."""
    low, high = min(low, 0.0), max(high, 0.0)
    if low == high:  # zeros are in no bin: any width does
        return 0, 0, 0
    # span / width < n_bins < 2**bit_length: no finer width can do
    exponent = math.frexp(high - low)[1] - n_bins.bit_length()
    while True:
        first, last = math.floor(math.ldexp(low, -exponent)), math.floor(math.ldexp(high, -exponent))
        if last - first < n_bins:
            return exponent, first, last
        exponent += 1


class Observer:
    """A streaming summary of values in bounded memory.

    Parameters
    ----------
    n_bins : int
        Most bins the histogram may have, 2 to 65536.

    Raises
    ------
    InvalidArgumentError
        When `n_bins` is out of bounds.

    Notes
    -----
    Values count as float32. `minimum` and `maximum` are exact. Exact zeros are counted apart, since every grid holds
    zero. All other values fall into bins ``[k * w, (k + 1) * w)``, k an integer of either sign and w a power of two:
    the smallest for which at most `n_bins` bins cover zero and all values seen. So w is less than ``2 * (max(maximum,
    0) - min(minimum, 0)) / (n_bins - 2)``, and a bin's centre is off by at most ``w / 2``.

    When larger values come, w doubles and neighbours merge: ``floor(floor(x / w) / 2) == floor(x / (2 * w))`` in exact
    arithmetic, and division by a power of two is exact. So counts are conserved, and the state depends on the values
    alone, not on how they were cut into batches, in which order they came or which ranks saw them.

    Examples
    --------
    >>> observer = Observer(n_bins=4)
    >>> observer.update([0.0, 0.5, 1.5, 3.5])
    >>> observer.counts, observer.edges, observer.zeros
    (array([1, 1, 0, 1]), array([0., 1., 2., 3., 4.]), 1)
    >>> observer.update([-4.0])
    >>> observer.counts, observer.edges
    (array([1, 0, 2, 1]), array([-4., -2.,  0.,  2.,  4.]))
    >>> observer.count, observer.minimum, observer.maximum
    (5, -4.0, 3.5)
    """

    def __init__(self, n_bins: int = N_BINS) -> None:
        if (
            isinstance(n_bins, bool)
            or not hasattr(n_bins, "__index__")
            or not MIN_BINS <= operator.index(n_bins) <= MAX_BINS
        ):
            raise InvalidArgumentError(
                "Observer", f"n_bins must be an integer from {MIN_BINS} to {MAX_BINS}, got {n_bins!r}"
            )
        self._n_bins = operator.index(n_bins)
        self._low, self._high = math.inf, -math.inf
        self._zeros = 0
        self._exponent, self._first = _window(0.0, 0.0, self._n_bins)[:2]
        self._counts: Int64 = np.zeros(1, np.int64)

    def __repr__(self) -> str:
        """Return what was seen in one line."""
        seen = "empty" if self.empty else f"count={self.count}, minimum={self._low}, maximum={self._high}"
        return f"{type(self).__name__}({seen})"

    @property
    def n_bins(self) -> int:
        """Most bins the histogram may have."""
        return self._n_bins

    @property
    def empty(self) -> bool:
        """Whether no value was seen yet."""
        return self._low > self._high

    @property
    def count(self) -> int:
        """How many values were seen."""
        return self._zeros + int(self._counts.sum())

    @property
    def zeros(self) -> int:
        """How many of them were exactly zero; they are in no bin."""
        return self._zeros

    @property
    def minimum(self) -> float:
        """Smallest value seen, exact; CalibrationError when there was none."""
        return self._end(self._low)

    @property
    def maximum(self) -> float:
        """Largest value seen, exact; CalibrationError when there was none."""
        return self._end(self._high)

    @property
    def counts(self) -> Int64:
        """Histogram of the values other than zero, a copy; shape (K,), K at most `n_bins`."""
        return self._counts.copy()

    @property
    def edges(self) -> Float64:
        """Edges of the bins, ascending, multiples of a power of two; shape (K + 1,)."""
        return np.ldexp(np.arange(self._counts.size + 1, dtype=np.float64) + self._first, self._exponent)

    def update(self, values: ArrayLike) -> None:
        """Take in values.

        Parameters
        ----------
        values : array of real numbers, any shape, empty included

        Raises
        ------
        CalibrationError
            When any is NaN or infinite; the observer is then as it was before.
        """
        array = finite_float32(values, "Observer.update").ravel()
        if not array.size:
            return
        self._cover(float(array.min()), float(array.max()))
        for start in range(0, array.size, CHUNK):
            chunk = array[start : start + CHUNK]
            chunk = chunk[chunk != 0].astype(np.float64)
            self._zeros += min(CHUNK, array.size - start) - chunk.size
            index = np.floor(np.ldexp(chunk, -self._exponent)).astype(np.int64) - self._first
            self._counts += np.bincount(index, minlength=self._counts.size)

    def merge(self, other: Observer) -> None:
        """Take in everything that another observer has seen; the other one stays as it is.

        Raises
        ------
        CalibrationError
            When the two have different `n_bins`.
        """
        if other.n_bins != self._n_bins:
            problem = f"can't merge an observer of {other.n_bins} bins into one of {self._n_bins}"
            raise CalibrationError("Observer.merge", problem)
        if other.empty:
            return
        seen = other.counts, other._exponent, other._first  # read before anything moves: it may be self
        zeros = other.zeros
        self._cover(other.minimum, other.maximum)
        self._add(*seen)
        self._zeros += zeros

    def state(self) -> dict[str, NDArray[Any]]:
        """Return the whole state as plain arrays.

        Returns
        -------
        dict
            ``counts`` int64 (n_bins,), zeros behind the bins in use; ``zeros`` int64 (); ``minimum`` and ``maximum``
            float64 (), plus and minus infinity when empty. Widths and edges follow from these. Shapes are the same at
            any time, so ranks can exchange states by collectives of fixed size.
        """
        counts = np.zeros(self._n_bins, np.int64)
        counts[: self._counts.size] = self._counts
        return {
            "counts": counts,
            "zeros": np.asarray(self._zeros, np.int64),
            "minimum": np.asarray(self._low, np.float64),
            "maximum": np.asarray(self._high, np.float64),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, ArrayLike]) -> Observer:
        """Return the observer whose `state` this is.

        Raises
        ------
        CalibrationError
            When an array is missing or the numbers contradict each other.
        """
        missing = [key for key in ("counts", "zeros", "minimum", "maximum") if key not in state]
        if missing:
            raise CalibrationError("Observer.from_state", f"missing: {', '.join(missing)}")
        counts, zeros = np.asarray(state["counts"]), np.asarray(state["zeros"])
        low, high = np.asarray(state["minimum"]), np.asarray(state["maximum"])
        if counts.ndim != 1 or counts.dtype.kind not in "iu" or not MIN_BINS <= counts.size <= MAX_BINS:
            raise CalibrationError(
                "Observer.from_state", f"counts must be {MIN_BINS} to {MAX_BINS} integers in one dimension"
            )
        if zeros.ndim or zeros.dtype.kind not in "iu" or any(end.ndim or end.dtype.kind != "f" for end in (low, high)):
            raise CalibrationError("Observer.from_state", "zeros must be an integer, minimum and maximum floats")
        observer = cls(counts.size)
        if low > high:
            if not (low == np.inf and high == -np.inf) or counts.any() or zeros:
                raise CalibrationError("Observer.from_state", "an empty observer has no counts and infinite ends")
            return observer
        if not np.isfinite([low, high]).all() or counts.min() < 0 or zeros < 0:
            raise CalibrationError("Observer.from_state", "ends must be finite and counts must not be negative")
        observer._cover(float(low), float(high))
        used = observer._counts.size
        fits = [
            not counts[used:].any(),
            counts[0] > 0 or low >= 0,  # the bin of the minimum
            counts[used - 1] > 0 or high <= 0,  # the bin of the maximum
            zeros > 0 or low * high != 0,
            zeros == 0 or low <= 0 <= high,
        ]
        if not all(fits):
            raise CalibrationError("Observer.from_state", "counts don't fit the minimum and the maximum")
        observer._counts += counts[:used].astype(np.int64)
        observer._zeros = int(zeros)
        return observer

    def _end(self, end: float) -> float:
        if self.empty:
            raise CalibrationError("Observer", "has seen no values", "feed calibration data first.")
        return end

    def _cover(self, low: float, high: float) -> None:
        """Widen the histogram to hold `low` and `high`."""
        self._low, self._high = min(self._low, low), max(self._high, high)
        counts, exponent, first = self._counts, self._exponent, self._first
        self._exponent, self._first, last = _window(self._low, self._high, self._n_bins)
        self._counts = np.zeros(last - self._first + 1, np.int64)
        self._add(counts, exponent, first)

    def _add(self, counts: Int64, exponent: int, first: int) -> None:
        """Add a histogram of finer or equal bins, inside the present window."""
        (used,) = np.nonzero(counts)
        if not used.size:
            return
        shift = min(self._exponent - exponent, 62)  # NumPy shifts int64 by at most 63; indices are far below 2**62
        np.add.at(self._counts, ((used + first) >> shift) - self._first, counts[used])
