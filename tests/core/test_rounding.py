"""The rounding gradients, by hand and against what they are derivatives of."""

import math

import numpy as np
import pytest

from trainable_core.enums import TieRule
from trainable_core.errors import InvalidArgumentError
from trainable_core.qparams import QParams
from trainable_core.reference import lsq, rounding, ste
from trainable_core.reference.rounding import Rounding, checked, of_arguments, slopes, through

GRID = QParams(np.float32(0.5), np.int32(0), -2, 1)
EVEN = TieRule.HALF_EVEN
EXACT = 64 * 2.0**-53  # a few dozen float64 operations


def test_ewgs_scales_by_the_rounding_error_and_the_sign():
    # Lee et al., equation 4: v = 0.25 of a range of 3 steps; 1 + 3 * 0.25 / 3 for a positive gradient
    x, upstream = np.array([0.125, 0.125]), np.array([4.0, -4.0])
    found = through(ste.gradients(x, upstream, GRID), x, upstream, GRID, Rounding("ewgs", 3.0), tie_rule=EVEN)
    assert found.x.tolist() == [5.0, -3.0]


def test_the_scale_follows_by_the_product_rule():
    # y = s * round(x / s): dy/ds = round(v) - slope * v = 0 - 1.25 * 0.25, against 0 - 0.25 of LSQ; outside as LSQ
    x, upstream = np.array([0.125, 9.0]), np.ones(2)
    plain = lsq.gradients(x, upstream, GRID)
    g = lsq.gradient_scale(2, 1)
    found = through(plain, x, upstream, GRID, Rounding("ewgs", 3.0), tie_rule=EVEN, constant=g)
    np.testing.assert_allclose(found.scale, (1 - 1.25 * 0.25) * g, rtol=EXACT)
    assert found.x.tolist() == [1.25, 0.0]
    assert found.zero_point == plain.zero_point


def test_the_fourier_surrogate_is_flat_at_codes_and_straight_at_ties():
    wave = math.sqrt(2) * math.pi * 0.2
    found = slopes([3.0, 3.5, 2.75], [3.0, 4.0, 3.0], np.ones(3), Rounding("fourier", 0.2), 7)
    quarter = wave * math.sqrt(0.5)  # the cosine of an eighth of a period
    expected = [(1 - wave) / (1 + wave), 1.0, (1 - quarter) / (1 + quarter)]
    np.testing.assert_allclose(found, expected, rtol=EXACT)


def test_dsq_is_the_derivative_of_the_soft_staircase():
    alpha, h = 0.3, 2.0**-20
    k = math.log(2 / alpha - 1)

    def soft(v):  # Gong et al., equations 3 to 6, in steps of the grid
        middle = np.floor(v) + 0.5
        return middle + np.tanh(k * (v - middle)) / (1 - alpha) / 2

    v = np.array([-1.9, -0.3, 0.25, 0.5, 0.75])
    found = slopes(v, np.rint(v), np.ones(5), Rounding("dsq", alpha), 3)
    # a central difference is off by h**2 / 6 times the third derivative, which is below 4 k**3 = 21
    np.testing.assert_allclose(found, (soft(v + h) - soft(v - h)) / (2 * h), atol=4 * h * h + 2.0**-30)
    # the staircase climbs by one from code to code
    sweep = (np.arange(2**12) + 0.5) / 2**12
    assert abs(slopes(sweep, np.rint(sweep), np.ones(2**12), Rounding("dsq", alpha), 3).mean() - 1) < 2.0**-20


@pytest.mark.parametrize("name", rounding.STRENGTHS)
def test_a_surrogate_has_a_default_within_its_bounds(name):
    made = checked(name, None, "q")
    assert made.is_straight_through == (name == "ste")
    assert of_arguments(made.arguments) == made


@pytest.mark.parametrize(
    ("name", "strength", "fact"),
    [
        ("steps", None, "ste"),
        (3, None, "3"),
        ("ste", 0.5, "none"),
        ("ewgs", -1.0, "-1.0"),
        ("ewgs", True, "True"),
        ("dsq", 0.5, "0.45"),
        ("dsq", math.nan, "nan"),
        ("fourier", 0.23, "0.22"),
        ("fourier", "much", "much"),
    ],
)
def test_a_wrong_option_is_refused(name, strength, fact):
    with pytest.raises(InvalidArgumentError, match=fact) as caught:
        checked(name, strength, "fc.weight")
    assert caught.value.subject.startswith("fc.weight: rounding")
