"""The loop of `calibrate`, on a model of a few lines: what is seen where, then all params at once or none."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest

from tests.core.home_backend import activation_config, activation_quantizer, weights_config, weights_quantizer
from trainable_core import QuantizationRecipe
from trainable_core.calibration.batches import inputs_of
from trainable_core.calibration.model import ModelCalibration
from trainable_core.calibration.unseen import Sight
from trainable_core.constants import THRESHOLD
from trainable_core.errors import CalibrationError, QuantizerStateError, ThresholdsKeptWarning, UnseenTensorsError
from trainable_core.recipe.state import WrappedState

BATCH = np.float32([[1.0, -3.0], [2.0, 0.5]])


class Holder:
    def __init__(self, quantizer, subject):
        quantizer.subject = subject
        self.trainable_quantizer, self.observer, self.sight = quantizer, None, Sight()

    def __call__(self, x):
        self.observer.update(x)
        self.sight.reached("" if np.size(x) else "an empty tensor")
        return x


class Model:
    """Two holders around a weight that two layers share."""

    training = last_in_training = False

    def __init__(self):
        self.weight, self.quantizer = np.float32([[2.0, 0.0], [0.0, -0.5]]), weights_quantizer(weights_config())
        self.first, self.last = (
            Holder(activation_quantizer(activation_config()), subject) for subject in ("fc: input", "fc: output")
        )
        self.state = WrappedState(
            QuantizationRecipe.of({"calibration": {"weights": "minmax", "activations": "minmax"}})
        )

    @property
    def quantizers(self):
        return [self.first.trainable_quantizer, self.quantizer, self.last.trainable_quantizer]

    def __call__(self, x):
        y = self.first(x) @ self.weight
        return y if self.last_in_training and not self.training else self.last(y)


class Calibration(ModelCalibration):
    def __init__(self, model):
        super().__init__(model, model.state)
        self.converted = 0

    def quantizers(self):
        return self.model.quantizers

    def holders(self):
        return [self.model.first, self.model.last]

    def weights(self):
        return [(self.model.weight, self.model.quantizer)] * 2

    def to_numpy(self, weight):
        self.converted += 1
        return weight

    training_forward = "forward=..."

    @contextmanager
    def observing(self, observers, *, training=False):
        try:
            self.model.training = training
            for holder, observer in observers.items():
                holder.observer = observer
            yield
        finally:
            self.model.training = False
            for holder in observers:
                holder.observer = None

    @contextmanager
    def watching(self, sights, *, readers=False):
        self.watched = list(sights)
        for holder, sight in sights.items():
            holder.sight = sight
        yield

    def call(self, batch, *, training=False):
        assert self.model.training is training
        return self.model(inputs_of(batch))


def calibrate(model, batches=((BATCH, "labels"),), forward=None, *, force=False, training=False):
    calibration = Calibration(model)
    calibration.run(batches, forward, force=force, training=training, show_progress=list)
    return calibration


def thresholds(model):
    return [float(quantizer.get_quantizer_variable(THRESHOLD)) for quantizer in model.quantizers]


@pytest.fixture
def model():
    return Model()


def test_thresholds_are_the_largest_values_seen(model):
    calibrate(model)
    assert thresholds(model) == [3.0, 2.0, 4.0]
    assert [holder.observer for holder in (model.first, model.last)] == [None, None]


def test_a_shared_weight_is_converted_and_calibrated_once(model):
    assert calibrate(model).converted == 1


def test_the_users_own_call_replaces_the_default_one(model):
    calibrate(model, [BATCH], lambda model, batch: model(batch * 2))
    assert thresholds(model) == [6.0, 2.0, 8.0]


def test_a_second_calibration_needs_force(model):
    calibrate(model)
    with pytest.raises(QuantizerStateError, match="force=True"):
        calibrate(model)
    calibrate(model, [BATCH * 2], force=True)
    assert thresholds(model) == [6.0, 2.0, 8.0]


def test_only_quantizers_that_wait_get_params(model):
    model.quantizer.set_quantization_params({4: {THRESHOLD: 0.5}})
    model.first.trainable_quantizer.set_quantization_params({4: {THRESHOLD: 0.25, "is_signed": True}})
    assert calibrate(model).converted == 0
    assert thresholds(model) == [0.25, 0.5, 4.0]


def test_batches_are_needed_only_where_a_holder_waits(model):
    for holder in (model.first, model.last):
        holder.trainable_quantizer.set_quantization_params({4: {THRESHOLD: 1.0, "is_signed": True}})
    calibrate(model, batches=None)
    assert thresholds(model) == [1.0, 2.0, 1.0]


def test_a_quantizer_that_is_switched_off_does_not_wait(model):
    model.quantizer = weights_quantizer(weights_config(enable_weights_quantization=False))
    calibrate(model)
    assert not model.quantizer.calibrated
    with pytest.raises(QuantizerStateError, match="its 2 quantizers"):
        calibrate(model)


def test_a_finalized_model_is_refused(model):
    model.state.finalized = True
    with pytest.raises(QuantizerStateError, match="Model: it is finalized"):
        calibrate(model)


@pytest.mark.parametrize("batches", [None, [], BATCH, 3], ids=["none", "empty", "one batch", "a number"])
def test_wrong_batches_change_nothing(model, batches):
    with pytest.raises(CalibrationError):
        calibrate(model, batches)
    assert not any(quantizer.calibrated for quantizer in model.quantizers)


def test_a_failure_leaves_every_quantizer_as_it_was(model):
    model.weight[0, 1] = np.nan  # the activations before it are seen, and the weight is refused
    with pytest.raises(CalibrationError):
        calibrate(model, forward=lambda model, _: (model.first(BATCH), model.last(BATCH)))
    assert not any(quantizer.calibrated for quantizer in model.quantizers)
    assert all(np.isnan(value) for value in thresholds(model))


def test_an_interruption_while_params_are_set_takes_them_back(model):
    def interrupted(params):
        raise KeyboardInterrupt

    model.quantizer.set_quantization_params = interrupted
    with pytest.raises(KeyboardInterrupt):
        calibrate(model)
    assert not any(quantizer.calibrated for quantizer in model.quantizers)
    assert all(np.isnan(value) for value in thresholds(model))


def test_a_backend_may_add_what_other_processes_saw(model):
    class Ranks(Calibration):
        def observe(self, holders, batches, call, *, training):
            observers = super().observe(holders, batches, call, training=training)
            for observer in observers:
                observer.update([7.0])
            return observers

    Ranks(model).run([BATCH], None, force=False, show_progress=list)
    assert thresholds(model) == [7.0, 2.0, 7.0]


# ---- what is not seen -----------------------------------------------------------------------------------------------


def test_every_tensor_that_was_not_seen_is_named_at_once_with_its_reason_and_ways_out(model):
    with pytest.raises(UnseenTensorsError) as caught:
        calibrate(model, forward=lambda model, _: model.first(BATCH[:0]))
    assert caught.value.reasons == {
        "fc: input": "it got an empty tensor, which holds no values to quantize",
        "fc: output": "no batch reached its layer in evaluation mode or in training mode",
    }
    for way in ("skip", "enabled", "inputs=", "forward=", "training=True", "batches"):
        assert way in str(caught.value)
    assert not any(quantizer.calibrated for quantizer in model.quantizers)


def test_what_runs_only_in_training_is_told_and_can_be_looked_at(model):
    model.last_in_training = True
    with pytest.raises(UnseenTensorsError) as caught:
        calibrate(model)
    assert caught.value.reasons == {"fc: output": "its layer runs only in training mode"}
    calibrate(model, training=True)
    assert thresholds(model) == [3.0, 2.0, 4.0]


def test_what_inference_reaches_is_calibrated_by_inference_alone(model):
    seen = []

    def forward(model, batch):
        seen.append(model.training)
        return model(np.float32(batch) * (10 if model.training else 1))

    calibrate(model, [BATCH, BATCH * 2], forward, training=True)
    assert thresholds(model) == [6.0, 2.0, 8.0]
    assert seen == [False, True, False, True]


def test_a_model_that_fails_in_training_mode_still_gets_its_reasons(model):
    model.last_in_training = True

    def forward(model, batch):
        if model.training:
            raise ZeroDivisionError
        return model(batch)

    with pytest.raises(UnseenTensorsError) as caught:
        calibrate(model, [BATCH], forward)
    assert caught.value.reasons == {"fc: output": "no batch reached its layer in evaluation mode"}


def test_a_backend_may_forbid_a_further_call(model):
    class Once(Calibration):
        may_try = False

    model.last_in_training, calls = True, []
    with pytest.raises(UnseenTensorsError, match="in evaluation mode"):
        Once(model).run([BATCH], lambda m, x: (calls.append(m), m(x)), force=False, show_progress=list)
    assert len(calls) == 1


def test_by_force_what_is_not_seen_keeps_its_params_and_is_told(model):
    calibrate(model)
    model.last_in_training = True
    with pytest.warns(ThresholdsKeptWarning, match="fc: output: its layer runs only in training"):
        calibrate(model, [BATCH * 2], force=True)
    assert thresholds(model) == [6.0, 2.0, 4.0]
