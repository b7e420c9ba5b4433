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
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trainable_core.config import (
    StrictBool,
    TrainableQuantizerActivationConfig,
    TrainableQuantizerConfig,
    TrainableQuantizerWeightsConfig,
)
from trainable_core.errors import DocumentError, DocumentVersionError, InvalidArgumentError
from trainable_core.recipe.document import QuantizationRecipe
from trainable_core.recipe.plan import LayerInfo, LayerPlan, QuantizerPlan, WeightInfo, WrappedState
from trainable_core.recipe.specs import Part

_CONFIGS: dict[str, type[TrainableQuantizerConfig]] = {
    "weights": TrainableQuantizerWeightsConfig,
    "activation": TrainableQuantizerActivationConfig,
}
HEADER = "trainable.json"
"""Name of the document in a file of arrays."""


def _quantizer_document(plan: QuantizerPlan) -> dict[str, Any]:
    return {
        "config": {"target": plan.config.prefix, **plan.config.model_dump(mode="json")},
        "training_method": plan.training_method,
        "arguments": dict(plan.arguments),
    }


class _Quantizer(Part):
    config: dict[str, Any]
    training_method: str
    arguments: dict[str, Any]

    def plan(self) -> QuantizerPlan:
        fields = dict(self.config)
        target = fields.pop("target", None)
        if target not in list(_CONFIGS):
            raise InvalidArgumentError("a quantizer's plan", f"target {target!r} is not one of {list(_CONFIGS)}")
        return QuantizerPlan(_CONFIGS[target].model_validate(fields), self.training_method, self.arguments)


class _Weight(Part):
    shape: list[int]
    channels_axis: int


class _Layer(Part):
    name: str
    op: str
    weights_info: dict[str, _Weight]
    weights: dict[str, _Quantizer]
    activation: _Quantizer | None
    placement: Literal["inputs", "outputs"]
    reason: str

    def plan(self) -> LayerPlan:
        infos = {name: WeightInfo(tuple(info.shape), info.channels_axis) for name, info in self.weights_info.items()}
        weights = {attribute: quantizer.plan() for attribute, quantizer in self.weights.items()}
        activation = None if self.activation is None else self.activation.plan()
        return LayerPlan(LayerInfo(self.name, self.op, infos), weights, activation, self.placement, self.reason)


class _State(Part):
    recipe: dict[str, Any]
    plans: list[_Layer]
    left_out: dict[str, str]
    folded: dict[str, str]
    finalized: StrictBool


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
    """Return the plan that `plan_document` was called on.

    Raises
    ------
    InvalidArgumentError, pydantic.ValidationError
        When it is no such document; names the field.
    """
    return _Layer.model_validate(document).plan()


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
    """Return the state that `state_document` was called on.

    Raises
    ------
    InvalidArgumentError, pydantic.ValidationError
        When it is no such document; names the field.
    """
    state = _State.model_validate(document)
    plans = [layer.plan() for layer in state.plans]
    return WrappedState(
        QuantizationRecipe.model_validate(state.recipe),
        {plan.layer.name: plan for plan in plans},
        state.left_out,
        state.folded,
        finalized=state.finalized,
    )


def as_path(path: Any) -> Path:
    """Return what a user gave for a path; DocumentError when it is none."""
    try:
        return Path(os.fsdecode(path))
    except TypeError as error:
        raise DocumentError(repr(path), f"it is {type(path).__name__}, no path") from error


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
        raise DocumentError(path, "it unpacks to more than it holds, which no file of ours does")
