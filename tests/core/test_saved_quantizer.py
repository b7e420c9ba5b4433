"""A quantizer in a saved model: the document is JSON, and what comes back is equal."""

import json

import numpy as np
import pytest

from tests.core.home_backend import activation_config, weights_config
from tests.core.toy_keras import ActivationTrainable, Deployed, ToyPlugin, Trainable, class_of
from trainable_core.documents.quantizer import quantizer_document, quantizer_from_document
from trainable_core.enums import QuantizationMethod, QuantizationTarget
from trainable_core.errors import UnknownQuantizerError
from trainable_core.qparams import from_params
from trainable_core.registry.process import default_registry, register


@pytest.fixture(autouse=True)
def _toy():
    register(ToyPlugin(), "toy")
    yield
    default_registry().unregister("toy")


def again(quantizer):
    return quantizer_from_document(json.loads(json.dumps(quantizer_document(quantizer))), "toy", class_of)


@pytest.mark.parametrize(
    ("cls", "config", "shape"),
    [
        (Trainable, weights_config({"threshold": 3.0}), (2, 3)),
        (Trainable, weights_config(method="UNIFORM"), (2, 3)),  # not calibrated
        (ActivationTrainable, activation_config({"threshold": 3.0, "is_signed": False}), None),
    ],
)
def test_a_trainable_quantizer_comes_back_by_its_key(cls, config, shape):
    quantizer = cls(config)
    quantizer.subject = "fc.kernel"
    quantizer.initialize_quantization(shape, "kernel", None)
    for name in quantizer.variable_names if config.quantization_params else ():
        quantizer.assign(getattr(quantizer, name), getattr(quantizer, name).value * 1.5)  # as training does
    found = again(quantizer)
    assert type(found) is cls
    assert (found.subject, found.quantization_config) == ("fc.kernel", config)
    assert found.calibrated == quantizer.calibrated
    for name in found.variable_names:
        assert getattr(found, name).value.tolist() == getattr(quantizer, name).value.tolist()


def test_a_deployed_quantizer_comes_back_by_target_and_grid():
    grid = from_params(QuantizationMethod.SYMMETRIC, 4, signed=True, params={"threshold": [1.0, 2.0]}, channels_axis=1)
    deployed = Deployed(grid, 4, 2)
    document = quantizer_document(deployed)
    assert document["inferable"] == ["Weights", "SYMMETRIC"]
    found = again(deployed)
    assert type(found) is Deployed
    assert np.array_equal(found.qparams.scale, grid.scale)
    assert found.num_bits == 4


def test_a_key_that_nobody_registered_is_told():
    quantizer = Trainable(weights_config({"threshold": 1.0}))
    document = quantizer_document(quantizer)
    document["trainable"][1] = "GONE"
    with pytest.raises(UnknownQuantizerError, match="GONE"):
        quantizer_from_document(document, "toy", class_of)


def test_the_key_of_a_document_is_target_method_and_grid():
    assert quantizer_document(Trainable(weights_config()))["trainable"] == ["Weights", "STE", "SYMMETRIC"]
    assert class_of(QuantizationTarget.Weights, QuantizationMethod.SYMMETRIC) is Deployed
