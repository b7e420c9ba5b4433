"""Look-up tables: trained, deployed, saved, and given to mct-quantizers bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.keras.framework import ENGINE, KERAS_VERSION, keras, kl, numpy, tf
from tests.keras.models import call, ready, train, vectors
from tests.table_models import RECIPES
from trainable_keras import finalize, load, save, to_mctq


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_what_is_trained_is_what_mctqs_own_class_computes(recipe: dict[str, Any], tmp_path: Path) -> None:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((8,)), kl.Dense(6, activation="relu"), kl.Dense(3)])
    qmodel = ready(model, recipe, vectors(4, 8))
    learned = [variable for variable in qmodel.trainable_variables if "threshold" in variable.name]
    before = [numpy(variable).copy() for variable in learned]
    train(qmodel, vectors(4, 8))
    assert any(not np.array_equal(numpy(v), old) for v, old in zip(learned, before, strict=True))
    x = vectors(16, 8)
    deployed = finalize(qmodel)
    expected = call(qmodel, x)
    np.testing.assert_array_equal(call(deployed, x), expected)
    save(deployed, tmp_path / "deployed.keras")
    np.testing.assert_array_equal(call(load(tmp_path / "deployed.keras", model), x), expected)
    if KERAS_VERSION == 2:
        np.testing.assert_array_equal(call(to_mctq(deployed), x), expected)
    elif ENGINE == "tensorflow":
        (quantizer,) = deployed.layers[0].weights_quantizers.values()
        kernel = numpy(deployed.layers[0].kernel)
        stock = quantizer.to_mctq()(tf.constant(kernel))
        np.testing.assert_array_equal(numpy(stock), numpy(quantizer(tf.constant(kernel))))
