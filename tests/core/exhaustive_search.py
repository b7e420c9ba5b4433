"""An exhaustive search for the range of least error, written without the library's: the reference for the fast one."""

import numpy as np

from trainable_core.constants import RANGE_MAX, RANGE_MIN, THRESHOLD
from trainable_core.enums import QuantizationMethod
from trainable_core.qparams import bound_threshold, from_params, lower_bound, power_of_two_ceil
from trainable_core.reference import affine

UNIFORM, POWER_OF_TWO = QuantizationMethod.UNIFORM, QuantizationMethod.POWER_OF_TWO
COARSE = np.concatenate([np.arange(0, 3, 1 / 32), np.arange(3, 16.25, 1 / 4)])  # octaves below the largest candidate
FINE = [k / 16 for k in range(-15, 16) if k]


def error(row, params, method, n_bits, p):
    """Mean of the p-th power of the distances of a row (n,) from its fake-quantized values, over the largest value."""
    row = np.asarray(row, np.float32)
    grid = from_params(method, n_bits, True, params)
    unit = max(float(np.abs(row).max()), 2.0**-149)
    distance = np.abs(row.astype(np.float64) - affine.fake_quantize(row, grid)) / unit
    return float(np.mean(distance**p))


def bounded(low, high, method, min_threshold):
    """Return the params nearest to a range, in the bounds of configs."""
    if method is not UNIFORM:
        threshold = bound_threshold(min(high, 2.0**100), min_threshold)
        return {THRESHOLD: float(power_of_two_ceil(threshold) if method is POWER_OF_TWO else threshold)}
    low, high = (float(np.float32(np.clip(end, -(2.0**99), 2.0**99))) for end in (low, high))
    width = float(lower_bound(min_threshold))
    if high - low < width:
        low, high = (low, width) if high >= -low else (-width, high)
    return {RANGE_MIN: low, RANGE_MAX: high}


def exhaustive_search(row, method, n_bits, p, min_threshold):
    """Return the best error and its params among 24, 180 or 538 candidates, swept one after the other."""
    low, high = min(float(np.min(row)), 0.0), max(float(np.max(row)), 0.0)
    if method is not UNIFORM:
        low, high = -max(high, -low), max(high, -low)
    last = 2 ** (n_bits - 1) - 1
    top = 0.0 if method is UNIFORM or not last else np.log2((last + 1) / last)
    best = bounded(low, high, method, min_threshold)
    least, place = error(row, best, method, n_bits, p), (0.0, 0.0)

    def sweep(places):
        nonlocal least, best, place
        for each in places:
            params = bounded(low * 2.0 ** each[0], high * 2.0 ** each[1], method, min_threshold)
            found = error(row, params, method, n_bits, p)
            if found < least:
                least, best, place = found, params, each

    if method is POWER_OF_TWO:
        sweep([(top - octave,) * 2 for octave in range(24)])
        return least, best
    moves = [(1, 1), (0, 1), (1, 0)] if method is UNIFORM and low and high else [(1, 1)]
    for moving in moves:
        sweep([tuple(top - octave if moves else at for moves, at in zip(moving, place)) for octave in COARSE])  # noqa: B905 - pairs
    for moving in moves:
        spacing = [1 / 32 if octave > -3 else 1 / 4 for octave in place]
        sweep([tuple(at + moves * width * step for moves, at, width in zip(moving, place, spacing)) for step in FINE])  # noqa: B905 - pairs
    return least, best
