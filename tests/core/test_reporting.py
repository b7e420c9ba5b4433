"""Reports in core: what is gathered, what a page says and looks like, and what files tell without a model's code."""

from __future__ import annotations

import json
import re
import struct
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.core.home_view import HomeView
from trainable_core import cli
from trainable_core.backend.description import Description, DescriptionRow
from trainable_core.calibration import Observer
from trainable_core.diagnosis.report import Diagnosis, Finding, LayerFigures
from trainable_core.documents.files import write_arrays
from trainable_core.errors import CalibrationError, DocumentError, InvalidArgumentError, MissingLibraryError
from trainable_core.qparams import QParams
from trainable_core.reporting import files
from trainable_core.reporting.contents import (
    Contents,
    Islands,
    TensorFacts,
    facts_of_values,
    gathered,
    overview,
    remarks,
)
from trainable_core.reporting.figures import BARS, points_of, rebinned, top_of
from trainable_core.reporting.page import Page, attention_to
from trainable_core.reporting.report import Asked, report_on
from trainable_core.tracking.writers import CsvWriter, Scalar

NAME = "<b>fc</b> & co"
ROW = DescriptionRow(
    layer=NAME, op="linear", tensor="weight", target="Weights", training_method="LSQ", method="SYMMETRIC", n_bits=4,
    channels_axis=0, params={"threshold": [1.0, 2.0]}, state="trainable", quantizer="LsqQuantizer",
    granularity="channel (axis 0)",
)  # fmt: skip
DESCRIPTION = Description((ROW,), left_out={"norm": "it has <no> weights"}, folded={"bn": "fc"})
GRID = QParams(np.float32(0.5), np.int32(0), -8, 7)


def needs_figures() -> None:
    pytest.importorskip("matplotlib", reason="the extra `report` is not installed")
    pytest.importorskip("jinja2", reason="the extra `report` is not installed")


DIAGNOSIS = Diagnosis(
    metric="mse", unit="dB", float_cost=0.5, total=4.25,
    findings=(Finding(kind="bits", layer="fc", tensor="weight", cost=4.0, sentence="fc costs <4.1> points"),),
    layers=(
        LayerFigures(layer="fc", op="linear", alone=4.0, within=3.0),
        LayerFigures(layer="head", op="linear", alone=-0.1, within=0.0),
    ),
    quantizers=(), variables=(),
)  # fmt: skip


class Checked(HTMLParser):
    """Collects text, ids, links and what a page would load; every element must be closed."""

    VOID = frozenset({"meta", "br", "path", "use", "rect", "line", "image"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        for name, value in attrs:
            self.ids += [value] if name == "id" else []
            self.links += [value] if name == "href" and tag == "a" else []
            self.loaded += [value] if name in {"src", "srcset"} or (name.endswith("href") and tag != "a") else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


# ---- what is gathered -----------------------------------------------------------------------------------------------


def test_weights_and_activations_are_held_against_their_grids() -> None:
    batches = [np.float32([-2.0, 0.0, 0.5, np.nan]), np.float32([0.25])]
    weight, of_input = gathered(HomeView(), batches)
    assert (weight.name, of_input.name) == ("fc.weight", "fc: input")
    assert (weight.values.minimum, weight.values.count) == (np.float32(-0.6), 6)
    # codes 1, -5, 7 and 1, 1, 7
    assert weight.codes is not None
    assert {code - 8: int(count) for code, count in enumerate(weight.codes) if count} == {-5: 1, 1: 3, 7: 2}
    assert weight.clipped == pytest.approx(1 / 6)
    assert (of_input.values.count, of_input.odd, of_input.clipped, of_input.used) == (4, 1, 0.25, 4)


def test_a_tensor_without_a_number_is_told() -> None:
    needs_figures()
    tensors = gathered(HomeView(), [np.full(3, np.nan, np.float32)])
    assert [facts.name for facts in tensors] == ["fc.weight", "fc: input"]
    page = Checked(page_of(tensors=tensors))
    assert "fc: input: 3 of its values are NaN or infinite" in page.text


def test_without_batches_there_are_weights_alone() -> None:
    assert [facts.name for facts in gathered(HomeView(), None)] == ["fc.weight"]


def test_a_weight_without_a_grid_shows_its_values() -> None:
    view = HomeView()
    view.weights.switch_off()
    (facts,) = gathered(view, None)
    assert (facts.grid, facts.codes, facts.values.count) == (None, None, 6)


def test_the_overview_counts() -> None:
    assert overview(DESCRIPTION) == {
        "weights": "1 with 4 bits", "activations": "0 quantized", "state": "1 trainable", "not quantized": "1",
    }  # fmt: skip


def test_what_is_worth_a_look_is_named() -> None:
    values = np.linspace(-1, 1, 100, dtype=np.float32)
    codes = np.zeros(100, np.int32)
    good = facts_of_values("good", values, GRID, np.arange(100, dtype=np.int32) % 16 - 8, 0.01)
    few = facts_of_values("few", values, GRID, codes, 0.0)
    clipped = facts_of_values("clipped", values, GRID, np.arange(100, dtype=np.int32) % 16 - 8, 0.2)
    odd = facts_of_values("odd", np.float32([1, np.nan, np.inf]), None)
    told = dict(attention_to([good, few, clipped, odd]))
    assert told.keys() == {"few", "clipped", "odd"}
    assert "1 of 16 codes" in told["few"]
    assert "20.0%" in told["clipped"]
    assert "2 of its values" in told["odd"]
    assert remarks(good)[0] == "100 values from -1 to 1"


@pytest.mark.parametrize("values", [[0.0], [0.0, 0.0], [-1.0], [5.0, 0.0, -3.0], list(np.linspace(-7, 9, 5000))])
def test_a_histogram_keeps_every_value_in_few_bars(values: list[float]) -> None:
    observer = Observer(1024)
    observer.update(values)
    counts, edges = rebinned(TensorFacts("x", None, observer))
    assert counts.sum() == len(values)
    assert len(counts) <= BARS
    assert len(edges) == len(counts) + 1
    assert edges[0] <= min(values) <= max(values) <= edges[-1]
    assert (np.diff(edges) > 0).all()
    assert top_of(counts) > 0


def test_points_of_a_grid_are_its_values() -> None:
    facts = facts_of_values("x", np.zeros(1, np.float32), GRID)
    assert points_of(facts).tolist() == [code * 0.5 for code in range(-8, 8)]
    many = facts_of_values("x", np.zeros(1, np.float32), QParams(np.float32(1), np.int32(0), 0, 255))
    assert points_of(many).size == 0


# ---- the page -------------------------------------------------------------------------------------------------------


def page_of(**changes: Any) -> str:
    values = np.random.default_rng(0).normal(0, 2, 500).astype(np.float32)
    facts = facts_of_values(NAME, values, GRID, np.clip(np.rint(values / 0.5), -8, 7).astype(np.int32), 0.1)
    training = [
        Scalar(step, NAME, quantity, sign * step) for step in (0, 5) for quantity, sign in (("low", -1), ("high", 1))
    ]
    islands = Islands("m.onnx", "onnx", 1234, {"Conv": 2}, [(NAME, "Softmax", "no <kernel>")])
    given = {
        "title": "<script>alert(1)</script>", "facts": {"a": "<i>"}, "description": DESCRIPTION, "tensors": [facts],
        "training": training, "islands": islands, "diagnosis": DIAGNOSIS,
    }  # fmt: skip
    return Page().html(Contents(**{**given, **changes}))


def test_a_page_is_whole_and_loads_nothing() -> None:
    needs_figures()
    page = page_of()
    checked = Checked(page)
    assert [each for each in checked.loaded if not each.startswith("#")] == []
    assert "url(" not in re.sub(r"url\(#", "", page)
    assert len(set(checked.ids)) == len(checked.ids)
    assert {link.removeprefix("#") for link in checked.links} <= set(checked.ids)
    for text in (
        NAME,
        "<script>alert(1)</script>",
        "it has <no> weights",
        "no <kernel>",
        "fc costs <4.1> points",
        "2 Conv",
    ):
        assert text in checked.text
    assert "Quantization costs 4.25 dB; the float model has 0.5." in re.sub(r"\s+", " ", checked.text)
    assert re.findall(r'style="width: ([\d.]+)%"', page) == ["100.0"]
    assert "<script" not in page
    assert page.count("<svg") == 3  # values, codes, training
    assert "#010101" not in page  # every placeholder has become a colour of the page


def test_a_page_is_the_same_for_the_same_contents() -> None:
    needs_figures()
    assert page_of() == page_of()


def test_an_empty_model_has_a_page() -> None:
    needs_figures()
    page = page_of(description=Description(()), tensors=(), training=(), islands=None, diagnosis=None)
    assert "Nothing is quantized." in page
    assert "<svg" not in page
    Checked(page)


def test_odd_tensors_have_figures() -> None:
    needs_figures()
    one = facts_of_values("one", np.float32([3.0]), GRID, np.int32([6]), 0.0)
    zeros = facts_of_values("zeros", np.zeros(9, np.float32), None)
    channels = QParams(np.float32([0.5, 1.0]), np.int32([0, 0]), -8, 7, 0)
    Checked(page_of(tensors=[one, zeros, facts_of_values("channels", np.ones(4, np.float32), channels)]))


def report(path: Path, **options: Any) -> Path:
    return report_on(HomeView(), DESCRIPTION, path, Asked(**options), {"home": "1.0"})


def test_a_report_is_written(tmp_path: Path) -> None:
    needs_figures()
    CsvWriter(tmp_path / "run.csv").write([Scalar(s, "fc.weight", q, 1.0) for s in (0, 1) for q in ("low", "high")])
    options = {"batches": [np.float32([0.5])], "training": tmp_path / "run.csv", "title": "Mine"}
    path = report(tmp_path / "page.html", **options, diagnosis=DIAGNOSIS)
    checked = Checked(path.read_text(encoding="utf-8"))
    for text in ("Mine", "fc: input", "ends of the grid over the training", "home 1.0"):
        assert text in checked.text


@pytest.mark.parametrize(
    ("name", "options", "error", "told"),
    [
        ("page.txt", {}, DocumentError, r"ends in \.html"),
        ("missing/page.html", {}, DocumentError, "is no folder"),
        ("page.html", {"title": 3}, InvalidArgumentError, "title"),
        ("page.html", {"diagnosis": "bad"}, InvalidArgumentError, "diagnosis must be"),
        ("page.html", {"training": "missing.csv"}, DocumentError, "no such file"),
        ("page.html", {"exported": "missing.onnx"}, DocumentError, "no such file"),
        ("page.html", {"batches": np.zeros(3)}, CalibrationError, r"pass \[batch\]"),
        ("page.html", {"batches": []}, CalibrationError, "empty"),
    ],
)
def test_what_a_report_can_not_be_made_of_is_refused(
    tmp_path: Path, name: str, options: dict[str, Any], error: type[Exception], told: str
) -> None:
    needs_figures()
    with pytest.raises(error, match=told):
        report(tmp_path / name, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("library", ["matplotlib", "jinja2"])
def test_a_missing_library_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    needs_figures()
    monkeypatch.setitem(__import__("sys").modules, library, None)
    with pytest.raises(MissingLibraryError, match=r"trainable-core\[report\]"):
        report(tmp_path / "page.html")


# ---- files ----------------------------------------------------------------------------------------------------------

HEADER = {
    "format": "trainable-keras", "schema_version": 1, "recipe": {}, "finalized": False, "frozen": [],
    "description": {**DESCRIPTION.to_dict()}, "places": {f"{NAME}.weight": "0:kernel"},
}  # fmt: skip
WEIGHT = np.float32([[0.1, 0.9, -0.6], [0.2, 4.0, 0.3]])


def keras_file(path: Path, **changes: Any) -> Path:
    header = {key: value for key, value in {**HEADER, **changes}.items() if value is not None}
    write_arrays(path, header, {"0:kernel": WEIGHT})
    return path


def torch_file(path: Path, **changes: Any) -> Path:
    """Write a safetensors file as its format says: a length, a JSON header, the tensors."""
    header = {**HEADER, "format": "trainable-torch", "aliases": {f"{NAME}.weight": "first"}, **changes}
    layout = {
        "__metadata__": {"trainable-torch": json.dumps(header)},
        "first": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "half": {"dtype": "BF16", "shape": [1], "data_offsets": [24, 26]},
        "odd": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [26, 28]},
    }
    text = json.dumps(layout).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + WEIGHT.tobytes() + b"\x80\x3f" + b"\0\0")
    return path


@pytest.mark.parametrize("write", [keras_file, torch_file])
def test_a_saved_file_tells_its_quantizers_and_weights(tmp_path: Path, write: Any) -> None:
    path = write(tmp_path / "model")
    found = files.read(path, weights=True)
    assert found.description == DESCRIPTION
    assert found.contents().facts["finalized"] == "no"
    (facts,) = found.weights
    # thresholds 1 and 2 of four bits: steps 0.125 and 0.25, codes 1, 7, -5 and 1, 7, 1
    assert facts.codes is not None
    assert {code - 8: int(count) for code, count in enumerate(facts.codes) if count} == {-5: 1, 1: 3, 7: 2}
    assert facts.clipped == pytest.approx(1 / 6)
    assert files.read(path).weights == ()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"training_method": "DOREFA"}, "values alone"),  # its codes are not those of the float weight
        ({"method": "OTHER"}, "values alone"),
        ({"params": {}}, "values alone"),
        ({"params": {"threshold": [1.0, 2.0, 3.0]}}, "values alone"),
        ({"granularity": "group of 32 (axis 1)"}, "values alone"),
        ({"training_method": "DOREFA", "state": "deployed"}, "codes"),
    ],
)
def test_codes_are_told_only_where_the_file_tells_them(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    document = DESCRIPTION.to_dict()
    document["rows"] = [{**document["rows"][0], **change}]
    (facts,) = files.read(keras_file(tmp_path / "model", description=document), weights=True).weights
    assert (facts.codes is not None) is (told == "codes")
    assert facts.values.count == 6


def test_a_description_as_json_is_a_file_too(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_text(DESCRIPTION.to_json())
    assert files.read(path).description == DESCRIPTION


def broken(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda p: p, "no such file"),
        (lambda p: broken(p, b""), "damaged"),
        (lambda p: broken(p, b"PK\x03\x04rubbish"), "damaged"),
        (lambda p: broken(p, b"{}"), "not the description"),
        (lambda p: broken(p, b'{"rows": [], "schema_version": 9}'), "description"),
        (lambda p: broken(p, struct.pack("<Q", 1 << 40) + b"{}"), "longer than it"),
        (lambda p: broken(p, struct.pack("<Q", 2) + b"{}"), "not written by trainable_torch.save"),
        (lambda p: broken(p, b"\x1c\0\0\0TFL3" + b"\0" * 40), "damaged"),
        (lambda p: keras_file(p, description=None), "kept no description"),
        (lambda p: keras_file(p, description={"rows": 1}), "description is damaged"),
        (lambda p: keras_file(p, places=[1]), "damaged"),
        (lambda p: keras_file(p, schema_version=7), "7"),
        (lambda p: torch_file(p, aliases=3), "damaged"),
        (lambda p: torch_file(p, description="x"), "damaged"),
    ],
)
def test_what_is_no_file_of_ours_is_refused(tmp_path: Path, make: Any, told: str) -> None:
    path = make(tmp_path / "model")
    content = path.read_bytes() if path.exists() else None
    if content == b"":
        pytest.importorskip("onnx", reason="what is no other file is read as ONNX, and onnx is not installed")
    if content is not None and content[4:8] == b"TFL3":
        pytest.importorskip("ai_edge_litert", reason="the extra `tflite` is not installed")
    with pytest.raises(DocumentError, match=told):
        files.read(path, weights=True)


def test_islands_are_those_of_exported_files(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="no exported file"):
        files.islands_of(keras_file(tmp_path / "model"))


# ---- the command line -----------------------------------------------------------------------------------------------


def test_describe_prints_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = keras_file(tmp_path / "model")
    assert cli.main(["describe", str(path)]) == 0
    out = capsys.readouterr().out
    for text in ("saved by trainable-keras", "threshold=1..2", "it has <no> weights", "finalized: no"):
        assert text in out
    assert cli.main(["describe", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(DESCRIPTION.to_json())
    assert cli.main(["describe", str(tmp_path / "missing")]) == 2


def test_report_writes_a_page_beside_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needs_figures()
    path = torch_file(tmp_path / "model.safetensors")
    assert cli.main(["report", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}.html\n"
    assert "model.safetensors" in Checked(Path(f"{path}.html").read_text(encoding="utf-8")).text
    assert cli.main(["report", str(path), str(tmp_path / "page.pdf")]) == 2
