"""Batch-norm folding keeps the function; what stays says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.keras.framework import FRAMEWORK, KERAS_VERSION, functions, keras, kl, numpy, tensor
from tests.keras.models import call, functional, images, network, ready, spec, vectors, weights_only
from trainable_keras import describe, wrap
from trainable_keras.folding import folded_copy, plan_folding
from trainable_keras.graph import layers_within

UNIT = 2.0**-24  # relative error of one float32 operation


def settled(model: keras.Model) -> keras.Model:
    """Return the model with batch norms that have seen something."""
    random = np.random.default_rng(0)
    for layer in layers_within(model):
        if isinstance(layer, kl.BatchNormalization):
            for variable in layer.variables:
                variable.assign(random.uniform(0.5, 2, tuple(variable.shape)))
    return model


def after(layer: Any, shape: tuple[int, ...] = (6, 6, 2), **options: Any) -> keras.Model:
    keras.utils.set_random_seed(3)
    return settled(keras.Sequential([keras.Input(shape), layer, kl.BatchNormalization(name="norm", **options)]))


FOLDABLE: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "Conv1D": (lambda: kl.Conv1D(4, 3), (6, 2)),
    "Conv2D": (lambda: kl.Conv2D(4, 3), (6, 6, 2)),
    "Conv2D of groups": (lambda: kl.Conv2D(4, 3, use_bias=False, groups=2), (6, 6, 2)),
    "Conv3D": (lambda: kl.Conv3D(4, 2), (4, 4, 4, 2)),
    "DepthwiseConv1D": (lambda: kl.DepthwiseConv1D(3, depth_multiplier=2), (6, 2)),
    "DepthwiseConv2D": (lambda: kl.DepthwiseConv2D(3, depth_multiplier=2), (6, 6, 2)),
    "SeparableConv2D": (lambda: kl.SeparableConv2D(4, 3), (6, 6, 2)),
    "Conv1DTranspose": (lambda: kl.Conv1DTranspose(4, 3), (6, 2)),
    "Conv2DTranspose": (lambda: kl.Conv2DTranspose(4, 3, strides=2, use_bias=False), (6, 6, 2)),
    "Dense": (lambda: kl.Dense(4), (6, 6, 2)),
}


@pytest.mark.parametrize(("make", "shape"), FOLDABLE.values(), ids=FOLDABLE)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_the_function_stays(make: Any, shape: tuple[int, ...], affine: bool) -> None:
    model = after(make(), shape, epsilon=0.01, scale=affine, center=affine)
    layer, norm = model.layers
    assert plan_folding(FRAMEWORK, model).folded == {"norm": layer.name}
    x = vectors(3, *shape)
    expected = numpy(model(tensor(x), training=False))
    actual = numpy(folded_copy(FRAMEWORK, layer, norm, "layer")(tensor(x)))
    # float32 sums of up to 36 products, and the normalization's own ten operations; every value is below 64
    assert np.abs(expected).max() < 64
    assert np.abs(actual - expected).max() <= (36 + 10) * UNIT * 64


def test_values_by_hand() -> None:
    model = after(kl.Dense(2), (1,), epsilon=1.0)
    layer, norm = model.layers
    layer.kernel.assign([[2.0, 4.0]])
    layer.bias.assign([1.0, 0.0])
    norm.gamma.assign([3.0, 1.0])
    norm.beta.assign([0.5, 0.0])
    norm.moving_mean.assign([2.0, 1.0])
    norm.moving_variance.assign([3.0, 0.0])
    copied = folded_copy(FRAMEWORK, layer, norm, "layer")
    # gains 3 / sqrt(3 + 1) and 1 / sqrt(0 + 1); biases (1 - 2) * 1.5 + 0.5 and (0 - 1) * 1
    assert numpy(copied.kernel).tolist() == [[3.0, 4.0]]
    assert numpy(copied.bias).tolist() == [-1.0, -1.0]


def test_wrap_folds_and_tells() -> None:
    model = settled(network())
    # 16 bits: the difference is the quantization of weights, half a step of 2**-15 of each channel's range
    qmodel = ready(model, weights_only(n_bits=16))
    assert describe(qmodel).folded == {"stem.norm": "stem.conv"}
    (gone,) = [layer for layer in layers_within(qmodel) if isinstance(layer, FRAMEWORK.passing)]
    assert gone.name == "norm"
    assert isinstance(gone, kl.BatchNormalization)
    assert gone.weights == []
    # three layers; sums of 9, 9 and 16 products, each weight below 4, each value below 16
    assert np.abs(call(qmodel, images())[0] - call(model, images())[0]).max() < (9 + 9 + 16) * 4 * 2.0**-16 * 16


def test_it_can_be_switched_off() -> None:
    qmodel = ready(network(), weights_only(fold_batch_norm=False))
    assert describe(qmodel).folded == {}
    assert any(isinstance(layer, kl.BatchNormalization) for layer in layers_within(qmodel))


def test_the_given_model_keeps_its_batch_norm() -> None:
    model = settled(network())
    before = call(model, images())
    wrap(model, weights_only())
    assert np.array_equal(call(model, images())[0], before[0])
    assert any(isinstance(layer, kl.BatchNormalization) for layer in layers_within(model))


def test_nested_and_functional_models_are_folded() -> None:
    assert plan_folding(FRAMEWORK, functional()).folded == {"inner.norm": "inner.conv"}


class SpecialConv(kl.Conv2D):
    """Not Keras's own: who knows what its call does."""


def image() -> Any:
    return keras.Input((4, 4, 4))


def conv(**options: Any) -> Any:
    return kl.Conv2D(4, 1, **options)


def norm() -> Any:
    return kl.BatchNormalization(name="norm")


def nothing_before() -> keras.Model:
    given = image()
    return keras.Model(given, norm()(given))


def other_users() -> keras.Model:
    given = image()
    output = conv()(given)
    return keras.Model(given, norm()(output) + output)


def layer_called_twice() -> keras.Model:
    given, shared = image(), conv()
    return keras.Model(given, norm()(shared(given)) + shared(given + 1.0))


def norm_called_twice() -> keras.Model:
    given, shared = image(), norm()
    return keras.Model(given, shared(conv()(given)) + shared(conv()(given)))


def function_before() -> keras.Model:
    given = image()
    return keras.Model(given, norm()(functions.relu(conv()(given))))


def output_leaves() -> keras.Model:
    given = image()
    output = conv()(given)
    return keras.Model(given, [norm()(output), output])


REASONS: dict[str, tuple[str, Callable[[], keras.Model]]] = {
    "nothing before": ("no layer", nothing_before),
    "a function before": ("no layer", function_before),
    "another layer before": ("MaxPooling2D", lambda: keras.Sequential([image(), kl.MaxPooling2D(1), norm()])),
    "a subclass": ("SpecialConv", lambda: keras.Sequential([image(), SpecialConv(4, 1), norm()])),
    "an activation inside": ("activation", lambda: keras.Sequential([image(), conv(activation="relu"), norm()])),
    "other users": ("other users", other_users),
    "an output of the model": ("other users", output_leaves),
    "layer called twice": ("more than once", layer_called_twice),
    "norm called twice": ("more than once", norm_called_twice),
    "another axis": (
        "channels",
        lambda: keras.Sequential([image(), conv(), kl.BatchNormalization(axis=1, name="norm")]),
    ),
}


@pytest.mark.parametrize("case", REASONS)
def test_a_batch_norm_stays_and_says_why(case: str) -> None:
    expected, build = REASONS[case]
    model = build()
    assert expected in plan_folding(FRAMEWORK, model).kept["norm"]
    assert (
        f"batch norm not folded: {plan_folding(FRAMEWORK, model).kept['norm']}"
        == describe(wrap(model, {"activations": spec()})).left_out["norm"]
    )


def test_a_batch_norm_behind_a_layer_that_shares_its_weights_stays() -> None:
    given, one, other = image(), conv(), conv()
    model = keras.Model(given, norm()(other(one(given))))
    if KERAS_VERSION == 3:  # which locks built layers, and has a property for the kernel
        other._tracker.unlock()  # noqa: SLF001 - there is no public way
        other._kernel = one._kernel  # noqa: SLF001 - as above
    else:
        other.kernel = one.kernel
    found = plan_folding(FRAMEWORK, model)
    assert found.folded == {}
    assert "shares its weights" in found.kept["norm"]


class Chooses(keras.Model):
    """A model without a graph, whose part has one."""

    def __init__(self) -> None:
        super().__init__()
        self.block = keras.Sequential([image(), conv(name="conv"), norm()])
        self.alone = kl.BatchNormalization()

    def call(self, x: Any) -> Any:
        """Return the output."""
        return self.alone(self.block(x))


def test_in_a_model_without_a_graph_the_parts_are_folded() -> None:
    model = Chooses()
    model(tensor(np.zeros((1, 4, 4, 4))))
    found = plan_folding(FRAMEWORK, model)
    assert found.folded == {"block.norm": "block.conv"}
    assert "no graph" in found.kept["alone"]


def test_a_model_without_batch_norm_has_nothing_to_fold() -> None:
    found = plan_folding(FRAMEWORK, keras.Sequential([keras.Input((2,)), kl.Dense(2)]))
    assert (found.folded, found.kept, found.gone) == ({}, {}, set())
