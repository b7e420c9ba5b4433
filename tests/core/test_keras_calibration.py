"""One pass over the batches, then all thresholds at once, on a Keras of a few lines."""

import numpy as np
import pytest

from tests.core.toy_keras import Chain, Dense, ToyPlugin, framework, layers_within
from trainable_core.calibration import Observer
from trainable_core.errors import CalibrationError, QuantizerStateError
from trainable_core.registry.process import default_registry, register
from trainable_keras.calibration import KerasCalibration
from trainable_keras.parts import KerasHolder, KerasWrapper

RECIPE = {
    "weights": {"method": "SYMMETRIC", "n_bits": 4, "training_method": "STE", "per_channel": False},
    "activations": {"method": "SYMMETRIC", "n_bits": 8, "training_method": "STE"},
    "calibration": {"weights": "minmax", "activations": "minmax"},
    "fold_batch_norm": False,
}
TOY = framework()
BATCH = np.float32([[1.0, -3.0], [2.0, 0.5]])


@pytest.fixture(autouse=True)
def _toy():
    register(ToyPlugin(), "toy")
    yield
    default_registry().unregister("toy")


@pytest.fixture
def qmodel():
    return TOY.wrap(Chain(Dense("fc"), Dense("head")), RECIPE)


class ToyCalibration(KerasCalibration):
    def value_of(self, variable):
        return variable.value

    def is_tensor(self, batches):
        return isinstance(batches, np.ndarray)

    def call(self, batch):
        return self.model(batch)


def calibration(qmodel):
    return ToyCalibration(qmodel, TOY.state_of(qmodel), layers_within(qmodel))


def calibrate(qmodel, batches=(BATCH,), *, force=False):
    calibration(qmodel).calibrate(batches, None, force=force, progress=False)


def thresholds(qmodel):
    return {q.subject: float(q.threshold.value) for q in TOY.quantizers_in(qmodel)}


def test_thresholds_are_the_largest_values_seen_with_float_weights(qmodel):
    calibrate(qmodel)
    # the batch times the first kernel is [[-0.5, -2.75], [2.25, -3.875]]
    assert thresholds(qmodel) == {"fc.kernel": 2.0, "fc: inputs": 3.0, "head.kernel": 2.0, "head: inputs": 3.875}


def test_a_second_time_needs_force(qmodel):
    calibrate(qmodel)
    with pytest.raises(QuantizerStateError, match="force=True"):
        calibrate(qmodel)
    calibrate(qmodel, [BATCH * 2], force=True)
    assert thresholds(qmodel)["fc: inputs"] == 6.0


def test_a_finalized_model_is_refused(qmodel):
    TOY.state_of(qmodel).finalized = True
    with pytest.raises(QuantizerStateError, match="finalized"):
        calibrate(qmodel)


def test_batches_are_asked_for_only_where_a_holder_waits():
    qmodel = TOY.wrap(Chain(Dense("fc")), {key: value for key, value in RECIPE.items() if key != "activations"})
    calibrate(qmodel, batches=None)
    assert thresholds(qmodel) == {"fc.kernel": 2.0}


def test_when_one_can_not_none_is_set(qmodel):
    head = qmodel.layers[1].layer
    head.kernel.value[0, 0] = np.nan
    with pytest.raises(CalibrationError, match="head"):
        calibrate(qmodel)
    assert not any(quantizer.calibrated for quantizer in TOY.quantizers_in(qmodel))
    assert all(np.isnan(value) for value in thresholds(qmodel).values())


def test_an_interruption_while_thresholds_are_set_takes_them_back(qmodel):
    quantizers = list(TOY.quantizers_in(qmodel))

    def interrupted(params):
        raise KeyboardInterrupt

    quantizers[-1].set_quantization_params = interrupted
    with pytest.raises(KeyboardInterrupt):
        calibrate(qmodel)
    assert not any(quantizer.calibrated for quantizer in quantizers)
    assert all(np.isnan(value) for value in thresholds(qmodel).values())


def test_observing_is_over_whatever_happens(qmodel):
    layers = layers_within(qmodel)
    wrappers = [each for each in layers if isinstance(each, KerasWrapper)]
    holders = [each for each in layers if isinstance(each, KerasHolder)]

    def look_and_fail():
        with calibration(qmodel).observing({each: Observer() for each in holders}):
            assert not any(each.quantizes_weights for each in wrappers)
            assert all(each.observer is not None for each in holders)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        look_and_fail()
    assert wrappers
    assert all(each.quantizes_weights for each in wrappers)
    assert all(each.observer is None for each in holders)
