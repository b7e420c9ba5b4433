"""The same networks and their training in Keras 3, from the weights of PyTorch's float models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import floats
import keras
import numpy as np
import tensorflow as tf
from cells import FLOAT, Cell, recipe
from keras import layers, ops
from problems import CONTEXT, VOCABULARY, WINDOW, Array, Data, Problem, batches, load, score

import trainable_keras


def _convolution(x: Any, name: str, outputs: int, size: int = 3, stride: int = 1, *, depthwise: bool = False) -> Any:
    """Return convolution, batch norm and ReLU, padded on all sides as in PyTorch."""
    if size > 1:
        x = layers.ZeroPadding2D(size // 2, name=f"{name}_pad")(x)
    if depthwise:
        x = layers.DepthwiseConv2D(size, stride, use_bias=False, name=f"{name}_conv")(x)
    else:
        x = layers.Conv2D(outputs, size, stride, use_bias=False, name=f"{name}_conv")(x)
    x = layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name=f"{name}_norm")(x)
    return layers.ReLU(name=f"{name}_relu")(x)


def _classifier(image: Any, x: Any) -> Any:
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(image, layers.Dense(10, name="head")(x))


def cnn() -> Any:
    """Return three convolutions and a dense layer for images of shape (8, 8, 1)."""
    image = keras.Input((8, 8, 1))
    x = _convolution(image, "stem", 8)
    x = _convolution(x, "body1", 16, stride=2)
    return _classifier(image, _convolution(x, "body2", 16, stride=2))


def depthwise() -> Any:
    """Return a convolution, three depthwise ones with a pointwise one behind each, and a dense layer."""
    image = keras.Input((8, 8, 1))
    x = _convolution(image, "stem", 16, stride=2)
    for index in range(3):
        x = _convolution(x, f"depth{index}", 0, depthwise=True)
        x = _convolution(x, f"point{index}", 32, size=1)
    return _classifier(image, x)


@keras.saving.register_keras_serializable("evidence")
class Positions(layers.Layer):
    """The numbers of the places in a sequence, for codes of shape (N, length)."""

    def call(self, codes: Any) -> Any:
        """Return shape (1, length)."""
        return ops.arange(ops.shape(codes)[1])[None]


@keras.saving.register_keras_serializable("evidence")
class Attention(layers.Layer):
    """Causal attention without weights; PyTorch's ``scaled_dot_product_attention`` with the heads split and joined.

    Parameters
    ----------
    heads : int
        How many.
    **kwargs
        Those of every layer.
    """

    def __init__(self, heads: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.heads = heads

    def call(self, query: Any, key: Any, value: Any) -> Any:
        """Return shape (N, length, width)."""
        length, width = query.shape[1:]
        q, k, v = (ops.reshape(x, (-1, length, self.heads, width // self.heads)) for x in (query, key, value))
        scores = ops.einsum("nqhc,nkhc->nhqk", q, k) / (width // self.heads) ** 0.5
        mask = np.tril(np.ones((length, length), bool))
        attended = ops.softmax(ops.where(mask, scores, -1e9))
        return ops.reshape(ops.einsum("nhqk,nkhc->nqhc", attended, v), (-1, length, width))


def _block(x: Any, name: str, width: int, heads: int, hidden: int) -> Any:
    """Return causal attention and a feed-forward part, each behind a layer norm, with residuals."""
    normed = layers.LayerNormalization(epsilon=1e-5, name=f"{name}_norm1")(x)
    parts = [layers.Dense(width, name=f"{name}_{part}")(normed) for part in ("query", "key", "value")]
    attended = Attention(heads, name=f"{name}_attention")(*parts)
    x = layers.Add(name=f"{name}_add1")([x, layers.Dense(width, name=f"{name}_project")(attended)])
    normed = layers.LayerNormalization(epsilon=1e-5, name=f"{name}_norm2")(x)
    up = layers.Dense(hidden, activation="gelu", name=f"{name}_up")(normed)
    return layers.Add(name=f"{name}_add2")([x, layers.Dense(width, name=f"{name}_down")(up)])


def transformer(width: int = 64, heads: int = 4, hidden: int = 128) -> Any:
    """Return two blocks between embeddings and a dense layer, for codes of characters of shape (length,)."""
    codes = keras.Input((CONTEXT,), dtype="int32")
    place = layers.Embedding(CONTEXT, width, name="position")(Positions(name="positions")(codes))
    x = layers.Add(name="add")([layers.Embedding(VOCABULARY, width, name="embedding")(codes), place])
    for index in range(2):
        x = _block(x, f"block{index}", width, heads, hidden)
    x = layers.LayerNormalization(epsilon=1e-5, name="norm")(x)
    return keras.Model(codes, layers.Dense(VOCABULARY, name="head")(x))


def recurrent(width: int = 64) -> Any:
    """Return a GRU and a dense layer, for series of shape (length, 1)."""
    series = keras.Input((WINDOW, 1))
    return keras.Model(series, layers.Dense(1, name="head")(layers.GRU(width, name="recurrent")(series)))


NETWORKS: dict[str, Callable[[], Any]] = {
    "cnn": cnn,
    "depthwise": depthwise,
    "transformer": transformer,
    "recurrent": recurrent,
}


def _of_gru(saved: dict[str, Array], prefix: str) -> list[Array]:
    """Return PyTorch's weights of a GRU as Keras has them, whose gates are in another order."""
    gates = {
        name: np.split(saved[f"{prefix}.{name}_l0"], 3) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    }
    joined = {name: np.concatenate([update, reset, new]) for name, (reset, update, new) in gates.items()}
    return [joined["weight_ih"].T, joined["weight_hh"].T, np.stack([joined["bias_ih"], joined["bias_hh"]])]


def load_weights(model: Any, saved: dict[str, Array]) -> None:
    """Give a model the weights of PyTorch's."""
    axes = {"Conv2D": (2, 3, 1, 0), "DepthwiseConv2D": (2, 3, 0, 1), "Dense": (1, 0), "Embedding": (0, 1)}
    for layer in model.layers:
        if not layer.weights:
            continue
        kind = type(layer).__name__
        prefix = layer.name.replace("_", ".", 1) if layer.name.startswith("block") else layer.name
        if kind == "GRU":
            layer.set_weights(_of_gru(saved, prefix))
            continue
        names = ("weight", "bias", "running_mean", "running_var")
        values = [saved[f"{prefix}.{name}"] for name in names if f"{prefix}.{name}" in saved]
        if kind in axes:
            values[0] = values[0].transpose(axes[kind])
        layer.set_weights(values)


def _inputs(problem: Problem, x: Array) -> Array:
    return {"digits": lambda: x[..., np.newaxis], "text": lambda: x.astype(np.int32), "series": lambda: x}[
        problem.data
    ]()


def _train(cell: Cell, qmodel: Any, data: Data) -> None:
    """Train with an optimizer for weights and one for what quantizers learn, as PyTorch's groups."""
    problem, steps = cell.problem, cell.problem.steps
    rates = {"WEIGHTS": problem.rate, "QPARAMS": problem.rate * cell.qparams}
    groups = trainable_keras.parameter_groups(qmodel)
    variables = [group["params"] for group in groups]
    constant = [rates[group["name"]] for group in groups]
    decaying = [keras.optimizers.schedules.CosineDecay(rate, steps) for rate in constant]
    optimizers = [keras.optimizers.Adam(rate, epsilon=1e-8) for rate in (decaying if cell.row.decays else constant)]
    for optimizer, own in zip(optimizers, variables, strict=True):
        optimizer.build(own)
    criterion = (
        keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        if problem.classifies
        else keras.losses.MeanSquaredError()
    )

    @tf.function(autograph=False)
    def step(x: Any, y: Any) -> None:
        with tf.GradientTape() as tape:
            loss = criterion(y, qmodel(x, training=True)) + trainable_keras.regularization(qmodel)
        gradients = tape.gradient(loss, variables)
        for optimizer, own, found in zip(optimizers, variables, gradients, strict=True):
            optimizer.apply(found, own)

    for x, y in batches(problem, data, steps=steps, seed=cell.seed + 1):
        step(tf.constant(_inputs(problem, x)), tf.constant(y))


def _score(problem: Problem, model: Any, data: Data) -> float:
    outputs = tf.function(model, autograph=False)(tf.constant(_inputs(problem, data.test_x)), training=False)
    return score(problem, outputs.numpy(), data.test_y)


def run(cell: Cell) -> dict[str, float]:
    """Train a cell's network and return the scores of what is deployed."""
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    keras.backend.clear_session()
    keras.utils.set_random_seed(cell.seed)
    problem, data = cell.problem, load(cell.problem, cell.seed)
    model = NETWORKS[cell.network]()
    load_weights(model, floats.weights(cell.network, cell.seed))
    if cell.method == FLOAT:
        return {"score": _score(problem, model, data)}
    some = [_inputs(problem, x) for x, _ in batches(problem, data, steps=8, seed=cell.seed + 100)]
    qmodel = trainable_keras.calibrate(trainable_keras.wrap(model, recipe(cell)), some, progress=False)
    if cell.row.reconstructs:
        trainable_keras.reconstruct(qmodel, some, progress=False)
    if cell.row.trains:
        _train(cell, qmodel, data)
    found = {"score": _score(problem, trainable_keras.finalize(qmodel), data)}
    if any(isinstance(layer, layers.BatchNormalization) for layer in model.layers):
        batched = [_inputs(problem, x) for x, _ in batches(problem, data, steps=50, seed=cell.seed + 200)]
        trainable_keras.reestimate_batch_norm(qmodel, batched)
        found["reestimated"] = _score(problem, trainable_keras.finalize(qmodel), data)
    return found
