"""mct-quantizers beside ours: what it finds, and models that are made of nothing but its classes."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import trainable_keras
from tests import mctq_classes
from tests.keras.framework import BACKEND, KERAS_VERSION, keras, kl, needs_mctq, only_keras, to_numpy
from trainable_core import list_quantizers
from trainable_core.errors import ModelError, QuantizerStateError, UnsupportedConfigError
from trainable_keras.graph import layers_within

METHODS = "SYMMETRIC", "POWER_OF_TWO", "UNIFORM"
TARGETS = "Weights", "Activation"


def recipe(method: str = "SYMMETRIC", n_bits: int = 8, **others: Any) -> dict[str, Any]:
    tensor = {"method": method, "n_bits": n_bits, "training_method": "LSQ"}
    return {"weights": tensor, "activations": tensor, **others}


# ---- what mctq finds ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def everything_of_ours() -> Any:
    """Return whatever this backend has of mctq's, in use: classes, a wrapped and a deployed model, a user's class."""
    import mct_quantizers

    class Mine(trainable_keras.BaseKerasTrainableQuantizer):
        """A quantizer that a user writes."""

    methods = [mct_quantizers.QuantizationMethod[name] for name in METHODS]
    mct_quantizers.mark_quantizer(mct_quantizers.QuantizationTarget.Weights, methods, "MINE")(Mine)
    rows = list_quantizers(BACKEND)
    model = keras.Sequential([kl.Input((6, 6, 3)), kl.Conv2D(4, 3), kl.ReLU()])
    qmodel = trainable_keras.calibrate(
        trainable_keras.wrap(model, recipe()), [np.random.default_rng(0).normal(size=(2, 6, 6, 3)).astype(np.float32)]
    )
    return [Mine, rows, qmodel, trainable_keras.finalize(qmodel)]


@needs_mctq
@pytest.mark.usefixtures("everything_of_ours")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("target", TARGETS)
def test_mctq_finds_one_class_for_a_target_and_a_grid(target: str, method: str) -> None:
    import mct_quantizers
    from mct_quantizers.common.get_quantizers import get_inferable_quantizer_class
    from mct_quantizers.keras.quantizers import BaseKerasInferableQuantizer

    found = get_inferable_quantizer_class(
        mct_quantizers.QuantizationTarget[target],
        mct_quantizers.QuantizationMethod[method],
        BaseKerasInferableQuantizer,
    )
    assert found.__module__.startswith("mct_quantizers.")


@pytest.mark.usefixtures("everything_of_ours")
def test_none_of_our_classes_is_found_among_the_subclasses_of_mctqs() -> None:
    assert "BaseInferableQuantizer" in {cls.__name__ for cls in mctq_classes.classes()}  # the look-up sees the classes
    assert mctq_classes.foreign() == set()


@pytest.mark.usefixtures("everything_of_ours")
def test_no_class_is_registered_with_keras_under_a_name_of_mctqs() -> None:
    registered = keras.saving.get_custom_objects()
    theirs = {cls.__name__ for cls in mctq_classes.classes()} - {"MetadataLayer"}  # which mctq itself registers
    assert any(name.startswith("trainable_keras") for name in registered)
    assert theirs.isdisjoint(registered)


def test_what_is_made_is_still_of_mctqs_classes(everything_of_ours: Any) -> None:
    import mct_quantizers

    own, _, qmodel, deployed = everything_of_ours
    assert issubclass(own, mct_quantizers.BaseInferableQuantizer)
    for model in (qmodel, deployed):
        wrapper = next(layer for layer in model.layers if hasattr(layer, "weights_quantizers"))
        (holder,) = wrapper.input_holders.values()
        for quantizer in (wrapper.weights_quantizers["kernel"], holder.activation_holder_quantizer):
            assert isinstance(quantizer, mct_quantizers.BaseInferableQuantizer)
        if KERAS_VERSION == 2:  # where mctq's wrapper and holder run
            assert isinstance(wrapper, mct_quantizers.KerasQuantizationWrapper)
            assert isinstance(holder, mct_quantizers.KerasActivationQuantizationHolder)


# ---- models of mctq's own classes -----------------------------------------------------------------------------------

of_keras_2 = only_keras(2, "mctq's wrapper and holder can't be built on Keras 3")
GENERATOR = np.random.default_rng(0)
IMAGES = GENERATOR.normal(size=(4, 8, 8, 3)).astype(np.float32)
VECTORS = GENERATOR.normal(size=(4, 6)).astype(np.float32)


def sequential() -> Any:
    return keras.Sequential(
        [kl.Input((8, 8, 3)), kl.Conv2D(4, 3), kl.BatchNormalization(), kl.ReLU(), kl.Flatten(), kl.Dense(3)]
    )


def residual() -> Any:
    inputs = kl.Input((8, 8, 3))
    first = kl.ReLU()(kl.BatchNormalization()(kl.Conv2D(8, 3, padding="same")(inputs)))
    both = kl.Add()([first, kl.DepthwiseConv2D(3, padding="same")(first)])
    return keras.Model(inputs, kl.Dense(4)(kl.GlobalAveragePooling2D()(both)))


def nested() -> Any:
    inner = keras.Sequential([kl.Input((8, 8, 3)), kl.Conv2D(4, 3), kl.ReLU()])
    return keras.Sequential([kl.Input((8, 8, 3)), inner, kl.Conv2DTranspose(2, 2)])


def shared() -> Any:
    inputs, layer = kl.Input((6,)), kl.Dense(6)
    return keras.Model(inputs, layer(kl.ReLU()(layer(inputs))))


def attention() -> Any:
    inputs = kl.Input((4, 6))
    return keras.Model(inputs, kl.MultiHeadAttention(2, 3)(inputs, inputs))


STOCK_MODELS = {
    "sequential": (sequential, IMAGES),
    "residual": (residual, IMAGES),
    "nested": (nested, IMAGES),
    "shared": (shared, VECTORS),
}


def deployed(model: Any, batch: Any, method: str = "SYMMETRIC", n_bits: int = 8, placement: str = "inputs") -> Any:
    asked = recipe(method, n_bits)
    asked["activations"] = {**asked["activations"], "placement": placement}
    return trainable_keras.finalize(trainable_keras.calibrate(trainable_keras.wrap(model, asked), [batch]))


def near(one: Any, other: Any) -> None:
    """Assert equality up to the roundings of another scale: the values of this seed are next to no tie.

    The kernels' scale differs from ours by 2**-23 of itself, and so do all values behind a quantizer; three layers of
    sums of up to 144 such products, which have other roundings each, end within 2**-23 * 3 * 144 of the largest one.
    """
    one, other = (to_numpy(each) for each in (one, other))
    np.testing.assert_allclose(one, other, rtol=0, atol=2**-23 * 3 * 144 * np.abs(other).max())


@of_keras_2
@pytest.mark.parametrize("placement", ["inputs", "outputs"])
@pytest.mark.parametrize(("method", "n_bits"), [("SYMMETRIC", 8), ("POWER_OF_TWO", 3), ("UNIFORM", 4), ("UNIFORM", 12)])
@pytest.mark.parametrize("name", STOCK_MODELS)
def test_a_stock_model_is_of_mctqs_classes_and_gives_the_same(
    name: str, method: str, n_bits: int, placement: str
) -> None:
    import mct_quantizers

    make, batch = STOCK_MODELS[name]
    ours = deployed(make(), batch, method, n_bits, placement)
    before = [to_numpy(variable) for variable in ours.weights]
    stock = trainable_keras.to_mctq(ours)
    near(stock(batch), ours(batch))
    layers = layers_within(stock)
    wrappers = [each for each in layers if type(each) is mct_quantizers.KerasQuantizationWrapper]
    holders = [each for each in layers if type(each) is mct_quantizers.KerasActivationQuantizationHolder]
    quantizers = [q for wrapper in wrappers for q in wrapper.weights_quantizers.values()]
    quantizers += [holder.activation_holder_quantizer for holder in holders]
    assert wrappers
    assert holders
    assert not any(type(each).__module__.startswith("trainable") for each in layers)
    assert {type(each).__module__.partition(".")[0] for each in quantizers} == {"mct_quantizers"}
    for value, variable in zip(before, ours.weights, strict=True):
        np.testing.assert_array_equal(to_numpy(variable), value)


ALONE = """
import sys
for name in ("trainable_core", "trainable_torch", "trainable_keras", "torch"):
    sys.modules[name] = None
import numpy as np
from mct_quantizers import keras_load_quantized_model
stock = keras_load_quantized_model(sys.argv[1], compile=False)
np.save(sys.argv[3], stock(np.load(sys.argv[2])).numpy())
"""


@of_keras_2
@pytest.mark.parametrize("suffix", ["keras", "h5"])
@pytest.mark.parametrize("name", ["residual", "nested"])
def test_a_stock_model_opens_where_only_mctq_is_installed(tmp_path: Any, name: str, suffix: str) -> None:
    make, batch = STOCK_MODELS[name]
    stock = trainable_keras.to_mctq(deployed(make(), batch))
    files = [str(tmp_path / f"stock.{suffix}"), str(tmp_path / "x.npy"), str(tmp_path / "y.npy")]
    stock.save(files[0])
    np.save(files[1], batch)
    subprocess.run([sys.executable, "-c", ALONE, *files], check=True)
    np.testing.assert_array_equal(np.load(files[2]), to_numpy(stock(batch)))


def refused(ours: Any, *facts: str) -> None:
    before = [to_numpy(variable) for variable in ours.weights]
    with pytest.raises(UnsupportedConfigError) as caught:
        trainable_keras.to_mctq(ours)
    for fact in facts:
        assert fact in str(caught.value)
    for value, variable in zip(before, ours.weights, strict=True):
        np.testing.assert_array_equal(to_numpy(variable), value)


@of_keras_2
def test_a_model_that_rounds_ties_as_another_target_is_refused() -> None:
    model = keras.Sequential([kl.Input((4,)), kl.Dense(3, name="top")])
    for target in ("onnx", "mctq"):
        asked = recipe(target=target)
        qmodel = trainable_keras.calibrate(trainable_keras.wrap(model, asked), [np.ones((2, 4), np.float32)])
        deployed = trainable_keras.finalize(qmodel)
        if target == "mctq":
            trainable_keras.to_mctq(deployed)
        else:
            with pytest.raises(UnsupportedConfigError, match=r"top.*even"):
                trainable_keras.to_mctq(deployed)


@only_keras(3, "Keras 2 has mctq's classes")
def test_on_keras_3_it_is_refused_with_the_reason() -> None:
    refused(deployed(shared(), VECTORS), "Keras 3", "learning_phase", "TF_USE_LEGACY_KERAS")


@of_keras_2
def test_one_bit_is_refused_by_every_name() -> None:
    model = keras.Sequential([kl.Input((6,)), kl.Dense(6, name="first"), kl.Dense(6, name="second")])
    refused(deployed(model, VECTORS, n_bits=1), "first: kernel", "first: inputs", "second: kernel", "2 to 16 bits")


@of_keras_2
@pytest.mark.parametrize("end", ["min_range", "max_range"])
def test_a_grid_that_mctq_derives_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    from mct_quantizers.keras import quantizers

    ours = deployed(keras.Sequential([kl.Input((6,)), kl.Dense(6, name="fc")]), VECTORS, "UNIFORM")
    init = quantizers.ActivationUniformInferableQuantizer.__init__

    def other(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        setattr(self, end, [value * 1.01 for value in getattr(self, end)])

    monkeypatch.setattr(quantizers.ActivationUniformInferableQuantizer, "__init__", other)
    refused(ours, "fc: inputs", "computes otherwise")


@of_keras_2
def test_a_weight_that_is_not_finite_goes_where_mctq_sends_it() -> None:
    """TensorFlow's kernels saturate infinities as ours do."""
    ours = deployed(keras.Sequential([kl.Input((6,)), kl.Dense(6, use_bias=False)]), VECTORS)
    (kernel,) = (v for v in ours.weights if v.shape == (6, 6))
    kernel.assign(np.where(np.eye(6) > 0, np.inf, to_numpy(kernel)).astype(np.float32))
    near(trainable_keras.to_mctq(ours)(VECTORS), ours(VECTORS))


@of_keras_2
def test_weights_of_layers_inside_a_layer_are_refused() -> None:
    tokens = GENERATOR.normal(size=(2, 4, 6)).astype(np.float32)
    refused(deployed(attention(), tokens), "query_dense.kernel", "of a layer inside")


@of_keras_2
def test_layers_that_code_calls_are_refused() -> None:
    @keras.saving.register_keras_serializable(package="tests_mctq")
    class Coded(keras.Model):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.fc = kl.Dense(6)

        def call(self, inputs: Any) -> Any:
            return self.fc(inputs)

    model = Coded()
    model(VECTORS)
    refused(deployed(model, VECTORS), "fc: it is called by the code")


@of_keras_2
def test_another_compute_dtype_is_refused() -> None:
    model = keras.Sequential([kl.Input((6,)), kl.Dense(6, name="fc", dtype="mixed_bfloat16")])
    refused(deployed(model, VECTORS), "fc: it computes in bfloat16")


@of_keras_2
def test_a_quantizer_without_counterpart_is_refused() -> None:
    ours = deployed(keras.Sequential([kl.Input((6,)), kl.Dense(6, name="fc")]), VECTORS)
    wrapper = next(layer for layer in ours.layers if hasattr(layer, "weights_quantizers"))
    quantizer = wrapper.weights_quantizers["kernel"]
    kind = type(quantizer)
    quantizer.__class__ = type("Unknown", (kind,), {"__module__": "somebodys_plugin"})
    refused(ours, "fc: kernel", "no counterpart", "somebodys_plugin.Unknown")


@of_keras_2
def test_only_finalized_models_are_converted() -> None:
    qmodel = trainable_keras.calibrate(trainable_keras.wrap(shared(), recipe()), [VECTORS])
    with pytest.raises(QuantizerStateError, match="finalize"):
        trainable_keras.to_mctq(qmodel)
    with pytest.raises(ModelError, match="wrap"):
        trainable_keras.to_mctq(shared())
