"""A quantized model learns from its float one, in `fit` and in a loop: the terms of the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.keras.framework import keras, kl, numpy, tensor
from tests.keras.models import call, flat, images, network, ready, recipe, state
from trainable_core.errors import InvalidArgumentError, ModelError, ShapeMismatchError
from trainable_core.reference.distillation import features_term, logits_term
from trainable_keras import distill


def student() -> Any:
    return ready(flat(), recipe("LSQ", n_bits=3), images())


def test_terms_are_those_of_the_reference() -> None:
    qmodel, model = student(), flat()
    trainer = distill(qmodel, model, temperature=2.0, logits=0.5, features={"relu": 3.0})
    (outputs,) = call(trainer, images(), training=True)
    found = []
    for each in (qmodel, model):
        relu = keras.Model(each.inputs, each.get_layer("relu").output) if each is model else None
        found.append([call(each, images())[0], None if relu is None else call(relu, images())[0]])
    logits, _ = logits_term(found[0][0], found[1][0], 2.0)
    of_student = numpy(tensor(images()))
    for name in ("conv", "norm", "relu"):
        of_student = numpy(qmodel.get_layer(name)(tensor(of_student)))
    features, _ = features_term(of_student, found[1][1])
    # sums of some hundred float32 terms
    assert sum(float(numpy(each)) for each in trainer.losses) == pytest.approx(0.5 * logits + 3.0 * features, rel=1e-5)
    np.testing.assert_array_equal(outputs, found[0][0])
    assert len(call(trainer, images())) == 1
    assert not trainer.losses


def test_fit_brings_a_student_closer_and_leaves_the_teacher() -> None:
    qmodel, model = student(), flat()
    before = state(model)
    trainer = distill(qmodel, model, temperature=2.0, features=["relu"])
    trainer.compile(keras.optimizers.Adam(0.01), "mse")
    targets = call(model, images(32))[0]
    history = trainer.fit(images(32), targets, batch_size=32, epochs=20, verbose=0).history["loss"]
    assert history[-1] < 0.7 * history[0]
    assert state(model) == before
    assert len(trainer.trainable_variables) == len(qmodel.trainable_variables)


def test_layers_of_nested_models_have_the_names_of_describe() -> None:
    trainer = distill(ready(network(), recipe("LSQ"), images()), network(), features=["stem.relu"])
    call(trainer, images(), training=True)
    assert len(trainer.losses) == 1


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ModelError, match="not made by"):
        distill(flat(), flat())
    with pytest.raises(ModelError, match="teacher is int"):
        distill(student(), 3)
    with pytest.raises(InvalidArgumentError, match="did you mean 'relu'"):
        distill(student(), flat(), features=["relo"])
    wide = keras.Sequential([*flat().layers[:-1], kl.Dense(4)])
    wide.build((None, 6, 6, 1))
    with pytest.raises(ShapeMismatchError, match="logits"):
        call(distill(student(), wide), images(), training=True)
