"""ONNX files of Keras models: the same codes in ONNX Runtime, NumPy and Keras, whichever Keras it is."""

import pytest

pytest.importorskip("onnx", reason="onnx comes with the extra `onnx`")
pytest.importorskip("onnxruntime", reason="ONNX Runtime comes with the extra `onnx`")

from tests.keras import test_exporting as tflite
from trainable_core.errors import InvalidArgumentError
from trainable_keras import export, verify

RECIPE = {**tflite.RECIPE, "target": "onnx"}


@pytest.mark.parametrize("name", tflite.MODELS)
def test_every_code_is_equal(name, tmp_path):
    build, shape = tflite.MODELS[name]
    made = tflite.deployed(build, shape, RECIPE)
    report = export(made, tmp_path / "model.onnx", target="onnx")
    found = verify(made, tmp_path / "model.onnx", tflite.batches(shape))
    assert not found.changed
    assert sum(row.numpy.different for row in found.rows if row.numpy is not None) == 0
    assert all(row.framework is not None for row in found.rows)
    assert found.ok, str(found)
    assert found.results
    assert max(found.results.values()) < 0.1
    assert {each.op for each in report.islands} <= {"Softmax"}


@pytest.mark.parametrize("name", ["gated", "decoder"])
def test_more_layers_are_written(name, tmp_path):
    build, shape = tflite.LAYERS[name]
    made = tflite.deployed(build, shape, RECIPE)
    export(made, tmp_path / "model.onnx", target="onnx")
    found = verify(made, tmp_path / "model.onnx", tflite.batches(shape))
    assert not found.changed
    assert sum(row.numpy.different for row in found.rows if row.numpy is not None) == 0
    assert found.ok, str(found)
    assert max(found.results.values()) < 0.1


def test_with_powers_of_two_every_code_is_certified_and_equal(tmp_path):
    build, shape = tflite.MODELS["residual"]
    made = tflite.deployed(build, shape, {**tflite.POWERS, "target": "onnx"})
    export(made, tmp_path / "model.onnx", target="onnx")
    found = verify(made, tmp_path / "model.onnx", [tflite.on_ties(shape)])
    assert found.equal, str(found)
    assert "exact but ties" not in {row.certificate for row in found.rows}
    assert {row.certificate for row in found.rows if row.must_be_equal} == {"exact", ""}


def test_a_qonnx_file_has_the_true_widths_and_nothing_is_packed(tmp_path):
    recipe = {**RECIPE, "target": "qonnx", "weights": {**RECIPE["weights"], "n_bits": 3}}
    made = tflite.deployed(*tflite.MODELS["sequence"], recipe)
    assert export(made, tmp_path / "model.onnx", target="qonnx").weights == 2
    with pytest.raises(InvalidArgumentError, match="packed"):
        export(made, tmp_path / "model.onnx", target="qonnx", packed=True)
