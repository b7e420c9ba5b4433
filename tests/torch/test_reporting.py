"""Reports on PyTorch models and their files, and how the page looks in a browser."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.core.test_reporting import Checked
from tests.torch.models import images, network, ready, recipe, same_state, spec, train
from trainable_core.errors import DocumentError, ModelError
from trainable_core.reference import affine
from trainable_core.reporting import files
from trainable_torch import describe, export, finalize, report, save

pytest.importorskip("matplotlib", reason="the extra `report` is not installed")
pytest.importorskip("jinja2", reason="the extra `report` is not installed")


def text_of(path: Path) -> str:
    return Checked(path.read_text(encoding="utf-8")).text


def test_a_report_shows_every_quantizer_and_changes_nothing(tmp_path: Path) -> None:
    qmodel = train(ready(network(), recipe("LSQ", fold_batch_norm="after"), images()), [images()] * 2)
    before = {name: value.clone() for name, value in qmodel.state_dict().items()}
    random = torch.get_rng_state()
    text = text_of(report(qmodel, tmp_path / "page.html", [images(), images(5)]))
    for row in describe(qmodel).rows:
        assert (f"{row.layer}.{row.tensor}" if row.target == "Weights" else f"{row.layer}: {row.tensor}") in text
    assert "batch norm that finalize folds into stem.conv" in text
    assert " of 16 codes in use" in text
    assert all(torch.equal(value, before[name]) for name, value in qmodel.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert qmodel.training


def test_a_deployed_model_has_a_report(tmp_path: Path) -> None:
    qmodel = ready(network(), recipe("LSQ"), images())
    deployed = finalize(qmodel)
    text = text_of(report(deployed, tmp_path / "page.html", [images()]))
    assert "4 deployed" in text or "deployed" in text
    assert "head: input" in text
    assert same_state(deployed, finalize(qmodel))


@pytest.mark.parametrize("method", ["DOREFA", "ADAROUND", "DQA", "DYNAMIC", "groups"])
def test_methods_with_codes_or_grids_of_their_own_have_a_report(tmp_path: Path, method: str) -> None:
    how = recipe("LSQ")
    if method == "DYNAMIC":
        how["activations"]["training_method"] = method
        how["target"] = "native"
    elif method == "groups":
        how["target"] = "native"
        how["rules"] = [{"match": {"name": "head"}, "weights": {"group_size": 8}}]
    else:
        how["weights"]["training_method"] = method
    qmodel = ready(network(), how, images())
    assert "head.weight" in text_of(report(qmodel, tmp_path / "page.html", [images()]))
    save(qmodel, tmp_path / "model.safetensors")
    found = files.read(tmp_path / "model.safetensors", weights=True)
    assert str(found.description) == str(describe(qmodel))
    assert len(found.weights) == 3


def test_files_are_described_as_the_model_is(tmp_path: Path) -> None:
    deployed = finalize(ready(network(), recipe("LSQ"), images()))
    save(deployed, tmp_path / "model.safetensors")
    found = files.read(tmp_path / "model.safetensors", weights=True)
    assert found.description == describe(deployed)
    weight = {facts.name: facts for facts in found.weights}["head.weight"]
    scale = torch.tensor(deployed.head.weights_quantizers["weight"].qparams.scale)[:, None]
    codes = torch.round(deployed.head.weights_quantizers["weight"](deployed.head.weight) / scale).int() + 8
    assert weight.codes is not None
    assert weight.codes.tolist() == torch.bincount(codes.reshape(-1), minlength=16).tolist()


@pytest.mark.parametrize("target", ["onnx", "qonnx"])
def test_exported_files_tell_their_codes(tmp_path: Path, target: str) -> None:
    pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    deployed = finalize(ready(network(), recipe("LSQ"), images()))
    path = tmp_path / f"model.{target}"
    told = export(deployed, path, target=target, example=images())
    found = files.read(path, weights=True)
    rows = {(row.layer, row.tensor): row for row in found.description.rows}
    assert rows.keys() == {(row.layer, row.tensor) for row in describe(deployed).rows}
    activations = [row for row in describe(deployed).rows if row.target == "Activation"]
    assert activations
    for row in activations:  # the first code that is stored is the lower end of the grid
        held = rows[row.layer, row.tensor]
        low = -row.params["threshold"] if row.params["is_signed"] else 0.0
        assert (int(held.method.split()[1]) - held.params.get("zero_point", 0)) * held.params["scale"] == low
    scale = torch.tensor(deployed.head.weights_quantizers["weight"].qparams.scale)[:, None]
    assert rows["head", "weight"].params["scale"] == [float(scale.min()), float(scale.max())]
    codes = torch.round(deployed.head.weights_quantizers["weight"](deployed.head.weight) / scale).int() + 8
    facts = {each.name: each for each in found.weights}["head.weight"]
    assert facts.codes is not None
    assert facts.codes.tolist() == torch.bincount(codes.reshape(-1), minlength=16).tolist()
    assert found.islands is not None
    assert [each[2] for each in found.islands.floats] == [island.reason for island in told.islands]
    page = text_of(report(deployed, tmp_path / "page.html", exported=path))
    assert path.name in page
    assert all(island.reason in page for island in told.islands)
    damaged = path.read_bytes()[:-40]
    path.write_bytes(damaged)
    with pytest.raises(DocumentError):
        files.read(path)


class Looked(nn.Module):
    """A table of which rows are looked up, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.fc = nn.Embedding(7, 5), nn.Linear(5, 3)
        with torch.no_grad():
            self.fc.weight += 0.3
            self.table.weight -= 0.4

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the logits of rows."""
        return self.fc(self.table(ids))


@pytest.mark.parametrize("target", ["onnx", "qonnx"])
@pytest.mark.parametrize("per_channel", [True, False], ids=["channel", "tensor"])
@pytest.mark.parametrize("method", ["UNIFORM", "SYMMETRIC"])
def test_weights_of_exported_files_have_the_codes_of_the_model(
    tmp_path: Path, target: str, per_channel: bool, method: str
) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    ids = torch.arange(7).reshape(1, 7)
    how = {"weights": spec("LSQ", method, 4, per_channel=per_channel), "target": target}
    how["rules"] = [{"match": {"op": "embedding"}, "weights": {"per_channel": False}}]  # as files look rows up
    deployed = finalize(ready(Looked(), how, ids))
    path = tmp_path / "model.onnx"
    export(deployed, path, target=target, example=ids)
    found = files.read(path, weights=True)
    rows = {row.layer: row for row in found.description.rows}
    counted = {facts.name: facts for facts in found.weights}
    for name in ("table", "fc"):
        layer = deployed.get_submodule(name)
        quantizer = layer.weights_quantizers["weight"]
        grid, values = quantizer.qparams, quantizer(layer.weight.detach()).numpy()
        zero = np.unique(grid.zero_point)
        told = rows[name].params.get("zero_point", 0)
        assert np.array_equal(np.unique(told), np.unique([zero.min(), zero.max()]))
        assert rows[name].method == f"codes {grid.quant_min} to {grid.quant_max}"
        codes = counted[f"{name}.weight"].codes
        assert codes is not None
        expected = np.bincount(affine.quantize(values, grid).reshape(-1) - grid.quant_min, minlength=16)
        assert codes.tolist() == expected.tolist()
    if (target, method) == ("onnx", "UNIFORM"):  # what earlier versions wrote
        model = onnx.load(path)
        (entry,) = (each for each in model.metadata_props if '"zero_point"' in each.value)
        entry.value = entry.value.replace('"zero_point"', '"unknown"')
        onnx.save(model, path)
        row = next(row for row in files.read(path, weights=True).description.rows if row.layer == "fc")
        assert row.method == "codes 0 to 15, stored without their zero point"


def test_a_float_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not made by"):
        report(network(), tmp_path / "page.html")


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed, to look at the page with")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_the_page(tmp_path: Path, width: int, request: pytest.FixtureRequest) -> None:
    qmodel = ready(network(), recipe("LSQ"), images())
    page = report(qmodel, tmp_path / "page.html", [images()])
    # a frame of the width of a phone: the window itself has a smallest width
    frame = tmp_path / "frame.html"
    frame.write_text(f'<body style="margin:0"><iframe src="page.html" style="border:0" width="{width}" height="1800">')
    folder = request.config.rootpath / ".nox" / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / f"report-{width}.png"
    picture.unlink(missing_ok=True)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-sync", "--no-first-run"]
    options += ["--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}"]
    command: list[Any] = [CHROMIUM, *options, f"--window-size={max(width, 500)},1800", frame.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    assert page.exists()
    assert picture.stat().st_size > 20_000  # an empty page has some 5,000 bytes
