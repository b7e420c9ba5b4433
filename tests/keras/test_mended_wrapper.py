"""Each fault of mctq's own Keras wrapper that ours does not show; mctq's own class, which shows it, runs on Keras 2."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mct_quantizers import KerasQuantizationWrapper

from tests.keras.framework import dtype_name, dtype_policy, kl, needs_two_devices, numpy, only_keras, tensor, tf
from trainable_keras import QuantizationWrapper

pytestmark = only_keras(2, "mctq's own wrapper can't be built on Keras 3: it sets a kernel that is a property there")
X = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)


def inferable() -> Any:
    from mct_quantizers.keras import quantizers as mctq

    return mctq.WeightsSymmetricInferableQuantizer(num_bits=4, threshold=[1.0], per_channel=False)


def dense(**arguments: Any) -> Any:
    layer = kl.Dense(3, **arguments)
    layer.build((None, 5))
    return layer


def pair(**arguments: Any) -> tuple[Any, Any]:
    """Return our wrapper and mctq's own, each around a dense layer."""
    ours = QuantizationWrapper(dense(**arguments), {"kernel": inferable()})
    theirs = KerasQuantizationWrapper(dense(**arguments), {"kernel": inferable()})
    theirs.build((None, 5))
    return ours, theirs


def test_it_is_mctqs_and_gives_the_same() -> None:
    ours, theirs = pair()
    theirs.layer.set_weights(ours.layer.get_weights())
    assert isinstance(ours, KerasQuantizationWrapper)
    assert np.array_equal(numpy(ours(tensor(X))), numpy(theirs(tensor(X))))


def test_the_layer_keeps_its_weight_after_a_graph_ran() -> None:
    ours, theirs = pair()
    for wrapper in (ours, theirs):
        tf.function(wrapper)(tensor(X))
    assert isinstance(ours.layer.kernel, tf.Variable)
    assert not isinstance(theirs.layer.kernel, tf.Variable)  # a tensor that leaked out of the graph
    assert len(ours.layer.weights) == 2
    assert len(theirs.layer.weights) == 1


def test_no_weight_is_added() -> None:
    ours, theirs = pair()
    assert [weight.shape for weight in ours.weights] == [weight.shape for weight in ours.layer.weights]
    assert [weight.dtype for weight in theirs.weights if weight.dtype.is_integer] == [tf.int32]


def test_a_frozen_layer_stays_frozen() -> None:
    ours, theirs = pair(trainable=False)
    assert ours.trainable_weights == []
    assert len(theirs.trainable_weights) == 1


def test_an_activity_regularizer_counts() -> None:
    ours, theirs = pair(activity_regularizer="l2")
    for wrapper in (ours, theirs):
        wrapper(tensor(X))
    assert len(ours.losses) == 1
    assert theirs.losses == []


def test_a_mixed_policy_works() -> None:
    with dtype_policy("mixed_float16"):
        ours, theirs = pair()
        assert dtype_name(ours(tensor(X))) == "float16"
        with pytest.raises((AssertionError, ValueError), match="float"):
            theirs(tensor(X))


def test_training_may_be_a_tensor() -> None:
    ours, theirs = pair()
    assert ours(tensor(X), training=tf.constant(value=True)).shape == (4, 3)
    with pytest.raises(Exception, match="type mismatch"):
        theirs(tensor(X), training=tf.constant(value=True))


def test_layers_with_several_inputs_and_weights_of_layers_inside_work() -> None:
    attention = kl.MultiHeadAttention(2, 3)
    query = tensor(np.ones((2, 4, 6)))
    attention(query, query)
    ours = QuantizationWrapper(attention, {"query_dense.kernel": inferable()}, input_names=("query", "value", "key"))
    assert ours(query, query).shape == (2, 4, 6)
    assert ours(query=query, value=query).shape == (2, 4, 6)
    theirs = KerasQuantizationWrapper(attention, {"query_dense.kernel": inferable()})
    with pytest.raises(AttributeError, match="query_dense"):
        theirs(query, query)


def test_converting_twice_keeps_the_quantizers() -> None:
    ours, _ = pair()
    before = numpy(ours(tensor(X)))
    for _ in range(2):
        ours.convert_to_inferable_quantizers()
        assert list(ours.weights_quantizers) == ["kernel"]
    assert np.array_equal(numpy(ours(tensor(X))), before)


@needs_two_devices
def test_a_layer_called_by_two_threads_of_a_strategy_is_not_disturbed() -> None:
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        ours = QuantizationWrapper(dense(), {"kernel": inferable()})
    results = strategy.run(lambda: ours(tensor(X)))
    first, second = (numpy(each) for each in strategy.experimental_local_results(results))
    assert np.array_equal(first, second)
    assert isinstance(ours.layer.kernel, tf.Variable)
