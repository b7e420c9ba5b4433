"""The target ``qonnx``: ``Quant`` nodes with the true widths, for FPGA flows."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from trainable_core import __version__
from trainable_core.export import files, islands
from trainable_core.export.graph import Graph, Node, attribute
from trainable_core.export.passes import is_quantizer, remove_identities
from trainable_core.export.report import ExportReport
from trainable_core.export.source import QuantizerRecord, Source
from trainable_core.integer.tensor import Quantized

TARGET = "qonnx"
DOMAIN = "qonnx.custom_op.general"


def build(source: Source) -> Any:
    """Return the model of a file, metadata included.

    Parameters
    ----------
    source : Source
        A finalized model as its backend tells it.

    Notes
    -----
    A ``Quant`` node gives ``(clip(round(x / scale + zero_point)) - zero_point) * scale``. Weights are float constants
    that are on their grid already, so every runtime of the format finds the same codes.
    """
    graph = Graph(source.model)
    records = dict(source.quantizers)
    remove_identities(graph, records)
    graph.nodes = [each for node in graph.nodes for each in _quantized(graph, node, records)]
    graph.opsets[DOMAIN] = 1
    graph.sweep()
    model = graph.to_model("trainable-core", __version__)
    quantizers = [
        {
            "name": each.name,
            "layer": each.layer,
            "tensor": each.tensor,
            "n_bits": each.n_bits,
            "quant_min": each.grid.quant_min,
            "quant_max": each.grid.quant_max,
            "is_weight": each.codes is not None,
            "codes": [],
        }
        for each in source.quantizers.values()
    ]
    found: list[islands.Island] = []
    header = {
        "target": TARGET,
        "versions": {"trainable-core": __version__, **source.versions},
        "recipe": dict(source.recipe),
        "quantizers": quantizers,
        "biases": {},
        "islands": [asdict(each) for each in found],
    }
    files.describe_in(model, header)
    return model


def _quantized(graph: Graph, node: Node, records: dict[str, QuantizerRecord]) -> list[Node]:
    """Return a ``Quant`` node in the place of a quantizer; other nodes as they are."""
    if not is_quantizer(node):
        return [node]
    record = records[attribute(node, "name")]
    grid, source = record.grid, node.input[0]
    rank = graph.rank(source)
    if record.codes is not None:
        value = Quantized(record.codes, grid).values
        source, rank = graph.add_constant(f"{record.name}.values", value), value.ndim
    along = grid if rank is None else grid.along(rank)
    numbers = {
        "scale": along.scale,
        "zero_point": along.zero_point.astype(np.float32),
        "n_bits": np.asarray(record.n_bits, np.float32),
    }
    names = [graph.add_constant(f"{record.name}.{key}", np.asarray(value)) for key, value in numbers.items()]
    signed = int(grid.quant_min < 0)
    attributes = {"signed": signed, "narrow": 0, "rounding_mode": "ROUND"}
    return [graph.make("Quant", [source, *names], list(node.output), domain=DOMAIN, like=node, **attributes)]


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
    size = files.write(build(source), path, external_data)
    weights = sum(each.codes is not None for each in source.quantizers.values())
    return ExportReport(str(path), TARGET, size, weights, len(source.quantizers) - weights)
