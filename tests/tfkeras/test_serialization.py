"""Every way to save and load, and what damaged or foreign files say."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import trainable_keras.keras2
from tests.tfkeras.models import LSQ, calibrated, dqa, kl, output, small, train
from trainable_core.errors import DocumentError, DocumentVersionError

SIGNED_ACTIVATIONS = {**LSQ, "activations": {"method": "SYMMETRIC", "n_bits": 6, "training_method": "LSQ"}}
every_recipe = pytest.mark.parametrize(
    "recipe", [LSQ, SIGNED_ACTIVATIONS, dqa(bit_cost_weight=0.25)], ids=["uniform", "symmetric", "dqa"]
)
finalized_or_not = pytest.mark.parametrize("finalized", [False, True], ids=["trainable", "deployed"])


def trained(recipe: Any) -> tuple[Any, np.ndarray]:
    qmodel, x = calibrated(recipe)
    train(qmodel, x)
    return qmodel, x


@every_recipe
@finalized_or_not
@pytest.mark.parametrize("form", ["keras", "h5", "tf"])
def test_keras_formats_give_the_same_model(recipe: Any, finalized: bool, form: str, tmp_path: Path) -> None:
    qmodel, x = trained(recipe)
    saved = trainable_keras.keras2.finalize(qmodel) if finalized else qmodel
    path = tmp_path / ("model" if form == "tf" else f"model.{form}")
    saved.save(path, save_format=form)
    loaded = tf.keras.models.load_model(path)
    assert np.array_equal(output(loaded, x), output(saved, x))
    assert trainable_keras.keras2.describe(loaded).to_dict() == trainable_keras.keras2.describe(saved).to_dict()
    if not finalized:
        assert np.array_equal(output(trainable_keras.keras2.finalize(loaded), x), output(saved, x))
        train(loaded, x)


@every_recipe
@finalized_or_not
def test_save_and_load_give_the_same_model(recipe: Any, finalized: bool, tmp_path: Path) -> None:
    qmodel, x = trained(recipe)
    saved = trainable_keras.keras2.finalize(qmodel) if finalized else qmodel
    trainable_keras.keras2.save(saved, tmp_path / "model")
    loaded = trainable_keras.keras2.load(tmp_path / "model", small())
    assert np.array_equal(output(loaded, x), output(saved, x))
    assert trainable_keras.keras2.describe(loaded).to_dict() == trainable_keras.keras2.describe(saved).to_dict()


def test_training_resumes_bit_for_bit_in_the_middle_of_a_schedule(tmp_path: Path) -> None:
    qmodel, x = trained(dqa(temperature={"t_start": 0, "t_end": 7, "initial_val": 1.0, "target_val": 0.1}))
    trainable_keras.keras2.freeze_quant_params(qmodel)
    trainable_keras.keras2.freeze_quant_params(qmodel, frozen=False)
    trainable_keras.keras2.save(qmodel, tmp_path / "model")
    loaded = trainable_keras.keras2.load(tmp_path / "model", small())
    for each in (qmodel, loaded):
        tf.keras.utils.set_random_seed(2)
        train(each, x)
    assert np.array_equal(output(loaded, x), output(qmodel, x))


def test_an_uncalibrated_and_a_frozen_model_come_back_as_they_were(tmp_path: Path) -> None:
    fresh = trainable_keras.keras2.wrap(small(), LSQ)
    trainable_keras.keras2.save(fresh, tmp_path / "fresh")
    loaded = trainable_keras.keras2.load(tmp_path / "fresh", small())
    assert {row.state for row in trainable_keras.keras2.describe(loaded).rows} == {"not calibrated"}
    qmodel, _ = calibrated()
    trainable_keras.keras2.save(trainable_keras.keras2.freeze_quant_params(qmodel), tmp_path / "frozen")
    loaded = trainable_keras.keras2.load(tmp_path / "frozen", small())
    assert {row.state for row in trainable_keras.keras2.describe(loaded).rows} == {"frozen"}


@pytest.mark.parametrize("name", ["weights.h5", "weights", "weights.weights.h5"])
def test_weights_files_calibrate_a_fresh_model(name: str, tmp_path: Path) -> None:
    qmodel, x = trained(SIGNED_ACTIVATIONS)
    qmodel.save_weights(tmp_path / name)
    fresh = trainable_keras.keras2.wrap(small(), SIGNED_ACTIVATIONS)
    fresh.load_weights(tmp_path / name)
    assert np.array_equal(output(fresh, x), output(qmodel, x))
    assert {row.state for row in trainable_keras.keras2.describe(fresh).rows} == {"trainable"}


def test_a_clone_is_calibrated_and_takes_the_weights() -> None:
    qmodel, x = trained(SIGNED_ACTIVATIONS)
    clone = tf.keras.models.clone_model(qmodel)
    clone.set_weights(qmodel.get_weights())
    assert np.array_equal(output(clone, x), output(qmodel, x))


def test_the_config_is_json() -> None:
    qmodel, _ = calibrated()
    document = qmodel.get_layer("conv").get_config()
    assert json.loads(json.dumps(document)) == json.loads(json.dumps(document))
    again = trainable_keras.keras2.QuantizationWrapper.from_config(json.loads(json.dumps(document)))
    assert json.dumps(again.get_config()) == json.dumps(document)


def test_a_file_holds_plain_arrays_and_no_pickle(tmp_path: Path) -> None:
    qmodel, _ = calibrated()
    trainable_keras.keras2.save(qmodel, tmp_path / "model")
    with zipfile.ZipFile(tmp_path / "model") as archive:
        for name in archive.namelist():
            if name.endswith(".npy"):
                with archive.open(name) as file:
                    np.lib.format.read_array(file, allow_pickle=False)


def edited(path: Path, **changes: Any) -> None:
    """Write a file's header anew with other values."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    header = {**json.loads(parts["trainable.json"]), **changes}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {**parts, "trainable.json": json.dumps(header).encode()}.items():
            archive.writestr(name, content)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"schema_version": 9}, DocumentVersionError, "version 9"),
        ({"format": "trainable-keras"}, DocumentError, "not written by trainable-tfkeras"),
        ({"recipe": {"schema_version": 1, "weights": 3}}, DocumentError, "recipe is damaged"),
        ({"frozen": ["nowhere.kernel"]}, DocumentError, "nowhere.kernel"),
        ({"signs": None}, DocumentError, "signs"),
    ],
)
def test_a_damaged_header_says_what_is_wrong(changes: Any, error: Any, message: str, tmp_path: Path) -> None:
    qmodel, _ = calibrated()
    trainable_keras.keras2.save(qmodel, tmp_path / "model")
    edited(tmp_path / "model", **changes)
    with pytest.raises(error, match=message):
        trainable_keras.keras2.load(tmp_path / "model", small())


def test_missing_truncated_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model"
    with pytest.raises(DocumentError, match="no such file"):
        trainable_keras.keras2.load(path, small())
    qmodel, _ = calibrated()
    trainable_keras.keras2.save(qmodel, path)
    with pytest.raises(DocumentError, match="another architecture"):
        trainable_keras.keras2.load(path, tf.keras.Sequential([tf.keras.Input((4,)), kl.Dense(2)]))
    wider = tf.keras.models.clone_model(small(), clone_function=_wider)
    with pytest.raises(DocumentError, match="has shape"):
        trainable_keras.keras2.load(path, wider)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DocumentError, match="truncated"):
        trainable_keras.keras2.load(path, small())


def _wider(layer: Any) -> Any:
    config = layer.get_config()
    if layer.name == "head":
        config["units"] = 5
    return type(layer).from_config(config)
