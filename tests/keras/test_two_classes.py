"""A quantized layer is still itself: state beside the variables, the model's own class, layers inside layers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trainable_keras
from tests.keras.framework import (
    ENGINE,
    FRAMEWORK,
    KERAS_VERSION,
    functions,
    keras,
    kl,
    numpy,
    only_keras,
    only_tensorflow,
    tensor,
    tf,
)
from tests.keras.models import call, network, recipe, same, vectors, weights_only
from trainable_core.errors import ModelError, TrainableError
from trainable_keras.graph import layers_within
from trainable_keras.parts import KerasWrapper
from trainable_keras.two_classes import PENDING, add_class

ROOT = Path(__file__).parents[2]
FINE = recipe("LSQ", "UNIFORM", 16)
"""16 bits stay near the float model: the bound of `near` is many steps of values below 8."""


def near(one: Any, other: Any, x: Any) -> bool:
    """Tell whether a model at 16 bits gives what the float model gives."""
    got, want = (numpy(each(x, training=False)) for each in (one, other))
    return bool(np.abs(got - want).max() < 1e-2)


def quantized(model: Any, x: Any, how: Any = FINE) -> Any:
    return trainable_keras.calibrate(trainable_keras.wrap(model, how), [x])


# ---- state beside the variables -------------------------------------------------------------------------------------


@keras.saving.register_keras_serializable(package="tests")
class Shift(kl.Layer):
    """A layer whose state is NumPy's, and is set outside of its constructor."""

    offset: np.ndarray = np.zeros(4, np.float32)

    def call(self, x: Any) -> Any:
        return x + tensor(self.offset)

    def save_own_variables(self, store: Any) -> None:
        store["offset"] = self.offset

    def load_own_variables(self, store: Any) -> None:
        self.offset = np.asarray(store["offset"])


def normalized() -> tuple[Any, Any]:
    norm = kl.Normalization()
    norm.adapt(vectors(64, 4) * 5 + 20)
    return keras.Sequential([keras.Input((4,)), norm, kl.Dense(3)]), tensor(vectors(8, 4) * 5 + 20)


def shifted() -> tuple[Any, Any]:
    shift = Shift()
    model = keras.Sequential([keras.Input((4,)), shift, kl.Dense(3)])
    shift.offset = np.float32([1, 2, 3, 4])
    return model, tensor(vectors(8, 4))


def binned() -> tuple[Any, Any]:
    bins = kl.Discretization(num_bins=5)
    bins.adapt(vectors(100, 1))
    given = keras.Input((1,))
    model = keras.Model(given, kl.Dense(2)(kl.Flatten()(kl.Embedding(6, 4)(bins(given)))))
    return model, tensor(np.linspace(-2, 2, 9)[:, None])


STATEFUL: dict[str, Callable[[], tuple[Any, Any]]] = {"adapted": normalized, "numpy": shifted, "bins": binned}


@pytest.mark.parametrize("name", list(STATEFUL))
def test_state_beside_the_variables_comes_along(name: str, tmp_path: Path) -> None:
    model, x = STATEFUL[name]()
    qmodel = quantized(model, x)
    assert near(qmodel, model, x)
    deployed = trainable_keras.finalize(qmodel)
    assert np.array_equal(numpy(deployed(x)), numpy(qmodel(x)))
    trainable_keras.save(qmodel, tmp_path / "own")
    assert np.array_equal(numpy(trainable_keras.load(tmp_path / "own", model)(x)), numpy(qmodel(x)))
    if (name, KERAS_VERSION) != ("bins", 2):  # Keras 2 loses the bins of a float model in such a file, too
        qmodel.save(tmp_path / "model.keras")
        assert np.array_equal(numpy(keras.models.load_model(tmp_path / "model.keras")(x)), numpy(qmodel(x)))


def test_a_copy_shares_no_state() -> None:
    model, x = shifted()
    qmodel = quantized(model, x)
    qmodel.layers[0].offset[:] = 9
    assert model.layers[-2].offset.tolist() == [1, 2, 3, 4]


# ---- the model's own class ------------------------------------------------------------------------------------------


class Own(keras.Model):
    """A functional model with a step, a method and an attribute of its own."""

    def __init__(self) -> None:
        given = keras.Input((4,))
        super().__init__(given, kl.Dense(3, name="fc")(given))
        self.steps: list[str] = []

    def train_step(self, *_: Any) -> Any:
        raise ZeroDivisionError

    def doubled(self, x: Any) -> Any:
        return self(x) * 2


def test_a_model_keeps_its_own_class() -> None:
    model, x = Own(), tensor(vectors(8, 4))
    model.steps.append("float")
    qmodel = quantized(model, x)
    assert isinstance(qmodel, Own)
    assert list(qmodel.steps) == ["float"]
    assert np.array_equal(numpy(qmodel.doubled(x)), 2 * numpy(qmodel(x)))
    qmodel.compile("sgd", "mse", run_eagerly=True)
    with pytest.raises(ZeroDivisionError):
        qmodel.fit(vectors(8, 4), vectors(8, 3), verbose=0)
    assert isinstance(trainable_keras.finalize(qmodel), Own)


def test_a_class_that_keras_could_not_read_is_not_written(tmp_path: Path) -> None:
    class Needs(keras.Model):
        def __init__(self, units: int) -> None:
            super().__init__()
            self.fc = kl.Dense(units)

        def call(self, x: Any) -> Any:
            return self.fc(x)

        def get_config(self) -> dict[str, Any]:
            return {}

    model, x = Needs(3), tensor(vectors(8, 4))
    model(x)
    qmodel = quantized(model, x)
    with pytest.raises(ModelError, match="own config"):
        qmodel.save(tmp_path / "model.keras")
    trainable_keras.save(qmodel, tmp_path / "own")
    assert np.array_equal(numpy(trainable_keras.load(tmp_path / "own", model)(x)), numpy(qmodel(x)))


# ---- reads ----------------------------------------------------------------------------------------------------------


@keras.saving.register_keras_serializable(package="tests")
class Reads(kl.Layer):
    """Multiplies by its inner layer's weight itself."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.inner = [kl.Dense(3, name="inner")]

    def build(self, shape: Any) -> None:
        self.inner[0].build(shape)
        self.built = True

    def call(self, x: Any) -> Any:
        return functions.matmul(x, self.inner[0].kernel)


def test_whoever_reads_a_weight_while_the_model_runs_gets_its_quantized_value(tmp_path: Path) -> None:
    model, x = keras.Sequential([keras.Input((4,)), Reads(name="reads")]), tensor(vectors(8, 4))
    qmodel = trainable_keras.calibrate(trainable_keras.wrap(model, weights_only("LSQ", n_bits=2)))
    inner = qmodel.get_layer("reads").inner[0]
    assert isinstance(inner, kl.Dense)
    floats = numpy(inner.kernel)  # outside of a call it is the float variable
    assert np.array_equal(floats, numpy(model.get_layer("reads").inner[0].kernel))
    (value,) = inner.get_quantized_weights().values()
    assert np.abs(numpy(value) - floats).max() > 0
    assert np.array_equal(numpy(qmodel(x)), numpy(functions.matmul(x, value)))
    qmodel.save(tmp_path / "model.keras")
    assert np.array_equal(numpy(keras.models.load_model(tmp_path / "model.keras")(x)), numpy(qmodel(x)))


class Keeps(kl.Layer):
    """Has a layer that it uses, and one that it doesn't."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.used, self.unused = kl.Dense(3), kl.Dense(3)

    def build(self, shape: Any) -> None:
        """Build both."""
        self.used.build(shape)
        self.unused.build(shape)
        self.built = True

    def call(self, x: Any) -> Any:
        """Return the output."""
        return self.used(x)


def test_a_weight_that_no_forward_pass_has_read_is_named() -> None:
    model, x = keras.Sequential([keras.Input((4,)), Keeps(name="keeps")]), tensor(vectors(8, 4))
    qmodel = trainable_keras.calibrate(trainable_keras.wrap(model, weights_only("LSQ")))
    assert trainable_keras.describe(qmodel).left_out == {}  # it has not run yet
    qmodel(x)
    left_out = {"keeps.unused.kernel": "no forward pass has read this weight so far"}
    assert trainable_keras.describe(qmodel).left_out == left_out
    assert trainable_keras.describe(trainable_keras.finalize(qmodel)).left_out == left_out


def test_inputs_of_a_layer_that_is_only_read_are_left_in_float(tmp_path: Path) -> None:
    model, x = keras.Sequential([keras.Input((4,)), Reads(name="reads")]), tensor(vectors(8, 4))
    qmodel = quantized(model, x)
    (why,) = trainable_keras.describe(qmodel).left_out.values()
    assert "Reads.call read its weights directly" in why
    deployed = trainable_keras.finalize(qmodel)
    for each in (qmodel, deployed):
        trainable_keras.save(each, tmp_path / "own")
        again = trainable_keras.load(tmp_path / "own", model)
        assert trainable_keras.describe(again).left_out == trainable_keras.describe(qmodel).left_out
        assert same(call(again, x), call(qmodel, x))


@only_tensorflow("AutoGraph is TensorFlow's")
def test_autograph_can_read_what_a_quantized_model_calls(caplog: pytest.LogCaptureFixture) -> None:
    model, x = with_block()
    qmodel = quantized(model, x)
    with caplog.at_level("WARNING", logger="tensorflow"):
        tf.function(lambda value: qmodel(value))(x)  # noqa: PLW0108 - a function, which AutoGraph converts
    assert "AutoGraph" not in caplog.text


def recurrent(layer: Any) -> tuple[Any, Any]:
    given = keras.Input((6, 4))
    return keras.Model(given, layer(given)), tensor(vectors(2, 6, 4))


INSIDE: dict[str, tuple[Callable[[], tuple[Any, Any]], int]] = {
    "TimeDistributed": (lambda: recurrent(kl.TimeDistributed(kl.Dense(3))), 1),
    "Bidirectional": (lambda: recurrent(kl.Bidirectional(kl.LSTM(3))), 4),
    "cell": (lambda: recurrent(kl.RNN(kl.GRUCell(3))), 2),
    "stacked": (lambda: recurrent(kl.RNN(kl.StackedRNNCells([kl.LSTMCell(3), kl.GRUCell(2)]))), 4),
    "ConvLSTM": (
        lambda: (
            keras.Sequential([keras.Input((3, 5, 5, 2)), kl.ConvLSTM2D(2, 3)]),
            tensor(vectors(2, 3, 5, 5, 2)),
        ),
        2,
    ),
    "Spectral": (
        lambda: (
            keras.Sequential([keras.Input((5, 5, 2)), kl.SpectralNormalization(kl.Conv2D(3, 3))]),
            tensor(vectors(2, 5, 5, 2)),
        ),
        1,
    ),
}


@pytest.mark.parametrize("name", list(INSIDE))
def test_layers_inside_layers_are_quantized_and_saved(name: str, tmp_path: Path) -> None:
    if name == "Spectral" and not hasattr(kl, "SpectralNormalization"):
        pytest.skip("this version of Keras has no SpectralNormalization")
    make, weights = INSIDE[name]
    model, x = make()
    qmodel = quantized(model, x)
    rows = [row for row in trainable_keras.describe(qmodel).rows if row.target == "Weights"]
    assert len(rows) == weights
    assert near(qmodel, model, x)
    deployed = trainable_keras.finalize(qmodel)
    for each in (qmodel, deployed):
        each.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        assert same([numpy(w) for w in loaded.weights], [numpy(w) for w in each.weights])
        if (
            ENGINE != "torch"
        ):  # which adds the products of a matrix in an order that depends on where they lie in memory
            assert same(call(loaded, x), call(each, x))
        trainable_keras.save(each, tmp_path / "own")
        assert same(call(trainable_keras.load(tmp_path / "own", make()[0]), x), call(each, x))
    assert same(call(deployed, x), call(qmodel, x))


def test_the_output_does_not_move_when_a_weight_is_what_it_is_quantized_to() -> None:
    for name in ("Bidirectional", "stacked", "TimeDistributed"):
        model, x = INSIDE[name][0]()
        qmodel = quantized(model, x, weights_only("STE", n_bits=3))
        before = call(qmodel, x)
        for wrapper in [each for each in layers_within(qmodel) if isinstance(each, KerasWrapper)]:
            for attribute, variable, _ in wrapper.get_weights_vars():
                variable.assign(numpy(wrapper.get_quantized_weights()[attribute]))
        assert same(call(qmodel, x), before), name


@keras.saving.register_keras_serializable(package="tests")
class Block(kl.Layer):
    """A layer of the user's that keeps others in an attribute, a list and a dictionary."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.first = kl.Dense(4)
        self.more = [kl.Dense(4), kl.Dense(4)]
        self.by_name = {"last": kl.Dense(3)}

    def build(self, shape: Any) -> None:
        """Build the layers inside."""
        for each in (self.first, *self.more, self.by_name["last"]):
            each.build(shape)
        self.built = True

    def call(self, x: Any) -> Any:
        """Return the output."""
        for each in (self.first, *self.more, self.by_name["last"]):
            x = each(x)
        return x

    def compute_output_shape(self, shape: Any) -> Any:
        """Return the output's shape."""
        return (*shape[:-1], 3)


@keras.utils.register_keras_serializable("tests.two_classes")
class Stack(kl.Layer):
    """Layers of one's own in a list, which Keras 2 names by their classes in files."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.blocks = [Block(), Block()]

    def build(self, shape: Any) -> None:
        for block in self.blocks:
            block.build(shape)
        self.built = True

    def call(self, x: Any) -> Any:
        return self.blocks[0](x) + self.blocks[1](x)


@keras.utils.register_keras_serializable("tests.two_classes")
class StackModel(keras.Model):
    """The same in a model without a graph."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.blocks, self.head = [Block(), Block()], kl.Dense(2)

    def call(self, x: Any) -> Any:
        return self.head(self.blocks[0](x) + self.blocks[1](x))


def with_block() -> tuple[Any, Any]:
    given = keras.Input((4,))
    return keras.Model(given, kl.Dense(2)(Block()(given))), tensor(vectors(8, 4))


def with_blocks() -> tuple[Any, Any]:
    given = keras.Input((4,))
    return keras.Model(given, kl.Dense(2)(Stack()(given))), tensor(vectors(8, 4))


def folded() -> tuple[Any, Any]:
    layers = [kl.Conv2D(4, 3, use_bias=False), kl.BatchNormalization(), kl.ReLU(), kl.Flatten(), kl.Dense(2)]
    return keras.Sequential([keras.Input((5, 5, 2)), *layers]), tensor(vectors(2, 5, 5, 2))


IN_FILES: dict[str, Callable[[], tuple[Any, Any]]] = {
    **{name: INSIDE[name][0] for name in ("Bidirectional", "TimeDistributed", "stacked", "ConvLSTM")},
    "adapted": normalized,
    "block": with_block,
    "blocks": with_blocks,
    "folded": folded,
}
COMPOSITES = ("Bidirectional", "TimeDistributed", "block", "blocks")
"""Those with layers inside of layers, which Keras 2 can't read from a SavedModel."""


def endings(name: str) -> list[str]:
    """Return the ends of the names of files that Keras can write of a model; without one it is a SavedModel."""
    if KERAS_VERSION == 3:
        return [".keras", ".h5"]
    # variables that a layer's own build makes have one name: Keras 2 can't write a float model's HDF5 file either
    return [".keras", *([] if name in {"block", "blocks"} else [".h5"]), *([] if name in COMPOSITES else [""])]


READS = """
import sys, numpy as np
import tests.keras.test_two_classes as t
for _ in range(2):  # so that Keras gives other names than in the process that wrote the files
    t.kl.Dense(1), t.kl.LSTM(1), t.kl.Bidirectional(t.kl.LSTM(1)), t.Block()
for name, make in t.IN_FILES.items():
    model, x = make()
    for end in t.endings(name):
        loaded = t.keras.models.load_model(f"{sys.argv[1]}/{name}{end}")
        np.save(f"{sys.argv[1]}/{name}{end}.npy", t.call(loaded, x)[0])
    qmodel = t.trainable_keras.wrap(model, t.FINE)
    qmodel.load_weights(f"{sys.argv[1]}/{name}.weights.h5")
    np.save(f"{sys.argv[1]}/{name}.weights.npy", t.call(qmodel, x)[0])
    again = t.trainable_keras.load(f"{sys.argv[1]}/{name}.own", make()[0])
    np.save(f"{sys.argv[1]}/{name}.own.npy", t.call(again, x)[0])
"""


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_a_new_process_reads_every_format(tmp_path: Path) -> None:
    expected = {}
    for name, make in IN_FILES.items():
        model, x = make()
        qmodel = quantized(model, x)
        expected[name] = call(qmodel, x)[0]
        for end in endings(name):
            qmodel.save(tmp_path / f"{name}{end}")
        qmodel.save_weights(tmp_path / f"{name}.weights.h5")
        trainable_keras.save(qmodel, tmp_path / f"{name}.own")
    settings = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    subprocess.run([sys.executable, "-W", "ignore", "-c", READS, str(tmp_path)], env=settings, cwd=ROOT, check=True)
    for name, output in expected.items():
        for end in (*endings(name), ".weights", ".own"):
            assert np.array_equal(np.load(tmp_path / f"{name}{end}.npy"), output), name + end


def test_a_model_without_a_graph_that_has_composite_layers_in_a_list_is_read(tmp_path: Path) -> None:
    model, x = StackModel(), tensor(vectors(8, 4))
    model(x)
    qmodel = quantized(model, x)
    for each in (qmodel, trainable_keras.finalize(qmodel)):
        each.save(tmp_path / "model.keras")
        assert np.array_equal(call(keras.models.load_model(tmp_path / "model.keras"), x)[0], call(qmodel, x)[0])


@only_keras(2, "Keras 3 writes no such files")
def test_a_saved_model_that_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    model, x = with_block()
    qmodel = quantized(model, x)
    with pytest.raises(ModelError, match=r"Block.*can't be read from a SavedModel"):
        qmodel.save(tmp_path / "model")
    tf.saved_model.save(qmodel, str(tmp_path / "served"))  # without what Keras reads
    served = tf.saved_model.load(str(tmp_path / "served"))
    assert np.array_equal(numpy(served(x)), numpy(qmodel(x)))


def test_a_file_does_not_depend_on_what_was_built_before(tmp_path: Path) -> None:
    x = tensor(vectors(8, 4))

    def make() -> Any:
        return keras.Sequential([keras.Input((4,)), kl.Dense(4), kl.Dense(3)])

    model = make()
    rule = {"match": {"name": model.layers[-1].name}, "skip": True}
    qmodel = quantized(model, x, {**FINE, "rules": [rule]})
    for each in (qmodel, trainable_keras.finalize(qmodel)):
        trainable_keras.save(each, tmp_path / "own")
        again = make()
        assert again.layers[-1].name != model.layers[-1].name
        assert same(call(trainable_keras.load(tmp_path / "own", again), x), call(each, x))


def test_paths_of_variables_are_those_of_the_float_model() -> None:
    model = network()
    qmodel = trainable_keras.wrap(model, weights_only("LSQ"))
    paths = [getattr(each, "path", each.name) for each in qmodel.variables]
    assert len(set(paths)) == len(paths)
    if ENGINE == "torch":
        assert len(list(qmodel.parameters())) == len(qmodel.variables)


@only_keras(3, "Keras 2 has no functional operations")
def test_a_graph_of_its_own_with_quantized_operations_is_not_written(tmp_path: Path) -> None:
    class Graph(keras.Model):
        def __init__(self) -> None:
            given = keras.Input((4,))
            super().__init__(given, kl.Dense(3)(given * given))

    rule = {"match": {"op": "mul"}, "activations": FINE["activations"]}
    x = tensor(vectors(8, 4))
    qmodel = quantized(Graph(), x, {**FINE, "rules": [rule]})
    assert near(qmodel, qmodel, x)
    with pytest.raises(TrainableError, match="can't be saved by Keras"):
        qmodel.save(tmp_path / "model.keras")


def test_a_layer_that_can_not_become_what_it_was_still_says_what_it_is_to_be():
    """Keras takes some errors for a layer that is built later: it must not go on with a float one then."""
    layer = kl.Dense(2)
    layer.build((None, 3))
    add_class(layer, FRAMEWORK.kit.pending)
    vars(layer)[PENDING] = {"quantization": {"weights_quantizers": {}}}  # damaged: the rest is missing
    for _ in range(2):
        with pytest.raises(KeyError):
            FRAMEWORK.kit.become(layer)
        assert isinstance(layer, FRAMEWORK.kit.pending)
