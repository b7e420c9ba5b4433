"""What `describe` returns, the same in every backend: rows of quantizers, and reasons for what was left out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from trainable_core.constants import SIGNED
from trainable_core.enums import QuantizationTarget
from trainable_core.plan import LayerInfo, QuantizerPlan
from trainable_core.quantizer import BaseTrainableQuantizer

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class DescriptionRow:
    """One quantizer of a model.

    Parameters
    ----------
    layer : str
        Name of the layer or functional operation.
    op : str
        Its framework-neutral kind.
    tensor : str
        Weight attribute, input or output.
    target : str
        ``Weights`` or ``Activation``.
    training_method, method : str
        How it learns; its grid.
    n_bits : int
        Width of the codes; of several candidates the selected one.
    channels_axis : int or None
        Channel axis when there is one threshold per channel.
    params : mapping
        The grid's numbers as in the configs; empty before calibration.
    state : str
        ``not calibrated``, ``trainable``, ``frozen``, ``switched off`` or ``deployed``.
    quantizer : str
        Class name.
    """

    layer: str
    op: str
    tensor: str
    target: str
    training_method: str
    method: str
    n_bits: int
    channels_axis: int | None
    params: Mapping[str, Any]
    state: str
    quantizer: str


def describe_quantizer(layer: LayerInfo, tensor: str, plan: QuantizerPlan, quantizer: Any) -> DescriptionRow:
    """Return the row of a trainable quantizer, or of an inferable one that shows ``params`` and ``num_bits``."""
    config, state = plan.config, "deployed"
    params: Mapping[str, Any] = {}
    n_bits = config.n_bits
    if not isinstance(quantizer, BaseTrainableQuantizer):
        params, n_bits = quantizer.params, quantizer.num_bits
    elif not config.enabled:
        state = "switched off"
    elif not quantizer.calibrated:
        state = "not calibrated"
    else:
        state = "frozen" if quantizer.freeze_quant_params else "trainable"
        current = quantizer.current_config()
        params, n_bits = current.quantization_params, current.n_bits
    if config.target is QuantizationTarget.Weights:
        params = {key: value for key, value in params.items() if key != SIGNED}
    return DescriptionRow(
        layer=layer.name,
        op=layer.op,
        tensor=tensor,
        target=str(config.target),
        training_method=plan.training_method,
        method=str(config.quantization_method),
        n_bits=n_bits,
        channels_axis=config.channels_axis,
        params=params,
        state=state,
        quantizer=type(quantizer).__name__,
    )


@dataclass(frozen=True)
class Description:
    """What of a model is quantized and what is not.

    Parameters
    ----------
    rows : tuple of DescriptionRow
        In the model's order.
    left_out : mapping of str to str
        Why, by name.
    folded : mapping of str to str
        Layer by the name of the batch norm folded into it.
    finalized : bool
        Whether the quantizers are inferable.
    """

    rows: tuple[DescriptionRow, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    folded: Mapping[str, str] = field(default_factory=dict)
    finalized: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the description as a JSON-clean document."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self), "rows": [asdict(row) for row in self.rows]}

    def to_json(self) -> str:
        """Return the document as text."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        """Return the description as a table."""
        titles = ("layer", "tensor", "grid", "bits", "trained by", "numbers", "state")
        table = [titles, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in table) for i in range(len(titles))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        if self.folded:
            lines += ["", "batch norm folded:", *(f"  {norm} -> {layer}" for norm, layer in self.folded.items())]
        if self.left_out:
            lines += ["", "not quantized:", *(f"  {name}: {reason}" for name, reason in self.left_out.items())]
        return "\n".join(lines)


def _cells(row: DescriptionRow) -> tuple[str, ...]:
    grid = row.method if row.channels_axis is None else f"{row.method} per channel (axis {row.channels_axis})"
    numbers = ", ".join(f"{key}={_short(value)}" for key, value in row.params.items())
    return row.layer, row.tensor, grid, str(row.n_bits), row.training_method, numbers, row.state


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"{min(value):.4g}..{max(value):.4g}"
    return str(value) if isinstance(value, bool) else f"{value:.4g}"
