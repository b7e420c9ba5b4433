"""A wrapped model on disk: its recipe and plain tensors, in one safetensors file; no pickle, nothing executed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import pydantic
import safetensors
import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from trainable_core.documents.files import as_path, check_header, write_atomically
from trainable_core.documents.model import (
    KINDS,
    SCHEMA_VERSION,
    check_shapes,
    freeze_quantizers,
    header_of,
    place_levels,
    placeholder,
    recipe_of,
    switch_off_quantizers,
)
from trainable_core.errors import DocumentError, ModelError, RuleError, TrainableError
from trainable_torch.batch_norm import simulated_batch_norms
from trainable_torch.description import describe
from trainable_torch.finalized import converted
from trainable_torch.ranks import require_whole
from trainable_torch.state import present_state, state_of
from trainable_torch.training import quantizers_of
from trainable_torch.wrapping import wrapped

FORMAT = "trainable-torch"
DIGEST = "sha256"
FROZEN_NORMS = "frozen_norms"
"""Key of a header: which batch norms use their running statistics in training too."""


def save(qmodel: nn.Module, path: str | PathLike[str]) -> None:
    """Write a wrapped or finalized model.

    Parameters
    ----------
    qmodel : Module
        What `wrap` or `finalize` returned.
    path : path
        File to write; an old one is replaced only once the new one is complete on disk.

    Raises
    ------
    ModelError
        When the model is not wrapped, is sharded over ranks, or its state holds something that is no tensor.
    DocumentError
        When the file can't be written.

    Notes
    -----
    A safetensors file: the state dict's tensors, and in the header the recipe, which quantizers are frozen, which names
    share a tensor, the version of this format, and the SHA-256 of all this, so that no damage goes unseen.
    """
    state = present_state(qmodel)
    require_whole(qmodel, "save")
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, value in qmodel.state_dict().items():
        if not isinstance(value, Tensor):
            raise ModelError(
                f"the state of {name!r} is {type(value).__name__}, no tensor; only plain tensors are saved"
            )
        if value.is_meta:
            raise ModelError(f"{name!r} is on the meta device and has no values to save")
        identity = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
        if value.numel() and identity in first:
            aliases[name] = first[identity]
        else:
            first[identity] = name
            tensors[name] = value.detach().to("cpu").contiguous().clone()
    header = header_of(FORMAT, state, quantizers_of(qmodel), describe(qmodel).summary().to_dict())
    more: dict[str, Any] = {"aliases": aliases, "training": qmodel.training, "folded": state.folded}
    if state.recipe.folds in {"after", "training"}:
        more["foldable"] = state.foldable
    if frozen := [name for name, norm in simulated_batch_norms(qmodel).items() if norm.statistics_frozen]:
        more[FROZEN_NORMS] = frozen
    if state.structure:
        more["structure"] = state.structure
    if state.origins:
        more["origins"] = state.origins
    text = json.dumps({**header, **more})
    try:
        content = to_bytes(tensors, {FORMAT: text, DIGEST: digest(text, tensors)})
    except KeyError as error:
        problem = f"its state holds {error}, which safetensors {safetensors.__version__} can't write"
        raise ModelError(problem, "pip install --upgrade safetensors.") from error
    write_atomically(as_path(path), content)


def digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a file's document and of its tensors: names, dtypes, shapes and values."""
    found = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def load(path: str | PathLike[str], model: nn.Module) -> nn.Module:
    """Return a wrapped model as it was saved: training resumes bit for bit.

    Parameters
    ----------
    path : path
        What `save` wrote.
    model : Module
        A float model of the same architecture; left untouched, its values don't matter.

    Returns
    -------
    Module
        Wrapped, or finalized if that is what was saved.

    Raises
    ------
    DocumentError
        When the file is missing, truncated, damaged, of another format, or for another architecture or dtype.
    DocumentVersionError
        When it was written in a version of the format that this release doesn't know.
    ModelError
        When `model` is no module.
    """
    metadata, tensors = _read(as_path(path))
    if not isinstance(model, nn.Module):
        raise ModelError(f"load needs the float torch.nn.Module, got {type(model).__name__}")
    recipe = recipe_of(path, metadata)
    try:
        known: dict[str, Any] = {
            name: metadata[name] for name in ("folded", "foldable", "structure", "origins") if name in metadata
        }
        qmodel = wrapped(model, recipe, known=known)
    except (ModelError, RuleError) as error:
        if isinstance(error, RuleError) and "structure" not in known:
            raise
        raise DocumentError(path, f"it is for another architecture: {error}") from error
    except pydantic.ValidationError as error:  # its rules add up to a config that is refused
        raise DocumentError(path, f"its recipe is damaged: {error}") from error
    switch_off_quantizers(path, metadata, quantizers_of(qmodel), state_of(qmodel))
    if metadata["finalized"]:
        for name, quantizer in quantizers_of(qmodel).items():
            placeholder(quantizer)
            _place_sign(quantizer, tensors.get(f"{name}.grid_low"))
            place_levels(path, quantizer, tensors.get(f"{name}.grid_levels"))
        qmodel = converted(qmodel)
    _fill(path, qmodel, tensors)
    _freeze_norms(path, metadata.get(FROZEN_NORMS, []), qmodel)
    freeze_quantizers(path, metadata["frozen"], quantizers_of(qmodel))
    return qmodel.train(metadata["training"])


def _place_sign(quantizer: Any, low: Tensor | None) -> None:
    """Give a quantizer with a table the sign of a file's: it decides which levels there are."""
    if quantizer.stores_sign and quantizer.levels and low is not None:
        quantizer.signed = bool((low < 0).any())


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            text = header.get(FORMAT)
            if text is None:
                raise DocumentError(path, "a safetensors file, but not written by trainable_torch.save")
            metadata = json.loads(text)
            check_header(path, metadata, FORMAT, SCHEMA_VERSION, {**KINDS, "aliases": dict, "training": bool})
            if not all(isinstance(name, str) for name in [*metadata["aliases"].values(), *metadata["frozen"]]):
                raise DocumentError(path, "its header has 'aliases' or 'frozen' that are no names")
            folded = metadata.get("folded", {})  # a file of release 0.1.0 may have none
            if not isinstance(folded, dict) or not all(isinstance(name, str) for name in folded.values()):
                raise DocumentError(path, "its header has 'folded' that is no mapping of names")
            for key in ("origins", "foldable"):
                names = metadata.get(key, {})
                if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
                    raise DocumentError(path, f"its header has {key!r} that is no mapping of names")
            check_structure(path, metadata.get("structure"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the file is no mapping
            if header.get(DIGEST) != digest(text, tensors):
                raise DocumentError(path, f"damaged: its content does not have the {DIGEST} that was written with it")
    except TrainableError:
        raise
    except FileNotFoundError as error:
        raise DocumentError(path, "no such file") from error
    except (OSError, ValueError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
        raise DocumentError(path, f"truncated, damaged or no safetensors file: {error}") from error
    for name, source in metadata["aliases"].items():
        if source not in tensors:
            raise DocumentError(path, f"{name!r} shares the tensor of {source!r}, which is missing")
        tensors[name] = tensors[source]
    return metadata, tensors


def _freeze_norms(path: Any, names: Any, qmodel: nn.Module) -> None:
    """Freeze the statistics of the batch norms that a file says are frozen."""
    norms = simulated_batch_norms(qmodel)
    if not isinstance(names, list) or not all(isinstance(name, str) and name in norms for name in names):
        raise DocumentError(path, f"its header has {FROZEN_NORMS!r} that are not the model's simulated batch norms")
    for name in names:
        norms[name].freeze_statistics(frozen=True)


def check_structure(path: Any, structure: Any) -> None:
    """Refuse a header's structure that `wrap` did not note; None where a file has none."""
    if structure is None:
        return
    calls = structure.get("calls") if isinstance(structure, dict) else None
    names = [name for call in calls if isinstance(call, list) and len(call) == 2 for name in call] if calls else []  # noqa: PLR2004 - two names
    if not isinstance(calls, list) or len(names) != 2 * len(calls):
        raise DocumentError(path, "its header has a 'structure' without calls")
    if not all(isinstance(name, str) or name is None for name in names):
        raise DocumentError(path, "its header has a 'structure' with calls that are no names")
    if not isinstance(structure.get("operations"), dict):
        raise DocumentError(path, "its header has a 'structure' without operations")


def _fill(path: Any, qmodel: nn.Module, tensors: dict[str, Tensor]) -> None:
    wanted = qmodel.state_dict()
    check_shapes(path, _shapes(wanted), _shapes(tensors))
    for name, value in wanted.items():
        found = tensors[name]
        if found.dtype != value.dtype:
            problem = f"{name!r} is {found.dtype}, this model's is {value.dtype}"
            raise DocumentError(path, problem, "cast the model before loading, as in model.to(torch.bfloat16).")
    try:
        qmodel.load_state_dict(tensors)
    except RuntimeError as error:  # names and shapes are right, so it is the values
        raise DocumentError(path, f"its tensors don't fit: {error}") from error


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
