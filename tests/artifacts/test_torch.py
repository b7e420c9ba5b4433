"""Files that earlier versions of trainable-torch wrote: each is read and gives the stored outputs, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs PyTorch")
pytest.importorskip("trainable_torch", reason="needs trainable-torch")

import torch

import trainable_torch
from tests.artifacts.torch_model import images, network
from tests.artifacts.versions import FOLDER, check_quantizers, document, every_version


def outputs(model):
    with torch.no_grad():
        return model(images()).numpy()


@every_version
def test_quantizers_are_made_again_from_their_documents(version):
    check_quantizers(version, "torch", lambda quantizer, x: quantizer.eval()(torch.from_numpy(x)).detach().numpy())


@every_version
@pytest.mark.parametrize("name", ["wrapped", "finalized"])
def test_a_model_is_loaded_from_its_file(version, name):
    model = trainable_torch.load(FOLDER / version / "torch" / f"{name}.safetensors", network(filled=False))
    expected = np.float32(document(version, "torch", "output"))
    np.testing.assert_array_equal(outputs(model), expected)
    assert not np.array_equal(outputs(network()), expected), "the file's numbers are those of a quantized model"


@every_version
def test_a_loaded_model_trains_on(version):
    qmodel = trainable_torch.load(FOLDER / version / "torch" / "wrapped.safetensors", network(filled=False)).train()
    before = outputs(qmodel.eval())
    optimizer = torch.optim.SGD(trainable_torch.parameter_groups(qmodel), lr=2.0**-4)
    qmodel.train()(images()).square().mean().backward()
    optimizer.step()
    after = outputs(qmodel.eval())
    assert not np.array_equal(after, before)
    np.testing.assert_array_equal(outputs(trainable_torch.finalize(qmodel)), after)
