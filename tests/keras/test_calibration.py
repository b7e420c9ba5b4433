"""One pass over batches sets every threshold, or changes nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.keras.framework import keras, kl, only_tensorflow, tensor, tf, to_numpy
from tests.keras.models import (
    GRIDS,
    TRAINED_BY,
    call,
    dense,
    functional,
    images,
    moved,
    network,
    quantizer_at,
    ready,
    recipe,
    spec,
    state,
    tensors,
    vectors,
    weights_only,
)
from trainable_core.calibration import Observer, calibrate_activation, calibrate_weights
from trainable_core.constants import SIGNED
from trainable_core.enums import CalibrationMethod
from trainable_core.errors import CalibrationError, QuantizerStateError, ThresholdsKeptWarning, UnseenTensorsError
from trainable_keras import QuantizationWrapper, calibrate, describe, finalize, wrap
from trainable_keras.graph import layers_within
from trainable_keras.parts import told_of
from trainable_keras.training import quantizers_of


def numbers(quantizer: Any) -> dict[str, np.ndarray]:
    """Return a quantizer's variables, by plain name."""
    return {key: to_numpy(variable) for key, variable in quantizer.grid_variables(quantizer.widths[0]).items()}


def wrappers(qmodel: Any) -> list[QuantizationWrapper]:
    return [layer for layer in layers_within(qmodel) if isinstance(layer, QuantizationWrapper)]


def two_layers() -> keras.Model:
    keras.utils.set_random_seed(0)
    layers = [keras.Input((6,)), kl.Dense(5, name="first"), kl.Dropout(0.5), kl.Dense(2, name="second")]
    return keras.Sequential(layers)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("method", list(CalibrationMethod))
def test_every_method_gives_cores_numbers(method: CalibrationMethod, grid: str) -> None:
    """Core is told exactly the values that pass: those of float weights, in inference mode."""
    model, x = two_layers(), vectors(40, 6)
    how = recipe(method=grid, calibration={"weights": method.value, "activations": method.value, "p": 3.0})
    qmodel = ready(model, how, x[:10], x[10:])
    options: dict[str, Any] = {"calibration_method": method, "quantization_method": grid, "n_bits": 4, "p": 3.0}
    behind = np.concatenate([to_numpy(model.layers[0](tensor(part))) for part in (x[:10], x[10:])])
    for name, seen in (("first", x), ("second", behind)):
        observer = Observer()
        observer.update(seen)
        expected = calibrate_activation(observer, **options)
        expected.pop(SIGNED, None)
        assert {key: np.float32(value) for key, value in expected.items()} == numbers(
            quantizer_at(qmodel, f"{name}: inputs")
        )
        weight = to_numpy(model.get_layer(name).kernel)
        expected = calibrate_weights(weight, channels_axis=1, **options)
        found = numbers(quantizer_at(qmodel, f"{name}.kernel"))
        assert expected.keys() == found.keys()
        assert all(np.array_equal(np.float32(expected[key]), found[key]) for key in expected)


def test_the_extremes_by_hand() -> None:
    model = dense(2, 2)
    model.layers[0].kernel.assign([[0.5, 0.25], [-2.0, -0.125]])
    minmax = {"weights": "minmax", "activations": "minmax"}
    qmodel = ready(model, recipe(calibration=minmax), np.array([[-3.0, 1.0]], np.float32))
    assert to_numpy(quantizer_at(qmodel, "fc.kernel").threshold).tolist() == [2.0, 0.25]  # largest magnitudes
    assert float(to_numpy(quantizer_at(qmodel, "fc: inputs").threshold)) == 3.0


@pytest.mark.parametrize("training_method", TRAINED_BY)
def test_every_training_method_is_calibrated(training_method: str) -> None:
    qmodel = ready(dense(), recipe(training_method), vectors(8, 4))
    assert all(quantizer.calibrated for quantizer in quantizers_of(qmodel).values())


def test_each_width_of_a_method_with_several_gets_its_own_numbers() -> None:
    how = {"weights": spec("DQA", candidates=[2, 8]), "calibration": {"weights": "mse"}}
    quantizer = quantizer_at(ready(dense(), how), "fc.kernel")
    assert (to_numpy(quantizer.threshold_2) != to_numpy(quantizer.threshold_8)).any()


def test_it_returns_the_model_it_was_given() -> None:
    qmodel = wrap(dense(), weights_only())
    assert calibrate(qmodel) is qmodel


def test_only_quantizers_change() -> None:
    qmodel = wrap(network(), recipe())
    own = {id(variable) for quantizer in quantizers_of(qmodel).values() for variable in quantizer.variables}
    kept = [variable for variable in qmodel.variables if id(variable) not in own]
    before = [to_numpy(variable).tobytes() for variable in kept]
    calibrate(qmodel, [images()])
    assert [to_numpy(variable).tobytes() for variable in kept] == before
    assert all(told_of(wrapper).quantizes_weights for wrapper in wrappers(qmodel))
    assert all(told_of(holder).observer is None for wrapper in wrappers(qmodel) for holder in wrapper.holders)


def test_batches_may_be_arrays_tensors_tuples_or_lists_and_come_from_a_generator() -> None:
    x = vectors(8, 4)
    expected = None
    for batches in ([x], [tensor(x)], [(x, np.zeros(8))], [[x, "label"]], (each for each in [x])):
        found = numbers(quantizer_at(calibrate(wrap(dense(), recipe()), batches), "fc: inputs"))
        assert expected is None or found == expected
        expected = found


def test_a_batch_of_named_inputs_is_passed_as_it_is() -> None:
    x = [vectors(4, 6, 6, 2), vectors(4, 6, 6, 2) + 1]
    by_name = calibrate(wrap(functional(), recipe()), [{"first": tensor(x[0]), "second": tensor(x[1])}])
    by_place = calibrate(wrap(functional(), recipe()), [(tensors(x),)])
    assert describe(by_name).to_dict() == describe(by_place).to_dict()


def test_forward_says_how_to_call_the_model() -> None:
    x = vectors(8, 4)
    qmodel = calibrate(wrap(dense(), recipe()), [{"images": x}], forward=lambda model, batch: model(batch["images"]))
    assert numbers(quantizer_at(qmodel, "fc: inputs")) == numbers(
        quantizer_at(ready(dense(), recipe(), x), "fc: inputs")
    )


@only_tensorflow("tf.data is TensorFlow's")
def test_batches_may_be_a_dataset_of_inputs_and_labels() -> None:
    x = vectors(8, 4)
    data = tf.data.Dataset.from_tensor_slices((x, np.zeros(8))).batch(4)
    qmodel = calibrate(wrap(dense(), recipe()), data)
    assert numbers(quantizer_at(qmodel, "fc: inputs")) == numbers(
        quantizer_at(ready(dense(), recipe(), x[:4], x[4:]), "fc: inputs")
    )


@only_tensorflow("the call is compiled by tf.function")
def test_a_call_that_the_user_compiled_shows_its_values_too() -> None:
    x = vectors(8, 4)
    qmodel = wrap(dense(), recipe())
    compiled = tf.function(lambda x: qmodel(x, training=False))
    calibrate(qmodel, [x], forward=lambda _, batch: compiled(batch))
    assert numbers(quantizer_at(qmodel, "fc: inputs")) == numbers(
        quantizer_at(ready(dense(), recipe(), x), "fc: inputs")
    )
    assert not tf.config.functions_run_eagerly()


def test_a_layer_that_no_batch_reaches_is_named() -> None:
    given, other = keras.Input((3,)), keras.Input((3,))
    model = keras.Model([given, other], [kl.Dense(2, name="used")(given), kl.Dense(2, name="unused")(other)])
    qmodel = wrap(model, recipe())
    used = qmodel.get_layer("used")
    with pytest.raises(CalibrationError, match="no batch reached its layer") as caught:
        calibrate(qmodel, [tensor(vectors(4, 3))], forward=lambda _, batch: used(batch))
    assert list(caught.value.reasons) == ["unused: inputs"]


def test_no_batches_are_needed_for_weights_and_none_are_read() -> None:
    read: list[int] = []
    calibrate(wrap(dense(), weights_only()), (read.append(1) for _ in range(3)))
    assert read == []


def test_progress_is_shown_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    calibrate(wrap(dense(), recipe()), [vectors(8, 4)], progress=True)
    assert "calibrate" in capsys.readouterr().err


def test_progress_is_not_shown_where_no_terminal_is(capsys: pytest.CaptureFixture[str]) -> None:
    calibrate(wrap(dense(), recipe()), [vectors(8, 4)])
    assert capsys.readouterr().err == ""


def test_thresholds_that_are_set_are_overwritten_only_by_force() -> None:
    qmodel = moved(ready(dense(), recipe("LSQ"), vectors(8, 4)))
    before = state(qmodel)
    with pytest.raises(QuantizerStateError, match=r"(?s)2 quantizers .*force=True"):
        calibrate(qmodel, [vectors(8, 4)])
    assert state(qmodel) == before
    calibrate(qmodel, [vectors(8, 4)], force=True)
    assert state(qmodel) != before


def test_only_what_is_missing_is_calibrated() -> None:
    qmodel = wrap(dense(), recipe())
    quantizer_at(qmodel, "fc.kernel").set_quantization_params({4: {"threshold": [5.0, 6.0, 7.0]}})
    calibrate(qmodel, [vectors(8, 4)])
    assert to_numpy(quantizer_at(qmodel, "fc.kernel").threshold).tolist() == [5.0, 6.0, 7.0]
    assert quantizer_at(qmodel, "fc: inputs").calibrated


def test_a_finalized_model_is_not_calibrated() -> None:
    deployed = finalize(ready(dense(), recipe(), vectors(8, 4)))
    with pytest.raises(QuantizerStateError, match="finalized"):
        calibrate(deployed, [vectors(8, 4)], force=True)


class Interrupted(Exception):  # noqa: N818 - what happens, not what is wrong
    """Raised in the middle of a calibration."""


def test_an_interrupted_calibration_leaves_the_model_as_it_was() -> None:
    qmodel = moved(ready(dense(), recipe("LSQ"), vectors(8, 4)))
    before, outputs = state(qmodel), call(qmodel, vectors(8, 4))

    def interrupted() -> Any:
        yield vectors(8, 4) * 5
        raise Interrupted

    with pytest.raises(Interrupted):
        calibrate(qmodel, interrupted(), force=True)
    assert state(qmodel) == before
    # quantizing again: neither observing nor with float weights any more
    assert np.array_equal(call(qmodel, vectors(8, 4))[0], outputs[0])


def test_a_compiled_model_calibrated_again_predicts_with_the_new_numbers() -> None:
    x = vectors(8, 4)
    qmodel = ready(dense(), recipe("STE"), x * 0.1)
    qmodel.predict(x, verbose=0)
    calibrate(qmodel, [x], force=True)
    assert np.array_equal(qmodel.predict(x, verbose=0), call(qmodel, x)[0])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_told_with_the_layer(value: float) -> None:
    x = vectors(8, 4)
    x[3, 2] = value
    qmodel = wrap(dense(), recipe())
    before = state(qmodel)
    with pytest.raises(CalibrationError, match=r"fc: inputs.*1 (NaN|infinite)") as caught:
        calibrate(qmodel, [vectors(8, 4), x])
    assert caught.value.subject == "fc: inputs"
    assert state(qmodel) == before
    assert {row.state for row in describe(qmodel).rows} == {"not calibrated"}
    assert all(told_of(holder).observer is None for wrapper in wrappers(qmodel) for holder in wrapper.holders)
    calibrate(qmodel, [vectors(8, 4)])  # as if nothing had been


def test_weights_that_are_not_finite_are_told_with_the_layer() -> None:
    model = dense()
    model.layers[0].kernel.assign(np.full((4, 3), np.nan))
    with pytest.raises(CalibrationError, match=r"fc\.kernel.*12 NaN"):
        calibrate(wrap(model, weights_only()))


# ---- what is not seen -----------------------------------------------------------------------------------------------


@keras.saving.register_keras_serializable("tests")
class Branches(keras.Model):  # type: ignore[misc] # Keras 2 is untyped
    """Layers that are reached in the ways in which a batch can miss a quantizer."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.body, self.aux, self.empty, self.never = (kl.Dense(6, name=n) for n in ("body", "aux", "empty", "never"))
        self.norm, self.drop = kl.BatchNormalization(), kl.Dropout(0.5)
        self.never.build((None, 6))

    def call(self, x: Any, training: bool = False) -> Any:
        y = self.body(x)
        if training:
            y = y + self.aux(self.drop(self.norm(y, training=training), training=training))
        self.empty(y[:0])
        return y

    def get_config(self) -> dict[str, Any]:
        return {}


UNSEEN = {
    "empty: inputs": "it got an empty tensor, which holds no values to quantize",
    "never: inputs": "no batch reached its layer in evaluation mode or in training mode",
}
RUNS_IN_TRAINING = {"aux: inputs": "its layer runs only in training mode"}


def branches() -> keras.Model:
    model = Branches()
    model(tensor(vectors(4, 6)), training=True)
    return model


@pytest.mark.filterwarnings("ignore:`build.. was called on layer:UserWarning")  # a subclass builds when it is called
def test_every_layer_that_saw_nothing_is_named_at_once_with_the_true_reason() -> None:
    qmodel = wrap(branches(), recipe(fold_batch_norm=False))
    before = state(qmodel)
    for training, expected in ((False, {**UNSEEN, **RUNS_IN_TRAINING}), (True, UNSEEN)):
        with pytest.raises(UnseenTensorsError) as caught:
            calibrate(qmodel, [tensor(vectors(4, 6))], training=training)
        found = {subject.removeprefix("_modules."): why for subject, why in caught.value.reasons.items()}
        assert found == expected
        assert state(qmodel) == before  # the statistics too
    assert not any("call" in vars(layer) for layer in layers_within(qmodel))


def with_aux_head() -> keras.Model:
    """Return a model with a head that runs only in training, behind layers that do something else there."""

    class Aux(keras.Model):  # type: ignore[misc] # Keras 2 is untyped
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.norm, self.drop = kl.BatchNormalization(), kl.Dropout(0.5)
            self.main, self.aux = kl.Dense(3, name="main"), kl.Dense(3, name="aux")

        def call(self, x: Any, training: bool = False) -> Any:
            x = self.drop(self.norm(x, training=training), training=training)
            return self.main(x) + self.aux(x) if training else self.main(x)

        def get_config(self) -> dict[str, Any]:
            return {}

    keras.utils.set_random_seed(0)
    model = Aux()
    model(tensor(vectors(4, 6)), training=True)
    return model


@pytest.mark.filterwarnings("ignore:`build.. was called on layer:UserWarning")  # as above
def test_a_head_that_runs_only_in_training_is_calibrated_by_what_it_sees() -> None:
    how = recipe(fold_batch_norm=False, calibration={"weights": "minmax", "activations": "minmax"})
    qmodel = wrap(with_aux_head(), how)
    others = [to_numpy(each) for each in qmodel.non_trainable_variables if not np.isnan(to_numpy(each)).any()]
    calibrate(qmodel, [tensor(part) for part in np.split(vectors(16, 6), 4)], training=True)
    found = {row.layer.removeprefix("_modules."): row.params for row in describe(qmodel).rows if row.tensor == "inputs"}
    assert found["main"] == found["aux"]  # the same tensor: nothing was dropped, and no statistics of the batch
    after = [to_numpy(each) for each in qmodel.non_trainable_variables]
    assert all(any(np.array_equal(one, other) for other in after) for one in others)
    finalize(qmodel)


@pytest.mark.filterwarnings("ignore:`build.. was called on layer:UserWarning")  # as above
def test_what_is_not_seen_by_force_keeps_its_numbers() -> None:
    qmodel = wrap(with_aux_head(), recipe(fold_batch_norm=False))
    calibrate(qmodel, [tensor(vectors(16, 6))], training=True)
    with pytest.warns(ThresholdsKeptWarning, match="aux: inputs: its layer runs only in training mode"):
        calibrate(qmodel, [tensor(2 * vectors(16, 6))], force=True)
    found = {row.layer.removeprefix("_modules."): row.params for row in describe(qmodel).rows if row.tensor == "inputs"}
    assert found["main"]["threshold"] > found["aux"]["threshold"]
