"""What was trained is what is deployed, bit for bit, after the numbers have moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trainable_keras
from tests.keras.framework import (
    KERAS_VERSION,
    dtype_policy,
    name_of,
    needs_mctq,
    numpy,
    only_tensorflow,
    pull_back,
    tensor,
    tf,
    to_numpy,
)
from tests.keras.models import (
    GRIDS,
    MODELS,
    TRAINED_BY,
    call,
    dense,
    images,
    moved,
    network,
    ready,
    recipe,
    same,
    spec,
    state,
    train,
    vectors,
    weights_only,
)
from trainable_core.errors import ModelError, QuantizerStateError
from trainable_keras import ActivationQuantizationHolder, QuantizationWrapper, describe, finalize, wrap
from trainable_keras.graph import layers_within
from trainable_keras.training import quantizers_of


@pytest.mark.parametrize("placement", ["inputs", "outputs"])
@pytest.mark.parametrize("name", list(MODELS))
def test_what_was_trained_is_what_is_deployed(name: str, placement: str) -> None:
    make, batches = MODELS[name]
    activations = spec("LSQ", "UNIFORM", 8, placement=placement)
    qmodel = moved(ready(make(), {"weights": spec("LSQ"), "activations": activations}, batches()))
    deployed = finalize(qmodel)
    assert same(call(deployed, batches(5)), call(qmodel, batches(5)))
    assert {row.state for row in describe(deployed).rows} == {"deployed"}


@pytest.mark.parametrize("per_channel", [True, False], ids=["channels", "tensor"])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("training_method", TRAINED_BY)
def test_every_method_and_grid_is_deployed_as_trained(training_method: str, grid: str, per_channel: bool) -> None:
    how = {
        "weights": spec(training_method, grid, per_channel=per_channel),
        "activations": spec(training_method, grid),
    }
    qmodel = moved(ready(dense(activation="relu"), how, vectors(16, 4)))
    assert same(call(finalize(qmodel), vectors(32, 4)), call(qmodel, vectors(32, 4)))


def test_the_gradient_of_the_input_is_the_trained_models() -> None:
    """For saliency maps and adversarial examples."""
    how = {"weights": spec("STE"), "activations": spec("STE", "UNIFORM", 8)}
    qmodel = moved(ready(network(), how, images()))
    upstream = tensor(np.ones(call(qmodel, images())[0].shape))
    one, other = (
        pull_back(lambda x, model=model: model(x, training=False), [tensor(3 * images())], upstream)[0]
        for model in (qmodel, finalize(qmodel))
    )
    assert np.abs(one).max() > 0
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("n_bits", [1, 2, 3, 8, 16])
def test_every_width_is_deployed_as_trained(n_bits: int) -> None:
    qmodel = moved(ready(dense(), recipe("LSQ", "UNIFORM", n_bits), vectors(16, 4)))
    assert same(call(finalize(qmodel), vectors(32, 4)), call(qmodel, vectors(32, 4)))


@only_tensorflow("Keras compiles with TensorFlow's graphs")
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("training_method", TRAINED_BY)
def test_graphs_give_the_same_bits_after_a_real_step(training_method: str, grid: str) -> None:
    qmodel = train(ready(dense(activation="relu"), recipe(training_method, grid, 3), vectors(16, 4)), vectors(16, 4))
    deployed = finalize(qmodel)
    expected = call(qmodel, vectors(32, 4))
    assert same([deployed.predict(vectors(32, 4), verbose=0)], [qmodel.predict(vectors(32, 4), verbose=0)])
    assert same([deployed.predict(vectors(32, 4), verbose=0)], expected)
    assert same(call(deployed, vectors(32, 4)), expected)


@pytest.mark.parametrize("grid", GRIDS)
def test_training_mode_gives_what_is_deployed(grid: str) -> None:
    qmodel = moved(ready(dense(), recipe("LSQ", grid), vectors(16, 4)))
    assert same(call(qmodel, vectors(32, 4), training=True), call(finalize(qmodel), vectors(32, 4)))


@only_tensorflow("SavedModel is TensorFlow's format")
def test_a_served_function_gives_the_same_bits(tmp_path: Path) -> None:
    deployed = finalize(ready(network(), {"weights": spec("DQA"), "activations": spec("LSQ")}, images()))
    folder = str(tmp_path / "served")
    if KERAS_VERSION == 2:
        tf.saved_model.save(deployed, folder)
    else:
        deployed.export(folder, verbose=False)
    (result,) = tf.saved_model.load(folder).signatures["serving_default"](tensor(images())).values()
    assert same([result.numpy()], [deployed.predict(images(), verbose=0)])


def test_training_moves_what_is_deployed() -> None:
    qmodel = ready(dense(), recipe("LSQ"), vectors(16, 4))
    before = [row.params for row in describe(finalize(qmodel)).rows]
    train(qmodel, vectors(16, 4), lr=0.5)
    assert all(row.params != old for row, old in zip(describe(finalize(qmodel)).rows, before, strict=True))


@needs_mctq
@pytest.mark.parametrize("grid", GRIDS)
def test_the_deployed_quantizers_are_mctqs(grid: str) -> None:
    from mct_quantizers import KerasActivationQuantizationHolder, KerasQuantizationWrapper
    from mct_quantizers.keras import quantizers as mctq

    short = {"SYMMETRIC": "Symmetric", "POWER_OF_TWO": "POT", "UNIFORM": "Uniform"}[grid]
    deployed = finalize(ready(dense(), recipe("LSQ", grid), vectors(8, 4)))
    (wrapper,) = [layer for layer in layers_within(deployed) if isinstance(layer, QuantizationWrapper)]
    (holder,) = wrapper.holders
    assert isinstance(wrapper.weights_quantizers["kernel"], getattr(mctq, f"Weights{short}InferableQuantizer"))
    assert isinstance(holder, ActivationQuantizationHolder)
    if KERAS_VERSION == 2:  # where mctq's wrapper and holder run too
        assert isinstance(wrapper, KerasQuantizationWrapper)
        assert isinstance(holder, KerasActivationQuantizationHolder)
    assert isinstance(holder.activation_holder_quantizer, getattr(mctq, f"Activation{short}InferableQuantizer"))


def test_the_deployed_model_has_nothing_to_train_in_its_quantizers() -> None:
    qmodel = ready(dense(), recipe("LSQ"), vectors(8, 4))
    assert {name_of(variable) for variable in qmodel.trainable_variables} == {"kernel", "bias", "threshold"}
    deployed = finalize(qmodel)
    assert {name_of(variable) for variable in deployed.trainable_variables} == {"kernel", "bias"}
    assert quantizers_of(deployed) == {}


def test_the_trained_model_is_left_as_it_is_and_still_trains() -> None:
    qmodel = moved(ready(network(), recipe("LSQ"), images()))
    before, outputs = state(qmodel), call(qmodel, images())
    deployed = finalize(qmodel)
    assert state(qmodel) == before
    train(qmodel, images(), lr=0.5)
    assert not same(call(qmodel, images()), outputs)
    assert same(call(deployed, images()), outputs)  # it does not follow


def test_finalizing_a_finalized_model_gives_an_equal_copy() -> None:
    deployed = finalize(moved(ready(network(), recipe("LSQ", "UNIFORM"), images())))
    again = finalize(deployed)
    assert again is not deployed
    assert same(call(again, images()), call(deployed, images()))
    assert describe(again).to_dict() == describe(deployed).to_dict()


def test_conversion_in_place_is_idempotent() -> None:
    qmodel = moved(ready(dense(), recipe("LSQ"), vectors(8, 4)))
    expected = call(qmodel, vectors(8, 4))
    (wrapper,) = [layer for layer in layers_within(qmodel) if isinstance(layer, QuantizationWrapper)]
    for _ in range(2):
        wrapper.convert_to_inferable_quantizers()
        assert same(call(qmodel, vectors(8, 4)), expected)
        assert wrapper.num_weights_quantizers == 1


def test_a_width_chosen_by_attention_is_deployed() -> None:
    qmodel = ready(dense(), {"weights": spec("DQA", candidates=[2, 4, 8])})
    (quantizer,) = quantizers_of(qmodel).values()
    quantizer.assign(quantizer.logits, np.array([0.0, 0.5, 2.0], np.float32))
    assert [row.n_bits for row in describe(finalize(qmodel)).rows] == [8]


def test_quantizers_that_are_switched_off_stay_as_they_are() -> None:
    qmodel = ready(dense(), recipe("LSQ"), vectors(8, 4))
    quantizer = quantizers_of(qmodel)["fc.kernel"]
    off = type(quantizer)(quantizer.quantization_config.model_copy(update={"enable_weights_quantization": False}))
    off.subject = "fc.kernel"
    with pytest.raises(QuantizerStateError, match=r"fc\.kernel: its config switches quantization off"):
        off.convert2inferable()
    assert np.array_equal(numpy(off(tensor(vectors(4, 3)))), vectors(4, 3))


def test_before_calibration_the_layers_are_named() -> None:
    with pytest.raises(QuantizerStateError, match=r"(?s)fc\.kernel, fc: inputs.*trainable_keras\.calibrate"):
        finalize(wrap(dense(), recipe()))


@pytest.mark.parametrize("model", [None, 3, dense])
def test_what_was_not_wrapped_is_refused(model: Any) -> None:
    given = model() if callable(model) else model
    with pytest.raises(ModelError, match=r"trainable_keras\.wrap|must be a Keras model"):
        finalize(given)


def test_the_numbers_are_those_of_the_trained_quantizer() -> None:
    qmodel = moved(ready(dense(), weights_only("LSQ", "UNIFORM", n_bits=8)))
    (quantizer,) = quantizers_of(qmodel).values()
    expected, found = quantizer.current_qparams(), quantizer.convert2inferable().qparams
    assert found.scale.tolist() == expected.scale.tolist()
    assert found.zero_point.tolist() == expected.zero_point.tolist()
    assert not np.isnan(to_numpy(quantizer.range_min)).any()


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "float16", "bfloat16"])
def test_a_dtype_policy_is_deployed_as_trained(policy: str) -> None:
    with dtype_policy(policy):
        qmodel = moved(ready(dense(), recipe("LSQ"), vectors(8, 4)))
        deployed = finalize(qmodel)
    one, other = (numpy(each(tensor(vectors(8, 4)))) for each in (qmodel, deployed))
    assert np.array_equal(one, other)
    assert trainable_keras.describe(deployed).finalized
