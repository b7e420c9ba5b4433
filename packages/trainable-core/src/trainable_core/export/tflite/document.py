"""Files: what they say of themselves, and how they are written and read."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from trainable_core import __version__
from trainable_core.documents.files import as_path, check_header, write_atomically
from trainable_core.errors import DocumentError
from trainable_core.export.files import FORMAT, SCHEMA_VERSION
from trainable_core.export.islands import Island
from trainable_core.export.network import Network
from trainable_core.export.report import ExportReport
from trainable_core.export.source import QuantizerRecord
from trainable_core.export.tflite.flatbuffer import from_bytes, to_bytes
from trainable_core.export.tflite.lowering import Lowered, lower
from trainable_core.export.tflite.program import Program, TfliteOperator, TfliteTensor

TARGET = "tflite"


def build(network: Network, *, packed: bool = False) -> Program:
    """Return the contents of a model's file, metadata included; for the arguments see `write`.

    Raises
    ------
    UnsupportedConfigError
        When integer kernels can't compute a layer; names it, and says why.
    """
    lowered = lower(network, packed=packed)
    program = lowered.program
    header = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "target": TARGET,
        "versions": {"trainable-core": __version__, **network.versions},
        "recipe": dict(network.recipe),
        "layers": network.layers,
        "quantizers": [_entry(each, network, lowered) for each in network.quantizers.values()],
        "biases": lowered.biases,
        "packed": packed,
        "islands": [asdict(each) for each in lowered.islands],
        "constants": {name: digest_of(tensor) for name, tensor in _described(program).items()},
        "nodes": digest_of_operators(program),
    }
    program.metadata = json.dumps(header)
    return program


def _entry(record: QuantizerRecord, network: Network, lowered: Lowered) -> dict[str, Any]:
    """Return what the metadata say of a quantizer: its grid, how it rounds ties, and where its codes are."""
    found = lowered.activations if record.codes is None else lowered.weights
    tie_rule = record.tie_rule or network.tie_rule
    return {
        "name": record.name,
        "layer": record.layer,
        "tensor": record.tensor,
        "n_bits": record.n_bits,
        "quant_min": record.grid.quant_min,
        "quant_max": record.grid.quant_max,
        "is_weight": record.codes is not None,
        "tie_rule": tie_rule.value,
        "codes": found.get(record.name, []),
    }


def _described(program: Program) -> dict[str, TfliteTensor]:
    """Return the tensors whose elements or grids are part of what was trained."""
    return {name: each for name, each in program.tensors.items() if each.data is not None or each.is_quantized}


def digest_of(tensor: TfliteTensor) -> str:
    """Return the SHA-256 of a tensor: type, shape, grid, and the elements of a constant."""
    found = hashlib.sha256(f"{tensor.kind} {tensor.shape} {tensor.axis}\n".encode())
    for each in (tensor.scale, tensor.zero_point, tensor.data):
        found.update(b"-" if each is None else np.ascontiguousarray(each).tobytes())
    return found.hexdigest()


def digest_of_operators(program: Program) -> str:
    """Return the SHA-256 of a file's operators, inputs and outputs."""
    told = [[each.code, each.inputs, each.outputs, _plain(each.options)] for each in program.operators]
    return hashlib.sha256(json.dumps([told, program.inputs, program.outputs]).encode()).hexdigest()


def _plain(options: Mapping[str, Any]) -> list[Any]:
    """Return the options that are not what the schema takes for granted, sorted."""
    return sorted((name, value) for name, value in options.items() if value not in (0, "NONE", None))


def changes_in(program: Program, metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return what is not as it was written, by the name of a tensor, or ``nodes``."""
    have, found = _described(program), {}
    for name, digest in metadata["constants"].items():
        if name not in have:
            found[name] = "it is missing"
        elif digest_of(have[name]) != digest:
            found[name] = "its codes, scales or zero points are not those that were written"
    found |= {name: "it was added" for name in have if name not in metadata["constants"]}
    if digest_of_operators(program) != metadata["nodes"]:
        found["nodes"] = "the operators are not those that were written"
    return found


def compared(have: Program, wanted: Program) -> dict[str, str]:
    """Return what is not as another program has it, by the name of a tensor, or ``nodes``."""
    found: dict[str, str] = {}
    ours = _described(have)
    for name, tensor in _described(wanted).items():
        if name not in ours:
            found[name] = "it is missing"
        elif digest_of(ours[name]) != digest_of(tensor):
            found[name] = _difference(ours[name], tensor)
    if digest_of_operators(have) != digest_of_operators(wanted):
        found["nodes"] = "the operators are not those of the model"
    return found


def _difference(have: TfliteTensor, want: TfliteTensor) -> str:
    if (have.kind, have.shape, have.axis) != (want.kind, want.shape, want.axis):
        return f"it is {have.kind} {have.shape}, the model's is {want.kind} {want.shape}"
    for what, one, other in (
        ("scales", have.scale, want.scale),
        ("zero points", have.zero_point, want.zero_point),
        ("values", have.data, want.data),
    ):
        if one is None or other is None or one.shape != other.shape:
            if one is not other:
                return f"its {what} are not the model's"
        elif one.tobytes() != other.tobytes():
            wrong = np.argwhere(np.atleast_1d(one) != np.atleast_1d(other))
            where = tuple(int(each) for each in wrong[0]) if len(wrong) else ()
            return f"{max(len(wrong), 1)} of {other.size} {what} are not the model's, the first at {where}"
    return "it is not the model's"


def write(network: Network, path: Any, *, packed: bool = False) -> ExportReport:
    """Write a file; an old one is replaced only once the new one is complete.

    Parameters
    ----------
    network : Network
        A finalized model as its backend tells it.
    path : path
        The file.
    packed : bool
        Whether weights of at most 4 bits stand two in a byte. The runtime computes them with kernels of its own then,
        which round twice.

    Returns
    -------
    ExportReport
        What is in it.

    Raises
    ------
    UnsupportedConfigError
        When integer kernels can't compute a layer; names it, and says why.
    DocumentError
        When it can't be written; the old file is whole then.
    """
    program = build(network, packed=packed)
    content = to_bytes(program)
    write_atomically(as_path(path), content)
    entries = metadata_of(program, path)
    return ExportReport(
        path=str(path),
        target=TARGET,
        size=len(content),
        weights=sum(each["is_weight"] for each in entries["quantizers"]),
        activations=sum(not each["is_weight"] for each in entries["quantizers"]),
        islands=tuple(Island(**each) for each in entries["islands"]),
        operations=dict(Counter(each.code for each in program.operators if _is_integer(program, each))),
    )


def _is_integer(program: Program, operator: TfliteOperator) -> bool:
    """Return whether an operator makes codes of codes."""
    kinds = {program.tensors[name].kind for name in (*operator.inputs, *operator.outputs)}
    return "float32" not in kinds


def read(path: Any) -> tuple[Program, bytes]:
    """Return the contents of a file, and its bytes.

    Raises
    ------
    DocumentError
        When it is missing, damaged or no TensorFlow Lite file.
    """
    path = as_path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DocumentError(path, f"can't be read: {error}") from error
    return from_bytes(content, path), content


def metadata_of(program: Program, path: object) -> dict[str, Any]:
    """Return the metadata of a file.

    Raises
    ------
    DocumentError
        When it has none, or it is damaged.
    """
    if not program.metadata:
        raise DocumentError(path, "a TensorFlow Lite file, but not written by `export`")
    try:
        document = json.loads(program.metadata)
    except ValueError as error:
        raise DocumentError(path, f"its metadata is damaged: {error}") from error
    kinds = {
        "constants": dict,
        "nodes": str,
        "layers": list,
        "quantizers": list,
        "islands": list,
        "biases": dict,
        "packed": bool,
    }
    check_header(path, document, FORMAT, SCHEMA_VERSION, kinds)
    found: dict[str, Any] = document
    return found
