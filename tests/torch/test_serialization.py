"""Files: complete, plain, atomic; and anything that is not one of them is refused without being run."""

from __future__ import annotations

import copy
import json
import os
import pickle
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import nn

from tests.torch.models import (
    TRAINED_BY,
    images,
    moved,
    network,
    ready,
    recipe,
    same_state,
    spec,
    train,
    weights_only,
)
from trainable_core.errors import DocumentError, DocumentVersionError, ModelError, TrainableError
from trainable_torch import describe, finalize, freeze_quant_params, load, save, wrap
from trainable_torch.serialization import DIGEST, FORMAT, digest, write_atomically
from trainable_torch.training import quantizers_of

MINMAX = {"weights": "minmax", "activations": "minmax"}


def trained(training_method="LSQ", placement="inputs", **more):
    """Return a model whose state is far from what wrapping and calibration alone give."""
    activations = spec(training_method, placement=placement)
    how = recipe(training_method, activations=activations, calibration=MINMAX, **more)
    return moved(train(ready(network(), how, images()), [images()]))


def fresh():
    """Return another float model of the same architecture."""
    model = network()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


# ---- there and back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training_method", TRAINED_BY)
@pytest.mark.parametrize("placement", ["inputs", "outputs"])
@pytest.mark.parametrize("deployed", [False, True], ids=["wrapped", "finalized"])
def test_what_was_saved_is_loaded(training_method, placement, deployed, path):
    qmodel = trained(training_method, placement)
    saved = finalize(qmodel) if deployed else qmodel
    save(saved, path)
    loaded = load(path, fresh())
    assert same_state(loaded, saved)
    assert describe(loaded) == describe(saved)
    assert [m.training for m in loaded.modules()] == [m.training for m in saved.modules()]
    assert torch.equal(loaded.eval()(images()), saved.eval()(images()))
    if not deployed:
        assert torch.equal(finalize(loaded)(images()), finalize(saved)(images()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_model_is_saved_and_loaded_as_it_is(dtype, path):
    qmodel = trained().to(dtype)
    save(qmodel, path)
    loaded = load(path, fresh().to(dtype))
    assert same_state(loaded, qmodel)
    assert {value.dtype for value in loaded.state_dict().values()} == {dtype, torch.float32, torch.bool}


def test_a_model_that_is_not_calibrated_yet_is_not_calibrated_after_loading(path):
    save(wrap(network(), recipe("DQA")), path)
    assert {row.state for row in describe(load(path, fresh())).rows} == {"not calibrated"}


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_kept(training, path):
    save(trained().train(training), path)
    assert all(module.training is training for module in load(path, fresh()).modules())


def test_what_is_frozen_is_frozen_after_loading(path):
    save(freeze_quant_params(trained()), path)
    loaded = load(path, fresh())
    assert {row.state for row in describe(loaded).rows} == {"frozen"}
    assert not any(parameter.requires_grad for q in quantizers_of(loaded).values() for parameter in q.parameters())
    one = next(iter(quantizers_of(loaded)))
    partly = freeze_quant_params(loaded, False)
    quantizers_of(partly)[one].freeze()
    save(partly, path)
    again = quantizers_of(load(path, fresh()))
    assert [name for name, quantizer in again.items() if quantizer.freeze_quant_params] == [one]


def test_the_recipe_is_in_the_file(path):
    save(trained(rules=[{"match": {"name": "head"}, "weights": {"n_bits": 8}}]), path)
    assert {row.layer: row.n_bits for row in describe(load(path, fresh())).rows if row.tensor == "weight"} == {
        "stem.conv": 4,
        "body": 4,
        "head": 8,
    }


def test_the_given_model_is_untouched(path):
    save(trained(), path)
    model = network()
    before, pointers = copy.deepcopy(model.state_dict()), [value.data_ptr() for value in model.state_dict().values()]
    load(path, model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert pointers == [value.data_ptr() for value in model.state_dict().values()]


def test_saving_changes_nothing(path):
    qmodel = trained("DQA")
    before = copy.deepcopy(qmodel.state_dict())
    save(qmodel, path)
    save(finalize(qmodel), path)
    assert all(torch.equal(before[name], value) for name, value in qmodel.state_dict().items())
    assert qmodel.training


def test_a_path_may_be_text(path):
    save(trained(), str(path))
    assert same_state(load(str(path), fresh()), load(path, fresh()))


def test_the_file_holds_plain_tensors_that_others_can_read(path):
    qmodel = trained()
    save(qmodel, path)
    assert load_file(path).keys() == qmodel.state_dict().keys()


class Tied(nn.Module):
    """An embedding and a head that share their weight."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 30), nn.Linear(30, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.embed(x))


@pytest.mark.parametrize("deployed", [False, True], ids=["wrapped", "finalized"])
def test_tied_tensors_are_in_the_file_once_and_tied_after_loading(deployed, path):
    qmodel = ready(Tied(), weights_only("LSQ"))
    save(finalize(qmodel) if deployed else qmodel, path)
    with safetensors.safe_open(path, framework="pt") as file:
        names = list(file.keys())
        aliases = json.loads(file.metadata()[FORMAT])["aliases"]
    weights = {"embed.weight", "head.weight"}
    assert len(weights & set(names)) == 1
    assert weights <= {*names, *aliases}
    loaded = load(path, Tied())
    assert loaded.head.weight is loaded.embed.weight
    assert torch.equal(loaded.head.weight, qmodel.head.weight)
    assert loaded.head.weights_quantizers["weight"] is loaded.embed.weights_quantizers["weight"]


def test_a_tied_file_does_not_load_into_a_model_that_unties_without_its_weights(path):
    save(ready(Tied(), weights_only("LSQ")), path)
    untied = Tied()
    untied.head.weight = nn.Parameter(torch.zeros(50, 30))
    loaded = load(path, untied)  # each has its own copy of what the two shared
    assert torch.equal(loaded.head.weight, loaded.embed.weight)
    assert loaded.head.weight is not loaded.embed.weight


# ---- atomic ---------------------------------------------------------------------------------------------------------


class Crash(BaseException):
    """The end of the process."""


def crash(*_args, **_kwargs):
    raise Crash


def disk_full(*_args, **_kwargs):
    raise OSError(28, "No space left on device")


def files_in(folder):
    return sorted(each.name for each in folder.iterdir())


@pytest.mark.parametrize("target", ["os.fsync", "pathlib.Path.replace", "pathlib.Path.open"])
@pytest.mark.parametrize(("fault", "error"), [(crash, Crash), (disk_full, DocumentError)], ids=["crash", "disk full"])
def test_a_save_that_fails_leaves_the_old_file_whole(target, fault, error, path, monkeypatch):
    qmodel = trained()
    save(qmodel, path)
    old = path.read_bytes()
    train(qmodel, [images()])
    with monkeypatch.context() as patch:
        patch.setattr(target, fault)
        with pytest.raises(error):
            save(qmodel, path)
    assert path.read_bytes() == old
    assert files_in(path.parent) == [path.name]
    save(qmodel, path)
    assert same_state(load(path, fresh()), qmodel)


def test_the_new_content_is_on_disk_before_it_takes_the_old_ones_place(path, monkeypatch):
    events = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor):
        events.append(f"fsync {os.fstat(descriptor).st_size}" if len(events) < 1 else "fsync folder")
        fsync(descriptor)

    def noted_replace(source, target):
        events.append(f"replace {source.stat().st_size}")
        return replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    write_atomically(path, b"12345")
    assert events == ["fsync 5", "replace 5", "fsync folder"]
    assert path.read_bytes() == b"12345"


def test_an_old_file_is_replaced(path):
    path.write_bytes(b"something else")
    save(trained(), path)
    assert load(path, fresh())
    assert files_in(path.parent) == [path.name]


def test_a_folder_that_cant_be_synced_is_no_failure(path, monkeypatch):
    """The file is in place by then, and some systems can't do it."""
    real = os.open

    def no_folders(name, *args, **kwargs):
        return disk_full() if Path(name).is_dir() else real(name, *args, **kwargs)

    monkeypatch.setattr(os, "open", no_folders)
    write_atomically(path, b"12345")
    assert path.read_bytes() == b"12345"


@pytest.mark.parametrize("name", ["missing/model", "file/model"])
def test_a_place_that_cant_be_written_is_told(name, tmp_path):
    (tmp_path / "file").write_text("a file")
    with pytest.raises(DocumentError, match="can't be written") as raised:
        save(trained(), tmp_path / name)
    assert isinstance(raised.value.__cause__, OSError)


# ---- what is no file of ours ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return the bytes of a small saved model."""
    file = tmp_path_factory.mktemp("written") / "model"
    save(ready(nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2)), weights_only("LSQ")), file)
    return file.read_bytes()


def small():
    return nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))


def test_the_small_file_is_a_good_one(written, path):
    path.write_bytes(written)
    assert describe(load(path, small())).rows


def test_a_file_cut_short_anywhere_is_refused(written, path):
    for length in [*range(0, len(written), 64), len(written) - 1]:
        path.write_bytes(written[:length])
        with pytest.raises(DocumentError, match="model"):
            load(path, small())


def test_a_flipped_bit_anywhere_is_refused(written, path):
    """In the header's names, the recipe, the numbers themselves: a checksum sees what the format doesn't."""
    for place in range(len(written)):
        damaged = bytearray(written)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        with pytest.raises(DocumentError, match="model"):
            load(path, small())


def test_bytes_added_at_the_end_are_refused(written, path):
    path.write_bytes(written + b"\0" * 8)
    with pytest.raises(DocumentError):
        load(path, small())


def test_an_empty_or_missing_file_or_a_folder_is_refused(path):
    with pytest.raises(DocumentError, match="no such file"):
        load(path, small())
    path.touch()
    with pytest.raises(DocumentError):
        load(path, small())
    with pytest.raises(DocumentError):
        load(path.parent, small())


class Bomb:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def with_pickle(file, trace):
    file.write_bytes(pickle.dumps({"format": FORMAT, "state": Bomb(trace)}))


def with_torch(file, trace):
    torch.save({"format": FORMAT, "state": Bomb(trace)}, file)


def with_state_dict(file, _trace):
    torch.save(network().state_dict(), file)


@pytest.mark.parametrize("write", [with_pickle, with_torch, with_state_dict])
def test_a_pickle_is_refused_and_not_run(write, path, tmp_path):
    trace = tmp_path / "trace"
    write(path, trace)
    with pytest.raises(DocumentError):
        load(path, network())
    assert not trace.exists()


def forged(path, written, tensors=None, **changes):
    """Write a file that is well formed, with other content and the digest that goes with it."""
    path.write_bytes(written)
    with safetensors.safe_open(path, framework="pt") as file:
        header = {**json.loads(file.metadata()[FORMAT]), **changes}
    tensors = load_file(path) if tensors is None else tensors
    text = json.dumps(header)
    path.write_bytes(to_bytes(tensors, {FORMAT: text, DIGEST: digest(text, tensors)}))
    return path


def test_a_forged_file_without_changes_loads(written, path):
    load(forged(path, written), small())


def test_a_file_without_its_digest_is_refused(written, path):
    path.write_bytes(written)
    with safetensors.safe_open(path, framework="pt") as file:
        text = file.metadata()[FORMAT]
    path.write_bytes(to_bytes(load_file(path), {FORMAT: text}))
    with pytest.raises(DocumentError, match=DIGEST):
        load(path, small())


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_safetensors_of_others_are_refused(metadata, path):
    path.write_bytes(to_bytes(network().state_dict(), metadata))
    with pytest.raises(DocumentError, match="not written by"):
        load(path, network())


@pytest.mark.parametrize("version", [0, 2, "1", None, True, 1.5, [1]])
def test_a_foreign_version_is_refused_with_those_known(version, written, path):
    with pytest.raises(DocumentVersionError) as raised:
        load(forged(path, written, schema_version=version), small())
    assert raised.value.supported == [1]
    assert raised.value.found == version


def test_another_shape_another_dtype_and_other_names_are_refused(written, path):
    tensors = load_file(forged(path, written))
    wider = {**tensors, "0.weight": torch.zeros(4, 3)}
    with pytest.raises(DocumentError, match=r"0\.weight.*\(4, 3\).*\(2, 3\)"):
        load(forged(path, written, wider), small())
    finer = {**tensors, "0.weight": tensors["0.weight"].double()}
    with pytest.raises(DocumentError, match=r"0\.weight.*float64.*float32"):
        load(forged(path, written, finer), small())
    renamed = {"0.kernel" if name == "0.weight" else name: value for name, value in tensors.items()}
    with pytest.raises(DocumentError, match=r"missing: 0\.weight; unknown: 0\.kernel"):
        load(forged(path, written, renamed), small())


def test_a_cast_model_does_not_lose_its_precision_silently(path):
    save(trained().double(), path)
    with pytest.raises(DocumentError, match=r"float64.*\n.*cast"):
        load(path, network())


def test_another_architecture_is_refused(path):
    save(trained(), path)
    with pytest.raises(DocumentError, match="architecture"):
        load(path, nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize("model", [None, {}, nn.Linear])
def test_what_is_no_model_is_refused(model, written, path):
    path.write_bytes(written)
    with pytest.raises(ModelError):
        load(path, model)


def test_a_model_without_values_is_not_saved(path):
    with torch.device("meta"):
        model = network()
    with pytest.raises(ModelError, match="meta"):
        save(wrap(model, recipe()), path)
    assert files_in(path.parent) == []


def test_a_float_model_is_not_saved(path):
    with pytest.raises(ModelError, match="wrap") as raised:
        save(network(), path)
    assert isinstance(raised.value, TrainableError)
