"""Files of arrays come back whole, are refused when damaged, and are written atomically."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile

import numpy as np
import pytest

from trainable_core.documents.files import HEADER, read_arrays, write_arrays, write_atomically
from trainable_core.errors import DocumentError, DocumentVersionError

RECIPE = {"weights": {"method": "SYMMETRIC", "n_bits": 4, "training_method": "LSQ"}}
FORM, VERSION, KINDS = "a-backend", 1, {"recipe": dict, "finalized": bool}
HEAD = {"format": FORM, "schema_version": VERSION, "recipe": RECIPE, "finalized": False}
ARRAYS = {"0:kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "1:step": np.asarray(7), "2:sign": np.asarray(True)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model"


# ---- arrays ---------------------------------------------------------------------------------------------------------


def test_arrays_come_back(path):
    write_arrays(path, HEAD, ARRAYS)
    header, arrays = read_arrays(path, FORM, VERSION, KINDS)
    assert header == HEAD
    assert list(arrays) == list(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(arrays[name], array, strict=True)


def read(path):
    return read_arrays(path, FORM, VERSION, KINDS)


def test_a_file_cut_short_anywhere_is_refused(path):
    write_arrays(path, HEAD, ARRAYS)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(DocumentError):
            read(path)


def test_a_flipped_bit_changes_nothing_that_is_read(path):
    """The archive has a checksum of each member; a bit outside of them, a time stamp's, may flip unseen."""
    write_arrays(path, HEAD, ARRAYS)
    content, refused = path.read_bytes(), 0
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        try:
            header, arrays = read(path)
        except DocumentError:
            refused += 1
            continue
        assert header == HEAD
        assert all(np.array_equal(arrays[name], array) for name, array in ARRAYS.items())
    assert refused > len(content) / 2


@pytest.mark.parametrize("version", [0, 2, "1", None, True, [1]])
def test_a_foreign_version_is_refused_with_those_known(version, path):
    write_arrays(path, {**HEAD, "schema_version": version}, ARRAYS)
    with pytest.raises(DocumentVersionError) as raised:
        read(path)
    assert (raised.value.found, raised.value.supported) == (version, [VERSION])


@pytest.mark.parametrize("change", [{"format": "another"}, {"recipe": []}, {"finalized": 1}])
def test_a_foreign_header_is_refused(change, path):
    write_arrays(path, {**HEAD, **change}, ARRAYS)
    with pytest.raises(DocumentError):
        read(path)


def archive(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members.items():
            file.writestr(name, content)


def npy(array):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array)
    return buffer.getvalue()


class Bomb:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def test_a_pickled_array_is_refused_and_not_run(path, tmp_path):
    trace = tmp_path / "trace"
    array = np.empty(1, object)
    array[0] = Bomb(str(trace))
    archive(path, {HEADER: json.dumps({**HEAD, "arrays": ["a"]}), "0.npy": npy(array)})
    with pytest.raises(DocumentError):
        read(path)
    path.write_bytes(pickle.dumps(Bomb(str(trace))))
    with pytest.raises(DocumentError):
        read(path)
    assert not trace.exists()


def test_what_unpacks_to_more_than_it_holds_is_refused(path):
    header = json.dumps({**HEAD, "arrays": ["a"]})
    archive(path, {HEADER: header, "0.npy": npy(np.zeros(10**6))}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10**5
    with pytest.raises(DocumentError, match="more than it holds"):
        read(path)


def test_an_array_larger_than_memory_is_refused(path):
    whole = npy(np.zeros(1))
    claim = whole.replace(b"(1,), }" + b" " * 14, b"(" + b"9" * 15 + b",), }")
    assert claim != whole
    assert len(claim) == len(whole)
    archive(path, {HEADER: json.dumps({**HEAD, "arrays": ["a"]}), "0.npy": claim})
    with pytest.raises(DocumentError):
        read(path)


def test_an_array_that_is_missing_and_one_without_a_name_are_refused(path):
    for names in (["a", "b"], [0], [["a"]], [None]):
        archive(path, {HEADER: json.dumps({**HEAD, "arrays": names}), "0.npy": npy(np.zeros(1))})
        with pytest.raises(DocumentError):
            read(path)


def test_a_file_of_others_a_folder_and_no_file_are_refused(path):
    archive(path, {"a.txt": "hello"})
    with pytest.raises(DocumentError, match="not one of"):
        read(path)
    with pytest.raises(DocumentError):
        read(path.parent)
    with pytest.raises(DocumentError, match="no such file"):
        read(path.parent / "missing")


# ---- atomic ---------------------------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(path, monkeypatch):
    def disk_full(_descriptor):
        raise OSError(28, "No space left on device")

    write_atomically(path, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", disk_full)
        with pytest.raises(DocumentError, match="No space"):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_folder_that_cant_be_synced_is_no_failure(path, monkeypatch):
    """The file is in place by then, and some systems can't do it."""
    real = os.open

    def no_folders(name, *args, **kwargs):
        if os.path.isdir(name):  # noqa: PTH112 - Path.is_dir opens nothing, but this is what is patched
            raise OSError(13, "Permission denied")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(os, "open", no_folders)
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("name", ["missing/model", "file/model", "nul\0l"])
def test_a_place_that_cant_be_written_is_told(name, tmp_path):
    (tmp_path / "file").write_text("a file")
    with pytest.raises(DocumentError, match="can't be written"):
        write_atomically(tmp_path / name, b"new")
