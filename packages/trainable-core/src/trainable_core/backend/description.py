"""What `describe` returns, the same in every backend: rows of quantizers, and reasons for what was left out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from html import escape
from typing import Any

import numpy as np

from trainable_core.backend.view import QuantizedTensor
from trainable_core.config import TrainableQuantizerConfig, TrainableQuantizerWeightsConfig
from trainable_core.constants import SIGNED
from trainable_core.enums import QuantizationTarget, TrainingMethod
from trainable_core.errors import DocumentError, DocumentVersionError, MissingLibraryError
from trainable_core.quantizer import BaseTrainableQuantizer
from trainable_core.recipe.layers import LayerInfo
from trainable_core.recipe.plan import QuantizerPlan

SCHEMA_VERSION = 1

TITLES = ("layer", "tensor", "grid", "bits", "trained by", "numbers", "state")
"""Columns of the table."""

MOST_NUMBERS = 4096
"""Numbers of a tensor that a file's description tells one by one, at most."""

FOLDED = "batch norm folded"
"""Heading of the batch norms that were folded, each with its layer."""


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
    granularity : str
        What has a threshold of its own, in words: ``tensor``, ``channel (axis 0)``, or ``channel (axis 0), group of 32
        (axis 1)``. Of an activation whose grid is computed from the tensor itself: ``token, computed`` or ``tensor,
        computed``.
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
    channels_axis: int | None
    params: Mapping[str, Any]
    state: str
    quantizer: str
    granularity: str = ""
    modifiers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def granularity_of(config: TrainableQuantizerConfig, arguments: Mapping[str, Any], *, computed: bool) -> str:
    """Return in words what has a threshold of its own; see `DescriptionRow`."""
    if computed:
        return f"{arguments.get('granularity', 'token')}, computed"
    if not isinstance(config, TrainableQuantizerWeightsConfig):
        return "tensor"
    said = []
    if config.weights_expert_axis is not None:
        said.append(f"expert (axis {config.weights_expert_axis})")
    if config.weights_per_channel_threshold:
        said.append(f"channel (axis {config.weights_channels_axis})")
    if config.weights_group_size is not None:
        said.append(f"group of {config.weights_group_size} (axis {config.weights_group_axis})")
    return ", ".join(said) or "tensor"


def rows_of(tensors: Iterable[QuantizedTensor]) -> tuple[DescriptionRow, ...]:
    """Return the rows of a model's quantized tensors."""
    return tuple(describe_quantizer(each.layer, each.tensor, each.plan, each.quantizer) for each in tensors)


def describe_quantizer(layer: LayerInfo, tensor: str, plan: QuantizerPlan, quantizer: Any) -> DescriptionRow:
    """Return the row of a trainable quantizer, or of an inferable one that shows ``params`` and ``num_bits``."""
    config, state = plan.config, "deployed"
    params: Mapping[str, Any] = {}
    n_bits = config.n_bits
    modifiers: Mapping[str, Mapping[str, float]] = {}
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
        modifiers = quantizer.report()
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
        channels_axis=_channels_axis(config),
        params=params,
        state=state,
        quantizer=type(quantizer).__name__,
        granularity=granularity_of(config, plan.arguments, computed=plan.training_method == TrainingMethod.DYNAMIC),
        modifiers=modifiers,
    )


def _channels_axis(config: TrainableQuantizerConfig) -> int | None:
    """Return the axis of the tensor's channels where each has thresholds of its own."""
    if isinstance(config, TrainableQuantizerWeightsConfig) and config.weights_per_channel_threshold:
        return config.weights_channels_axis
    return None


@dataclass(frozen=True)
class Description:
    """Which tensors of a model are quantized, how, and why the others are not.

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
    biases : mapping of str to str
        By the name of each int32 bias, the tensor whose scale times that of the layer's weight is its scale.
    islands : mapping of str to str
        Why, by the name of each layer or operation that is computed in float between quantizers.
    """

    rows: tuple[DescriptionRow, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    folded: Mapping[str, str] = field(default_factory=dict)
    finalized: bool = False
    biases: Mapping[str, str] = field(default_factory=dict)
    islands: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the description as a JSON-clean document."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self), "rows": [asdict(row) for row in self.rows]}

    def to_json(self) -> str:
        """Return the document as text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Description:
        """Return the description that `to_dict` was called on.

        Raises
        ------
        DocumentError
            When it is no such document; nothing in it is taken on trust.
        """
        version = document.get("schema_version") if isinstance(document, Mapping) else None
        if version != SCHEMA_VERSION or isinstance(version, bool):
            raise DocumentVersionError("description", version, [SCHEMA_VERSION])
        try:
            parts = {key: value for key, value in document.items() if key not in {"schema_version", "rows"}}
            rows = tuple(DescriptionRow(**row) for row in document["rows"])
            found = cls(rows, **parts)
            str(found)  # every value is of a kind that can be shown
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DocumentError("description", f"damaged: {type(error).__name__}: {error}") from error
        return found

    def summary(self) -> Description:
        """Return the same, with the smallest and the largest number in the place of more than 4,096 of one tensor.

        That is what files hold of themselves. Where each group of weights has a scale, it is among the tensors.
        """

        def ends(value: Any) -> Any:
            return [min(value), max(value)] if isinstance(value, list) and len(value) > MOST_NUMBERS else value

        rows = (replace(row, params={key: ends(value) for key, value in row.params.items()}) for row in self.rows)
        return replace(self, rows=tuple(rows))

    def to_dataframe(self) -> Any:
        """Return the rows as a pandas DataFrame, with one column for each field of `DescriptionRow`.

        Raises
        ------
        MissingLibraryError
            When pandas is not installed.
        """
        try:
            import pandas as pd  # noqa: PLC0415 - only for those who have it
        except ImportError as error:
            raise MissingLibraryError("pandas", "to_dataframe", str(error), "pip install pandas") from error
        names = [each.name for each in fields(DescriptionRow)]
        return pd.DataFrame([[getattr(row, name) for name in names] for row in self.rows], columns=names)

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Return the titles and the cells of the table that is printed."""
        return TITLES, [_cells(row) for row in self.rows]

    def notes(self) -> dict[str, dict[str, str]]:
        """Return what is said below the table: by a heading, a text for each name; without those that are empty."""
        found = {
            FOLDED: self.folded,
            "int32 biases, and the input that their scales come from": self.biases,
            "computed in float": self.islands,
            "not quantized": self.left_out,
        }
        return {heading: dict(names) for heading, names in found.items() if names}

    def __str__(self) -> str:
        """Return the description as a table."""
        titles, cells = self.table()
        table = [titles, *cells]
        widths = [max(len(line[i]) for line in table) for i in range(len(titles))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        for heading, names in self.notes().items():
            mark = " ->" if heading == FOLDED else ":"
            lines += ["", f"{heading}:", *(f"  {name}{mark} {text}" for name, text in names.items())]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Return the description as a table for notebooks, which ask for it by this name."""
        titles, cells = self.table()
        parts = ["<table><thead><tr>", *(f"<th>{escape(title)}</th>" for title in titles), "</tr></thead><tbody>"]
        for line in cells:
            parts += ["<tr>", *(f"<td>{escape(cell)}</td>" for cell in line), "</tr>"]
        parts.append("</tbody></table>")
        for heading, names in self.notes().items():
            parts += [f"<p>{escape(heading)}:</p><ul>"]
            parts += [f"<li><code>{escape(name)}</code>: {escape(text)}</li>" for name, text in names.items()]
            parts.append("</ul>")
        return "".join(parts)


def set_described_params(quantizers: Iterable[BaseTrainableQuantizer], document: Mapping[str, Any]) -> None:
    """Give a model's quantizers the numbers in the description of another model, of any framework.

    Parameters
    ----------
    quantizers : iterable of BaseTrainableQuantizer
        Those of a wrapped model whose layers have the names of the described ones.
    document : mapping
        What `Description.to_dict` returned, or its JSON read again.

    Raises
    ------
    DocumentError
        When the document is not a description, or has another number of quantizers for a layer than the model, or
        numbers for another grid, width or number of channels. Nothing is changed then.

    Notes
    -----
    Tensors of one layer are matched in their order, so ``weight`` and ``kernel`` are one. The numbers of channels go
    along the output channels, wherever the receiving framework keeps them: axis 0 of ``OIHW``, the last
    one of ``HWIO``.
    """
    version = document.get("schema_version") if isinstance(document, Mapping) else None
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise DocumentVersionError("description", version, [SCHEMA_VERSION])
    described: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in document["rows"]:
        if row["training_method"] == TrainingMethod.DYNAMIC:
            continue  # it has no numbers
        described.setdefault((row["layer"], row["target"]), []).append(row)
    found: dict[tuple[str, str], list[BaseTrainableQuantizer]] = {}
    for quantizer in quantizers:
        if quantizer.quantization_config.enabled and not quantizer.computes_grid:
            found.setdefault((_layer_of(quantizer), str(quantizer.quantization_config.target)), []).append(quantizer)
    for key in sorted(described.keys() | found.keys()):
        if len(described.get(key, [])) != len(found.get(key, [])):
            problem = f"it has {len(described.get(key, []))} quantizers for {' '.join(key)}, the model has "
            raise DocumentError("description", f"{problem}{len(found.get(key, []))}")
    pairs = [pair for key, rows in described.items() for pair in zip(rows, found[key], strict=True)]
    for row, quantizer in pairs:
        _check_fits(row, quantizer)
    for row, quantizer in pairs:
        quantizer.set_quantization_params({row["n_bits"]: row["params"]})


def _layer_of(quantizer: BaseTrainableQuantizer) -> str:
    """Return the name of a quantizer's layer, which its subject begins with."""
    if quantizer.activation_quantization():
        return quantizer.subject.rpartition(": ")[0]
    subject, mark, _ = quantizer.subject.rpartition(".")
    return subject if mark else quantizer.subject


def _check_fits(row: Mapping[str, Any], quantizer: BaseTrainableQuantizer) -> None:
    config = quantizer.quantization_config
    if row["method"] != str(config.quantization_method) or (row["n_bits"],) != quantizer.widths:
        problem = f"{row['method']} with {row['n_bits']} bits for {quantizer.subject}, which is "
        raise DocumentError("description", f"{problem}{config.quantization_method} with {list(quantizer.widths)}")
    shape = tuple(next(iter(quantizer.grid_variables(quantizer.widths[0]).values())).shape)
    numbers = [value for key, value in row["params"].items() if key != SIGNED]
    if not numbers or any(np.shape(value) != shape for value in numbers):
        shapes = [np.shape(value) for value in numbers]
        raise DocumentError("description", f"numbers of shapes {shapes} for {quantizer.subject}, which needs {shape}")


def _cells(row: DescriptionRow) -> tuple[str, ...]:
    plain = row.granularity in {"", "tensor"}
    grid = row.method if plain else f"{row.method} per {row.granularity}"
    numbers = ", ".join(f"{key}={_short(value)}" for key, value in row.params.items())
    shares = (f"{name} {share:.1%}" for told in row.modifiers.values() for name, share in told.items())
    state = ", ".join(dict.fromkeys((row.state, *shares)))
    return row.layer, row.tensor, grid, str(row.n_bits), row.training_method, numbers, state


def _short(value: Any) -> str:
    if isinstance(value, list):
        return "..".join(dict.fromkeys(f"{end:.4g}" for end in (min(value), max(value))))  # one where both are the same
    return str(value) if isinstance(value, bool) else f"{value:.4g}"
