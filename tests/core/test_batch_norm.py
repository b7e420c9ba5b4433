"""Batch normalization simulated as folded: the reference against its definition, and what callers are told."""

from __future__ import annotations

import numpy as np
import pytest

from trainable_core.calibration.batch_norm import require_several, require_simulated, warn_if_new
from trainable_core.errors import ModelError, ShapeMismatchError, StatisticsMissingWarning
from trainable_core.recipe.document import QuantizationRecipe
from trainable_core.reference.batch_norm import (
    Layer,
    batch_statistics,
    folded_bias,
    gain,
    training_gradients,
    training_output,
    updated,
)

EPSILON = 1e-3


def case(seed: int, rows: int = 12, channels: int = 3):
    """Return products and the layer's numbers: a negative scale, a scale of zero, and a bias."""
    rng = np.random.default_rng(seed)
    products = rng.normal(0.5, 2.0, (rows, channels))
    gamma = rng.uniform(0.5, 2.0, channels) * np.array([1.0, -1.0, 0.0])[:channels]
    layer = Layer(rng.normal(size=channels), gamma, rng.normal(size=channels), rng.uniform(0.5, 3, channels), EPSILON)
    return products, layer


def normalized(products, layer):
    """Return batch normalization by its definition (Ioffe and Szegedy 2015, algorithm 1), of products with a bias."""
    z = products + layer.bias
    mean, variance = z.mean(0), z.var(0)
    return layer.gamma * (z - mean) / np.sqrt(variance + EPSILON) + layer.beta


@pytest.mark.parametrize("seed", range(5))
def test_without_quantization_it_is_batch_normalization(seed):
    products, layer = case(seed)
    folded = products * gain(layer.gamma, layer.running_variance, EPSILON)
    found = training_output(folded, products, layer)
    # a dozen operations on float64 numbers below 20, and sums of 12 of them
    np.testing.assert_allclose(found, normalized(products, layer), rtol=0, atol=20 * 24 * 2.0**-52)


def test_with_the_statistics_of_the_batch_it_is_the_folded_layer():
    products, layer = case(1)
    statistics = batch_statistics(products)
    layer = layer._replace(running_variance=statistics.variance)
    quantized = np.round(products * gain(layer.gamma, layer.running_variance, EPSILON) * 4) / 4
    added = folded_bias(
        layer.bias, layer.gamma, layer.beta, statistics.mean + layer.bias, layer.running_variance, EPSILON
    )
    np.testing.assert_allclose(training_output(quantized, products, layer), quantized + added, rtol=0, atol=1e-13)


@pytest.mark.parametrize("seed", range(5))
def test_gradients_are_the_slopes(seed):
    products, layer = case(seed)
    rng = np.random.default_rng(seed + 100)
    quantized, upstream = rng.normal(0, 2, products.shape), rng.normal(size=products.shape)
    found = training_gradients(upstream, quantized, products, layer)

    def loss(changed, values):
        given = {"quantized": quantized, "products": products, **{name: getattr(layer, name) for name in NAMES}}
        given[changed] = values
        changed_layer = layer._replace(**{name: given[name] for name in NAMES})
        return (training_output(given["quantized"], given["products"], changed_layer) * upstream).sum()

    for name in found._fields:
        values = getattr(layer, name, None) if name in NAMES else {"quantized": quantized, "products": products}[name]
        slopes = np.zeros_like(values)
        for index in np.ndindex(values.shape):
            step = np.zeros_like(values)
            step[index] = 1e-5
            slopes[index] = (loss(name, values + step) - loss(name, values - step)) / 2e-5
        # a central difference is wrong by step**2 times a third derivative, and by the rounding of sums below 1e3
        np.testing.assert_allclose(getattr(found, name), slopes, rtol=0, atol=1e-6, err_msg=name)


NAMES = ("bias", "gamma", "beta")


def test_vectors_by_hand():
    # rows 1 and 5: mean 3, variance 4; sigma of the batch 2, of the running statistics 4
    products, layer = np.array([[1.0], [5.0]]), Layer(*(np.array([x]) for x in (7.0, 2.0, 1.0, 16.0)), 0.0)
    quantized = np.array([[0.25], [2.75]])  # of 0.5 and 2.5
    # c = 4 / 2; b' = -3 * 2 / 4 + 1 / 2 = -1; (0.25 - 1) * 2 and (2.75 - 1) * 2
    np.testing.assert_array_equal(training_output(quantized, products, layer), [[-1.5], [3.5]])
    found = training_gradients(np.array([[1.0], [0.0]]), quantized, products, layer)
    np.testing.assert_array_equal(found.quantized, [[2.0], [0.0]])
    np.testing.assert_array_equal(found.beta, [1.0])
    np.testing.assert_array_equal(found.gamma, [-1.5])
    np.testing.assert_array_equal(found.bias, [0.0])
    # d_mean = -1; d_sigma = (3 - 2 * 0.25) / 2 = 1.25; rows: -1 / 2 + 1.25 / 2 * (-2 or 2) / 2
    np.testing.assert_array_equal(found.products, [[-1.125], [0.125]])


def test_running_statistics_move_by_their_share():
    np.testing.assert_array_equal(updated(np.array([1.0]), np.array([3.0]), 0.25), [1.5])


def test_a_gain_without_a_scale():
    np.testing.assert_array_equal(gain(None, np.array([3.0], np.float32), 1.0), np.array([0.5], np.float32))


def test_a_recipe_simulates_with_whatever_else_it_says():
    said = {"weights": {"method": "POWER_OF_TWO", "n_bits": 4, "training_method": "STE"}, "bias": "int32"}
    said["activations"] = {"method": "UNIFORM", "n_bits": 8, "training_method": "STE", "placement": "outputs"}
    recipe = QuantizationRecipe.of({**said, "fold_batch_norm": "training"})
    assert recipe.folds == "training"
    assert QuantizationRecipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_what_can_t_be_simulated_is_told():
    with pytest.raises(ModelError, match="fold_batch_norm: training"):
        require_simulated([])
    with pytest.raises(ShapeMismatchError, match="several values of each channel"):
        require_several(1)
    require_several(2)


def test_new_statistics_are_warned_of():
    new, used = (np.zeros(2), np.ones(2)), (np.zeros(2), np.array([1.0, 2.0]))
    warn_if_new({"used": used, "shifted": (np.ones(2), np.ones(2))}, stacklevel=1)
    with pytest.warns(StatisticsMissingWarning, match="calibrate: norm") as caught:
        warn_if_new({"norm": new, "used": used}, stacklevel=1)
    assert caught[0].filename == __file__
    assert caught[0].message.norms == ["norm"]
