"""What `diagnose` returns, the same in every backend: figures of quantizers, layers and variables, and findings."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from trainable_core.calibration.params import MAX_BITS
from trainable_core.diagnosis.quality import GridQuality

SCHEMA_VERSION = 1

SHOWN = 12
"""How many layers the table shows; `rows` and `to_json` have all."""


@dataclass(frozen=True, kw_only=True)
class QuantizerFigures:
    """One quantizer of a model, and how its grid fits the values that it gets.

    Parameters
    ----------
    layer, op, tensor : str
        Its place: layer or functional operation, its framework-neutral kind, and weight attribute, input or output.
    target : str
        ``Weights`` or ``Activation``.
    training_method, method : str
        How it learns; its grid.
    n_bits : int
        Width of the codes.
    granularity : str
        What has a threshold of its own, as `describe` says it.
    quality : GridQuality or None
        How the grid fits; None where no value reached the quantizer.
    axis : int or None
        Axis of the channels that have thresholds of their own.
    output_axis : int or None
        Axis of its output channels, of a weight whose thresholds are found to go along another one; else None.
    groups : bool
        Whether the weight can have thresholds per group.
    most_bits : int
        The widest codes that it may have, the last of `widths`.
    widths : tuple of int
        The widths that it may have: the target's on such a grid, its own where its codes are those of a table, or those
        that its method chooses among.
    chooses : bool
        Whether its method chooses among the widths by itself.
    modifiers : mapping of str to mapping
        What stands on top of the method, and its numbers: such as the share of weights that oscillate.
    """

    layer: str
    op: str
    tensor: str
    target: str
    training_method: str
    method: str
    n_bits: int
    granularity: str
    quality: GridQuality | None
    axis: int | None = None
    output_axis: int | None = None
    groups: bool = False
    most_bits: int = MAX_BITS
    widths: tuple[int, ...] = tuple(range(1, MAX_BITS + 1))
    chooses: bool = False
    modifiers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Layer and tensor in words."""
        return f"{self.layer}: {self.tensor}" if self.target == "Activation" else f"{self.layer}.{self.tensor}"


@dataclass(frozen=True, kw_only=True)
class LayerFigures:
    """What the quantization of one layer costs.

    Parameters
    ----------
    layer, op : str
        Its name and kind.
    alone : float
        Cost of the model in which this layer alone is quantized, less that of the model in which nothing is.
    within : float
        Cost of the model in which everything is quantized, less that of the model in which this layer is not.
    """

    layer: str
    op: str
    alone: float
    within: float

    @property
    def cost(self) -> float:
        """The larger of both."""
        return max(self.alone, self.within)


@dataclass(frozen=True, kw_only=True)
class VariableFigures:
    """One variable of a quantizer that training is to change.

    Parameters
    ----------
    quantizer, name : str
        The quantizer's place in words; the variable's name.
    value : float
        Root mean square of its elements.
    gradient : float or None
        Root mean square of its gradient's elements; None where none arrives.
    moved : float or None
        Root mean square of the distance from the calibrated values, divided by that of these; None where the model does
        not know them, as one that was loaded from a file.
    """

    quantizer: str
    name: str
    value: float
    gradient: float | None
    moved: float | None

    @property
    def relative_gradient(self) -> float | None:
        """The gradient beside the value: what a step of SGD with rate 1 changes, relatively."""
        if self.gradient is None:
            return None
        return self.gradient / self.value if self.value else math.inf if self.gradient else 0.0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that is worth doing.

    Parameters
    ----------
    kind : str
        ``values``, ``axis``, ``range``, ``bits``, ``gradient``, ``oscillation`` or ``codes``.
    layer, tensor : str
        Where; the tensor may be empty.
    cost : float
        What is to be gained: what the layer costs, or what setting it right is expected to save.
    sentence : str
        What was found, and what to do.
    """

    kind: str
    layer: str
    tensor: str
    cost: float
    sentence: str


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What hurts a quantized model, and what of it trains.

    Parameters
    ----------
    metric, unit : str
        What costs are: the name of the metric, and what they are counted in.
    float_cost, total : float
        Cost of the model without quantization; what quantization adds to it.
    findings : tuple of Finding
        What is worth doing, the most important first.
    layers : tuple of LayerFigures
        The most expensive first.
    quantizers : tuple of QuantizerFigures
        In the model's order.
    variables : tuple of VariableFigures
        Variables of quantizers that training is to change, in the model's order.
    left_out : mapping of str to str
        Why, by the name of what is not quantized.
    batches : int
        How many there were.
    greater_is_better : bool
        Whether a larger number of the metric is better; costs are its negative then.
    """

    metric: str
    unit: str
    float_cost: float
    total: float
    findings: tuple[Finding, ...]
    layers: tuple[LayerFigures, ...]
    quantizers: tuple[QuantizerFigures, ...]
    variables: tuple[VariableFigures, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    batches: int = 0
    greater_is_better: bool = False

    @property
    def float_value(self) -> float:
        """What the metric gives for the model without quantization."""
        return -self.float_cost if self.greater_is_better else self.float_cost

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The quantizers as flat dictionaries, JSON-clean, as a data frame takes them."""
        costs = {each.layer: each for each in self.layers}
        found = []
        for each in self.quantizers:
            row = asdict(each)
            quality = row.pop("quality") or {}
            layer = costs.get(each.layer)
            row |= quality | {"alone": layer.alone if layer else None, "within": layer.within if layer else None}
            found.append(_clean(row))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the diagnosis as a JSON-clean document."""
        document: dict[str, Any] = _clean({"schema_version": SCHEMA_VERSION, **asdict(self)})
        return document

    def to_json(self) -> str:
        """Return the document as text."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        """Return the findings as sentences, and the layers as a table."""
        lines = [f"Quantization costs {_number(self.total)} {self.unit} over {_counted(self.batches, 'batch', 'es')}."]
        if self.float_cost:
            lines[0] += f" (The float model: {_number(self.float_value)}.)"
        lines += ["", *(f"{place}. {each.sentence}" for place, each in enumerate(self.findings, 1))]
        lines += [] if self.findings else ["Nothing stands out."]
        return "\n".join([*lines, "", *self._table()]).rstrip()

    def _table(self) -> Iterator[str]:
        titles = (
            "layer",
            "alone",
            "within",
            "tensor",
            "bits",
            "SQNR dB",
            "calibrated",
            "clipped",
            "unused",
            "grid",
            "values",
        )
        table: list[Sequence[str]] = [titles]
        for layer in self.layers[:SHOWN]:
            first = (layer.layer, _number(layer.alone), _number(layer.within))
            for each in self.quantizers:
                if each.layer == layer.layer:
                    table.append((*first, *_cells(each)))
                    first = ("", "", "")
        widths = [max(len(line[i]) for line in table) for i in range(len(titles))]
        for place, line in enumerate(table):
            yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            if not place:
                yield "  ".join("-" * width for width in widths)
        if len(self.layers) > SHOWN:
            yield f"and {_counted(len(self.layers) - SHOWN, 'layer', 's')} more"


def _cells(row: QuantizerFigures) -> tuple[str, ...]:
    quality = row.quality
    if quality is None:
        return row.tensor, str(row.n_bits), "no value seen", "", "", "", "", ""
    calibrated = "" if quality.calibrated_sqnr is None else f"{quality.calibrated_sqnr:.1f}"
    unused = "" if quality.unused is None else f"{quality.unused:.1%}"
    grid = "" if math.isnan(quality.low) else f"{quality.low:.3g} to {quality.high:.3g}"
    seen = f"{quality.minimum:.3g} to {quality.maximum:.3g}"
    return (
        row.tensor, str(row.n_bits), f"{quality.sqnr:.1f}", calibrated, f"{quality.clipped:.2%}", unused, grid, seen,
    )  # fmt: skip


def _number(value: float) -> str:
    return f"{value:.3g}"


def _counted(count: int, noun: str, plural: str) -> str:
    return f"{count} {noun}{'' if count == 1 else plural}"


def _clean(value: Any) -> Any:
    """Return nested values with None for what JSON has no number for."""
    if isinstance(value, Mapping):
        return {key: _clean(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
