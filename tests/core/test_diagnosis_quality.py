"""How well a grid fits values: against sums that are counted by hand, or over all values at once."""

import math

import numpy as np
import pytest

from trainable_core import TrainableQuantizerActivationConfig, TrainableQuantizerWeightsConfig
from trainable_core.diagnosis.quality import QualityMeter, decibels
from trainable_core.qparams import QParams, from_params
from trainable_core.reference import affine


def activation(method="SYMMETRIC", n_bits=3, **params):
    return TrainableQuantizerActivationConfig(
        activation_quantization_method=method,
        activation_n_bits=n_bits,
        activation_quantization_params=params,
        enable_activation_quantization=True,
        min_threshold=0.0,
    )


def weights(n_bits=3, axis=None, **more):
    return TrainableQuantizerWeightsConfig(
        weights_quantization_method="SYMMETRIC",
        weights_n_bits=n_bits,
        weights_quantization_params={},
        enable_weights_quantization=True,
        weights_channels_axis=axis,
        weights_per_channel_threshold=axis is not None,
        min_threshold=0.0,
        **more,
    )


def grid(n_bits=3, threshold=4.0, axis=None):
    return from_params(activation().quantization_method, n_bits, True, {"threshold": threshold}, 0.0, axis)


def meter_of(config, qparams, *batches, quantized=None):
    meter = QualityMeter(config, qparams)
    for batch in batches:
        made = affine.fake_quantize(batch, qparams) if quantized is None else quantized
        meter.update(batch, made)
    return meter


def test_figures_of_values_counted_by_hand():
    # steps of 1 from -4 to 3; 3.4 is rounded down to the last code, 3.6 and 9 are beyond it
    values = np.float32([0.0, 1.25, -2.0, 3.4, 3.6, 9.0])
    found = meter_of(activation(), grid(), values).quality(None)
    error = 0.25**2 + 0.4**2 + 0.6**2 + 6.0**2
    signal = 1.25**2 + 2.0**2 + 3.4**2 + 3.6**2 + 9.0**2
    assert found.sqnr == pytest.approx(10 * math.log10(signal / error), rel=1e-6)  # 3.4 and 3.6 are float32 numbers
    assert found.clipped == 2 / 6
    assert found.unused == 4 / 8  # codes 0, 1, -2 and 3 are used
    assert (found.low, found.high, found.minimum, found.maximum) == (-4.0, 3.0, -2.0, 9.0)
    assert (found.count, found.not_finite) == (6, 0)


def test_the_ends_of_a_table_are_its_levels():
    table = QParams(np.float32(1 / 128), np.int32(0), -128, 127, levels=(-64, 0, 32))
    values = np.float32([-0.5, 0.1, 0.3, 2.0])
    meter = QualityMeter(weights(), table)
    meter.update(values, affine.fake_quantize(values, table))
    found = meter.quality(None)
    assert (found.low, found.high, found.clipped) == (-0.5, 0.25, 0.25)


def test_batches_add_up_to_what_one_batch_gives():
    values = np.random.default_rng(0).normal(size=(64, 5)).astype(np.float32)
    whole = meter_of(activation(), grid(), values)
    parts = meter_of(activation(), grid(), *np.split(values, 4))
    one, other = (meter.quality(meter.calibrated_activation()) for meter in (whole, parts))
    assert one.sqnr == pytest.approx(other.sqnr, rel=1e-12)  # float64 sums in another order
    assert one.clipped == other.clipped
    assert one.unused == other.unused
    assert one.calibrated_sqnr == other.calibrated_sqnr


def test_values_that_are_not_finite_are_counted_and_nothing_else():
    values = np.float32([1.25, np.nan, np.inf, -2.0])
    found = meter_of(activation(), grid(), values).quality(None)
    without = meter_of(activation(), grid(), np.float32([1.25, -2.0])).quality(None)
    assert (found.count, found.not_finite) == (2, 2)
    assert found.sqnr == without.sqnr
    assert found.maximum == 1.25


def test_each_channel_counts_by_its_own_grid():
    values = np.float32([[1.0, 2.0], [100.0, 200.0]])
    own = grid(threshold=[4.0, 400.0], axis=0)
    found = meter_of(weights(axis=0), own, values).quality(None)
    assert found.sqnr == math.inf
    assert found.clipped == 0
    assert (found.low, found.high) == (-400.0, 300.0)


def test_groups_are_laid_out_as_their_thresholds_are():
    values = np.float32([[1.0, 2.0, 100.0, 200.0]])
    config = weights(axis=0, weights_group_size=2, weights_group_axis=1)
    found = QualityMeter(config, grid(threshold=[4.0, 400.0], axis=0))
    found.update(values, values)
    assert found.quality(None).clipped == 0


@pytest.mark.parametrize("factor", [0.1, 1.0, 30.0])
def test_the_calibrated_ratio_does_not_depend_on_the_threshold(factor):
    values = np.random.default_rng(0).normal(size=10_000).astype(np.float32)
    best = min(
        float(np.square(affine.fake_quantize(values, grid(8, t)) - values, dtype=np.float64).sum())
        for t in np.linspace(2, 6, 400)
    )
    meter = meter_of(activation(n_bits=8), grid(8, 4.0 * factor), values)
    signal = float(np.square(values, dtype=np.float64).sum())
    # the histogram has at least 16 bins for a step, so its error is off by less than a sixteenth: 0.6 dB at most
    assert meter.calibrated_activation() == pytest.approx(10 * math.log10(signal / best), abs=0.6)


def test_values_that_are_not_the_nearest_codes_have_no_calibrated_ratio():
    values = np.float32(np.linspace(-3, 3, 50))
    meter = meter_of(activation(), grid(), values, quantized=np.float32(np.floor(values)))
    assert not meter.rounds_to_nearest
    assert meter.calibrated_activation() is None


def test_a_grid_that_is_computed_from_the_tensor_has_no_codes():
    values = np.float32([1.0, 2.0])
    meter = QualityMeter(activation(), None)
    meter.update(values, values * np.float32(1.5))
    found = meter.quality(meter.calibrated_activation())
    assert found.sqnr == pytest.approx(20 * math.log10(2))
    assert found.unused is None
    assert found.calibrated_sqnr is None
    assert math.isnan(found.low)


def test_decibels_of_nothing():
    assert decibels(0.0, 1.0) == -math.inf
