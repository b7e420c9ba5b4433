"""What a description says of each quantizer, and of what has none."""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from tests.core.home_backend import (
    WarmWeights,
    activation_config,
    activation_quantizer,
    candidates,
    weights_config,
    weights_quantizer,
)
from trainable_core.backend.description import Description, DescriptionRow, describe_quantizer, set_described_params
from trainable_core.constants import RANGE_MAX, RANGE_MIN, SIGNED, THRESHOLD
from trainable_core.errors import DocumentError, DocumentVersionError, MissingLibraryError
from trainable_core.recipe.layers import LayerInfo, WeightInfo
from trainable_core.recipe.plan import QuantizerPlan

FC = LayerInfo("fc", "linear", {"weight": WeightInfo((2, 3), 0)})
PER_CHANNEL = {"weights_channels_axis": 0, "weights_per_channel_threshold": True}


def row(quantizer: Any, tensor: str = "weight", training_method: str = "HOME", config: Any = None) -> DescriptionRow:
    """Return the row of a quantizer of the layer ``fc``."""
    plan = QuantizerPlan(quantizer.quantization_config if config is None else config, training_method)
    return describe_quantizer(FC, tensor, plan, quantizer)


def test_a_row_says_where_what_and_how():
    config = weights_config({THRESHOLD: [1.0, 2.0]}, **PER_CHANNEL)
    assert row(weights_quantizer(config, cls=WarmWeights), training_method="WARM") == DescriptionRow(
        layer="fc",
        op="linear",
        tensor="weight",
        target="Weights",
        training_method="WARM",
        method="SYMMETRIC",
        n_bits=4,
        channels_axis=0,
        params={THRESHOLD: [1.0, 2.0]},
        state="trainable",
        quantizer="WarmWeights",
        granularity="channel (axis 0)",
    )


def test_before_calibration_there_are_no_numbers():
    found = row(weights_quantizer(weights_config()))
    assert (found.state, found.params) == ("not calibrated", {})


def test_a_frozen_quantizer_says_so():
    quantizer = weights_quantizer(weights_config({THRESHOLD: 1.0}))
    quantizer.freeze_quant_params = True
    assert (row(quantizer).state, row(quantizer).params) == ("frozen", {THRESHOLD: 1.0})


def test_a_quantizer_that_is_switched_off_says_so():
    found = row(weights_quantizer(weights_config({THRESHOLD: 1.0}, enable_weights_quantization=False)))
    assert (found.state, found.params) == ("switched off", {})


def test_numbers_are_those_that_were_learned():
    quantizer = weights_quantizer(weights_config({THRESHOLD: 1.0}))
    quantizer.assign(quantizer.get_quantizer_variable(THRESHOLD), 3.0)
    assert row(quantizer).params == {THRESHOLD: 3.0}


def test_a_power_of_two_is_told_as_deployed():
    # the next power of two
    assert row(weights_quantizer(weights_config({THRESHOLD: 3.0}, method="POWER_OF_TWO"))).params == {THRESHOLD: 4.0}


def test_of_several_widths_the_selected_one_is_told():
    config = weights_config({THRESHOLD: 1.0}, weights_quantization_candidates=candidates(2, 8))
    assert row(weights_quantizer(config)).n_bits == 8


def test_an_activation_tells_its_sign_and_weights_have_none_to_tell():
    quantizer = activation_quantizer(activation_config({THRESHOLD: 1.0, SIGNED: False}))
    assert row(quantizer, "input").params == {THRESHOLD: 1.0, SIGNED: False}
    assert row(quantizer, "input").target == "Activation"
    assert SIGNED not in row(weights_quantizer(weights_config({THRESHOLD: 1.0, SIGNED: True}))).params


@pytest.mark.parametrize("weights", [True, False])
def test_a_deployed_quantizer_tells_its_own_numbers(*, weights: bool):
    quantizer = (
        weights_quantizer(weights_config({THRESHOLD: 1.0}))
        if weights
        else activation_quantizer(activation_config({THRESHOLD: 1.0, SIGNED: False}))
    )
    deployed = quantizer.convert2inferable()
    found = row(deployed, config=quantizer.quantization_config)
    assert (found.state, found.n_bits, found.quantizer) == ("deployed", 4, "Deployed")
    assert found.params == ({THRESHOLD: 1.0} if weights else {THRESHOLD: 1.0, SIGNED: False})


def test_a_document_is_json_and_holds_every_field():
    quantizer = weights_quantizer(weights_config({RANGE_MIN: -1.0, RANGE_MAX: 0.5}, method="UNIFORM"))
    description = Description((row(quantizer),), {"emb": "no known kind"}, {"bn": "conv"}, finalized=True)
    document = json.loads(description.to_json())
    assert document == description.to_dict()
    assert document["schema_version"] == 1
    assert set(document["rows"][0]) == {field.name for field in fields(DescriptionRow)}
    assert document["rows"][0]["params"] == dict(row(quantizer).params)
    assert (document["left_out"], document["folded"], document["finalized"]) == (
        {"emb": "no known kind"},
        {"bn": "conv"},
        True,
    )


def test_a_table_has_a_line_per_quantizer_in_columns():
    description = Description(
        (
            row(weights_quantizer(weights_config({THRESHOLD: [1.0, 2.5]}, **PER_CHANNEL))),
            row(activation_quantizer(activation_config({THRESHOLD: 1 / 3, SIGNED: False})), "input"),
        )
    )
    titles, rule, *lines = str(description).splitlines()
    columns = [titles.index(title) for title in ("layer", "tensor", "grid", "bits", "trained by", "numbers", "state")]
    assert columns == sorted(columns)
    assert set(rule) == {"-", " "}
    assert len(lines) == 2
    for line, cells in zip(
        lines,
        [
            ("fc", "weight", "SYMMETRIC per channel (axis 0)", "4", "HOME", "threshold=1..2.5", "trainable"),
            ("fc", "input", "SYMMETRIC", "4", "HOME", "threshold=0.3333, is_signed=False", "trainable"),
        ],
        strict=True,
    ):
        ends = [*columns[1:], len(line)]
        assert tuple(line[start:end].strip() for start, end in zip(columns, ends, strict=True)) == cells


def test_channels_of_one_threshold_have_one_number():
    same = Description((row(weights_quantizer(weights_config({THRESHOLD: [0.5, 0.5]}, **PER_CHANNEL))),))
    assert "threshold=0.5 " in str(same)


def test_what_is_folded_and_what_is_left_out_stand_below_the_table():
    text = str(Description((), {"emb": "no known kind"}, {"bn": "conv"}))
    assert "batch norm folded:\n  bn -> conv" in text
    assert "not quantized:\n  emb: no known kind" in text
    assert "not quantized" not in str(Description(()))
    assert "folded" not in str(Description(()))


# ---- numbers from another model -------------------------------------------------------------------------------------


def document(*rows: DescriptionRow) -> dict[str, Any]:
    """Return what another model's description tells, as it comes from a file."""
    return json.loads(Description(rows).to_json())


def described() -> dict[str, Any]:
    """Return the document of one layer with a weight and an input."""
    weights = weights_quantizer(weights_config({THRESHOLD: [1.0, 0.3]}, **PER_CHANNEL))
    inputs = activation_quantizer(activation_config({THRESHOLD: 3.0, SIGNED: False}))
    return document(row(weights), row(inputs, "input"))


def test_described_numbers_are_taken_over_bit_for_bit_along_another_axis():
    # (3, 2), output channels last: another framework's kernel, under another name
    kernel = weights_quantizer(weights_config(weights_channels_axis=1, weights_per_channel_threshold=True), (3, 2))
    kernel.subject = "fc.kernel"
    inputs = activation_quantizer(activation_config())
    inputs.subject = "fc: inputs"
    set_described_params([inputs, kernel], described())
    assert kernel.threshold.tolist() == np.float32([1.0, 0.3]).tolist()
    assert (float(inputs.threshold), inputs.signed) == (3.0, False)
    assert kernel.calibrated
    assert inputs.calibrated


def quantizers(**changes: Any) -> list[Any]:
    """Return quantizers that fit the document but for what is changed."""
    config = weights_config(**{**PER_CHANNEL, **changes.get("config", {})})
    weights = weights_quantizer(config, changes.get("shape", (2, 3)))
    weights.subject = changes.get("subject", "fc.weight")
    return [weights, activation_quantizer(activation_config())]


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"shape": (5, 3)}, r"fc\.weight, which needs \(5,\)"),
        ({"config": {"weights_per_channel_threshold": False}}, r"needs \(\)"),
        ({"config": {"n_bits": 8}}, r"4 bits for fc\.weight, which is SYMMETRIC with \[8\]"),
        ({"config": {"method": "UNIFORM"}}, "which is UNIFORM"),
        ({"subject": "other.weight"}, "has 1 quantizers for fc Weights, the model has 0"),
    ],
    ids=["channels", "per tensor", "width", "grid", "layer"],
)
def test_numbers_that_do_not_fit_are_refused_and_nothing_is_changed(changes: dict[str, Any], fact: str):
    given = quantizers(**changes)
    with pytest.raises(DocumentError, match=fact):
        set_described_params(given, described())
    assert [quantizer.calibrated for quantizer in given] == [False, False]


def test_a_quantizer_that_the_document_lacks_is_named():
    with pytest.raises(DocumentError, match="has 0 quantizers for fc Activation, the model has 1"):
        set_described_params(quantizers(), document(row(weights_quantizer(weights_config({THRESHOLD: 1.0})))))


@pytest.mark.parametrize("version", [None, 0, 2, True, "1"])
def test_a_description_of_another_version_is_refused(version: Any):
    with pytest.raises(DocumentVersionError):
        set_described_params(quantizers(), {**described(), "schema_version": version})


def with_everything() -> Description:
    """Return a description with a bit of everything."""
    quantizer = weights_quantizer(weights_config({THRESHOLD: [1.0, 2.0]}, **PER_CHANNEL))
    return Description(
        (row(quantizer), row(weights_quantizer(weights_config()), tensor="<other & weight>")),
        left_out={"a<b": 'it\'s "float"'},
        folded={"norm": "fc"},
        biases={"fc.bias": "fc: input"},
        islands={"softmax": "computed in float"},
    )


def test_a_notebook_shows_a_table_with_everything_escaped():
    shown = with_everything()._repr_html_()
    root = ET.fromstring(f"<div>{shown}</div>")  # noqa: S314 - made in the line before
    cells = [cell.text or "" for cell in root.iter("td")]
    assert cells == [cell for line in with_everything().table()[1] for cell in line]
    assert "<other & weight>" in cells
    assert [text for item in root.iter("li") for text in item.itertext()][-2:] == ["a<b", ': it\'s "float"']
    assert len(list(root.iter("p"))) == 4


def test_the_text_lists_what_is_below_the_table():
    text = str(with_everything())
    assert "\nbatch norm folded:\n  norm -> fc\n" in text
    assert text.endswith('\nnot quantized:\n  a<b: it\'s "float"')


def test_a_data_frame_has_the_rows():
    pytest.importorskip("pandas", reason="pandas is not installed")
    frame = with_everything().to_dataframe()
    assert list(frame.columns) == [each.name for each in fields(DescriptionRow)]
    assert frame["params"].tolist() == [{THRESHOLD: [1.0, 2.0]}, {}]
    assert Description(()).to_dataframe().shape == (0, len(fields(DescriptionRow)))


def test_without_pandas_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingLibraryError, match="pip install pandas"):
        with_everything().to_dataframe()


def test_a_description_is_read_again():
    document = json.loads(with_everything().to_json())
    assert Description.from_dict(document) == with_everything()


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 2},
        {"rows": 3},
        {"rows": [{}]},
        {"rows": [{"layer": 3}]},
        {"unknown": 1},
        {"left_out": 3},
        {"folded": [1]},
    ],
)
def test_a_damaged_description_is_refused(change):
    with pytest.raises(DocumentError):
        Description.from_dict({**with_everything().to_dict(), **change})


def test_a_damaged_row_is_refused():
    document = with_everything().to_dict()
    for key, value in (
        ("layer", 3),
        ("params", 3),
        ("params", {"threshold": "x"}),
        ("modifiers", [1]),
        ("state", None),
    ):
        rows = [{**document["rows"][0], key: value}]
        with pytest.raises(DocumentError):
            Description.from_dict({**document, "rows": rows})


def test_a_file_holds_the_ends_of_very_many_numbers():
    many = [float(value) for value in range(1, 5000)]
    quantizer = weights_quantizer(weights_config({THRESHOLD: many}, **PER_CHANNEL), shape=(4999, 1))
    many_numbers = Description((row(quantizer),))
    assert many_numbers.summary().rows[0].params == {THRESHOLD: [1.0, 4999.0]}
    assert with_everything().summary() == with_everything()
