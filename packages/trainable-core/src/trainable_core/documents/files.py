"""Files: written atomically, and a format of plain arrays beside a JSON document, without pickle."""

from __future__ import annotations

import contextlib
import io
import json
import os
import secrets
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainable_core.errors import DocumentError, DocumentVersionError

HEADER = "trainable.json"
"""Name of the document in a file of arrays."""


def as_path(path: Any) -> Path:
    """Return a user's argument as a path; raise DocumentError when it is not one."""
    try:
        return Path(os.fsdecode(path))
    except TypeError as error:
        raise DocumentError(repr(path), f"it is {type(path).__name__}, not a path") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that at any moment, also after a crash, the path holds the old content or all of the new.

    Parameters
    ----------
    path : path
        The file; a process that is killed while writing may leave ``.NAME.*.part`` beside it.
    content : bytes
        All of it.

    Raises
    ------
    DocumentError
        When it can't be written; the old file is whole then.
    """
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.part"
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, ValueError) as error:  # ValueError: no path at all, it contains a null character
        raise DocumentError(path, f"can't be written: {error}") from error
    finally:
        with contextlib.suppress(OSError, ValueError):  # not there, or nothing could be there
            temporary.unlink()
    with contextlib.suppress(OSError):  # the content is safe; not every system lets a folder be synced
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def require_writable(path: Path) -> None:
    """Refuse a path that nothing can be written to, before any work is done for it.

    Raises
    ------
    DocumentError
        When its folder does not exist or is no folder, or the path is one.
    """
    try:
        problem = "" if path.parent.is_dir() else f"{path.parent} is no folder"
        problem = "it is a folder" if path.is_dir() else problem
    except (OSError, ValueError) as error:  # ValueError: no path at all, it contains a null character
        raise DocumentError(path, f"can't be written: {error}") from error
    if problem:
        raise DocumentError(path, f"can't be written: {problem}")


def check_header(path: object, header: Any, form: str, version: int, kinds: Mapping[str, type]) -> None:
    """Refuse a header that is not of a format.

    Parameters
    ----------
    path : object
        The file, for errors.
    header : object
        What was read from the file.
    form : str
        The ``format`` that the header must have.
    version : int
        Its ``schema_version``.
    kinds : mapping of str to type
        Keys that it must have, and the type of each.

    Raises
    ------
    DocumentError
        When it is of another format, or lacks a key.
    DocumentVersionError
        When it was written in another version of the format.
    """
    if not isinstance(header, dict) or header.get("format") != form:
        raise DocumentError(path, f"it was not written by {form}")
    found = header.get("schema_version")
    if found != version or isinstance(found, bool):
        raise DocumentVersionError(path, found, [version])
    for key, kind in kinds.items():
        if not isinstance(header.get(key), kind):
            raise DocumentError(path, f"its header has no {key!r}")


def write_arrays(path: Path, header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write a JSON document and plain arrays into one file: a zip of ``.npy`` files, no pickle.

    Parameters
    ----------
    path : path
        An old file is replaced only once the new one is complete on disk.
    header : mapping
        JSON-clean; has ``format`` and ``schema_version``.
    arrays : mapping of str to array
        Of NumPy's own dtypes.

    Raises
    ------
    DocumentError
        When the file can't be written.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(HEADER, json.dumps({**header, "arrays": list(arrays)}))
        for index, array in enumerate(arrays.values()):
            with archive.open(f"{index}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)
    write_atomically(path, buffer.getvalue())


def read_arrays(
    path: Path, form: str, version: int, kinds: Mapping[str, type]
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Return header and arrays of a file that `write_arrays` wrote.

    Parameters
    ----------
    path : path
        The file.
    form : str
        The ``format`` that the header must have.
    version : int
        Its ``schema_version``.
    kinds : mapping of str to type
        Further keys of the header, and the type of each.

    Raises
    ------
    DocumentError
        When the file is missing, truncated, damaged, or of another format.
    DocumentVersionError
        When its version is another.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _unpack(path, archive, form, version, kinds)
    except DocumentError:
        raise
    except FileNotFoundError as error:
        raise DocumentError(path, "no such file") from error
    except Exception as error:  # zipfile and NumPy raise whatever the damage leads them to
        raise DocumentError(path, f"truncated, damaged or no file of {form}: {error}") from error


def _unpack(
    path: Path, archive: zipfile.ZipFile, form: str, version: int, kinds: Mapping[str, type]
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    _check_sizes(path, archive)
    if HEADER not in archive.namelist():
        raise DocumentError(path, f"a zip file, but not one of {form}")
    header = json.loads(archive.read(HEADER))
    check_header(path, header, form, version, {**kinds, "arrays": list})
    arrays = {}
    for index, name in enumerate(header.pop("arrays")):
        if not isinstance(name, str):
            raise DocumentError(path, f"its header calls an array {name!r}")
        with archive.open(f"{index}.npy") as file:
            arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
    return header, arrays


def _check_sizes(path: Path, archive: zipfile.ZipFile) -> None:
    """Refuse what would unpack to more than the file holds."""
    members = archive.infolist()
    stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
    if not stored or sum(member.file_size for member in members) > path.stat().st_size:
        raise DocumentError(path, "it unpacks to more than it holds, which no file written by `save` does")
