"""A grid to the arguments of mctq's Keras quantizers and back."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.toy_keras import ActivationDeployed, Deployed
from trainable_core.backend.inferable import by_grid, grid_of_arguments, mctq_arguments, target_and_method
from trainable_core.enums import QuantizationMethod, QuantizationTarget
from trainable_core.qparams import from_params

WEIGHTS, ACTIVATION = QuantizationTarget.Weights, QuantizationTarget.Activation
SYMMETRIC, UNIFORM = QuantizationMethod.SYMMETRIC, QuantizationMethod.UNIFORM


def test_weights_per_channel_have_an_axis_counted_from_the_front():
    grid = from_params(SYMMETRIC, 4, signed=True, params={"threshold": [1.0, 2.0]}, channels_axis=-1)
    assert mctq_arguments(grid, 4, 3, WEIGHTS, SYMMETRIC) == {
        "num_bits": 4,
        "threshold": [1.0, 2.0],
        "per_channel": True,
        "channel_axis": 2,
        "input_rank": 3,
    }


def test_activations_tell_their_sign_and_ranges_do_not():
    grid = from_params(SYMMETRIC, 4, signed=False, params={"threshold": 3.0})
    assert mctq_arguments(grid, 4, 0, ACTIVATION, SYMMETRIC) == {"num_bits": 4, "threshold": [3.0], "signed": False}
    grid = from_params(UNIFORM, 2, signed=True, params={"range_min": -1.0, "range_max": 2.0})
    assert mctq_arguments(grid, 2, 0, ACTIVATION, UNIFORM) == {"num_bits": 2, "min_range": [-1.0], "max_range": [2.0]}


magnitudes = st.floats(2.0**-40, 2.0**60, width=32)


@pytest.mark.parametrize("method", [SYMMETRIC, QuantizationMethod.POWER_OF_TWO, UNIFORM], ids=str)
@given(st.lists(st.tuples(magnitudes, magnitudes), min_size=1, max_size=3), st.integers(1, 16))
def test_the_round_trip_through_json_keeps_every_bit(method, pairs, n_bits):
    lows, highs = zip(*pairs, strict=True)
    params = (
        {"range_min": [-low for low in lows], "range_max": list(highs)}
        if method is UNIFORM
        else {"threshold": list(highs)}
    )
    grid = from_params(method, n_bits, signed=True, params=params, channels_axis=1)
    document = json.loads(json.dumps(mctq_arguments(grid, n_bits, 2, WEIGHTS, method)))
    again, width, ndim = grid_of_arguments(document, method)
    assert (width, ndim, again.channels_axis) == (n_bits, 2, 1)
    assert (again.quant_min, again.quant_max) == (grid.quant_min, grid.quant_max)
    assert np.array_equal(again.scale, grid.scale)
    assert np.array_equal(again.zero_point, grid.zero_point)


def test_classes_are_found_by_target_and_grid():
    assert target_and_method(Deployed) == (WEIGHTS, SYMMETRIC)
    assert by_grid(Deployed, ActivationDeployed) == {
        (WEIGHTS, SYMMETRIC): Deployed,
        (ACTIVATION, SYMMETRIC): ActivationDeployed,
    }


def test_a_deployed_quantizer_tells_its_grid_from_its_variables():
    grid = from_params(SYMMETRIC, 4, signed=True, params={"threshold": [1.0, 2.0]}, channels_axis=-1)
    deployed = Deployed(grid, 4, 2)
    assert deployed.grid_scale.value.shape == (1, 2)
    assert np.array_equal(deployed.qparams.scale, grid.scale)
    assert (deployed.params, deployed.per_channel) == ({"threshold": [1.0, 2.0], "is_signed": True}, True)
    assert deployed.initialize_quantization((2, 2), "x", None) == {}
    deployed.grid_scale.value *= 2  # as loading a file does
    assert deployed.mctq_arguments()["threshold"] == [2.0, 4.0]
