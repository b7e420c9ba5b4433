"""Files that earlier versions of trainable-keras wrote: each is read and gives the stored outputs, bit for bit.

On Keras 3 with any engine, or on Keras 2, as the environment variables say; each reads what it wrote.
"""

from __future__ import annotations

import os

import numpy as np
import pytest

# Importing the other Keras too would leave every later test of this process with both.
pytest.importorskip("tf_keras" if os.environ.get("TF_USE_LEGACY_KERAS") == "1" else "keras", reason="needs Keras")
pytest.importorskip("trainable_keras", reason="needs trainable-keras")

import trainable_keras
from tests.artifacts.keras_model import BACKEND, images, keras, network
from tests.artifacts.versions import FOLDER, check_quantizers, document, every_version


def outputs(model):
    return np.asarray(model.predict(images(), verbose=0))


@every_version
def test_quantizers_are_made_again_from_their_documents(version):
    def run(quantizer, x):
        output = quantizer(x)
        return output.detach().cpu().numpy() if hasattr(output, "detach") else np.asarray(output)

    check_quantizers(version, BACKEND, run)


@every_version
@pytest.mark.parametrize("name", ["wrapped", "finalized"])
def test_a_model_is_loaded_from_its_file(version, name):
    model = trainable_keras.load(FOLDER / version / BACKEND / f"{name}.npz", network(filled=False))
    expected = np.float32(document(version, BACKEND, "output"))
    np.testing.assert_array_equal(outputs(model), expected)
    assert not np.array_equal(outputs(network()), expected), "the file's numbers are those of a quantized model"


@every_version
@pytest.mark.parametrize("name", ["wrapped", "finalized"])
def test_keras_loads_a_model_from_its_own_format(version, name):
    model = keras.models.load_model(FOLDER / version / BACKEND / f"{name}.keras")
    np.testing.assert_array_equal(outputs(model), np.float32(document(version, BACKEND, "output")))


@every_version
def test_a_loaded_model_trains_on(version):
    qmodel = trainable_keras.load(FOLDER / version / BACKEND / "wrapped.npz", network(filled=False))
    before = outputs(qmodel)
    qmodel.compile(keras.optimizers.SGD(2.0**-4), "mse")
    qmodel.fit(images(), np.zeros((len(images()), 5), np.float32), batch_size=len(images()), verbose=0)
    after = outputs(qmodel)
    assert not np.array_equal(after, before)
    np.testing.assert_array_equal(outputs(trainable_keras.finalize(qmodel)), after)
