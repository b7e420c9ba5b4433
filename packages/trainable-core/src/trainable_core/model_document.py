"""What a wrapped model is, as JSON documents; and files of plain arrays beside one, without pickle.

A backend that keeps its models' state in the framework's own config (both Keras backends) writes a `LayerPlan` and a
`WrappedState` through these; `write_arrays` and `read_arrays` are the ``save`` and ``load`` of such a backend.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import secrets
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainable_core.config import (
    TrainableQuantizerActivationConfig,
    TrainableQuantizerConfig,
    TrainableQuantizerWeightsConfig,
)
from trainable_core.errors import DocumentError, DocumentVersionError
from trainable_core.plan import LayerInfo, LayerPlan, QuantizerPlan, WeightInfo, WrappedState
from trainable_core.recipe import QuantizationRecipe

_CONFIGS: dict[str, type[TrainableQuantizerConfig]] = {
    "weights": TrainableQuantizerWeightsConfig,
    "activation": TrainableQuantizerActivationConfig,
}
# What Python's readers of zip, JSON and NumPy files raise where bytes are not what they expect: NotImplementedError for
# an unknown compression, RuntimeError for encryption, MemoryError for a size that damage has made.
_UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    EOFError,
    RuntimeError,
    MemoryError,
    struct.error,
    zipfile.BadZipFile,
)
HEADER = "trainable.json"
"""Name of the document in a file of arrays."""


def _quantizer_document(plan: QuantizerPlan) -> dict[str, Any]:
    return {
        "config": {"target": plan.config.prefix, **plan.config.model_dump(mode="json")},
        "training_method": plan.training_method,
        "arguments": dict(plan.arguments),
    }


def _quantizer_plan(document: Mapping[str, Any]) -> QuantizerPlan:
    fields = dict(document["config"])
    config = _CONFIGS[fields.pop("target")].model_validate(fields)
    return QuantizerPlan(config, document["training_method"], dict(document["arguments"]))


def plan_document(plan: LayerPlan) -> dict[str, Any]:
    """Return a layer's plan as a JSON-clean document."""
    return {
        "name": plan.layer.name,
        "op": plan.layer.op,
        "weights_info": {
            attribute: {"shape": list(info.shape), "channels_axis": info.channels_axis}
            for attribute, info in plan.layer.weights.items()
        },
        "weights": {attribute: _quantizer_document(each) for attribute, each in plan.weights.items()},
        "activation": None if plan.activation is None else _quantizer_document(plan.activation),
        "placement": plan.placement,
        "reason": plan.reason,
    }


def plan_from_document(document: Mapping[str, Any]) -> LayerPlan:
    """Return the plan that `plan_document` was called on."""
    infos = {
        attribute: WeightInfo(tuple(info["shape"]), info["channels_axis"])
        for attribute, info in document["weights_info"].items()
    }
    activation = document["activation"]
    return LayerPlan(
        LayerInfo(document["name"], document["op"], infos),
        {attribute: _quantizer_plan(each) for attribute, each in document["weights"].items()},
        None if activation is None else _quantizer_plan(activation),
        document["placement"],
        document["reason"],
    )


def state_document(state: WrappedState) -> dict[str, Any]:
    """Return what a wrapped model knows of itself as a JSON-clean document."""
    return {
        "recipe": state.recipe.model_dump(mode="json", exclude_unset=True),
        "plans": [plan_document(plan) for plan in state.plans.values()],
        "left_out": dict(state.left_out),
        "folded": dict(state.folded),
        "finalized": state.finalized,
    }


def state_from_document(document: Mapping[str, Any]) -> WrappedState:
    """Return the state that `state_document` was called on."""
    plans = [plan_from_document(each) for each in document["plans"]]
    return WrappedState(
        QuantizationRecipe.model_validate(document["recipe"]),
        {plan.layer.name: plan for plan in plans},
        dict(document["left_out"]),
        dict(document["folded"]),
        finalized=bool(document["finalized"]),
    )


def as_path(path: Any) -> Path:
    """Return what a user gave for a path; DocumentError when it is none."""
    try:
        return Path(os.fsdecode(path))
    except TypeError as error:
        raise DocumentError(repr(path), f"it is {type(path).__name__}, no path") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that at any moment, also after a crash, the path holds the old content or all of the new.

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
            if HEADER not in archive.namelist():
                raise DocumentError(path, f"a zip file, but not one of {form}")
            header = json.loads(archive.read(HEADER))
            if not isinstance(header, dict) or header.get("format") != form:
                raise DocumentError(path, f"it was not written by {form}")
            found = header.get("schema_version")
            if found != version or isinstance(found, bool):
                raise DocumentVersionError(path, found, [version])
            for key, kind in {**kinds, "arrays": list}.items():
                if not isinstance(header.get(key), kind):
                    raise DocumentError(path, f"its header has no {key!r}")
            arrays = {}
            for index, name in enumerate(header.pop("arrays")):
                with archive.open(f"{index}.npy") as file:
                    arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
    except FileNotFoundError as error:
        raise DocumentError(path, "no such file") from error
    except _UNREADABLE as error:
        if isinstance(error, DocumentError):
            raise
        raise DocumentError(path, f"truncated, damaged or no file of {form}: {error}") from error
    return header, arrays
