"""The target ``onnx``: QuantizeLinear and DequantizeLinear with integer initializers."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from trainable_core import __version__
from trainable_core.export import files, islands
from trainable_core.export.graph import Graph
from trainable_core.export.interpreter import Interpreter
from trainable_core.export.lowering import Lowered, lower
from trainable_core.export.passes import simplify
from trainable_core.export.report import ExportReport
from trainable_core.export.source import QuantizerRecord, Source
from trainable_core.export.verification import TARGET


def build(source: Source) -> tuple[Any, list[islands.Island]]:
    """Return the model of a file, metadata included, and what stays float in it.

    Parameters
    ----------
    source : Source
        A finalized model as its backend tells it.
    """
    records: dict[str, QuantizerRecord] = dict(source.quantizers)
    graph = Graph(source.model)
    simplify(graph, records)
    lowered = lower(graph, records)
    found = islands.find(lowered)
    model = lowered.graph.to_model("trainable-core", __version__)
    versions = {"trainable-core": __version__, **source.versions}
    header = {
        "target": TARGET,
        "versions": versions,
        "recipe": dict(source.recipe),
        "layers": list(source.layers),
        "quantizers": [_entry(each, lowered) for each in source.quantizers.values()],
        "biases": lowered.biases,
        "islands": [asdict(each) for each in found],
    }
    files.describe_in(model, header)
    return model, found


def _entry(record: QuantizerRecord, lowered: Lowered) -> dict[str, Any]:
    """Return what the metadata say of a quantizer: its grid, and where its codes are."""
    calls = lowered.activations.get(record.name, {})
    codes = [calls.get(call) for call in range(max(calls, default=-1) + 1)]
    # weights may be stored beside another zero point; on grids with a sign it is 0
    counted = record.codes is not None and record.grid.quant_min == 0
    zero_point = {"zero_point": record.grid.zero_point.reshape(-1).tolist()} if counted else {}
    return {
        "name": record.name,
        "layer": record.layer,
        "tensor": record.tensor,
        "n_bits": record.n_bits,
        "quant_min": record.grid.quant_min,
        "quant_max": record.grid.quant_max,
        **zero_point,
        "is_weight": record.codes is not None,
        "codes": codes if record.codes is None else lowered.weights.get(record.name, []),
    }


def write(source: Source, path: Any, external_data: bool | None = None) -> ExportReport:  # noqa: FBT001 - as the verbs
    """Write a file of the target; returns what is in it.

    Parameters
    ----------
    source : Source
        A finalized model as its backend tells it.
    path : path
        The file.
    external_data : bool, optional
        As for `trainable_core.export.files.write`.
    """
    model, found = build(source)
    size = files.write(model, path, external_data)
    entries = files.metadata_of(model, path)["quantizers"]
    units = Interpreter(Graph(model)).units.values()
    return ExportReport(
        path=str(path),
        target=TARGET,
        size=size,
        weights=sum(entry["is_weight"] for entry in entries),
        activations=sum(not entry["is_weight"] for entry in entries),
        islands=tuple(found),
        operations=dict(Counter(unit.node.op_type for unit in units)),
    )
