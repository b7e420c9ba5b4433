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
    """What its call does is its own."""

    def call(self, x: Any) -> Any:
        """Return the output."""
        return super().call(x) * 2.0


class SpecialNorm(kl.BatchNormalization):
    """It also activates, as timm's does."""

    def call(self, x: Any, *given: Any, **options: Any) -> Any:
        """Return the output."""
        return functions.relu(super().call(x, *given, **options))


class Padded(kl.Conv2D):
    """A subclass with a constructor, a config and methods of its own, and Keras's call."""

    note = "nobody in Keras reads this"

    def __init__(self, filters: int, kernel_size: Any = 3, **options: Any) -> None:
        super().__init__(filters, kernel_size, **{"padding": "same", **options})
        self.made_by = "a test"

    def build(self, shape: Any) -> None:
        """Build it as Keras does."""
        super().build(shape)

    def get_config(self) -> dict[str, Any]:
        """Return Keras's own config."""
        config: dict[str, Any] = super().get_config()
        return config

    @property
    def area(self) -> int:
        """Number of taps."""
        return int(np.prod(self.kernel_size))


class Gentle(kl.BatchNormalization):
    """A subclass that changes a default, and nothing of the call."""

    def __init__(self, momentum: float = 0.9, **options: Any) -> None:
        super().__init__(momentum=momentum, **options)


class NeverBiased(kl.Conv2D):
    """Its constructor decides about the bias."""

    def __init__(self, filters: int, kernel_size: Any, **options: Any) -> None:
        options.pop("use_bias", None)
        super().__init__(filters, kernel_size, use_bias=False, **options)


def without_other(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "other"}


class Reader(kl.Layer):
    """A layer that uses the kernel of another one."""

    def __init__(self, other: Any, **options: Any) -> None:
        super().__init__(**options)
        self.other = other

    def call(self, x: Any) -> Any:
        """Return the output."""
        return x * functions.mean(self.other.kernel)

    def get_config(self) -> dict[str, Any]:
        """Return what the constructor takes."""
        return {**super().get_config(), "other": keras.saving.serialize_keras_object(self.other)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Return the layer again; whoever copies a model puts the right other layer in."""
        return cls(keras.saving.deserialize_keras_object(config["other"]), **without_other(config))


class ReadingDense(kl.Dense):
    """A layer of a known kind that uses the kernel of another one."""

    def __init__(self, units: int, other: Any, **options: Any) -> None:
        super().__init__(units, **options)
        self.other = other

    def get_config(self) -> dict[str, Any]:
        """Return what the constructor takes."""
        return {**super().get_config(), "other": keras.saving.serialize_keras_object(self.other)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Return the layer again."""
        return cls(other=keras.saving.deserialize_keras_object(config["other"]), **without_other(config))


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


def read_by(make_reader: Callable[[Any], Any]) -> keras.Model:
    given, layer = image(), conv()
    return keras.Model(given, make_reader(layer)(norm()(layer(given))))


def norm_in_training() -> keras.Model:
    given = image()
    return keras.Model(given, norm()(conv()(given), training=True))


def norm_in_a_model_in_training() -> keras.Model:
    given, hidden = image(), image()
    inner = keras.Model(hidden, norm()(conv()(hidden)), name="inner")
    return keras.Model(given, inner(given, training=True))


def nested_twice_in_two_models() -> keras.Model:
    """The convolution of the inner model is called by the outer one too."""
    given, hidden = image(), image()
    layer = conv()
    inner = keras.Model(hidden, norm()(layer(hidden)), name="inner")
    return keras.Model(given, inner(given) + layer(given))


def with_frozen(frozen: str) -> keras.Model:
    model = keras.Sequential([image(), conv(name="conv"), norm()])
    model.get_layer(frozen).trainable = False
    return model


def with_call_of_its_own() -> keras.Model:
    layer = conv()
    layer.call = lambda x: kl.Conv2D.call(layer, x) * 2.0
    return keras.Sequential([image(), layer, norm()])


def limited() -> Any:
    return keras.constraints.MaxNorm(0.05, axis=(0, 1, 2))


TERMS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "kernel_constraint": lambda: (conv(kernel_constraint=limited()), norm()),
    "kernel_regularizer": lambda: (conv(kernel_regularizer="l2"), norm()),
    "bias_constraint": lambda: (conv(bias_constraint="non_neg"), norm()),
    "bias_regularizer": lambda: (conv(bias_regularizer="l2"), norm()),
    "activity_regularizer": lambda: (conv(activity_regularizer="l2"), norm()),
    "depthwise_constraint": lambda: (kl.DepthwiseConv2D(1, depthwise_constraint="unit_norm"), norm()),
    "depthwise_regularizer": lambda: (kl.DepthwiseConv2D(1, depthwise_regularizer="l1"), norm()),
    "pointwise_constraint": lambda: (kl.SeparableConv2D(4, 1, pointwise_constraint="unit_norm"), norm()),
    "pointwise_regularizer": lambda: (kl.SeparableConv2D(4, 1, pointwise_regularizer="l1"), norm()),
    "gamma_constraint": lambda: (conv(), kl.BatchNormalization(gamma_constraint="non_neg", name="norm")),
    "gamma_regularizer": lambda: (conv(), kl.BatchNormalization(gamma_regularizer="l2", name="norm")),
    "beta_constraint": lambda: (conv(), kl.BatchNormalization(beta_constraint="non_neg", name="norm")),
    "beta_regularizer": lambda: (conv(), kl.BatchNormalization(beta_regularizer="l2", name="norm")),
}

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
    "a subclass of batch norm": (
        "SpecialNorm",
        lambda: keras.Sequential([image(), conv(), SpecialNorm(name="norm")]),
    ),
    "a call of one object": ("something of its own", with_call_of_its_own),
    "a class that has no bias": (
        "can't be made again with a bias",
        lambda: keras.Sequential([image(), NeverBiased(4, 1), norm()]),
    ),
    "a reader of the kernel": ("more than once", lambda: read_by(Reader)),
    "a known layer that reads the kernel": ("more than once", lambda: read_by(lambda each: ReadingDense(2, each))),
    "a call in training": ("training=True", norm_in_training),
    "a frozen layer before": ("don't train", lambda: with_frozen("conv")),
    "a frozen batch norm": ("don't train", lambda: with_frozen("norm")),
    **{
        name: (name, lambda make=make: keras.Sequential([image(), *make()]))  # type: ignore[misc]
        for name, make in TERMS.items()
    },
    "another axis": (
        "channels",
        lambda: keras.Sequential([image(), conv(), kl.BatchNormalization(axis=1, name="norm")]),
    ),
}


@pytest.mark.filterwarnings("ignore::trainable_core.errors.NothingQuantizedWarning")  # that is what it is about
@pytest.mark.parametrize("case", REASONS)
def test_a_batch_norm_stays_and_says_why(case: str) -> None:
    expected, build = REASONS[case]
    model = build()
    assert expected in plan_folding(FRAMEWORK, model).kept["norm"]
    assert (
        f"batch norm not folded: {plan_folding(FRAMEWORK, model).kept['norm']}"
        == describe(wrap(model, {"activations": spec()})).left_out["norm"]
    )


@pytest.mark.parametrize("build", [norm_in_a_model_in_training, nested_twice_in_two_models])
def test_a_batch_norm_in_a_nested_model_stays(build: Callable[[], keras.Model]) -> None:
    found = plan_folding(FRAMEWORK, build())
    assert found.folded == {}
    assert set(found.kept) == {"inner.norm"}


@pytest.mark.parametrize(
    ("layer", "normalization"),
    [
        (lambda: Padded(4), norm),
        (lambda: Padded(4, use_bias=False), norm),
        (conv, lambda: Gentle(name="norm")),
        (lambda: Padded(4), lambda: Gentle(name="norm")),
    ],
    ids=["layer", "layer without bias", "norm", "both"],
)
def test_subclasses_that_inherit_keras_call_are_folded(layer: Any, normalization: Any) -> None:
    keras.utils.set_random_seed(3)
    model = settled(keras.Sequential([keras.Input((6, 6, 2)), layer(), normalization()]))
    before, after_it = model.layers
    assert plan_folding(FRAMEWORK, model).folded == {"norm": before.name}
    x = vectors(3, 6, 6, 2)
    expected = numpy(model(tensor(x), training=False))
    actual = numpy(folded_copy(FRAMEWORK, before, after_it, "layer")(tensor(x)))
    assert np.abs(expected).max() < 64
    assert np.abs(actual - expected).max() <= (18 + 10) * UNIT * 64  # as in the first test


@pytest.mark.parametrize("frozen", [(), ("conv", "norm")], ids=["trained", "frozen"])
def test_what_trains_together_is_folded(frozen: tuple[str, ...]) -> None:
    model = keras.Sequential([image(), conv(name="conv"), norm()])
    for name in frozen:
        model.get_layer(name).trainable = False
    assert plan_folding(FRAMEWORK, model).folded == {"norm": "conv"}


@pytest.mark.parametrize("name", TERMS)
def test_a_step_of_nothing_leaves_constraints_and_losses_as_they_were(name: str) -> None:
    """With learning rate 0 only constraints act, and what they held before they hold still.

    Weights of 16 bits move values by up to 2**-15 of the largest; a constraint put on a folded kernel, by factors.
    """
    keras.utils.set_random_seed(3)
    model = settled(keras.Sequential([image(), *TERMS[name](), kl.Flatten(), kl.Dense(2, name="head")]))
    x, y = vectors(8, 4, 4, 4), vectors(8, 2)

    def step_of_nothing(each: keras.Model) -> float:
        each.compile(keras.optimizers.SGD(0.0), "mse")
        each.fit(x, y, batch_size=8, shuffle=False, verbose=0)
        for layer in layers_within(each):  # which has seen a batch more
            if isinstance(layer, kl.BatchNormalization):
                layer.moving_mean.assign(np.linspace(-0.5, 0.5, layer.moving_mean.shape[0]))
                layer.moving_variance.assign(np.linspace(0.5, 2, layer.moving_mean.shape[0]))
        return float(each.evaluate(x, y, batch_size=8, verbose=0))

    step_of_nothing(model)  # weights as Keras makes them first may be out of bounds
    qmodel = ready(model, weights_only(n_bits=16), x)
    before = call(qmodel, x)[0]
    losses = [step_of_nothing(each) for each in (model, qmodel)]
    found, expected = (call(each, x)[0] for each in (qmodel, model))
    assert np.abs(found - before).max() <= 2.0**-20 * np.abs(before).max()  # a norm is made one again
    assert np.abs(found - expected).max() <= 2.0**-9 * np.abs(expected).max()
    assert abs(losses[1] - losses[0]) <= 2.0**-8 * losses[0]


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
