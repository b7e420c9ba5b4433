"""What a model's owner froze stays frozen: weights, and the thresholds of weights and activations with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.keras.framework import functions, keras, kl, numpy, path_of, tensor
from tests.keras.models import TRAINED_BY, ready, recipe, spec, train, vectors
from trainable_keras import finalize, freeze_quant_params, load, save, wrap
from trainable_keras.training import quantizers_of


def sequential() -> keras.Model:
    return keras.Sequential([keras.Input((4,)), kl.Dense(5, name="first"), kl.Dense(3, name="second")])


def functional() -> keras.Model:
    given = keras.Input((4,))
    return keras.Model(given, kl.Dense(3, name="second")(functions.relu(kl.Dense(5, name="first")(given))))


def nested() -> keras.Model:
    inner = keras.Sequential([keras.Input((4,)), kl.Dense(5, name="hidden"), kl.ReLU()], name="first")
    return keras.Sequential([keras.Input((4,)), inner, kl.Dense(3, name="second")])


def nested_graph() -> keras.Model:
    """Its functional operations have quantizers of their own."""
    given, hidden = keras.Input((4,)), keras.Input((4,))
    inner = keras.Model(hidden, kl.Dense(5, name="hidden")(functions.relu(hidden) + hidden), name="first")
    return keras.Model(given, kl.Dense(3, name="second")(inner(given)), name="graph")


@keras.saving.register_keras_serializable(package="tests.frozen")
class Holding(kl.Layer):
    """A layer of the user's, with one of Keras's inside."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.inside = kl.Dense(5)

    def build(self, shape: Any) -> None:
        """Build the layer inside."""
        self.inside.build(shape)
        self.built = True

    def call(self, x: Any) -> Any:
        """Return the output."""
        return self.inside(x)

    def compute_output_shape(self, shape: Any) -> Any:
        """Return the output's shape."""
        return (*shape[:-1], 5)

    def get_config(self) -> dict[str, Any]:
        """Return name, dtype and whether the layer is trainable."""
        config: dict[str, Any] = super().get_config()
        return config


def composite() -> keras.Model:
    return keras.Sequential([keras.Input((4,)), Holding(name="first"), kl.Dense(3, name="second")])


def recurrent() -> keras.Model:
    """Its weights are those of a layer inside the layer."""
    layers = [kl.Reshape((2, 2)), kl.LSTM(5, name="first"), kl.Dense(3, name="second")]
    return keras.Sequential([keras.Input((4,)), *layers])


class Plain(keras.Model):
    """A model without a graph."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.one, self.other = kl.Dense(5, name="first"), kl.Dense(3, name="second")

    def call(self, x: Any, training: bool | None = None) -> Any:
        """Return the output."""
        return self.other(self.one(x))


def subclassed() -> keras.Model:
    model = Plain()
    model(tensor(vectors(2, 4)))
    return model


MODELS: list[Callable[[], keras.Model]] = [
    sequential, functional, nested, nested_graph, composite, recurrent, subclassed
]  # fmt: skip
each_model = pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)


def frozen(make: Callable[[], keras.Model], name: str = "first") -> keras.Model:
    keras.utils.set_random_seed(0)
    model = make()
    model.get_layer(name).trainable = False
    return model


def wrapped(model: keras.Model, training_method: str = "LSQ") -> keras.Model:
    """Return it quantized, functional additions too where there are any."""
    both = spec(training_method, "SYMMETRIC" if training_method == "DQA" else "UNIFORM")
    additions = [{"match": {"op": "add"}, "activations": both}] if model.name == "graph" else []
    return ready(model, {"weights": both, "activations": both, "rules": additions}, vectors(16, 4))


def values(variables: Any) -> list[list[float]]:
    return [numpy(each).tolist() for each in variables]


@each_model
@pytest.mark.parametrize("training_method", TRAINED_BY)
def test_nothing_of_a_frozen_layer_trains(make: Any, training_method: str) -> None:
    qmodel = wrapped(frozen(make), training_method)
    layer = qmodel.get_layer("first")
    assert not layer.trainable_variables
    inside = {id(variable) for variable in layer.variables}
    assert not inside & {id(variable) for variable in qmodel.trainable_variables}
    # the step of a schedule counts batches, and learns nothing
    fixed = [variable for variable in layer.variables if path_of(variable).rpartition("/")[2] != "step"]
    assert len(fixed) > 2
    before, others = values(fixed), values(qmodel.trainable_variables)
    train(qmodel, vectors(16, 4), lr=0.5)
    assert values(fixed) == before
    assert values(qmodel.trainable_variables) != others


@each_model
def test_as_many_variables_train_as_in_the_float_model(make: Any) -> None:
    """Of the layer that is not frozen: its kernel, its bias, and the thresholds of both its quantizers."""
    model = frozen(make)
    qmodel = wrapped(model)
    found = [path_of(variable) for variable in qmodel.trainable_variables]
    assert len(found) == len(model.trainable_variables) + 2 * 2, found


@each_model
def test_a_frozen_model_trains_nothing(make: Any) -> None:
    model = make()
    model.trainable = False
    qmodel = wrapped(model)
    assert not qmodel.trainable_variables
    qmodel.trainable = True
    assert len(qmodel.trainable_variables) == len(wrapped(make()).trainable_variables)


@each_model
def test_thawed_it_trains_with_its_thresholds(make: Any) -> None:
    """Set on the layer, as Keras's guides do, before the model is compiled."""
    qmodel = wrapped(frozen(make))
    qmodel.get_layer("first").trainable = True
    assert len(qmodel.trainable_variables) == len(wrapped(make()).trainable_variables)
    before = values(qmodel.get_layer("first").trainable_variables)
    train(qmodel, vectors(16, 4), lr=64.0)  # the least gradient is some 1e-7, the last bit of its variable as much
    after = values(qmodel.get_layer("first").trainable_variables)
    assert all(one != other for one, other in zip(before, after, strict=True))


def test_frozen_after_wrapping_it_stays_so_too() -> None:
    qmodel = wrapped(sequential())
    qmodel.get_layer("first").trainable = False
    assert not qmodel.get_layer("first").trainable_variables


def test_thresholds_frozen_by_the_verb_are_not_thawed_by_the_layer() -> None:
    qmodel = freeze_quant_params(wrapped(frozen(sequential)), True)
    qmodel.get_layer("first").trainable = True
    assert len(qmodel.trainable_variables) == 4  # kernels and biases
    freeze_quant_params(qmodel, False)
    assert len(qmodel.trainable_variables) == len(wrapped(sequential()).trainable_variables)


def test_the_verb_does_not_thaw_a_frozen_layer() -> None:
    qmodel = freeze_quant_params(wrapped(frozen(sequential)), False)
    assert not qmodel.get_layer("first").trainable_variables


@each_model
def test_saved_and_loaded_it_is_frozen(make: Any, tmp_path: Path) -> None:
    model = frozen(make)
    qmodel = wrapped(model)
    save(qmodel, tmp_path / "model")
    loaded = load(tmp_path / "model", model)
    assert not loaded.get_layer("first").trainable_variables
    assert len(loaded.trainable_variables) == len(qmodel.trainable_variables)


@pytest.mark.parametrize("make", [sequential, nested], ids=lambda make: make.__name__)
def test_a_keras_file_keeps_what_keras_keeps(make: Any, tmp_path: Path) -> None:
    """Of functional models Keras's own loading thaws every layer, so those are not here."""
    qmodel = wrapped(frozen(make))
    qmodel.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert len(loaded.trainable_variables) == len(qmodel.trainable_variables)
    assert not loaded.get_layer("first").trainable_variables


def test_finalize_leaves_it_frozen() -> None:
    qmodel = wrapped(frozen(sequential))
    deployed = finalize(qmodel)
    assert not deployed.get_layer("first").trainable_variables
    assert len(deployed.get_layer("second").trainable_variables) == 2  # kernel and bias; a deployed grid is fixed


def test_the_given_model_is_as_frozen_as_it_was() -> None:
    model = frozen(sequential)
    wrap(model, recipe("LSQ"))
    assert [layer.trainable for layer in model.layers] == [False, True]


def test_a_frozen_layer_with_a_frozen_batch_norm_is_folded_and_stays_frozen() -> None:
    layers = [keras.Input((6, 6, 2)), kl.Conv2D(4, 3, use_bias=False, name="conv"), kl.BatchNormalization(name="norm")]
    model = keras.Sequential([*layers, kl.Flatten(), kl.Dense(3, name="head")])
    for name in ("conv", "norm"):
        model.get_layer(name).trainable = False
    for rules in (recipe("LSQ"), {"activations": spec("LSQ"), "rules": [{"match": {"name": "conv"}, "skip": True}]}):
        qmodel = ready(model, rules, vectors(8, 6, 6, 2))
        assert qmodel.trainable_state.folded == {"norm": "conv"}
        assert not qmodel.get_layer("conv").trainable_variables
        assert qmodel.get_layer("conv").use_bias
        assert np.isfinite(numpy(qmodel(tensor(vectors(2, 6, 6, 2)), training=False))).all()


@pytest.mark.parametrize("training_method", TRAINED_BY)
def test_every_quantizer_is_there_though_it_does_not_train(training_method: str) -> None:
    qmodel = wrapped(frozen(sequential), training_method)
    assert set(quantizers_of(qmodel)) == {"first.kernel", "first: inputs", "second.kernel", "second: inputs"}
