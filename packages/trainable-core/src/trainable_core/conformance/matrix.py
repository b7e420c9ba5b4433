"""Tables of training methods: what each declares, and which backends implement it on which grids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from trainable_core.enums import LUT_METHODS, QuantizationMethod, QuantizationTarget
from trainable_core.reference.method import Method
from trainable_core.registry.methods import built_in_methods
from trainable_core.registry.rows import QuantizerRow

GRIDS = tuple(sorted(QuantizationMethod, key=lambda method: method.value))
COLUMNS = ("training method", "learns", "target", "granularity", *(method.name for method in GRIDS))
GRANULARITY = {
    # mctq deploys activations with one threshold per tensor; the base classes do all three for weights
    QuantizationTarget.Weights: "per tensor, per channel, per group",
    QuantizationTarget.Activation: "per tensor",
}
OF_TABLES = "per tensor, per channel"
"""Granularity of weights on the levels of a look-up table: mctq deploys these."""
COMPUTED = "per token, per tensor"
"""Granularity of grids that are computed from the tensor itself."""
NOBODY = "-"

METHOD_COLUMNS = ("training method", "name", "learns", "in training", "targets", "grids", "options", "reference")
FORWARDS = {
    "deployed": "the deployed values",
    "soft": "soft values",
    "random": "random values",
}


def method_rows() -> list[tuple[str, ...]]:
    """Return a row for each built-in method, from its declaration."""
    return [
        (
            method.name,
            method.title,
            ", ".join(method.learns) or NOBODY,
            FORWARDS[method.training_forward] + (" until its schedule ends" if method.schedule_end else ""),
            ", ".join(target.name for target in method.targets),
            ", ".join(grid.name for grid in method.grids),
            _options(method),
            method.reference,
        )
        for method in built_in_methods().values()
    ]


def _options(method: Method) -> str:
    return "; ".join(f"`{each.name}={each.default!r}`: {each.summary}" for each in method.options) or NOBODY


def matrix_rows(quantizers: Iterable[QuantizerRow]) -> list[tuple[str, ...]]:
    """Return a row per training method and target; a cell names the backends that have it on that grid."""
    offered: dict[tuple[str, str], dict[QuantizationMethod, list[str]]] = {}
    learns: dict[str, str] = {}
    computed: set[str] = set()
    for row in quantizers:
        learns.setdefault(row.training_method, ", ".join(row.declaration.learns) or NOBODY)
        computed |= {row.training_method} if row.declaration.computes_grid else set()
        cells = offered.setdefault((row.training_method, row.target.name), {})
        for method in row.methods:
            cells.setdefault(method, []).append(row.backend)
    return [
        (
            training_method,
            learns[training_method],
            target,
            COMPUTED if training_method in computed else _granularity(QuantizationTarget[target], cells),
            *(", ".join(dict.fromkeys(cells.get(grid, [NOBODY]))) for grid in GRIDS),
        )
        for (training_method, target), cells in sorted(offered.items())
    ]


def _granularity(target: QuantizationTarget, grids: Iterable[QuantizationMethod]) -> str:
    is_table = target is QuantizationTarget.Weights and set(grids) <= set(LUT_METHODS)
    return OF_TABLES if is_table else GRANULARITY[target]


def markdown(rows: Sequence[Sequence[str]], columns: Sequence[str] = COLUMNS) -> str:
    """Return the rows as a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
