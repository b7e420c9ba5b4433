"""The axis of the output channels, found by what changes at a layer's output."""

import numpy as np
import pytest

from trainable_core.diagnosis.axes import output_axis

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(5, 7, 6))


def linear(weight):
    return X @ weight.T


def linear_of_keras(weight):
    return X @ weight


def depthwise_with_multiplier(weight):  # (channels, multiplier), the outputs channel by channel
    return (X[..., None] * weight).reshape(5, 7, -1)


def recurrent(weight):
    state = np.zeros((7, weight.shape[0]))
    for x in X:
        state = np.tanh(np.resize(x, state.shape) + state @ weight)
    return state


def two_directions(weight):  # behind each other; the weight, of three gates, is the second one's
    gates = linear(weight).reshape(5, 7, 3, -1)
    return np.concatenate([X, np.tanh(gates).prod(axis=2) @ np.ones((6, 6))], axis=-1)


def softmax(weight):
    e = np.exp(linear(weight))
    return e / e.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize(
    ("layer", "shape", "right"),
    [
        (linear, (4, 6), 0),
        (linear, (6, 6), 0),
        (lambda w: np.maximum(linear(w), 0), (4, 6), 0),
        (lambda w: linear(w).transpose(0, 2, 1), (3, 6), 0),
        (linear_of_keras, (6, 4), 1),
        (linear_of_keras, (6, 6), 1),
        (depthwise_with_multiplier, (6, 2), 0),
        (depthwise_with_multiplier, (6, 1), 0),
    ],
)
def test_the_other_axis_is_found_to_be_wrong(layer, shape, right):
    weight = RANDOM.normal(size=shape)
    assert output_axis(weight, right, layer) is None
    assert output_axis(weight, right - len(shape), layer) is None
    assert output_axis(weight, 1 - right, layer) == right


@pytest.mark.parametrize("layer", [recurrent, softmax, lambda w: None, lambda w: np.zeros((5, 6))])
@pytest.mark.parametrize("axis", [0, 1])
def test_nothing_is_said_where_no_axis_tells_itself_apart(layer, axis):
    assert output_axis(RANDOM.normal(size=(6, 6)), axis, layer) is None


def test_a_weight_that_reaches_the_second_half_of_the_outputs_alone_tells_no_axis():
    assert output_axis(RANDOM.normal(size=(18, 6)), 0, two_directions) is None
