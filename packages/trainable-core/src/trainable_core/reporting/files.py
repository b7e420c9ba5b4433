"""What files say of themselves, without the code of the model they were made from.

Saved models (of PyTorch, of either Keras), exported files (ONNX, QONNX, TensorFlow Lite) and the JSON of a description.
Of a file of PyTorch the header is read here, which safetensors keeps as JSON at the beginning, and its tensors where a
report asks for them: no framework is needed.
"""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainable_core.backend.codes import places_of, sample_of
from trainable_core.backend.description import Description, DescriptionRow
from trainable_core.documents.files import HEADER, as_path, read_arrays
from trainable_core.documents.model import DESCRIPTION, PLACES, SCHEMA_VERSION
from trainable_core.enums import QuantizationMethod
from trainable_core.errors import DocumentError, TrainableError
from trainable_core.export import files as onnx_files
from trainable_core.export.graph import Graph
from trainable_core.export.islands import Island
from trainable_core.qparams import QParams, from_params
from trainable_core.reference.affine import fake_quantize
from trainable_core.registry.methods import built_in_methods
from trainable_core.reporting.contents import LOOKED_AT, Contents, Islands, TensorFacts, facts_of_values, overview

SAFETENSORS = "trainable-torch"
"""Key of a safetensors file that `trainable_torch.save` wrote."""

LARGEST_HEADER = 1 << 28
"""Bytes of a safetensors header, at most; more is no header."""

PLAIN = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1", "U8": "|u1"}
"""Types of safetensors that NumPy has too."""


@dataclass(frozen=True)
class FileContents:
    """What a file says of itself.

    Parameters
    ----------
    path : path
        The file.
    kind : str
        What wrote it, or what it is for.
    description : Description
        Its quantizers.
    facts : mapping of str to str
        What else is told, in order.
    weights : sequence of TensorFacts
        How its weights fit their grids, where that was asked for.
    islands : Islands, optional
        Of an exported file.
    """

    path: Path
    kind: str
    description: Description
    facts: Mapping[str, str] = field(default_factory=dict)
    weights: tuple[TensorFacts, ...] = ()
    islands: Islands | None = None

    def contents(self) -> Contents:
        """Return the contents of a report on the file."""
        facts = {"file": self.kind, **overview(self.description), **self.facts}
        return Contents(self.path.name, facts, self.description, self.weights, islands=self.islands)


def read(path: object, *, weights: bool = False) -> FileContents:
    """Return what a file says of itself.

    Parameters
    ----------
    path : path
        What `save` or `export` wrote, or the JSON of a description.
    weights : bool
        Whether to look at its weights too.

    Raises
    ------
    DocumentError
        When it is missing, damaged, or nothing that this library writes; or a saved model from a release that kept no
        description in its files.
    MissingLibraryError
        For an ONNX file, when onnx is not installed.
    """
    place = as_path(path)
    if not place.is_file():
        raise DocumentError(place, "no such file")
    try:
        with place.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise DocumentError(place, f"can't be read: {error}") from error
    try:
        with np.errstate(all="ignore"):  # what a damaged file makes of numbers is shown as it is
            return _reader_for(start)(place, weights=weights)
    except TrainableError:
        raise
    except Exception as error:  # JSON, onnx and NumPy raise whatever the damage leads them to
        raise DocumentError(place, f"truncated or damaged: {type(error).__name__}: {error}") from error


def _reader_for(start: bytes) -> Callable[..., FileContents]:
    """Return what reads a file that begins like this; what is nothing else may be ONNX, which has no mark."""
    if start[4:8] == onnx_files.TFLITE:
        return _of_tflite
    if start[:2] == b"PK":
        return _of_keras
    if start[8:9] == b"{":
        return _of_torch
    return _of_json if start.lstrip()[:1] == b"{" else _of_onnx


def islands_of(path: object) -> Islands:
    """Return what an exported file computes in integers, and what in float.

    Raises
    ------
    DocumentError
        When it is missing, damaged, or no file that `export` wrote.
    """
    found = read(path).islands
    if found is None:
        raise DocumentError(path, "it is no exported file", "pass what `export` wrote for onnx, qonnx or tflite.")
    return found


# ---- saved models ---------------------------------------------------------------------------------------------------


def _of_json(path: Path, *, weights: bool) -> FileContents:  # noqa: ARG001 - a description has none
    document = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(document, dict) or "rows" not in document:
        raise DocumentError(path, "a JSON file, but not the description of a model")
    return FileContents(path, "a description", _description(path, document))


def _of_keras(path: Path, *, weights: bool) -> FileContents:
    with zipfile.ZipFile(path) as archive:
        named = HEADER in archive.namelist()
        form = json.loads(archive.read(HEADER)).get("format") if named else None
    if not isinstance(form, str):
        hint = (
            "trainable_keras.save writes files that say what is in them; a .keras file needs keras.models.load_model."
        )
        raise DocumentError(path, "a zip file, but not one that `save` wrote", hint)
    header, arrays = read_arrays(path, form, SCHEMA_VERSION, {"recipe": dict, "finalized": bool})
    return _of_header(path, form, header, arrays if weights else {}, header.get(PLACES, {}))


def _of_torch(path: Path, *, weights: bool) -> FileContents:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(LARGEST_HEADER, path.stat().st_size - 8):
            raise DocumentError(path, "truncated, damaged or no safetensors file: its header is longer than it")
        layout = json.loads(file.read(length))
    text = layout.pop("__metadata__", {}).get(SAFETENSORS)
    if text is None:
        raise DocumentError(path, "a safetensors file, but not written by trainable_torch.save")
    header = json.loads(text)
    arrays = dict(_tensors(path, layout, 8 + length)) if weights else {}
    return _of_header(path, SAFETENSORS, header, arrays, header.get("aliases", {}))


def _tensors(path: Path, layout: Mapping[str, Any], start: int) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield the tensors of a safetensors file as they are mapped from it, those of types that NumPy has."""
    whole = np.memmap(path, np.uint8, "r")
    for name, told in layout.items():
        first, last = (start + int(each) for each in told["data_offsets"])
        if not start <= first <= last <= whole.size:
            raise DocumentError(path, f"damaged: {name!r} is outside of it")
        if told["dtype"] == "BF16":
            high = whole[first:last].view("<u2").astype(np.uint32) << 16
            yield name, high.view(np.float32).reshape(told["shape"])
        elif told["dtype"] in PLAIN:
            yield name, whole[first:last].view(PLAIN[told["dtype"]]).reshape(told["shape"])


def _of_header(
    path: Path, form: str, header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], aliases: Mapping[str, str]
) -> FileContents:
    if DESCRIPTION not in header:
        hint = "load it with the code of the model, and save it again."
        raise DocumentError(path, "it was saved by a release that kept no description in its files", hint)
    description = _description(path, header[DESCRIPTION])
    facts = {"size": f"{path.stat().st_size:,} bytes", "finalized": "yes" if header.get("finalized") else "no"}
    named = {**arrays, **{name: arrays[source] for name, source in aliases.items() if source in arrays}}
    weights = [
        _of_saved(row, named[name]) for row in description.rows if (name := f"{row.layer}.{row.tensor}") in named
    ]
    kept = tuple(each for each in weights if not each.values.empty or each.odd)
    return FileContents(path, f"saved by {form}", description, facts, kept)


def _of_saved(row: DescriptionRow, values: NDArray[Any]) -> TensorFacts:
    """Return how a saved weight fits its grid, where the description tells it, and the float weight tells its codes."""
    name, values = f"{row.layer}.{row.tensor}", np.asarray(values, np.float32)
    method = built_in_methods().get(row.training_method)
    direct = row.state == "deployed" or (method is not None and not method.deploys_values)
    plain = row.granularity in {"tensor", f"channel (axis {row.channels_axis})"}
    if not (direct and plain and row.params) or row.state == "switched off":
        return facts_of_values(name, values, None)
    try:
        grid = from_params(QuantizationMethod[row.method], row.n_bits, True, row.params, 0.0, row.channels_axis)  # noqa: FBT003 - weights are signed
        axis = grid.channels_axis
        if axis is not None and grid.scale.size not in {1, values.shape[axis]}:  # a file holds the ends alone
            return facts_of_values(name, values, None)
        sample = sample_of(values, np.asarray(fake_quantize(values, grid)), grid, None, LOOKED_AT)
    except (KeyError, IndexError, TypeError, ValueError):  # a plugin's grid, or one that does not fit
        return facts_of_values(name, values, None)
    clipped = float(np.mean(sample.clipped)) if sample.clipped.size else None
    return facts_of_values(name, sample.values, grid, sample.codes, clipped)


def _description(path: Path, document: Any) -> Description:
    try:
        return Description.from_dict(document)
    except DocumentError as error:
        raise DocumentError(path, f"its description is damaged: {error}") from error


# ---- exported files -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stored:
    """What an exported file holds of one quantizer."""

    grid: QParams | None = None
    codes: NDArray[Any] | None = None
    values: NDArray[Any] | None = None


def _of_onnx(path: Path, *, weights: bool) -> FileContents:
    model = onnx_files.read(path)
    metadata = onnx_files.metadata_of(model, path)
    graph = Graph(model)
    stored = _OnnxGrids(graph)
    operations = Counter(node.op_type for node in graph.nodes)
    return _of_metadata(path, metadata, stored.of, operations, weights=weights)


class _OnnxGrids:
    """Finds the grids of quantizers in a graph."""

    def __init__(self, graph: Graph) -> None:
        self.constants = graph.constants
        self.users = {node.input[0]: node for node in graph.nodes if node.op_type == "DequantizeLinear"}

    def of(self, entry: Mapping[str, Any]) -> _Stored:
        """Return what there is of a quantizer."""
        name = entry["name"]
        if not entry["codes"] and f"{name}.scale" in self.constants:  # a QONNX file, without codes
            grid = self._grid(entry, self.constants[f"{name}.scale"], self.constants.get(f"{name}.zero_point"), None)
            return _Stored(grid, values=self.constants.get(f"{name}.values"))
        for codes in (each for each in entry["codes"] if each is not None):
            node, scale = self.users.get(codes), self.constants.get(f"{name}.scale")
            if node is None and codes in self.constants and scale is not None and scale.size == 1:
                # a table, of which rows are looked up before they are dequantized
                zero = self.constants.get(f"{name}.zero_point")
                return _Stored(self._grid(entry, scale, zero, None), self.constants[codes])
            if node is None or node.input[1] not in self.constants:
                continue
            zero = self.constants.get(node.input[2]) if len(node.input) > 2 else None  # noqa: PLR2004 - codes, scale, zero point
            axis = next((each.i for each in node.attribute if each.name == "axis"), 1)
            return _Stored(self._grid(entry, self.constants[node.input[1]], zero, axis), self.constants.get(codes))
        return _Stored()

    @staticmethod
    def _grid(entry: Mapping[str, Any], scale: Any, zero: Any, axis: int | None) -> QParams | None:
        scale = np.asarray(scale, np.float32)
        zero = np.zeros(scale.shape, np.int32) if zero is None else np.asarray(zero).astype(np.int32)
        if scale.size > 1 and axis is None:
            axis = int(np.argmax(scale.shape))
        first, last = _ends(entry)
        shift = first if entry["codes"] and not entry["is_weight"] else 0  # activations are stored from 0
        ends = first - shift, last - shift
        if scale.size == 1:
            return QParams(scale.reshape(()), zero.reshape(-1)[:1].reshape(()), *ends)
        return QParams(scale.reshape(-1), np.broadcast_to(zero, scale.shape).reshape(-1), *ends, axis)


def _of_tflite(path: Path, *, weights: bool) -> FileContents:
    from trainable_core.export.tflite import document  # noqa: PLC0415 - no other file needs it

    program, _ = document.read(path)
    metadata = document.metadata_of(program, path)

    def stored(entry: Mapping[str, Any]) -> _Stored:
        for name in entry["codes"]:
            tensor = program.tensors.get(name)
            if tensor is not None and tensor.is_quantized:
                return _Stored(tensor.grid, tensor.data)
        return _Stored()

    operations = Counter(operator.code for operator in program.operators)
    return _of_metadata(path, metadata, stored, operations, weights=weights)


def _of_metadata(
    path: Path, metadata: Mapping[str, Any], stored: Any, operations: Mapping[str, int], *, weights: bool
) -> FileContents:
    rows, looked = [], []
    for entry in metadata["quantizers"]:
        held = _as_in_model(entry, stored(entry))
        rows.append(_row(entry, held))
        values = _values(held) if weights and entry["is_weight"] else None
        if values is not None:
            looked.append(_facts(entry, held, values))
    floats = [Island(**each) for each in metadata["islands"]]
    made = ", ".join(f"{name} {version}" for name, version in metadata.get("versions", {}).items())
    target = str(metadata.get("target", "tflite"))
    size = path.stat().st_size
    islands = Islands(path.name, target, size, dict(operations), [(f.layer, f.op, f.reason) for f in floats])
    description = Description(tuple(rows), finalized=True)
    facts = {"size": f"{size:,} bytes", **({"made with": made} if made else {})}
    return FileContents(path, f"exported for {target}", description, facts, tuple(looked), islands)


def _as_in_model(entry: Mapping[str, Any], held: _Stored) -> _Stored:
    """Return a weight's codes beside the zero point that they have in the model, where the file tells it.

    A file may store codes that are counted from zero, or from the grid's lower end.
    """
    known = _zero_points(entry)
    if not entry["is_weight"] or held.codes is None or held.grid is None or len(known) not in {1, held.grid.scale.size}:
        return held
    zero = np.broadcast_to(np.asarray(known, np.int32), (held.grid.scale.size,)).reshape(held.grid.scale.shape)
    grid = QParams(held.grid.scale, zero, *_ends(entry), held.grid.channels_axis)
    dimensions = held.codes.ndim
    shift = grid.along(dimensions).zero_point - held.grid.along(dimensions).zero_point
    return _Stored(grid, held.codes.astype(np.int32) + shift)


def _row(entry: Mapping[str, Any], held: _Stored) -> DescriptionRow:
    numbers: dict[str, Any] = {}
    channels = None
    codes = f"codes {entry['quant_min']} to {entry['quant_max']}"
    if held.grid is not None:
        if not entry["is_weight"]:  # as they are stored, beside their zero point
            codes = f"codes {held.grid.quant_min} to {held.grid.quant_max}"
        elif held.codes is not None and not _zero_points(entry):
            codes += ", stored without their zero point"  # by a version that does not tell it
        scale, zero = held.grid.scale.reshape(-1), held.grid.zero_point.reshape(-1)
        many = scale.size > 1
        channels = held.grid.channels_axis
        numbers["scale"] = [float(scale.min()), float(scale.max())] if many else float(scale[0])
        if zero.any():
            numbers["zero_point"] = [int(zero.min()), int(zero.max())] if many else int(zero[0])
    return DescriptionRow(
        layer=str(entry["layer"]),
        op="",
        tensor=str(entry["tensor"]),
        target="Weights" if entry["is_weight"] else "Activation",
        training_method="",
        method=codes,
        n_bits=int(entry["n_bits"]),
        channels_axis=channels,
        params=numbers,
        state="exported",
        quantizer="",
        granularity="tensor" if channels is None else f"channel (axis {channels})",
    )


def _zero_points(entry: Mapping[str, Any]) -> list[int]:
    """Return the zero points that a weight has in the model, one or one of each channel; none where it isn't told."""
    signed = _ends(entry)[0] < 0
    return [0] if signed else list(map(int, entry.get("zero_point", [])))


def _ends(entry: Mapping[str, Any]) -> tuple[int, int]:
    return int(entry["quant_min"]), int(entry["quant_max"])


def _values(held: _Stored) -> NDArray[Any] | None:
    if held.values is not None:
        return np.asarray(held.values, np.float32)
    if held.codes is None or held.grid is None:
        return None
    along = held.grid.along(held.codes.ndim)
    return np.asarray((held.codes.astype(np.int32) - along.zero_point) * along.scale)


def _facts(entry: Mapping[str, Any], held: _Stored, values: NDArray[Any]) -> TensorFacts:
    """Return how a stored weight uses its grid; of one whose codes can't be told from the file, its values alone."""
    name, grid = str(entry["name"]), held.grid
    if grid is None:
        return facts_of_values(name, values, None)
    if held.codes is None:
        along = grid.along(values.ndim)
        codes = np.rint(values.astype(np.float64) / along.scale).astype(np.int32) + along.zero_point
    else:
        codes = held.codes.astype(np.int32)
    first, last = _ends(entry)
    if not codes.size or codes.min() < first or codes.max() > last:
        return facts_of_values(name, values, None)
    told = QParams(grid.scale, grid.zero_point, first, last, grid.channels_axis)
    return facts_of_values(name, values, told, codes.reshape(-1)[places_of(codes.size, LOOKED_AT)])
