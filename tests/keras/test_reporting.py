"""Reports on Keras models and their files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.core.test_reporting import Checked
from tests.keras.framework import numpy
from tests.keras.models import images, network, quantizer_at, ready, recipe, state
from trainable_core.errors import ModelError
from trainable_core.reporting import files
from trainable_keras import describe, export, finalize, report, save

pytest.importorskip("matplotlib", reason="the extra `report` is not installed")
pytest.importorskip("jinja2", reason="the extra `report` is not installed")


def text_of(path: Path) -> str:
    return Checked(path.read_text(encoding="utf-8")).text


@pytest.mark.parametrize("deployed", [False, True])
def test_a_report_shows_every_quantizer_and_changes_nothing(tmp_path: Path, deployed: bool) -> None:
    qmodel = ready(network(), recipe("LSQ", fold_batch_norm="after"), images())
    qmodel = finalize(qmodel) if deployed else qmodel
    before = state(qmodel)
    text = text_of(report(qmodel, tmp_path / "page.html", [images(), images(5)]))
    for row in describe(qmodel).rows:
        assert (f"{row.layer}.{row.tensor}" if row.target == "Weights" else f"{row.layer}: {row.tensor}") in text
    assert " of 16 codes in use" in text
    assert state(qmodel) == before


def test_a_saved_file_is_described_as_the_model_is(tmp_path: Path) -> None:
    qmodel = ready(network(), recipe("LSQ"), images())
    save(qmodel, tmp_path / "model.trainable")
    found = files.read(tmp_path / "model.trainable", weights=True)
    assert found.description == describe(qmodel)
    head = next(layer for layer in qmodel.layers if layer.name == "head")
    scale = quantizer_at(qmodel, "head.kernel").current_qparams().scale
    codes = np.clip(np.rint(numpy(head.kernel) / scale), -8, 7).astype(int) + 8  # none lies half way between two
    facts = {each.name: each for each in found.weights}["head.kernel"]
    assert facts.codes is not None
    assert facts.codes.tolist() == np.bincount(codes.reshape(-1), minlength=16).tolist()


def test_a_tensorflow_lite_file_tells_its_codes(tmp_path: Path) -> None:
    how = recipe("LSQ", n_bits=8, bias="int32", target="tflite")
    how["activations"] |= {"placement": "integer"}
    deployed = finalize(ready(network(), how, images()))
    path = tmp_path / "model.tflite"
    export(deployed, path, target="tflite")
    found = files.read(path, weights=True)
    assert found.islands is not None
    assert "FULLY_CONNECTED" in found.islands.operations or "CONV_2D" in found.islands.operations, found.islands
    rows = {(row.layer, row.tensor): row for row in found.description.rows}
    assert ("head", "kernel") in rows
    assert {row.method for row in rows.values() if row.target == "Activation"} == {"codes -128 to 127"}
    facts = {each.name: each for each in found.weights}["head.kernel"]
    assert facts.codes is not None
    assert facts.codes.sum() == facts.values.count
    assert path.name in text_of(report(deployed, tmp_path / "page.html", exported=path))


def test_a_float_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        report(network(), tmp_path / "page.html")
