"""Who implements what: training method, target, granularity against grids, from the registry."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from trainable_core.enums import QuantizationMethod, QuantizationTarget
from trainable_core.registry.rows import QuantizerRow

GRIDS = tuple(sorted(QuantizationMethod, key=lambda method: method.value))
COLUMNS = ("training method", "learns", "target", "granularity", *(method.name for method in GRIDS))
GRANULARITY = {
    # mctq deploys activations with one threshold per tensor; the base classes do both for weights
    QuantizationTarget.Weights: "per tensor, per channel",
    QuantizationTarget.Activation: "per tensor",
}
NOBODY = "-"


def matrix_rows(quantizers: Iterable[QuantizerRow]) -> list[tuple[str, ...]]:
    """Return a row per training method and target; a cell names the backends that have it on that grid."""
    offered: dict[tuple[str, str], dict[QuantizationMethod, list[str]]] = {}
    learns: dict[str, str] = {}
    for row in quantizers:
        learns.setdefault(row.training_method, ", ".join(row.declaration.learns) or NOBODY)
        cells = offered.setdefault((row.training_method, row.target.name), {})
        for method in row.methods:
            cells.setdefault(method, []).append(row.backend)
    return [
        (
            training_method,
            learns[training_method],
            target,
            GRANULARITY[QuantizationTarget[target]],
            *(", ".join(dict.fromkeys(cells.get(grid, [NOBODY]))) for grid in GRIDS),
        )
        for (training_method, target), cells in sorted(offered.items())
    ]


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return the rows as a Markdown table."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
