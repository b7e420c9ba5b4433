"""What a Keras model's graph tells, and which functional operations are of which kind."""

from __future__ import annotations

from typing import Any

import pytest

from tests.keras.framework import FRAMEWORK, KERAS_VERSION, keras, kl, tf
from tests.keras.models import functional, network, subclassed
from trainable_core.recipe.layers import OPS
from trainable_keras.graph import direct_layers, layers_within
from trainable_keras.layers import FUNCTIONS, FUNCTIONS_OF_TENSORFLOW

graph_of, op_of = FRAMEWORK.graph, FRAMEWORK.op


def graph(*layers: Any) -> Any:
    return graph_of(keras.Sequential([keras.Input((4, 4, 2)), *layers]))


def test_functional_and_built_sequential_models_have_a_graph() -> None:
    assert graph_of(functional()) is not None
    assert graph_of(network()) is not None
    for other in (keras.Sequential([kl.Dense(2)]), subclassed(), kl.Dense(2)):
        assert graph_of(other) is None


def test_operations_come_inputs_first_each_once() -> None:
    names = [operation.name for operation in graph_of(functional()).operations]
    assert names.count("shared") == 1
    assert names.index("shared") < names.index("inner") < names.index("pool") < names.index("head")


def test_a_shared_layer_is_called_twice() -> None:
    found = graph_of(functional())
    (shared,) = [operation for operation in found.operations if operation.name == "shared"]
    assert len(found.calls(shared)) == 2


def test_source_and_only_user() -> None:
    found = graph(kl.Conv2D(2, 1, name="conv"), kl.ReLU(name="relu"))
    conv, relu = (found.calls(operation)[0] for operation in found.operations)
    assert found.source(relu) is conv
    assert found.source(conv) is None
    assert found.only_user(conv) is relu
    assert found.only_user(relu) is None  # it leaves the model


@pytest.mark.parametrize(
    ("between", "expected"),
    [
        ([kl.ReLU()], True),
        ([kl.Dropout(0.5), kl.ReLU()], True),
        ([kl.SpatialDropout2D(0.5), kl.Activation("gelu")], True),
        ([kl.MaxPooling2D(1), kl.ReLU()], False),
        ([kl.BatchNormalization(), kl.ReLU()], False),
    ],
    ids=["next", "behind dropout", "behind spatial dropout", "behind pooling", "behind batch norm"],
)
def test_an_activation_after_a_call_is_seen(between: list[Any], expected: bool) -> None:
    found = graph(kl.Conv2D(2, 1), *between, kl.Conv2D(2, 1))
    activation = found.activation_after(found.calls(found.operations[0])[0], op_of)
    assert (activation is not None) is expected
    assert activation is None or activation.operation is between[-1]


def test_a_batch_norm_that_is_folded_is_looked_through() -> None:
    found = graph(kl.Conv2D(2, 1), kl.BatchNormalization(), kl.ReLU(), kl.Conv2D(2, 1))
    conv, norm, relu, _ = found.operations
    assert found.activation_after(found.calls(conv)[0], op_of, {id(norm)}) is found.calls(relu)[0]


if KERAS_VERSION == 3:
    ops = keras.ops
    CALLS: dict[str, list[Any]] = {
        "add": [lambda x: x + x, lambda x: x - 1.0, lambda x: ops.add(x, x), lambda x: ops.subtract(x, x)],
        "mul": [lambda x: x * x, lambda x: 2.0 * x, lambda x: ops.multiply(x, x)],
        "cat": [lambda x: ops.concatenate([x, x]), lambda x: ops.stack([x, x])],
        "matmul": [lambda x: x @ x, lambda x: ops.matmul(x, x), lambda x: ops.einsum("bij,bjk->bik", x, x)],
        "activation": [ops.relu, ops.gelu, ops.silu, ops.sigmoid, ops.tanh, ops.softmax, ops.elu, ops.relu6],
        "pooling": [lambda x: ops.mean(x, axis=1), lambda x: ops.average_pool(x, 2)],
        "no op": [lambda x: ops.reshape(x, (-1, 16)), lambda x: ops.transpose(x, (0, 2, 1)), lambda x: x[:, 0]],
    }
else:
    CALLS = {
        "add": [lambda x: x + x, lambda x: x - 1.0, lambda x: tf.add(x, x), lambda x: tf.subtract(x, x)],
        "mul": [lambda x: x * x, lambda x: 2.0 * x, lambda x: tf.multiply(x, x)],
        "cat": [lambda x: tf.concat([x, x], 1), lambda x: tf.stack([x, x])],
        "matmul": [lambda x: x @ x, lambda x: tf.matmul(x, x), lambda x: tf.einsum("bij,bjk->bik", x, x)],
        "activation": [tf.nn.relu, tf.nn.gelu, tf.nn.silu, tf.sigmoid, tf.tanh, tf.nn.softmax, tf.nn.elu, tf.nn.relu6],
        "pooling": [lambda x: tf.reduce_mean(x, 1)],
        "no op": [lambda x: tf.reshape(x, (-1, 16)), lambda x: tf.transpose(x, (0, 2, 1)), lambda x: x[:, 0]],
    }


@pytest.mark.parametrize(
    ("op", "function"), [(op, function) for op, functions in CALLS.items() for function in functions]
)
def test_each_function_has_its_op_kind(op: str, function: Any) -> None:
    given = keras.Input((4, 4))
    (operation,) = graph_of(keras.Model(given, function(given))).operations
    assert not FRAMEWORK.is_layer(operation)
    assert op_of(operation) == (None if op == "no op" else op)


def test_every_function_is_of_a_known_op() -> None:
    assert {*FUNCTIONS.values(), *FUNCTIONS_OF_TENSORFLOW.values()} <= set(OPS)


def test_a_layer_is_not_a_functional_operation() -> None:
    assert FRAMEWORK.is_layer(kl.Add())
    assert op_of(kl.Add()) == "add"
    assert op_of(kl.ReLU()) == "activation"
    assert op_of(kl.Flatten()) is None


def test_layers_within_and_direct_layers() -> None:
    model = subclassed()
    assert {layer.name for layer in direct_layers(model)} >= {model.stem.name, model.tail.name}
    assert "dense" not in {layer.name for layer in direct_layers(model)}
    within = layers_within(model)
    assert within[0] is model
    assert len(within) == len({id(layer) for layer in within})
    assert "dense" in {layer.name for layer in within}
