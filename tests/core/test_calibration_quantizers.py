"""Calibration for a quantizer: each of its widths, by what its config and the recipe say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.core.home_backend import (
    activation_config,
    activation_quantizer,
    candidates,
    weights_config,
    weights_quantizer,
)
from trainable_core.calibration import Observer, calibrate_activation, calibrate_weights
from trainable_core.calibration.quantizers import activation_params, weights_params
from trainable_core.constants import SIGNED, THRESHOLD
from trainable_core.enums import CalibrationMethod
from trainable_core.errors import CalibrationError
from trainable_core.recipe.sections import CalibrationSection

VALUES = np.random.default_rng(0).standard_normal(4000).astype(np.float32)
WEIGHTS = VALUES[:12].reshape(2, 6)
PER_CHANNEL = {"weights_channels_axis": 1, "weights_per_channel_threshold": True}

SPECS = [
    CalibrationSection(weights=method, activations=method, percentile=90.0, p=3.0)
    for method in CalibrationMethod
    if method is not CalibrationMethod.KL
]
each_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: str(spec.weights))


def seen(values: Any) -> Observer:
    """Return an observer that has seen values."""
    observer = Observer()
    observer.update(values)
    return observer


@each_spec
@pytest.mark.parametrize("method", ["SYMMETRIC", "POWER_OF_TWO", "UNIFORM"])
def test_an_activation_is_calibrated_as_config_and_recipe_say(method: str, spec: CalibrationSection):
    quantizer = activation_quantizer(activation_config(method=method, min_threshold=0.125))
    assert activation_params(quantizer, seen(VALUES), spec) == {
        4: calibrate_activation(
            seen(VALUES),
            calibration_method=spec.activations,
            quantization_method=method,
            n_bits=4,
            min_threshold=0.125,
            percentile=90.0,
            p=3.0,
        )
    }


@each_spec
@pytest.mark.parametrize("fields", [{}, PER_CHANNEL], ids=["per tensor", "per channel"])
def test_weights_are_calibrated_as_config_and_recipe_say(fields: dict[str, Any], spec: CalibrationSection):
    quantizer = weights_quantizer(weights_config(min_threshold=0.125, **fields), WEIGHTS.shape)
    assert weights_params(quantizer, WEIGHTS, spec) == {
        4: calibrate_weights(
            WEIGHTS,
            calibration_method=spec.weights,
            quantization_method="SYMMETRIC",
            n_bits=4,
            channels_axis=1 if fields else None,
            min_threshold=0.125,
            percentile=90.0,
            p=3.0,
        )
    }


def test_each_width_gets_its_own_threshold():
    spec = CalibrationSection(weights=CalibrationMethod.MSE, activations=CalibrationMethod.MSE)
    weights = weights_quantizer(weights_config(weights_quantization_candidates=candidates(2, 8)))
    activation = activation_quantizer(activation_config(activation_quantization_candidates=candidates(2, 8)))
    for params in (weights_params(weights, VALUES, spec), activation_params(activation, seen(VALUES), spec)):
        # fewer codes, coarser steps: clipping more of a bell curve costs less than rounding all of it
        assert params[2][THRESHOLD] < params[8][THRESHOLD]


def test_the_result_is_what_the_quantizer_takes():
    quantizer = weights_quantizer(weights_config(**PER_CHANNEL), WEIGHTS.shape)
    params = weights_params(quantizer, WEIGHTS, CalibrationSection(weights=CalibrationMethod.MINMAX))
    quantizer.set_quantization_params(params)
    assert quantizer.get_quantizer_variable(THRESHOLD).tolist() == params[4][THRESHOLD]


@pytest.mark.parametrize(("lowest", "signed"), [(0.0, False), (-0.5, True)])
def test_a_negative_value_makes_an_activation_signed(lowest: float, *, signed: bool):
    quantizer = activation_quantizer(activation_config())
    params = activation_params(quantizer, seen([lowest, 1.0]), CalibrationSection())
    assert params[4][SIGNED] is signed


@pytest.mark.parametrize("signed", [True, False])
def test_a_sign_that_is_decided_stays(*, signed: bool):
    quantizer = activation_quantizer(activation_config({SIGNED: signed}))
    for lowest in (-0.5, 0.0):
        assert activation_params(quantizer, seen([lowest, 1.0]), CalibrationSection())[4][SIGNED] is signed


def test_all_widths_share_one_sign():
    # a single small negative value: 99.99 per cent leaves it out, the sign counts it
    quantizer = activation_quantizer(activation_config(activation_quantization_candidates=candidates(1, 2, 8)))
    params = activation_params(quantizer, seen(np.append(np.abs(VALUES), np.float32(-1e-3))), CalibrationSection())
    assert [each[SIGNED] for each in params.values()] == [True, True, True]


def test_a_tensor_no_batch_has_reached_is_named():
    with pytest.raises(CalibrationError, match=r"fc: input: no batch reached it(.|\n)*skip") as caught:
        activation_params(activation_quantizer(activation_config()), Observer(), CalibrationSection())
    assert caught.value.subject == "fc: input"


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (np.array([[1.0, np.nan, np.inf]]), "1 NaN and 1 infinite"),
        (np.zeros((2, 0)), "empty"),
        (np.array(["a"]), "dtype"),
    ],
    ids=["not finite", "empty", "no numbers"],
)
def test_weights_that_give_no_threshold_are_named(values: Any, problem: str):
    quantizer = weights_quantizer(weights_config())
    with pytest.raises(CalibrationError, match=rf"fc\.weight: .*{problem}") as caught:
        weights_params(quantizer, values, CalibrationSection())
    assert caught.value.subject == "fc.weight"
    assert not quantizer.calibrated
