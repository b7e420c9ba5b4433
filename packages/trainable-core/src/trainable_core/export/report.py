"""What `export` tells of a file that it wrote."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from trainable_core.export.islands import Island


@dataclass(frozen=True)
class ExportReport:
    """A file that was written, and which parts of it stayed float.

    Parameters
    ----------
    path : str
        The file.
    target : str
        What it is for.
    size : int
        Bytes that were written.
    weights, activations : int
        How many quantized weights and activations are in it.
    islands : tuple of Island
        Nodes that stay float, each with its reason.
    operations : mapping of str to int
        How many of the operations are computed in integers, by name.
    """

    path: str
    target: str
    size: int
    weights: int = 0
    activations: int = 0
    islands: tuple[Island, ...] = ()
    operations: Mapping[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a JSON-clean document."""
        return {**asdict(self), "islands": [asdict(each) for each in self.islands]}

    def to_json(self) -> str:
        """Return the document as text."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        """Return the report as text: one line for each reason."""
        lines = [f"{self.path}: target {self.target}, {self.size:,} bytes"]
        if self.weights or self.activations:
            lines.append(f"{self.weights} quantized weights, {self.activations} quantized activations")
        if self.operations:
            told = ", ".join(f"{count} {name}" for name, count in self.operations.items())
            lines.append(f"in integers: {told}")
        if self.islands:
            lines.append("in float:")
            counted = Counter((each.op, each.reason) for each in self.islands)
            for (op, reason), count in counted.items():
                layers = [each.layer for each in self.islands if (each.op, each.reason) == (op, reason)]
                lines.append(f"  {count} {op} ({', '.join(layers[:3])}{', ...' if count > 3 else ''}): {reason}")  # noqa: PLR2004
        elif self.target == "onnx":
            lines.append("in float: nothing between the first quantizer and the last")
        return "\n".join(lines)
