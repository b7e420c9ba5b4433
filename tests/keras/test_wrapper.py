"""A wrapped layer does what a plain layer with quantized weights does, for every layer type that has weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import trainable_keras
from tests.keras.framework import (
    ENGINE,
    KERAS_VERSION,
    dtype_name,
    dtype_policy,
    functions,
    keras,
    kl,
    numpy,
    only_keras,
    path_of,
    tensor,
)
from trainable_core.errors import InvalidArgumentError, ModelError, QuantizerStateError

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
DEPTHWISE = {2: "depthwise_kernel", 3: "kernel"}[KERAS_VERSION]
CHANNELS = {  # axis of the output channels, by hand from Keras's kernel layouts
    "Dense.kernel": 1,
    "EinsumDense.kernel": 2,
    "Conv1D.kernel": 2,
    "Conv2D.kernel": 3,
    "Conv3D.kernel": 4,
    f"DepthwiseConv1D.{DEPTHWISE}": 1,
    f"DepthwiseConv2D.{DEPTHWISE}": 2,
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


def model_of(name: str) -> tuple[keras.Model, np.ndarray]:
    """Return a functional model of one layer, and an input for it."""
    keras.utils.set_random_seed(7)
    make, shape = CASES[name]
    random = np.random.default_rng(3)
    if name == "Embedding":
        given, x = keras.Input(shape, dtype="int32"), random.integers(0, 10, (2, *shape)).astype("int32")
    else:
        given, x = keras.Input(shape), random.normal(size=(2, *shape)).astype("float32")
    layer = make()
    output = layer(given, given) if name == "MultiHeadAttention" else layer(given)
    return keras.Model(given, output), x


def wrapper_in(model: keras.Model) -> trainable_keras.QuantizationWrapper:
    (wrapper,) = [layer for layer in model.layers if isinstance(layer, trainable_keras.QuantizationWrapper)]
    return wrapper


@every_layer
@pytest.mark.parametrize("deployed", [False, True], ids=["trainable", "deployed"])
def test_output_is_that_of_the_layer_with_quantized_weights(name: str, deployed: bool) -> None:
    model, x = model_of(name)
    qmodel = trainable_keras.calibrate(trainable_keras.wrap(model, WEIGHTS_ONLY))
    if deployed:
        qmodel = trainable_keras.finalize(qmodel)
    quantized = wrapper_in(qmodel).get_quantized_weights()
    plain = keras.models.clone_model(model)
    plain.set_weights(model.get_weights())
    (layer,) = [each for each in plain.layers if not isinstance(each, kl.InputLayer)]
    for attribute, value in quantized.items():
        variable = trainable_keras.QuantizationWrapper.weight_of(layer, attribute)
        assert not np.array_equal(numpy(value), numpy(variable))
        variable.assign(value)
    x = tensor(x) if name != "Embedding" else x
    assert np.array_equal(numpy(qmodel(x, training=False)), numpy(plain(x, training=False)))


@every_layer
def test_channel_axes_are_those_of_the_output(name: str) -> None:
    rows = trainable_keras.describe(trainable_keras.wrap(model_of(name)[0], WEIGHTS_ONLY)).rows
    wanted = {key.partition(".")[2]: axis for key, axis in CHANNELS.items() if key.startswith(f"{name}.")}
    assert {row.tensor: row.channels_axis for row in rows} == wanted


@every_layer
def test_gradients_reach_weights_and_thresholds(name: str) -> None:
    model, x = model_of(name)
    qmodel = trainable_keras.calibrate(trainable_keras.wrap(model, WEIGHTS_ONLY))
    before = [np.array(numpy(variable)) for variable in qmodel.trainable_variables]
    target = np.zeros_like(model.predict(x, verbose=0))
    qmodel.compile(keras.optimizers.SGD(0.5), "mse")
    qmodel.fit(x, target, verbose=0)
    moved = {
        path_of(variable)
        for variable, old in zip(qmodel.trainable_variables, before, strict=True)
        if not np.array_equal(numpy(variable), old)
    }
    # softmax does not see what the key's bias adds to all scores alike
    still = {path_of(v) for v in qmodel.trainable_variables if path_of(v).endswith("key/bias")}
    assert {path_of(variable) for variable in qmodel.trainable_variables} - moved <= still


def test_batch_statistics_are_assigned_and_noise_is_drawn_anew() -> None:
    trainable_keras.register_layer(_Noisy, "linear", {"kernel": -1})
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((4,)), _Noisy(name="noisy")])
    qmodel = trainable_keras.calibrate(trainable_keras.wrap(model, WEIGHTS_ONLY))
    layer = wrapper_in(qmodel).layer
    x = tensor(np.ones((8, 4)) * 3)
    first, second = (numpy(qmodel(x, training=True)) for _ in range(2))
    assert not np.array_equal(first, second)
    mean = np.array(numpy(layer.norm.moving_mean))
    assert not np.array_equal(mean, np.zeros(4))
    first, second = (numpy(qmodel(x, training=False)) for _ in range(2))
    assert np.array_equal(first, second)
    assert np.array_equal(numpy(layer.norm.moving_mean), mean)


@only_keras(3, "a layer with noise has a variable for its seed")
def test_seeds_are_assigned_back() -> None:
    trainable_keras.register_layer(_Noisy, "linear", {"kernel": -1})
    keras.utils.set_random_seed(1)
    qmodel = trainable_keras.calibrate(
        trainable_keras.wrap(keras.Sequential([keras.Input((4,)), _Noisy(name="noisy")]), WEIGHTS_ONLY)
    )
    state, x = wrapper_in(qmodel).layer.noise.seed_generator.state, tensor(np.ones((8, 4)))
    seeds = [np.array(numpy(state))]
    for training in (True, False):
        qmodel(x, training=training)
        seeds.append(np.array(numpy(state)))
    assert [np.array_equal(seed, seeds[1]) for seed in seeds] == [False, True, True]


@keras.saving.register_keras_serializable(package="tests")
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
        y = functions.matmul(self.noise(x, training=training), self.kernel)
        self.add_loss(functions.mean(y**2))
        return self.norm(y, training=training)


def test_losses_of_the_layer_reach_the_model() -> None:
    trainable_keras.register_layer(_Noisy, "linear", {"kernel": -1})
    model = keras.Sequential([keras.Input((4,)), _Noisy(name="noisy")])
    qmodel = trainable_keras.calibrate(trainable_keras.wrap(model, WEIGHTS_ONLY))
    qmodel(tensor(np.ones((8, 4))), training=False)
    assert len(qmodel.losses) == 1
    assert float(numpy(qmodel.losses[0])) > 0


def test_attributes_are_the_layers() -> None:
    wrapper = wrapper_in(trainable_keras.wrap(model_of("Conv2D")[0], WEIGHTS_ONLY))
    assert wrapper.filters == 6
    assert wrapper.kernel is wrapper.layer.kernel
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        _ = wrapper.nothing_of_this_name


def test_an_unbuilt_layer_is_refused() -> None:
    with pytest.raises(ModelError, match="not built"):
        trainable_keras.QuantizationWrapper(kl.Dense(3), {})


def test_a_weight_that_is_not_there_is_refused() -> None:
    dense = kl.Dense(3)
    dense.build((None, 4))
    with pytest.raises(InvalidArgumentError, match="no weight 'kernal'"):
        trainable_keras.QuantizationWrapper.weight_of(dense, "kernal")


def test_a_call_before_calibration_says_so() -> None:
    model, x = model_of("Dense")
    with pytest.raises(QuantizerStateError, match="no quantization params"):
        trainable_keras.wrap(model, WEIGHTS_ONLY)(tensor(x))


def test_masks_pass() -> None:
    given = keras.Input((None,), dtype="int32")
    embedded = kl.Embedding(10, 4, mask_zero=True)(given)
    model = keras.Model(given, kl.LSTM(3)(embedded))
    qmodel = trainable_keras.calibrate(trainable_keras.wrap(model, WEIGHTS_ONLY))
    padded = np.array([[3, 4, 5, 0, 0], [3, 4, 5, 6, 0]], "int32")
    # a masked step changes nothing: the state is that of the sequence without it
    short = numpy(qmodel(padded[:1, :3], training=False))
    assert np.array_equal(numpy(qmodel(padded, training=False))[0], short[0])


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("name", ["Dense", "Conv2D", "Embedding", "MultiHeadAttention", "LSTM"])
def test_weights_are_quantized_in_float32_under_a_mixed_policy(policy: str, name: str) -> None:
    with dtype_policy(policy):
        model, x = model_of(name)
        qmodel = trainable_keras.calibrate(trainable_keras.wrap(model, WEIGHTS_ONLY))
    values = wrapper_in(qmodel).get_quantized_weights().values()
    assert {dtype_name(value) for value in values} == {"float32"}
    x = tensor(x) if name != "Embedding" else x
    y = qmodel(x)
    assert dtype_name(y) == policy.removeprefix("mixed_")
    assert np.array_equal(numpy(trainable_keras.finalize(qmodel)(x)), numpy(y))


@pytest.mark.skipif(ENGINE == "torch", reason="no graph of its own to compile")
def test_a_compiled_step_trains() -> None:
    model, x = model_of("Conv2D")
    qmodel = trainable_keras.calibrate(trainable_keras.wrap(model, WEIGHTS_ONLY))
    qmodel.compile("sgd", "mse", jit_compile=True)
    history = qmodel.fit(x, np.zeros(qmodel.compute_output_shape(x.shape), np.float32), epochs=3, verbose=0)
    assert history.history["loss"][2] < history.history["loss"][0]
