"""Batch norms that stay in training and are folded by `finalize`: the codes of weights are those that were trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.keras.framework import keras, kl, numpy
from tests.keras.models import call, images, network, ready, same, spec, state, train
from trainable_core.errors import UnsupportedConfigError
from trainable_keras import describe, finalize, load, reestimate_batch_norm, save, wrap
from trainable_keras.graph import layers_within
from trainable_keras.parts import KerasWrapper


def after(grid: str = "SYMMETRIC", **more: Any) -> dict[str, Any]:
    return {"weights": spec("LSQ", grid, 4, **more), "fold_batch_norm": "after"}


def model() -> Any:
    keras.utils.set_random_seed(0)
    layers = [
        keras.Input((6, 6, 1)),
        kl.Conv2D(4, 3, use_bias=False, name="conv"),
        kl.BatchNormalization(name="norm"),
        kl.ReLU(name="relu"),
        kl.DepthwiseConv2D(3, name="body"),
        kl.BatchNormalization(name="next"),
        kl.Flatten(name="flatten"),
        kl.Dense(3, name="head"),
    ]
    return keras.Sequential(layers)


def trained(how: Any) -> Any:
    """Return a model whose batch norms have moved, one channel to a gain of zero and one to a negative one."""
    qmodel = train(ready(model(), how, images()), images(), lr=0.01)
    for name, gamma in (("norm", [1.0, 0.0, 0.7, 2.0]), ("next", [1.0, 0.3, -0.5, 1.0])):
        qmodel.get_layer(name).gamma.assign(np.array(gamma, np.float32))
    body = qmodel.get_layer("body")
    (kernel, quantizer) = next((weight, q) for _, weight, q in body.get_weights_vars())
    # the lowest code of a channel whose gain is negative has no opposite
    bound = quantizer.current_qparams().scale.reshape(1, 1, -1, 1) * 7
    kernel.assign(np.maximum(numpy(kernel), -bound))
    return qmodel


def codes_of(qmodel: Any) -> dict[str, np.ndarray]:
    found = {}
    for layer in layers_within(qmodel):
        if isinstance(layer, KerasWrapper):
            ((attribute, value),) = layer.get_quantized_weights().items()
            quantizer = layer.weights_quantizers[attribute]
            grid = quantizer.current_qparams() if hasattr(quantizer, "current_qparams") else quantizer.qparams
            value = numpy(value)
            found[layer.name] = np.rint(value / grid.along(value.ndim).scale)
    return found


@pytest.mark.parametrize("grid", ["SYMMETRIC", "UNIFORM"])
def test_codes_stay_and_outputs_differ_by_rounding_alone(grid: str, tmp_path: Path) -> None:
    qmodel = trained(after(grid))
    deployed = finalize(qmodel)
    assert describe(deployed).folded == {"norm": "conv", "next": "body"}
    expected, found = codes_of(qmodel), codes_of(deployed)
    assert np.array_equal(found["conv"], expected["conv"] * np.array([1, 0, 1, 1]))
    assert np.array_equal(found["body"], expected["body"] * np.array([1, 1, -1, 1]).reshape(1, 1, 4, 1))
    assert np.array_equal(found["head"], expected["head"])
    (one,), (other,) = call(qmodel, images(32)), call(deployed, images(32))
    # scales of UNIFORM have 20 bits; two layers, and gains up to 4
    np.testing.assert_allclose(one, other, rtol=0, atol=2.0**-16 * np.abs(one).max())
    for each in (qmodel, deployed):
        save(each, tmp_path / "model.zip")
        again = load(tmp_path / "model.zip", model())
        assert state(again) == state(each)
        assert describe(again).folded == describe(each).folded
        each.save(tmp_path / "model.keras")
        again = keras.models.load_model(tmp_path / "model.keras")
        assert same(call(again, images()), call(each, images()))
        assert same(call(finalize(again), images()), call(deployed, images()))


def test_what_can_t_be_folded_stays_and_is_told(tmp_path: Path) -> None:
    deployed = finalize(trained(after("POWER_OF_TWO")))
    assert "no power of two" in describe(deployed).left_out["norm"]
    save(deployed, tmp_path / "model.zip")
    again = load(tmp_path / "model.zip", model())
    assert same(call(again, images()), call(deployed, images()))


def test_batch_norms_in_nested_models_train_and_are_told_of() -> None:
    qmodel = ready(network(), after(), images())
    assert describe(qmodel).left_out["stem.norm"] == "batch norm that finalize folds into stem.conv"
    reestimate_batch_norm(qmodel, [images()])
    deployed = finalize(qmodel)
    assert describe(deployed).folded == {"stem.norm": "stem.conv"}
    np.testing.assert_allclose(call(qmodel, images())[0], call(deployed, images())[0], rtol=0, atol=1e-5)


def test_what_can_t_be_folded_then_is_refused() -> None:
    how = {**after(), "activations": spec("LSQ", placement="outputs")}
    with pytest.raises(UnsupportedConfigError, match="stands between"):
        wrap(network(), how)
