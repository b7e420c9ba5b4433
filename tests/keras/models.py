"""What the model-level Keras tests share: recipes, small models, a few training steps."""

from __future__ import annotations

from typing import Any

import numpy as np

import trainable_keras
from tests.keras.framework import functions, keras, kl, nested, numpy, tensor
from trainable_keras.graph import layers_within
from trainable_keras.training import quantizers_of

TRAINED_BY = ("STE", "LSQ", "DQA")
GRIDS = ("SYMMETRIC", "POWER_OF_TWO", "UNIFORM")


def spec(training_method: str = "STE", method: str = "SYMMETRIC", n_bits: int = 4, **more: Any) -> dict[str, Any]:
    """Return how one kind of tensor is quantized, as a recipe says it."""
    return {"training_method": training_method, "method": method, "n_bits": n_bits, **more}


def recipe(training_method: str = "STE", method: str = "SYMMETRIC", n_bits: int = 4, **more: Any) -> dict[str, Any]:
    """Return a recipe that quantizes weights and activations alike; `more` replaces or adds parts."""
    both = spec(training_method, method, n_bits)
    return {"weights": both, "activations": dict(both), **more}


def weights_only(
    training_method: str = "STE", method: str = "SYMMETRIC", n_bits: int = 4, **more: Any
) -> dict[str, Any]:
    """Return a recipe for weights, the rest float."""
    return {"weights": spec(training_method, method, n_bits), **more}


def dqa(n_bits: int = 2, **arguments: Any) -> dict[str, Any]:
    """Return a recipe for weights that learn their width, with these arguments of the method."""
    return {"weights": spec("DQA", n_bits=n_bits, arguments=arguments)}


def dense(inputs: int = 4, outputs: int = 3, **arguments: Any) -> keras.Sequential:
    """Return a model of one layer called ``fc``."""
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((inputs,)), kl.Dense(outputs, name="fc", **arguments)])


def network() -> keras.Sequential:
    """Return convolutions and a dense layer, with batch norm and activations, for images of shape (6, 6, 1)."""
    keras.utils.set_random_seed(0)
    stem = [
        keras.Input((6, 6, 1)),
        kl.Conv2D(4, 3, use_bias=False, name="conv"),
        kl.BatchNormalization(name="norm"),
        kl.ReLU(name="relu"),
    ]
    layers = [
        keras.Input((6, 6, 1)),
        keras.Sequential(stem, name="stem"),
        kl.DepthwiseConv2D(3, name="body"),
        kl.ReLU(name="relu"),
        kl.Flatten(name="flatten"),
        kl.Dense(3, name="head"),
    ]
    return keras.Sequential(layers, name="network")


def flat() -> keras.Sequential:
    """Return a convolution with batch norm, and a dense layer, in no model of their own, for images too.

    Keras 2 can't load nested models with layers that are not Keras's own from an HDF5 file.
    """
    keras.utils.set_random_seed(0)
    layers = [
        keras.Input((6, 6, 1)),
        kl.Conv2D(4, 3, use_bias=False, name="conv"),
        kl.BatchNormalization(name="norm"),
        kl.ReLU(name="relu"),
        kl.Flatten(name="flatten"),
        kl.Dense(3, name="head"),
    ]
    return keras.Sequential(layers)


def functional() -> keras.Model:
    """Return a model with two inputs and outputs, a shared layer, a nested model, functional operations."""
    keras.utils.set_random_seed(0)
    first, second = keras.Input((6, 6, 2), name="first"), keras.Input((6, 6, 2), name="second")
    shared = kl.Conv2D(4, 3, padding="same", name="shared")
    inner = keras.Sequential(
        [keras.Input((6, 6, 4)), kl.Conv2D(4, 1, use_bias=False, name="conv"), kl.BatchNormalization(name="norm")],
        name="inner",
    )
    merged = shared(first) * 0.5 + inner(shared(second))
    pooled = kl.GlobalAveragePooling2D(name="pool")(functions.relu(merged))
    return keras.Model([first, second], [kl.Dense(3, name="head")(pooled), kl.Dense(1, name="score")(pooled)])


@keras.saving.register_keras_serializable(package="tests")
class Subclassed(keras.Model):
    """Layers as attributes, in lists, and in a model of their own."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.stem = kl.Conv2D(4, 3, padding="same")
        self.blocks = [kl.Conv2D(4, 1), kl.Conv2D(4, 1)]
        self.tail = keras.Sequential([kl.Flatten(), kl.Dense(3, name="dense")])

    def call(self, x: Any, training: bool | None = None) -> Any:
        """Return the output."""
        x = self.stem(x)
        for block in self.blocks:
            x = functions.relu(block(x)) + x
        return self.tail(x)


def subclassed() -> keras.Model:
    """Return it, built."""
    keras.utils.set_random_seed(0)
    model = Subclassed()
    model(tensor(np.zeros((1, 6, 6, 2))))
    return model


def vectors(*shape: int) -> np.ndarray:
    """Return normal numbers of this shape, always the same ones."""
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


def images(count: int = 8) -> np.ndarray:
    """Return inputs of `network`, the same for the same count."""
    return np.random.default_rng(count).normal(size=(count, 6, 6, 1)).astype(np.float32)


MODELS: dict[str, tuple[Any, Any]] = {
    "sequential": (network, images),
    "functional": (functional, lambda count=8: [vectors(count, 6, 6, 2), vectors(count, 6, 6, 2) + 1]),
    "subclassed": (subclassed, lambda count=8: vectors(count, 6, 6, 2)),
}
"""Ways to build a model, and inputs for each."""


def tensors(batch: Any) -> Any:
    """Return a batch of arrays as tensors of the engine."""
    return nested.map_structure(tensor, batch)


def call(model: Any, batch: Any, *, training: bool = False) -> list[np.ndarray]:
    """Return a model's outputs."""
    return [numpy(each) for each in nested.flatten(model(tensors(batch), training=training))]


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    """Tell whether two models' outputs are the same bit for bit."""
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def ready(model: Any, how: Any, *batches: Any) -> Any:
    """Return the model wrapped and calibrated; its batch norms have seen something."""
    for layer in layers_within(model):
        if isinstance(layer, kl.BatchNormalization):
            layer.moving_mean.assign(np.linspace(-0.5, 0.5, layer.moving_mean.shape[0]))
            layer.moving_variance.assign(np.linspace(0.5, 2, layer.moving_mean.shape[0]))
    return trainable_keras.calibrate(trainable_keras.wrap(model, how), [(tensors(batch),) for batch in batches])


def train(qmodel: Any, batch: Any, *, lr: float = 0.05, **options: Any) -> Any:
    """Let `fit` take one step of gradient descent; return the model."""
    targets = [np.zeros_like(each) for each in call(qmodel, batch)]
    several = len(targets) > 1
    qmodel.compile(keras.optimizers.SGD(lr), ["mse"] * len(targets) if several else "mse", **options)
    size = len(nested.flatten(batch)[0])
    qmodel.fit(batch, targets if several else targets[0], batch_size=size, shuffle=False, verbose=0)
    return qmodel


def moved(qmodel: Any) -> Any:
    """Return the model with every trained number off its calibrated place, as after a long training."""
    random = np.random.default_rng(1)
    for variable in qmodel.trainable_variables:
        variable.assign(numpy(variable) * (1 + 0.3 * random.random(tuple(variable.shape))).astype(np.float32))
    for quantizer in quantizers_of(qmodel).values():
        if "logits" in quantizer.variable_names:
            quantizer.assign(quantizer.logits, random.normal(size=tuple(quantizer.logits.shape)).astype(np.float32))
    return qmodel


def quantizer_at(qmodel: Any, name: str) -> trainable_keras.BaseKerasTrainableQuantizer:
    """Return the trainable quantizer of a tensor, such as ``fc.kernel`` or ``fc: inputs``."""
    return quantizers_of(qmodel)[name]


def state(model: Any) -> list[bytes]:
    """Return every variable's bits."""
    return [numpy(variable).tobytes() for variable in model.variables]
