"""The loop of `calibrate`, on a model of a few lines: what is seen where, then all params at once or none."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest

from tests.core.home_backend import activation_config, activation_quantizer, weights_config, weights_quantizer
from trainable_core import QuantizationRecipe
from trainable_core.calibration.batches import inputs_of
from trainable_core.calibration.model import ModelCalibration
from trainable_core.constants import THRESHOLD
from trainable_core.errors import CalibrationError, QuantizerStateError
from trainable_core.recipe.state import WrappedState

BATCH = np.float32([[1.0, -3.0], [2.0, 0.5]])


class Holder:
    def __init__(self, quantizer):
        self.trainable_quantizer, self.observer = quantizer, None

    def __call__(self, x):
        self.observer.update(x)
        return x


class Model:
    """Two holders around a weight that two layers share."""

    def __init__(self):
        self.weight, self.quantizer = np.float32([[2.0, 0.0], [0.0, -0.5]]), weights_quantizer(weights_config())
        self.first, self.last = (Holder(activation_quantizer(activation_config())) for _ in range(2))
        self.state = WrappedState(
            QuantizationRecipe.of({"calibration": {"weights": "minmax", "activations": "minmax"}})
        )

    @property
    def quantizers(self):
        return [self.first.trainable_quantizer, self.quantizer, self.last.trainable_quantizer]

    def __call__(self, x):
        return self.last(self.first(x) @ self.weight)


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

    @contextmanager
    def observing(self, observers):
        try:
            for holder, observer in observers.items():
                holder.observer = observer
            yield
        finally:
            for holder in observers:
                holder.observer = None

    def is_tensor(self, batches):
        return isinstance(batches, np.ndarray)

    def call(self, batch):
        return self.model(inputs_of(batch))


def calibrate(model, batches=((BATCH, "labels"),), forward=None, *, force=False):
    calibration = Calibration(model)
    calibration.run(batches, forward, force=force, show_progress=list)
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
        def observe(self, holders, batches, call):
            observers = super().observe(holders, batches, call)
            for observer in observers:
                observer.update([7.0])
            return observers

    Ranks(model).run([BATCH], None, force=False, show_progress=list)
    assert thresholds(model) == [7.0, 2.0, 7.0]
