"""Which layer's weights should have how many bits: measured layer by layer, chosen exactly under a budget."""

from __future__ import annotations

import glob
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainable_core.backend.view import ModelView, QuantizedTensor
from trainable_core.diagnosis import solver
from trainable_core.diagnosis.examination import ShowProgress, checked
from trainable_core.diagnosis.objective import Average, Objective
from trainable_core.diagnosis.quality import requantized, width_params
from trainable_core.errors import CalibrationError, InvalidArgumentError, ModelError, QuantizerStateError
from trainable_core.quantizer import BaseTrainableQuantizer
from trainable_core.recipe.document import QuantizationRecipe
from trainable_core.targets.known import TARGETS

Array = NDArray[Any]
Budget = float | Mapping[str, Any]

SCHEMA_VERSION = 1
SUBJECT = "suggest"

WIDTHS = (2, 3, 4, 5, 6, 8)
"""Widths that are chosen among when the user names none."""

MAX_BITS = 16


@dataclass(frozen=True, kw_only=True)
class SuggestedLayer:
    """One layer, or several with the same weights.

    Parameters
    ----------
    layers : tuple of str
        Names.
    size : int
        Number of weights.
    present : int
        Their width now.
    n_bits : int
        The width that is suggested.
    added : mapping of int to float
        By width: how much more the model costs than it does now, with this layer at the width and all others as they
        are; where it costs infinitely much now, what it costs then.
    fixed : bool
        Whether the width can't be chosen, so that no rule says it: a table's width follows from the table, and some
        methods choose among candidates by themselves.
    """

    layers: tuple[str, ...]
    size: int
    present: int
    n_bits: int
    added: Mapping[int, float]
    fixed: bool = False


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """Bits for each layer, and what they are expected to cost.

    Parameters
    ----------
    rows : tuple of SuggestedLayer
        In the model's order.
    recipe : QuantizationRecipe
        The model's recipe with a rule for each layer behind its own rules.
    metric, unit : str
        What costs are: the name of the metric, and what they are counted in.
    present, predicted : float
        What quantization costs now, and with the widths that are suggested: the sum of what each layer adds. From
        narrow widths, what layers save by themselves overlaps; no less is predicted than the least cost of any state of
        the model that was measured, its float state included.
    average_bits, bytes : float
        Bits of a weight on average, and the size of all codes, both with the widths that are suggested.
    used, limit : float
        What of the budget is used, and the budget, in its own unit.
    uniform : mapping of int to float
        By width: what is predicted where all weights have it, as far as the budget allows.
    """

    rows: tuple[SuggestedLayer, ...]
    recipe: QuantizationRecipe
    metric: str
    unit: str
    present: float
    predicted: float
    average_bits: float
    bytes: int
    used: float
    limit: float
    uniform: Mapping[int, float]

    @property
    def rules(self) -> list[dict[str, Any]]:
        """The rules that say the widths, for a recipe of your own."""
        return rules_of(self.rows)

    @property
    def widths(self) -> dict[str, int]:
        """The widths by the names of the layers."""
        return {name: row.n_bits for row in self.rows for name in row.layers}

    def to_dict(self) -> dict[str, Any]:
        """Return the suggestion as a JSON-clean document."""
        document = {"schema_version": SCHEMA_VERSION, **{k: v for k, v in vars(self).items() if k != "recipe"}}
        document["rows"] = [
            {**asdict(row), "added": {str(width): _finite(each) for width, each in row.added.items()}}
            for row in self.rows
        ]
        document["uniform"] = {str(width): _finite(each) for width, each in self.uniform.items()}
        document |= {name: _finite(document[name]) for name in ("present", "predicted")}
        return {**document, "recipe": self.recipe.model_dump(mode="json", exclude_unset=True)}

    def to_json(self) -> str:
        """Return the document as text."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        """Return the suggestion as a table."""
        widths = sorted({width for row in self.rows for width in row.added})
        table = [["layer", "weights", "now", "bits", *(f"+ at {width}" for width in widths)]]
        for row in self.rows:
            costs = [f"{row.added[width]:.3g}" if width in row.added else "" for width in widths]
            table.append([", ".join(row.layers), str(row.size), str(row.present), str(row.n_bits), *costs])
        sizes = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        lines = ["  ".join(c.ljust(s) for c, s in zip(line, sizes, strict=True)).rstrip() for line in table]
        lines.insert(1, "  ".join("-" * size for size in sizes))
        told = f"{self.average_bits:.2f} bits on average, {self.bytes} bytes of weights; quantization costs "
        told += f"{self.present:.3g} {self.unit} now, {self.predicted:.3g} predicted"
        for width, cost in self.uniform.items():
            told += f", {cost:.3g} with {width} bit{'' if width == 1 else 's'} everywhere"
        return "\n".join([*lines, "", f"{told}."])


def rules_of(rows: Iterable[SuggestedLayer]) -> list[dict[str, Any]]:
    """Return the rules of a recipe that say the widths of some layers."""
    return [
        {"match": {"name": glob.escape(name)}, "weights": {"n_bits": row.n_bits}}
        for row in rows
        if not row.fixed
        for name in row.layers
    ]


# ---- the budget -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """What gets one width: a layer, or layers that share weights.

    Parameters
    ----------
    layers : tuple of str
        Names, as recipes match them.
    tensors : tuple of QuantizedTensor
        The quantizers of its weights, each once.
    sizes : tuple of int
        Numbers of elements of its weights.
    present : int
        Width now.
    """

    layers: tuple[str, ...]
    tensors: tuple[QuantizedTensor, ...]
    sizes: tuple[int, ...]
    present: int

    @property
    def size(self) -> int:
        """Number of its weights."""
        return sum(self.sizes)

    def bytes(self, width: int) -> int:
        """Return the size of its codes."""
        return sum(math.ceil(size * width / 8) for size in self.sizes)

    def fixed(self) -> bool:
        """Whether its width can't be chosen: it follows from a table, or the method chooses among several."""
        return any(each.candidates or each.quantizer.levels for each in self.tensors)


class Limit:
    """What a choice of widths may cost.

    Parameters
    ----------
    budget : float or mapping
        As `suggest` has it.

    Raises
    ------
    InvalidArgumentError
        When it is not a budget.
    """

    KINDS = ("average_bits", "bytes", "costs")

    def __init__(self, budget: Budget) -> None:
        given: Mapping[str, Any] = budget if isinstance(budget, Mapping) else {"average_bits": budget}
        kinds = [kind for kind in self.KINDS if kind in given]
        expected = {kinds[0], "limit"} if kinds == ["costs"] else set(kinds)
        if len(kinds) != 1 or set(given) != expected:
            problem = (
                f"it is a number, or a mapping with average_bits, with bytes, or with costs and limit; got {budget!r}"
            )
            raise InvalidArgumentError("budget", problem)
        self.kind = kinds[0]
        self.limit = _number("budget", given["limit" if self.kind == "costs" else self.kind])
        self.table: Mapping[str, Mapping[int, float]] = given["costs"] if self.kind == "costs" else {}
        if not isinstance(self.table, Mapping) or not all(isinstance(row, Mapping) for row in self.table.values()):
            raise InvalidArgumentError(
                "budget", f"costs is a mapping of layers to mappings of widths, got {self.table!r}"
            )

    def cost(self, unit: Unit, width: int, total: int) -> float | None:
        """Return what a width of a unit takes of the budget; None where the table has no such width."""
        if self.kind == "average_bits":
            return unit.size * width / total
        if self.kind == "bytes":
            return unit.bytes(width)
        rows = [self.table[name] for name in unit.layers if name in self.table]
        if not rows:
            return 0.0
        costs = [row.get(width) for row in rows]
        return None if None in costs else sum(_number(f"budget: costs of {unit.layers[0]}", cost) for cost in costs)

    def check(self, units: Sequence[Unit]) -> None:
        """Refuse a table with layers that the model lacks.

        Raises
        ------
        InvalidArgumentError
            Names them.
        """
        known = {name for unit in units for name in unit.layers}
        unknown = sorted(map(str, self.table.keys() - known))
        if unknown:
            problem = f"costs has {', '.join(unknown)}; layers with quantized weights: {', '.join(sorted(known))}"
            raise InvalidArgumentError("budget", problem)


def _number(subject: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not 0 <= float(value) < math.inf:
        raise InvalidArgumentError(subject, f"{value!r} is not a finite number that is at least zero")
    return float(value)


def _checked_widths(widths: Any) -> tuple[int, ...]:
    listed = list(widths) if isinstance(widths, Iterable) and not isinstance(widths, str) else [widths]
    wrong = [
        each for each in listed if isinstance(each, bool) or not isinstance(each, int) or not 1 <= each <= MAX_BITS
    ]
    if wrong or not listed:
        raise InvalidArgumentError("widths", f"they are integers from 1 to {MAX_BITS}, got {widths!r}")
    return tuple(sorted(set(listed)))


# ---- measuring ------------------------------------------------------------------------------------------------------


def suggest(
    view: ModelView,
    batches: Iterable[Any],
    budget: Budget,
    *,
    teacher: Any,
    widths: Sequence[int],
    objective: Objective,
    show_progress: ShowProgress,
) -> Suggestion:
    """Return bits for each layer under a budget; `trainable_torch.suggest` documents the arguments."""
    limit, wanted = Limit(budget), _checked_widths(widths)
    solver.require()
    if view.state.finalized:
        raise QuantizerStateError(SUBJECT, "the model is finalized; its widths don't change any more")
    batches = checked(view, batches, SUBJECT)
    units = list(_units(view))
    if not units:
        raise ModelError(f"{SUBJECT}: no weights of the model are quantized", "describe(qmodel) says why.")
    limit.check(units)
    with show_progress(None) as bar, view.undisturbed():
        candidates = {unit: _params(view, unit, _allowed(view, unit, wanted)) for unit in units}
        present, costs = _measured(view, objective, teacher, batches, candidates, bar)
    return _chosen(view, objective, limit, present, costs)


def _units(view: ModelView) -> Iterator[Unit]:
    """Yield what gets one width."""
    groups: list[dict[str, list[QuantizedTensor]]] = []
    for tensor in view.tensors():
        if not tensor.is_weight or not tensor.switched_on or not isinstance(tensor.quantizer, BaseTrainableQuantizer):
            continue
        name = view.state.origins.get(tensor.layer.name, tensor.layer.name)
        joined = [
            group
            for group in groups
            if name in group or any(each.quantizer is tensor.quantizer for own in group.values() for each in own)
        ]
        merged: dict[str, list[QuantizedTensor]] = {}
        for group in joined:
            merged |= group
        merged.setdefault(name, []).append(tensor)
        at = groups.index(joined[0]) if joined else len(groups)
        groups = [group for group in groups if not any(group is each for each in joined)]
        groups.insert(at, merged)
    for group in groups:
        tensors = {id(tensor.quantizer): tensor for own in group.values() for tensor in own}
        sizes = tuple(math.prod(view.values(tensor).shape) for tensor in tensors.values())
        present = max(tensor.n_bits for tensor in tensors.values())
        yield Unit(tuple(group), tuple(tensors.values()), sizes, present)


def _allowed(view: ModelView, unit: Unit, widths: Sequence[int]) -> tuple[int, ...]:
    """Return the widths that a unit may have: those that the target has too, or the present one alone."""
    if unit.fixed():
        return (unit.present,)
    grids = TARGETS[view.state.recipe.target].weights.widths
    methods = {tensor.plan.config.quantization_method for tensor in unit.tensors}
    return tuple(width for width in widths if all(width in grids.get(method, ()) for method in methods)) or (
        unit.present,
    )


Thresholds = dict[QuantizedTensor, dict[str, Any]]


def _params(view: ModelView, unit: Unit, widths: Sequence[int]) -> dict[int, Thresholds | None]:
    """Return the thresholds that calibration gives the weights of a unit, by width; None: as they are."""
    if unit.fixed() or not unit.size:
        return {unit.present: None}
    found: dict[int, Thresholds | None] = {}
    section = view.state.recipe.calibration
    for width in widths:
        with suppress(CalibrationError):  # SAWB has no numbers for some widths
            found[width] = {
                tensor: width_params(tensor.quantizer, view.values(tensor), width, section) for tensor in unit.tensors
            }
    return found or {unit.present: None}


def _measured(
    view: ModelView,
    objective: Objective,
    teacher: Any,
    batches: Iterable[Any],
    candidates: Mapping[Unit, Mapping[int, Thresholds | None]],
    bar: Any,
) -> tuple[float, dict[Unit, dict[int, float]]]:
    """Return what quantization costs now, and with each unit at each width."""
    nothing, present = Average(), Average()
    costs = {unit: {width: Average() for width in widths} for unit, widths in candidates.items()}
    count = 0
    for batch in batches:
        count += 1
        with view.quantizing(()):
            outputs = view.run(batch)
        values = view.main_output(outputs) if objective.needs_arrays else None
        reference = values
        if teacher is not None and objective.needs_arrays:
            reference = view.main_output(view.call_teacher(teacher, batch))
        if reference is not None and values is not None:
            objective.check(reference, values)
        nothing.add(*objective.cost_of_float(outputs, values, reference, batch))

        def cost(batch: Any = batch, reference: Array | None = reference) -> tuple[float, float]:
            given = view.run(batch)
            array = view.main_output(given) if objective.needs_arrays else None
            return objective.cost(given, array, reference, batch)

        present.add(*cost())
        bar.update(2)
        for unit, by_width in candidates.items():
            weights = {tensor: view.values(tensor) for tensor in unit.tensors}
            for width, params in by_width.items():
                made = {
                    tensor: requantized(tensor.quantizer, weights[tensor], width, params=of_tensor)
                    for tensor, of_tensor in (params or {}).items()
                }
                with view.replacing(made):
                    costs[unit][width].add(*cost())
                bar.update(1)
    if not count:
        raise CalibrationError(SUBJECT, "the batches are empty", "a generator can be read only once; pass a fresh one.")
    base = nothing.value
    return present.value - base, {
        unit: {width: each.value - base for width, each in by_width.items()} for unit, by_width in costs.items()
    }


# ---- choosing -------------------------------------------------------------------------------------------------------


def _chosen(
    view: ModelView,
    objective: Objective,
    limit: Limit,
    present: float,
    costs: Mapping[Unit, Mapping[int, float]],
) -> Suggestion:
    units, total = list(costs), sum(unit.size for unit in costs)
    now = present if math.isfinite(present) else 0.0  # else nothing is more than what the model costs now
    added = [_falling({width: _known(cost) - now for width, cost in costs[unit].items()}) for unit in units]
    taken = [{width: limit.cost(unit, width, total) for width in by} for unit, by in zip(units, added, strict=True)]
    options = [[width for width in by if used[width] is not None] for by, used in zip(added, taken, strict=True)]
    for unit, widths in zip(units, options, strict=True):
        if not widths:
            problem = f"costs has none of the widths that {unit.layers[0]} may have: {', '.join(map(str, costs[unit]))}"
            raise InvalidArgumentError("budget", problem)
    sizes = [[float(used[width] or 0.0) for width in widths] for used, widths in zip(taken, options, strict=True)]
    losses = [[by[width] for width in widths] for by, widths in zip(added, options, strict=True)]
    picked = solver.choose(losses, sizes, limit.limit)
    rows = tuple(
        SuggestedLayer(
            layers=unit.layers,
            size=unit.size,
            present=unit.present,
            n_bits=widths[index],
            added=dict(by),
            fixed=unit.fixed(),
        )
        for unit, by, widths, index in zip(units, added, options, picked, strict=True)
    )
    floor = min(0.0, present, *(cost for by_width in costs.values() for cost in by_width.values()))

    def predicted(added: Iterable[float]) -> float:
        """Return the sum, and no less than what was measured of some state of the model."""
        return max(now + sum(added), floor) if math.isfinite(present) or len(units) == 1 else math.inf

    common = set.intersection(*map(set, options))
    uniform = {
        width: predicted(by[width] for by in added)
        for width in sorted(common)
        if sum(float(used[width] or 0.0) for used in taken) <= limit.limit * (1 + 1e-9)
    }
    bits = sum(row.size * row.n_bits for row in rows)
    recipe = view.state.recipe.model_dump(mode="json", exclude_unset=True)
    recipe["rules"] = [*recipe.get("rules", []), *rules_of(rows)]
    return Suggestion(
        rows=rows,
        recipe=QuantizationRecipe.model_validate(recipe),
        metric=objective.name,
        unit=objective.unit,
        present=present,
        predicted=predicted(row.added[row.n_bits] for row in rows),
        average_bits=bits / total if total else 0.0,
        bytes=sum(unit.bytes(row.n_bits) for unit, row in zip(units, rows, strict=True)),
        used=sum(each[index] for each, index in zip(sizes, picked, strict=True)),
        limit=limit.limit,
        uniform=uniform,
    )


def _falling(added: Mapping[int, float]) -> dict[int, float]:
    """Return costs that don't grow with the width: where more bits seem worse, it is by chance."""
    found: dict[int, float] = {}
    worst = -math.inf
    for width in sorted(added, reverse=True):
        worst = found[width] = max(worst, added[width])
    return dict(sorted(found.items()))


def _known(cost: float) -> float:
    """Return a cost; that of a model whose outputs or metric are not numbers is infinite."""
    return math.inf if math.isnan(cost) else cost


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
