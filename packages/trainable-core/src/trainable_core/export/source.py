"""What a backend tells of a finalized model, beside its ONNX graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainable_core.enums import TieRule
from trainable_core.integer.tensor import Int32
from trainable_core.qparams import QParams

DOMAIN = "trainable"
"""Domain of the nodes that stand for quantizers."""

QUANTIZE = "Quantize"
"""Their operation: one input, one output of the same shape, and the attribute ``name``."""

NAME_TARGET = "name the target in the recipe; `wrap` then checks every layer before training."
"""What to do about quantizers that no file format holds."""


@dataclass(frozen=True)
class QuantizerRecord:
    """One quantizer of a finalized model.

    Parameters
    ----------
    name : str
        Unique in the model; the attribute ``name`` of its nodes.
    layer, tensor : str
        Whose it is, as `describe` has it.
    n_bits : int
        Width of its codes.
    grid : QParams
        Its numbers.
    codes : int32 array or None
        Of a weight: its codes; None for an activation.
    tie_rule : TieRule or None
        Where it puts an activation half way between two codes; None where it does as its backend does.
    """

    name: str
    layer: str
    tensor: str
    n_bits: int
    grid: QParams
    codes: Int32 | None = None
    tie_rule: TieRule | None = None


@dataclass(frozen=True)
class Source:
    """A finalized model as a backend tells it.

    Parameters
    ----------
    model : onnx.ModelProto
        The graph, with a ``trainable.Quantize`` node wherever a quantizer is called.
    quantizers : mapping of str to QuantizerRecord
        By name.
    recipe : mapping
        The recipe, JSON-clean.
    versions : mapping of str to str
        Versions of the libraries that made it, by name.
    layers : sequence of str
        The names of its layers in order, where another process may give them other names.
    """

    model: Any
    quantizers: Mapping[str, QuantizerRecord]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    layers: Sequence[str] = ()
