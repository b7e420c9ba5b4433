"""`save` and `load`: the file is whole or refused, and training goes on as if nothing had been."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.keras.framework import FRAMEWORK, KERAS_VERSION, dtype_policy, keras, kl, only_keras
from tests.keras.models import (
    MODELS,
    TRAINED_BY,
    call,
    dense,
    dqa,
    flat,
    images,
    moved,
    network,
    ready,
    recipe,
    same,
    spec,
    state,
    train,
    vectors,
    weights_only,
)
from trainable_core.documents.files import HEADER
from trainable_core.errors import DocumentError, DocumentVersionError, ModelError
from trainable_keras import calibrate, describe, finalize, freeze_quant_params, load, save, wrap
from trainable_keras.training import quantizers_of

LSQ = recipe("LSQ", "UNIFORM")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.trainable"


@pytest.mark.parametrize("deployed", [False, True], ids=["trainable", "deployed"])
@pytest.mark.parametrize("name", list(MODELS))
def test_what_was_saved_is_loaded(name: str, deployed: bool, path: Path) -> None:
    make, batches = MODELS[name]
    model = make()
    qmodel = moved(ready(model, LSQ, batches()))
    saved = finalize(qmodel) if deployed else qmodel
    save(saved, path)
    loaded = load(path, model)
    assert same(call(loaded, batches(5)), call(saved, batches(5)))
    assert describe(loaded).to_dict() == describe(saved).to_dict()


@pytest.mark.parametrize("placement", ["inputs", "outputs"])
@pytest.mark.parametrize("deployed", [False, True], ids=["trainable", "deployed"])
@pytest.mark.parametrize("training_method", TRAINED_BY)
def test_every_training_method_is_saved_and_loaded(
    training_method: str, deployed: bool, placement: str, path: Path
) -> None:
    how = {"weights": spec(training_method), "activations": spec(training_method, placement=placement)}
    qmodel = moved(ready(dense(activation="relu"), how, vectors(8, 4)))
    saved = finalize(qmodel) if deployed else qmodel
    save(saved, path)
    loaded = load(path, dense(activation="relu"))
    assert state(loaded) == state(saved)
    assert same(call(loaded, vectors(8, 4)), call(saved, vectors(8, 4)))


@pytest.mark.parametrize("training_method", ["LSQ", "DQA"])
def test_training_resumes_bit_for_bit(training_method: str, path: Path) -> None:
    arguments = {"temperature": {"t_start": 0, "t_end": 8, "initial_val": 1.0, "target_val": 0.1}}
    how = recipe(training_method)
    if training_method == "DQA":
        how = {part: spec("DQA", arguments=arguments) for part in ("weights", "activations")}
    qmodel = train(ready(dense(), how, vectors(8, 4)), vectors(8, 4))
    save(qmodel, path)
    loaded = load(path, dense())
    for each in (qmodel, loaded):
        train(each, vectors(16, 4), lr=0.5)
    assert state(loaded) == state(qmodel)


def test_a_model_that_is_not_calibrated_yet_is_not_calibrated_after_loading(path: Path) -> None:
    save(wrap(dense(), LSQ), path)
    loaded = load(path, dense())
    assert {row.state for row in describe(loaded).rows} == {"not calibrated"}
    calibrate(loaded, [vectors(8, 4)])


def test_what_is_frozen_is_frozen_after_loading(path: Path) -> None:
    qmodel = ready(dense(), LSQ, vectors(8, 4))
    quantizers_of(qmodel)["fc.kernel"].freeze()
    save(qmodel, path)
    assert {name: q.freeze_quant_params for name, q in quantizers_of(load(path, dense())).items()} == {
        "fc.kernel": True,
        "fc: inputs": False,
    }


def test_a_sign_that_calibration_found_comes_back(path: Path) -> None:
    qmodel = ready(dense(), recipe("LSQ"), np.abs(vectors(8, 4)))
    assert quantizers_of(qmodel)["fc: inputs"].signed is False
    save(qmodel, path)
    assert quantizers_of(load(path, dense()))["fc: inputs"].signed is False


def test_saving_changes_nothing_and_a_path_may_be_text(path: Path) -> None:
    qmodel = moved(ready(dense(), LSQ, vectors(8, 4)))
    freeze_quant_params(qmodel)
    before = state(qmodel)
    save(qmodel, str(path))
    assert state(qmodel) == before
    model = dense()
    kept = state(model)
    assert state(load(str(path), model)) == before
    assert state(model) == kept


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16", "float16"])
def test_a_model_under_a_dtype_policy_is_loaded_as_it_was(policy: str, path: Path) -> None:
    with dtype_policy(policy):
        qmodel = moved(ready(dense(), LSQ, vectors(8, 4)))
        save(qmodel, path)
        loaded = load(path, dense())
    assert state(loaded) == state(qmodel)


def test_the_file_is_a_zip_of_plain_arrays_and_a_recipe(path: Path) -> None:
    save(moved(ready(dense(), LSQ, vectors(8, 4))), path)
    with zipfile.ZipFile(path) as archive:
        header = json.loads(archive.read(HEADER))
        arrays = [np.load(io.BytesIO(archive.read(f"{index}.npy")), allow_pickle=False) for index in range(2)]
    assert header["recipe"] == LSQ
    assert [array.shape for array in arrays] == [(4, 3), (3,)]


# ---- damage ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return the content of a small model's file."""
    path = tmp_path_factory.mktemp("written") / "model"
    save(moved(ready(dense(), LSQ, vectors(8, 4))), path)
    return path.read_bytes()


def test_a_file_cut_short_anywhere_is_refused(written: bytes, path: Path) -> None:
    model = dense()
    for size in {*range(0, 60, 7), *range(60, len(written), len(written) // 25), len(written) - 1}:
        path.write_bytes(written[:size])
        with pytest.raises(DocumentError):
            load(path, model)


def test_a_flipped_bit_is_refused_or_harmless(written: bytes, path: Path) -> None:
    """A zip has bytes that mean nothing, such as times; whatever is loaded is what was saved."""
    model = dense()
    path.write_bytes(written)
    expected = state(load(path, model))
    refused = 0
    places = range(0, len(written), 97)
    for place in places:
        content = bytearray(written)
        content[place] ^= 1 << (place % 8)
        path.write_bytes(content)
        try:
            assert state(load(path, model)) == expected
        except DocumentError:
            refused += 1
    assert refused > len(places) // 2


def forged(written: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """Return a file with another header and the same arrays, whole in itself."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(written)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == HEADER:
                header = json.loads(content)
                change(header)
                content = json.dumps(header).encode()
            new.writestr(name, content)
    return buffer.getvalue()


def test_a_forged_file_without_changes_loads(written: bytes, path: Path) -> None:
    path.write_bytes(forged(written, lambda header: None))
    load(path, dense())


OTHER_FORMAT = {2: "trainable-keras", 3: "trainable-keras2"}[KERAS_VERSION]
FORGERIES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a later version": ({"schema_version": 2}, DocumentVersionError, "schema version 2"),
    "no version": ({"schema_version": None}, DocumentVersionError, "None"),
    "a bool version": ({"schema_version": True}, DocumentVersionError, "True"),
    "another format": ({"format": "trainable-torch"}, DocumentError, "trainable-keras"),
    "the format of the other Keras": ({"format": OTHER_FORMAT}, DocumentError, FRAMEWORK.file_format),
    "no recipe": ({"recipe": None}, DocumentError, "'recipe'"),
    "a damaged recipe": ({"recipe": weights_only(n_bits=40)}, DocumentError, r"weights\.n_bits"),
    "another recipe": ({"recipe": weights_only("LSQ", "UNIFORM")}, DocumentError, "another architecture"),
    "finalized by a word": ({"finalized": "no"}, DocumentError, "'finalized'"),
    "finalized by mistake": ({"finalized": True}, DocumentError, r"no quantizer 'fc"),
    "frozen that is not there": ({"frozen": ["neck"]}, DocumentError, "'neck'"),
    "signs of another": ({"signs": {"neck": True}}, DocumentError, "'neck'"),
    "signs that are a list": ({"signs": []}, DocumentError, "'signs'"),
    "arrays that are none": ({"arrays": None}, DocumentError, "'arrays'"),
    "an array too many": ({"arrays": ["0:kernel", "1:bias", "2", "3", "4", "5", "6"]}, DocumentError, "model"),
}


@pytest.mark.parametrize(("changes", "error", "fact"), FORGERIES.values(), ids=FORGERIES)
def test_a_wrong_header_is_told(
    changes: dict[str, Any], error: type[Exception], fact: str, written: bytes, path: Path
) -> None:
    path.write_bytes(forged(written, lambda header: header.update(changes)))
    model = dense()
    before = state(model)
    with pytest.raises(error, match=fact):
        load(path, model)
    assert state(model) == before


class Bomb:
    """What a pickle runs when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Write a file."""
        return Path.touch, (Path("exploded"),)


def object_array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Bomb()], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def test_a_pickle_is_refused_and_not_run(
    written: bytes, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    smuggled = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(written)) as old, zipfile.ZipFile(smuggled, "w") as new:
        for name in old.namelist():
            new.writestr(name, object_array() if name == "0.npy" else old.read(name))
    for content in (pickle.dumps(Bomb()), smuggled.getvalue()):
        path.write_bytes(content)
        with pytest.raises(DocumentError):
            load(path, dense())
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "content", [b"", b"weights: 4 bits\n" * 100, np.random.default_rng(0).bytes(5000)], ids=["empty", "text", "random"]
)
def test_a_foreign_file_is_refused(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    with pytest.raises(DocumentError, match=r"model\.trainable"):
        load(path, dense())


def test_a_keras_file_is_refused_with_its_name(tmp_path: Path) -> None:
    dense().save(tmp_path / "model.keras")
    with pytest.raises(DocumentError, match=r"a zip file, but not one of trainable-keras"):
        load(tmp_path / "model.keras", dense())


@pytest.mark.parametrize(("name", "fact"), [("missing", "no such file"), (".", "directory"), (None, "NoneType")])
def test_what_is_not_there_is_told(name: Any, fact: str, tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match=fact):
        load(tmp_path / name if name else name, dense())


@pytest.mark.parametrize(
    ("name", "fact"),
    [
        ("missing/model", "missing"),
        (".", "can't be written"),
        ("file/model", "file"),
        ("a\0b", "null"),
        (None, "NoneType"),
        (5, "int"),
    ],
)
def test_a_place_that_cant_be_written_is_told(name: Any, fact: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here already")
    with pytest.raises(DocumentError, match=fact):
        save(ready(dense(), weights_only()), tmp_path / name if isinstance(name, str) else name)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


@pytest.mark.filterwarnings("ignore::trainable_core.errors.NothingQuantizedWarning")  # of the last one
@pytest.mark.parametrize(
    "make", [lambda: dense(4, 5), network, lambda: keras.Sequential([keras.Input((4,)), kl.ReLU()])]
)
def test_another_architecture_is_refused(make: Any, written: bytes, path: Path) -> None:
    path.write_bytes(written)
    model = make()
    before = state(model)
    with pytest.raises(DocumentError, match=r"architecture|shape"):
        load(path, model)
    assert state(model) == before


@pytest.mark.parametrize("model", [None, "model", dense])
def test_what_is_not_a_model_is_refused(model: Any, written: bytes, path: Path) -> None:
    path.write_bytes(written)
    with pytest.raises(ModelError, match="must be a Keras model"):
        load(path, model)


def test_a_float_model_is_not_saved(path: Path) -> None:
    with pytest.raises(ModelError, match=r"trainable_keras\.wrap"):
        save(dense(), path)
    assert not path.exists()


# ---- Keras's own file -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deployed", [False, True], ids=["trainable", "deployed"])
@pytest.mark.parametrize("name", ["sequential", "functional"])
def test_a_keras_file_gives_the_same_model_without_custom_objects(name: str, deployed: bool, tmp_path: Path) -> None:
    make, batches = MODELS[name]
    qmodel = moved(ready(make(), LSQ, batches()))
    saved = finalize(qmodel) if deployed else qmodel
    saved.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert same(call(loaded, batches(5)), call(saved, batches(5)))
    assert describe(loaded).to_dict() == describe(saved).to_dict()
    assert same(call(finalize(loaded), batches(5)), call(saved, batches(5)))


@only_keras(2, "Keras 3 has neither format")
@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
@pytest.mark.parametrize("deployed", [False, True], ids=["trainable", "deployed"])
@pytest.mark.parametrize("how", [LSQ, recipe("LSQ"), dqa(bit_cost_weight=0.25)], ids=["uniform", "symmetric", "DQA"])
@pytest.mark.parametrize("form", ["h5", "tf"])
def test_older_formats_give_the_same_model(how: Any, deployed: bool, form: str, tmp_path: Path) -> None:
    qmodel = moved(ready(flat(), how, images()))
    saved = finalize(qmodel) if deployed else qmodel
    path = tmp_path / ("model" if form == "tf" else f"model.{form}")
    saved.save(path, save_format=form)
    loaded = keras.models.load_model(path)
    assert same(call(loaded, images(5)), call(saved, images(5)))
    assert describe(loaded).to_dict() == describe(saved).to_dict()
    if not deployed:
        assert same(call(finalize(loaded), images(5)), call(saved, images(5)))
        train(loaded, images())


def test_a_subclassed_models_keras_file_gives_the_same_model(tmp_path: Path) -> None:
    """Its own class makes float layers; its config tells what becomes of them."""
    make, batches = MODELS["subclassed"]
    qmodel = moved(ready(make(), LSQ, batches()))
    qmodel.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert same(call(loaded, batches()), call(qmodel, batches()))
    assert describe(loaded).to_dict() == describe(qmodel).to_dict()


WEIGHTS_FILES = {2: ["it.h5", "it", "it.weights.h5"], 3: ["it.weights.h5"]}[KERAS_VERSION]


@pytest.mark.parametrize("name", WEIGHTS_FILES)
def test_a_weights_file_of_keras_calibrates_a_fresh_model(name: str, tmp_path: Path) -> None:
    qmodel = moved(ready(network(), recipe("LSQ"), images()))
    qmodel.save_weights(tmp_path / name)
    other = wrap(network(), recipe("LSQ"))
    other.load_weights(tmp_path / name)
    assert same(call(other, images()), call(qmodel, images()))
    assert {row.state for row in describe(other).rows} == {"trainable"}


def test_a_clone_is_calibrated_and_takes_the_weights() -> None:
    qmodel = moved(ready(network(), recipe("LSQ"), images()))
    clone = keras.models.clone_model(qmodel)
    clone.set_weights(qmodel.get_weights())
    assert same(call(clone, images()), call(qmodel, images()))


def test_an_optimizer_comes_back_with_the_keras_file(tmp_path: Path) -> None:
    qmodel = ready(dense(), LSQ, vectors(8, 4))
    qmodel.compile("adam", "mse")
    target = np.zeros((8, 3), np.float32)
    qmodel.fit(vectors(8, 4), target, verbose=0)
    qmodel.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for each in (qmodel, loaded):
        each.fit(vectors(8, 4), target, verbose=0)
    assert state(loaded) == state(qmodel)


def test_a_users_layer_needs_no_more_than_keras_asks(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((4,)), Halved(), kl.Dense(2, name="fc")])
    qmodel = moved(ready(model, LSQ, vectors(8, 4)))
    qmodel.save(tmp_path / "model.keras")
    assert same(call(keras.models.load_model(tmp_path / "model.keras"), vectors(8, 4)), call(qmodel, vectors(8, 4)))


@keras.saving.register_keras_serializable(package="tests")
class Halved(kl.Layer):
    """A layer without weights."""

    def call(self, x: Any) -> Any:
        """Return half of it."""
        return x * 0.5
