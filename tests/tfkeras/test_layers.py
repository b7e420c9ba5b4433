"""Which layers are which kind, and where their weights are."""

from __future__ import annotations

import pytest
import tensorflow as tf

from trainable_core.errors import InvalidArgumentError, ModelError
from trainable_keras.keras2 import register_layer
from trainable_keras.keras2.layers import TYPES, find_weight, is_operation, kind_of, layer_info
from trainable_keras.keras2.tracing import graph_of, op_of
from trainable_keras.layers import KINDS

kl = tf.keras.layers


def test_every_layer_of_the_table_that_keras_2_has_is_known():
    missing = [name for name in KINDS if not hasattr(kl, name)]
    assert missing == ["RMSNormalization"]


def test_a_subclass_of_a_known_layer_is_of_its_kind():
    class Mine(kl.Conv2D):
        pass

    assert kind_of(Mine(2, 3)).op == "conv"
    assert TYPES.stock(Mine(2, 3)) == ""
    assert TYPES.stock(kl.Conv2D(2, 3)) == "Conv2D"


def test_depthwise_kernels_have_keras_2s_name():
    assert kind_of(kl.DepthwiseConv2D(3)).weights == {"depthwise_kernel": -2}


@pytest.mark.parametrize(
    ("call", "op"),
    [
        (lambda x: x + 1.0, "add"),
        (lambda x: x - x, "add"),
        (lambda x: x * x, "mul"),
        (lambda x: tf.concat([x, x], 1), "cat"),
        (lambda x: tf.matmul(x, x, transpose_b=True), "matmul"),
        (lambda x: tf.einsum("ab,cb->ac", x, x), "matmul"),
        (tf.nn.relu, "activation"),
        (tf.nn.gelu, "activation"),
        (tf.nn.softmax, "activation"),
        (tf.tanh, "activation"),
        (lambda x: tf.reduce_mean(x, 1), "pooling"),
        (tf.transpose, None),
        (lambda x: x[:, :2], None),
    ],
)
def test_functions_of_tensorflow_have_a_kind(call, op):
    given = tf.keras.Input((4,))
    (operation,) = graph_of(tf.keras.Model(given, call(given))).operations
    assert is_operation(operation)
    assert op_of(operation) == op


def test_register_layer_tells_of_a_layer_of_ones_own():
    class Scaled(kl.Layer):
        def build(self, shape):
            self.scale = self.add_weight(name="scale", shape=(2, shape[-1]))
            super().build(shape)

    layer = Scaled()
    assert kind_of(layer) is None
    register_layer(Scaled, "linear", {"scale": -1})
    layer.build((None, 3))
    info = layer_info("here", layer, kind_of(layer))
    assert (info.op, info.weights["scale"].shape, info.weights["scale"].channels_axis) == ("linear", (2, 3), 1)


@pytest.mark.parametrize(("cls", "op"), [(3, "conv"), (int, "conv"), (kl.Dense, "convolution")])
def test_what_can_not_be_registered_is_refused(cls, op):
    with pytest.raises(InvalidArgumentError, match="register_layer"):
        register_layer(cls, op)


def test_a_layer_without_weights_yet_says_so():
    with pytest.raises(ModelError, match="no weights yet"):
        layer_info("dense", kl.Dense(3), kind_of(kl.Dense(3)))


def test_an_einsum_without_an_output_axis_in_its_kernel_is_unsupported():
    assert "no axis of its kernel" in kind_of(kl.EinsumDense("ab,b->a", ())).unsupported


def test_a_path_leads_into_sublayers_with_and_without_an_underscore():
    attention = kl.MultiHeadAttention(2, 3)
    query = tf.ones((1, 4, 6))
    attention(query, query)
    assert find_weight(attention, "query_dense.kernel") is attention.weights[0]  # Keras makes the query's kernel first
    assert find_weight(attention, "query_dense.kernal") is None
