"""Costs of outputs against their definitions, and their gradients against differences."""

import math

import numpy as np
import pytest

from trainable_core.diagnosis.objective import Average, Objective
from trainable_core.errors import CalibrationError, InvalidArgumentError

RANDOM = np.random.default_rng(0)
REFERENCE, VALUES = RANDOM.normal(size=(2, 6, 4)).astype(np.float32)


def softmax(x, axis=-1):
    e = np.exp(np.asarray(x, np.float64))
    return e / e.sum(axis=axis, keepdims=True)


def cost(objective, values, reference):
    return objective.cost(None, values, reference, None)


def test_divergence_is_that_of_the_definition():
    p, q = softmax(REFERENCE), softmax(VALUES)
    expected = (p * np.log(p / q)).sum() / 6
    assert cost(Objective(), VALUES, REFERENCE) == (pytest.approx(expected, rel=1e-12), 6.0)


def test_divergence_along_another_axis():
    p, q = softmax(REFERENCE, 0), softmax(VALUES, 0)
    expected = (p * np.log(p / q)).sum() / 4
    assert cost(Objective(axis=0), VALUES, REFERENCE)[0] == pytest.approx(expected, rel=1e-12)


def test_probabilities_are_taken_as_such():
    p, q = softmax(REFERENCE), softmax(VALUES)
    of_logits = cost(Objective(), VALUES, REFERENCE)[0]
    # float32 probabilities have 24 bits
    assert cost(Objective(), q.astype(np.float32), p.astype(np.float32))[0] == pytest.approx(of_logits, rel=1e-5)


def test_squared_error_is_relative_to_the_energy():
    reference, values = np.float32([3.0, 4.0]), np.float32([3.0, 5.0])
    assert cost(Objective("mse"), values, reference) == (1 / 25, 25.0)


@pytest.mark.parametrize("metric", ["kl", "mse"])
@pytest.mark.parametrize("given", ["logits", "probabilities"])
def test_the_gradient_is_that_of_the_cost(metric, given):
    reference, values = (REFERENCE, VALUES) if given == "logits" else (softmax(REFERENCE), softmax(VALUES))
    objective = Objective(metric)
    gradient = objective.upstream(values, reference)
    direction = RANDOM.normal(size=values.shape)
    if given == "probabilities":
        direction -= direction.mean(axis=-1, keepdims=True)  # they still sum up to one
    h = 1e-5
    ends = [cost(objective, values + sign * h * direction, reference)[0] for sign in (1, -1)]
    # central differences are off by h**2, and rounding by 1e-16 / h; the gradient is float32
    assert float((gradient * direction).sum()) == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-5, abs=1e-7)


def test_a_metric_of_the_user_s_counts_downwards_where_greater_is_better():
    def accuracy(outputs, batch):
        return outputs * batch

    assert Objective(accuracy).cost(3.0, None, None, 2.0) == (-6.0, 1.0)
    assert Objective(accuracy, greater_is_better=False).cost(3.0, None, None, 2.0) == (6.0, 1.0)
    assert Objective(accuracy).name == "accuracy"


def test_outputs_that_are_not_finite_are_infinitely_bad():
    values = VALUES.copy()
    values[0, 0] = np.nan
    assert cost(Objective(), values, REFERENCE)[0] == math.inf
    average = Average()
    average.add(1.0)
    average.add(math.nan)
    assert average.value == math.inf


def test_averages_are_weighted():
    average = Average()
    average.add(1.0, 3.0)
    average.add(5.0, 1.0)
    assert average.value == 2.0


@pytest.mark.parametrize(
    ("call", "error", "fact"),
    [
        (lambda: Objective("accuracy"), InvalidArgumentError, "'accuracy'"),
        (lambda: Objective(axis=True), InvalidArgumentError, "True"),
        (lambda: Objective().check(*np.ones((2, 3, 1))), InvalidArgumentError, "(3, 1)"),
        (lambda: Objective(axis=2).check(*np.ones((2, 3, 2))), InvalidArgumentError, "no axis 2"),
        (lambda: Objective().check(*np.full((2, 3, 2), np.nan)), CalibrationError, "not finite"),
        (lambda: Objective("mse").check(np.ones((3, 1)), np.ones((3, 2))), InvalidArgumentError, "(3, 1)"),
        (lambda: Objective(lambda *_: math.nan).cost_of_float(1, None, None, 1), InvalidArgumentError, "nan"),
        (lambda: Objective(lambda outputs, batch: None).cost(1, None, None, 1), InvalidArgumentError, "NoneType"),
    ],
)
def test_what_is_refused(call, error, fact):
    with pytest.raises(error, match=fact.replace("(", r"\(").replace(")", r"\)")):
        call()
