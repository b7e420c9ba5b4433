"""A wrapped layer does what a plain layer with quantized weights does, for every layer type that has weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import trainable_keras.keras2
from tests.tfkeras.tensors import numpy, tensor
from trainable_core.errors import InvalidArgumentError, ModelError, QuantizerStateError

kl = tf.keras.layers

WEIGHTS_ONLY = {
    "schema_version": 1,
    "weights": {"method": "SYMMETRIC", "n_bits": 4, "training_method": "LSQ"},
    "fold_batch_norm": False,
}
IMAGE, SEQUENCE = (6, 6, 4), (5, 8)

CASES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "Dense": (lambda: kl.Dense(3, activation="relu"), (8,)),
    "EinsumDense": (lambda: kl.EinsumDense("abc,cde->abde", (None, 2, 3), bias_axes="e"), SEQUENCE),
    "Conv1D": (lambda: kl.Conv1D(3, 2), SEQUENCE),
    "Conv2D": (lambda: kl.Conv2D(6, 3, padding="same", groups=2), IMAGE),
    "Conv3D": (lambda: kl.Conv3D(3, 2), (4, 4, 4, 2)),
    "DepthwiseConv1D": (lambda: kl.DepthwiseConv1D(2), SEQUENCE),
    "DepthwiseConv2D": (lambda: kl.DepthwiseConv2D(3, depth_multiplier=2), IMAGE),
    "SeparableConv1D": (lambda: kl.SeparableConv1D(3, 2), SEQUENCE),
    "SeparableConv2D": (lambda: kl.SeparableConv2D(3, 3), IMAGE),
    "Conv1DTranspose": (lambda: kl.Conv1DTranspose(3, 2), SEQUENCE),
    "Conv2DTranspose": (lambda: kl.Conv2DTranspose(3, 3, strides=2), IMAGE),
    "Conv3DTranspose": (lambda: kl.Conv3DTranspose(3, 2), (4, 4, 4, 2)),
    "Embedding": (lambda: kl.Embedding(10, 4), (5,)),
    "LSTM": (lambda: kl.LSTM(3, return_sequences=True), SEQUENCE),
    "GRU": (lambda: kl.GRU(3), SEQUENCE),
    "SimpleRNN": (lambda: kl.SimpleRNN(3), SEQUENCE),
    "MultiHeadAttention": (lambda: kl.MultiHeadAttention(2, 3), SEQUENCE),
}
CHANNELS = {  # axis of the output channels, by hand from Keras's kernel layouts
    "Dense.kernel": 1,
    "EinsumDense.kernel": 2,
    "Conv1D.kernel": 2,
    "Conv2D.kernel": 3,
    "Conv3D.kernel": 4,
    "DepthwiseConv1D.depthwise_kernel": 1,
    "DepthwiseConv2D.depthwise_kernel": 2,
    "SeparableConv1D.depthwise_kernel": 1,
    "SeparableConv1D.pointwise_kernel": 2,
    "SeparableConv2D.depthwise_kernel": 2,
    "SeparableConv2D.pointwise_kernel": 3,
    "Conv1DTranspose.kernel": 1,
    "Conv2DTranspose.kernel": 2,
    "Conv3DTranspose.kernel": 3,
    "Embedding.embeddings": 0,
    "LSTM.cell.kernel": 1,
    "LSTM.cell.recurrent_kernel": 1,
    "GRU.cell.kernel": 1,
    "GRU.cell.recurrent_kernel": 1,
    "SimpleRNN.cell.kernel": 1,
    "SimpleRNN.cell.recurrent_kernel": 1,
    "MultiHeadAttention.query_dense.kernel": 2,
    "MultiHeadAttention.key_dense.kernel": 2,
    "MultiHeadAttention.value_dense.kernel": 2,
    "MultiHeadAttention.output_dense.kernel": 2,
}
every_layer = pytest.mark.parametrize("name", list(CASES))


def model_of(name: str) -> tuple[tf.keras.Model, np.ndarray]:
    """Return a functional model of one layer, and an input for it."""
    tf.keras.utils.set_random_seed(7)
    make, shape = CASES[name]
    random = np.random.default_rng(3)
    if name == "Embedding":
        given, x = tf.keras.Input(shape, dtype="int32"), random.integers(0, 10, (2, *shape)).astype("int32")
    else:
        given, x = tf.keras.Input(shape), random.normal(size=(2, *shape)).astype("float32")
    layer = make()
    output = layer(given, given) if name == "MultiHeadAttention" else layer(given)
    return tf.keras.Model(given, output), x


def wrapper_in(model: tf.keras.Model) -> trainable_keras.keras2.QuantizationWrapper:
    (wrapper,) = [layer for layer in model.layers if isinstance(layer, trainable_keras.keras2.QuantizationWrapper)]
    return wrapper


@every_layer
@pytest.mark.parametrize("deployed", [False, True], ids=["trainable", "deployed"])
def test_output_is_that_of_the_layer_with_quantized_weights(name: str, deployed: bool) -> None:
    model, x = model_of(name)
    qmodel = trainable_keras.keras2.calibrate(trainable_keras.keras2.wrap(model, WEIGHTS_ONLY))
    if deployed:
        qmodel = trainable_keras.keras2.finalize(qmodel)
    quantized = wrapper_in(qmodel).get_quantized_weights()
    plain = tf.keras.models.clone_model(model)
    plain.set_weights(model.get_weights())
    (layer,) = [each for each in plain.layers if not isinstance(each, kl.InputLayer)]
    for attribute, value in quantized.items():
        variable = trainable_keras.keras2.QuantizationWrapper.weight_of(layer, attribute)
        assert not np.array_equal(numpy(value), numpy(variable))
        variable.assign(value)
    x = tensor(x) if name != "Embedding" else x
    assert np.array_equal(numpy(qmodel(x, training=False)), numpy(plain(x, training=False)))


@every_layer
def test_channel_axes_are_those_of_the_output(name: str) -> None:
    rows = trainable_keras.keras2.describe(trainable_keras.keras2.wrap(model_of(name)[0], WEIGHTS_ONLY)).rows
    wanted = {key.partition(".")[2]: axis for key, axis in CHANNELS.items() if key.startswith(f"{name}.")}
    assert {row.tensor: row.channels_axis for row in rows} == wanted


@every_layer
def test_gradients_reach_weights_and_thresholds(name: str) -> None:
    model, x = model_of(name)
    qmodel = trainable_keras.keras2.calibrate(trainable_keras.keras2.wrap(model, WEIGHTS_ONLY))
    before = [np.array(numpy(variable)) for variable in qmodel.trainable_variables]
    target = np.zeros_like(model.predict(x, verbose=0))
    qmodel.compile(tf.keras.optimizers.SGD(0.5), "mse")
    qmodel.fit(x, target, verbose=0)
    moved = {
        variable.name
        for variable, old in zip(qmodel.trainable_variables, before, strict=True)
        if not np.array_equal(numpy(variable), old)
    }
    # softmax does not see what the key's bias adds to all scores alike
    still = {v.name for v in qmodel.trainable_variables if v.name.endswith("key/bias:0")}
    assert {variable.name for variable in qmodel.trainable_variables} - moved <= still


def test_batch_statistics_are_assigned_and_noise_is_drawn_anew() -> None:
    trainable_keras.keras2.register_layer(_Noisy, "linear", {"kernel": -1})
    tf.keras.utils.set_random_seed(1)
    model = tf.keras.Sequential([tf.keras.Input((4,)), _Noisy(name="noisy")])
    qmodel = trainable_keras.keras2.calibrate(trainable_keras.keras2.wrap(model, WEIGHTS_ONLY))
    layer = wrapper_in(qmodel).layer
    x = tensor(np.ones((8, 4), np.float32) * 3)
    first, second = numpy(qmodel(x, training=True)), numpy(qmodel(x, training=True))
    assert not np.array_equal(first, second)
    mean = numpy(layer.norm.moving_mean)
    assert not np.array_equal(mean, np.zeros(4))
    assert np.array_equal(numpy(qmodel(x, training=False)), numpy(qmodel(x, training=False)))
    assert np.array_equal(numpy(layer.norm.moving_mean), mean)


@tf.keras.saving.register_keras_serializable(package="tests")
class _Noisy(kl.Layer):
    """A layer with a weight, a loss, noise and batch statistics of its own."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.norm = kl.BatchNormalization()
        self.noise = kl.Dropout(0.5)

    def build(self, shape: Any) -> None:
        self.kernel = self.add_weight(shape=(shape[-1], shape[-1]), initializer="glorot_uniform", name="kernel")
        self.norm.build(shape)

    def call(self, x: Any, training: bool | None = None) -> Any:
        y = tf.matmul(self.noise(x, training=training), self.kernel)
        self.add_loss(tf.reduce_mean(y**2))
        return self.norm(y, training=training)


def test_losses_of_the_layer_reach_the_model() -> None:
    trainable_keras.keras2.register_layer(_Noisy, "linear", {"kernel": -1})
    model = tf.keras.Sequential([tf.keras.Input((4,)), _Noisy(name="noisy")])
    qmodel = trainable_keras.keras2.calibrate(trainable_keras.keras2.wrap(model, WEIGHTS_ONLY))
    qmodel(tensor(np.ones((8, 4))), training=False)
    assert len(qmodel.losses) == 1
    assert float(numpy(qmodel.losses[0])) > 0


def test_attributes_are_the_layers() -> None:
    wrapper = wrapper_in(trainable_keras.keras2.wrap(model_of("Conv2D")[0], WEIGHTS_ONLY))
    assert wrapper.filters == 6
    assert wrapper.kernel is wrapper.layer.kernel
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        _ = wrapper.nothing_of_this_name


def test_an_unbuilt_layer_is_refused() -> None:
    with pytest.raises(ModelError, match="not built"):
        trainable_keras.keras2.QuantizationWrapper(kl.Dense(3), {})


def test_a_weight_that_is_not_there_is_refused() -> None:
    dense = kl.Dense(3)
    dense.build((None, 4))
    with pytest.raises(InvalidArgumentError, match="no weight 'kernal'"):
        trainable_keras.keras2.QuantizationWrapper.weight_of(dense, "kernal")


def test_a_call_before_calibration_says_so() -> None:
    model, x = model_of("Dense")
    with pytest.raises(QuantizerStateError, match="no quantization params"):
        trainable_keras.keras2.wrap(model, WEIGHTS_ONLY)(tensor(x))


def test_masks_pass() -> None:
    given = tf.keras.Input((None,), dtype="int32")
    embedded = kl.Embedding(10, 4, mask_zero=True)(given)
    model = tf.keras.Model(given, kl.LSTM(3)(embedded))
    qmodel = trainable_keras.keras2.calibrate(trainable_keras.keras2.wrap(model, WEIGHTS_ONLY))
    padded = np.array([[3, 4, 5, 0, 0], [3, 4, 5, 6, 0]], "int32")
    # a masked step changes nothing: the state is that of the sequence without it
    short = numpy(qmodel(padded[:1, :3], training=False))
    assert np.array_equal(numpy(qmodel(padded, training=False))[0], short[0])


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("name", ["Dense", "Conv2D", "Embedding", "MultiHeadAttention", "LSTM"])
def test_weights_are_quantized_in_float32_under_a_mixed_policy(policy: str, name: str) -> None:
    tf.keras.mixed_precision.set_global_policy(policy)
    try:
        model, x = model_of(name)
        qmodel = trainable_keras.keras2.calibrate(trainable_keras.keras2.wrap(model, WEIGHTS_ONLY))
    finally:
        tf.keras.mixed_precision.set_global_policy("float32")
    wrapper = wrapper_in(qmodel)
    assert {value.dtype for value in wrapper.get_quantized_weights().values()} == {tf.float32}
    y = qmodel(x)
    assert y.dtype.name == policy.removeprefix("mixed_")
    assert np.array_equal(numpy(trainable_keras.keras2.finalize(qmodel)(x)).view("uint16"), numpy(y).view("uint16"))


def test_a_compiled_step_trains() -> None:
    model, x = model_of("Conv2D")
    qmodel = trainable_keras.keras2.calibrate(trainable_keras.keras2.wrap(model, WEIGHTS_ONLY))
    qmodel.compile("sgd", "mse", jit_compile=True)
    history = qmodel.fit(x, np.zeros(qmodel.compute_output_shape(x.shape), np.float32), epochs=3, verbose=0)
    assert history.history["loss"][2] < history.history["loss"][0]
