"""Exported files: what they say of themselves, and how they are written and read.

The metadata is a JSON document in the property ``trainable`` of the model. It holds the versions of the libraries, the
recipe, where each quantizer's codes are, the float islands, and a digest of every constant and of the nodes, so that a
change is found and named.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trainable_core.documents.files import as_path, check_header, write_atomically
from trainable_core.errors import DocumentError
from trainable_core.export.graph import Array
from trainable_core.export.libraries import library

FORMAT = "trainable-export"
SCHEMA_VERSION = 1
KEY = "trainable"
"""Name of the model's property that holds the metadata."""

LARGE = 1 << 30
"""Bytes of constants from which on they are written into a file of their own; protobuf ends at twice as many."""

SMALL = 1024
"""Constants of fewer bytes stay in the model's own file."""


def digest_of(array: Array) -> str:
    """Return the SHA-256 of a constant: dtype, shape and values."""
    found = hashlib.sha256(f"{array.dtype} {array.shape}\n".encode())
    found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def digest_of_nodes(model: Any) -> str:
    """Return the SHA-256 of a model's nodes, inputs and outputs."""
    found = hashlib.sha256()
    for each in [*model.graph.node, *model.graph.input, *model.graph.output]:
        found.update(each.SerializeToString(deterministic=True))
    return found.hexdigest()


def constants_of(model: Any) -> dict[str, Array]:
    """Return a model's initializers by name."""
    onnx = library("onnx", "reading an ONNX file")
    return {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}


def describe_in(model: Any, header: Mapping[str, Any]) -> None:
    """Put the metadata into a model, digests included."""
    onnx = library("onnx", "writing an ONNX file")
    digests = {name: digest_of(array) for name, array in constants_of(model).items()}
    document = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        **header,
        "constants": digests,
        "nodes": digest_of_nodes(model),
    }
    onnx.helper.set_model_props(model, {KEY: json.dumps(document)})


def metadata_of(model: Any, path: object) -> dict[str, Any]:
    """Return the metadata of a model.

    Raises
    ------
    DocumentError
        When it has none, or it is damaged.
    """
    text = next((each.value for each in model.metadata_props if each.key == KEY), None)
    if text is None:
        raise DocumentError(path, "an ONNX file, but not written by `export`")
    try:
        document = json.loads(text)
    except ValueError as error:
        raise DocumentError(path, f"its metadata is damaged: {error}") from error
    kinds = {"constants": dict, "nodes": str, "quantizers": list, "islands": list}
    check_header(path, document, FORMAT, SCHEMA_VERSION, kinds)
    found: dict[str, Any] = document
    return found


def changes_in(model: Any, metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return what is not as it was written, by the name of a constant, or ``nodes``."""
    found, constants = {}, constants_of(model)
    for name, digest in metadata["constants"].items():
        if name not in constants:
            found[name] = "it is missing"
        elif digest_of(constants[name]) != digest:
            found[name] = "its values are not those that were written"
    found |= {name: "it was added" for name in constants if name not in metadata["constants"]}
    if digest_of_nodes(model) != metadata["nodes"]:
        found["nodes"] = "the nodes of the graph are not those that were written"
    return found


def write(model: Any, path: Any, external_data: bool | None = None) -> int:  # noqa: FBT001 - as the verbs
    """Write a model; an old file is replaced only once the new one is complete.

    Parameters
    ----------
    model : onnx.ModelProto
        With its metadata.
    path : path
        The file.
    external_data : bool, optional
        Whether large constants go into a second file beside it, ``NAME.DIGEST.data``; by default where they are more
        than protobuf should hold.

    Returns
    -------
    int
        Bytes that were written.

    Raises
    ------
    DocumentError
        When it can't be written; the old file is whole then.
    """
    path = as_path(path)
    total = sum(len(each.raw_data) for each in model.graph.initializer)
    if external_data is None:
        external_data = total > LARGE
    if not external_data:
        content = model.SerializeToString()
        write_atomically(path, content)
        return len(content)
    data, model = _split(model, path)
    name = f"{path.name}.{secrets.token_hex(4)}.data"
    for each in model.graph.initializer:
        for entry in each.external_data:
            if entry.key == "location":
                entry.value = name
    old = _data_files(path)
    write_atomically(path.parent / name, data)
    content = model.SerializeToString()
    try:
        write_atomically(path, content)
    except DocumentError:
        (path.parent / name).unlink(missing_ok=True)
        raise
    for each in old:
        each.unlink(missing_ok=True)
    return len(content) + len(data)


def _split(model: Any, path: Path) -> tuple[bytes, Any]:
    """Return large constants as one block, and a copy of the model that refers to it."""
    onnx = library("onnx", "writing an ONNX file")
    copied = type(model)()
    copied.CopyFrom(model)
    blocks, offset = [], 0
    for each in copied.graph.initializer:
        block = each.raw_data
        if len(block) < SMALL:
            continue
        blocks.append(block + b"\0" * (-len(block) % ALIGNED))
        each.ClearField("raw_data")
        each.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", path.name), ("offset", offset), ("length", len(block))):
            each.external_data.add(key=key, value=str(value))
        offset += len(blocks[-1])
    return b"".join(blocks), copied


ALIGNED = 4096
"""Constants in a file of their own begin at pages, so that runtimes can map them."""


def _data_files(path: Path) -> list[Path]:
    """Return the data files that belong to an old file of ours, which are named by eight hexadecimal digits."""
    if not path.exists():
        return []
    pattern = re.compile(re.escape(path.name) + r"\.[0-9a-f]{8}\.data")
    return [each for each in path.parent.iterdir() if pattern.fullmatch(each.name)]


TFLITE = b"TFL3"
"""The identifier of TensorFlow Lite files, behind their first four bytes."""


def is_tflite(path: Any) -> bool:
    """Return whether a file says of itself that it is one for TensorFlow Lite."""
    try:
        with as_path(path).open("rb") as file:
            return file.read(8)[4:] == TFLITE
    except (OSError, ValueError):
        return False  # whoever reads it as another file says what is wrong


def read(path: Any) -> Any:
    """Return the model of a file, its data included.

    Raises
    ------
    DocumentError
        When it is missing, truncated, damaged, or no ONNX file.
    """
    onnx = library("onnx", "reading an ONNX file")
    path = as_path(path)
    if not path.is_file():
        raise DocumentError(path, "no such file")
    try:
        model = onnx.load(str(path))
    except Exception as error:  # protobuf and onnx raise whatever the damage leads them to
        raise DocumentError(path, f"truncated, damaged or no ONNX file: {error}") from error
    if not model.graph.node:
        raise DocumentError(path, "truncated, damaged or no ONNX file: it has no nodes")
    return model
