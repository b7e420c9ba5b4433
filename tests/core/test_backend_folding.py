"""Folding a normalization into quantized weights: codes stay, scales take the gain, or a reason says why not."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from trainable_core import QuantizationMethod, QuantizationRecipe
from trainable_core.backend.folding import fold_codes
from trainable_core.errors import UnsupportedConfigError
from trainable_core.qparams import QParams, shorten_scale
from trainable_core.reference import affine
from trainable_core.reference.oscillation import codes

SYMMETRIC, UNIFORM = QuantizationMethod.SYMMETRIC, QuantizationMethod.UNIFORM
GAINS = hnp.arrays(np.float64, 3, elements=st.floats(-(2.0**20), 2.0**20))
CODES = hnp.arrays(np.int32, (2, 3), elements=st.integers(0, 15))


def grid_of(method):
    scale = shorten_scale(np.array([0.3, 1.0, 7e-4], np.float32), 4)
    if method is UNIFORM:
        return QParams(scale, np.array([0, 15, 6], np.int32), 0, 15, 1)
    return QParams(scale, np.zeros(3, np.int32), -8, 7, 1)


@given(CODES, GAINS, st.sampled_from([SYMMETRIC, UNIFORM]))
def test_codes_stay_up_to_the_sign_and_values_are_multiplied(given_codes, gain, method):
    grid = grid_of(method)
    counted = given_codes + grid.quant_min - grid.zero_point
    values = (counted * grid.scale).astype(np.float32)
    found = fold_codes(values, grid, method, 4, gain, 1)
    lowest = ((counted == -8) & (gain < 0)).any()
    if isinstance(found, str):
        assert method is SYMMETRIC
        assert lowest
        assert "negative gain" in found
        return
    folded, new = found
    alive = grid.scale.astype(np.float64) * np.abs(gain) >= 2.0**-116
    assert np.array_equal(codes(folded, new), counted * np.sign(gain) * alive)
    assert np.array_equal(affine.fake_quantize(folded, new), folded)  # what is deployed is what is stored
    # the scale is rounded to float32, or to 20 bits, and the product once more; a dead channel is below 2**-112
    np.testing.assert_allclose(folded, values * gain, rtol=2.0**-19, atol=2.0**-112)


@pytest.mark.parametrize(
    ("method", "gain", "axis", "told"),
    [
        (SYMMETRIC, [1.0, 2.0, 3.0], 0, "no scale for each output channel"),
        (SYMMETRIC, [1.0, 2.0], 1, "no scale for each output channel"),
        (QuantizationMethod.POWER_OF_TWO, [1.0, 2.0, 3.0], 1, "no power of two"),
        (QuantizationMethod.LUT_SYM_QUANTIZER, [1.0, 2.0, 3.0], 1, "values of a table"),
        (SYMMETRIC, [1.0, 2.0, 1e38], 1, "not finite"),
    ],
)
def test_what_can_t_be_folded_is_told(method, gain, axis, told):
    values = np.zeros((2, 3), np.float32)
    assert told in fold_codes(values, grid_of(SYMMETRIC), method, 4, np.array(gain), axis)


def test_powers_of_two_stay_powers_of_two():
    grid = QParams(np.array([0.5, 0.25], np.float32), np.zeros(2, np.int32), -8, 7, 0)
    _, new = fold_codes(
        np.zeros((2, 2), np.float32), grid, QuantizationMethod.POWER_OF_TWO, 4, np.array([4.0, -0.5]), 0
    )
    assert new.scale.tolist() == [2.0, 0.125]


W4 = {"weights": {"method": "SYMMETRIC", "n_bits": 4, "training_method": "LSQ"}}


@pytest.mark.parametrize(
    ("said", "meant"), [(True, "before"), ("before",) * 2, ("training",) * 2, ("after",) * 2, (False, None)]
)
def test_when_a_recipe_folds(said, meant):
    recipe = QuantizationRecipe.of({**W4, "fold_batch_norm": said})
    assert recipe.folds == meant
    assert QuantizationRecipe.model_validate_json(recipe.model_dump_json()) == recipe


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"fold_batch_norm": "after", "bias": "int32"}, "int32 bias"),
        (
            {"fold_batch_norm": "after", "activations": {**W4["weights"], "placement": "outputs"}},
            "stands between it and its batch norm",
        ),
    ],
)
def test_what_can_t_be_folded_then_is_refused(more, told):
    with pytest.raises(UnsupportedConfigError, match=told):
        _ = QuantizationRecipe.of({**W4, **more}).folds


@pytest.mark.parametrize("said", ["later", 1, None, "After"])
def test_unknown_times_are_refused_when_the_recipe_is_read(said):
    with pytest.raises(ValueError, match="fold_batch_norm"):
        QuantizationRecipe.of({**W4, "fold_batch_norm": said})
