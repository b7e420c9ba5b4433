"""The terms of distillation by hand, and their gradients against differences."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from trainable_core.errors import InvalidArgumentError
from trainable_core.reference.distillation import checked_weights, features_term, logits_term

LOGITS = hnp.arrays(np.float64, (3, 4), elements=st.floats(-8, 8))


def test_equal_logits_cost_nothing_up_to_a_shift():
    x = np.arange(6.0).reshape(2, 3)
    assert logits_term(x, x + 5, 2.0)[0] == pytest.approx(0.0, abs=1e-12)


def test_by_hand():
    # p = (1/4, 3/4), q = (1/2, 1/2): 1/4 ln(1/2) + 3/4 ln(3/2), the mean of this and of a row of zero
    term, gradient = logits_term([[0.0, 0.0], [1.0, 1.0]], [[0.0, np.log(3.0)], [2.0, 2.0]])
    assert term == pytest.approx((0.25 * np.log(0.5) + 0.75 * np.log(1.5)) / 2)
    np.testing.assert_allclose(gradient, [[0.125, -0.125], [0, 0]], atol=1e-15)
    assert features_term([1.0, 2.0], [0.0, 4.0])[0] == 2.5


@given(LOGITS, LOGITS, st.sampled_from([0.5, 1.0, 4.0]), st.sampled_from([0, 1]))
def test_gradients_are_those_of_the_terms(student, teacher, temperature, axis):
    h = 1e-5
    _, gradient = logits_term(student, teacher, temperature, axis)
    _, of_features = features_term(student, teacher)
    for place in [(0, 0), (2, 3)]:
        there, back = student.copy(), student.copy()
        there[place] += h
        back[place] -= h
        # a central difference: an error of h**2 times a third derivative below 4 / T**2, and rounding of 1e-15 / h
        found = (
            logits_term(there, teacher, temperature, axis)[0] - logits_term(back, teacher, temperature, axis)[0]
        ) / (2 * h)
        assert found == pytest.approx(gradient[place], abs=1e-8)
        found = (features_term(there, teacher)[0] - features_term(back, teacher)[0]) / (2 * h)
        assert found == pytest.approx(of_features[place], abs=1e-8)


def test_factors_by_name():
    assert checked_weights(1, 1, ["a"], ["a", "b"], ["a"]) == {"a": 1.0}
    assert checked_weights(1, 0, {"a": 2}, ["a"], ["a"]) == {"a": 2.0}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((0, 1, None), "temperature"),
        ((1, -1, None), "logits"),
        ((1, True, None), "logits"),
        ((float("inf"), 1, None), "temperature"),
        ((1, 1, "body"), "names of layers"),
        ((1, 1, ["bodi"]), "did you mean 'body'"),
        ((1, 1, {"body": -1}), "factor of 'body'"),
        ((1, 1, ["only"]), "the teacher has no layer 'only'"),
        ((1, 0, None), "nothing would be learned"),
    ],
)
def test_wrong_arguments_are_refused(arguments, told):
    with pytest.raises(InvalidArgumentError, match=told):
        checked_weights(*arguments, ["body", "only"], ["body"])
