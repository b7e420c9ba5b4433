"""A deployment target as a record: which grids and biases it can express, and how it rounds.

`QuantizationRecipe.resolve` checks every layer against the record of the recipe's target, so that what can't be shipped
is refused before training.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from trainable_core.enums import QuantizationMethod, QuantizationTarget, TieRule
from trainable_core.errors import UnsupportedConfigError

Bias = Literal["float", "int32"]
"""How the biases of quantized layers are represented."""


class Requantization(Enum):
    """How a runtime comes from the sum of a layer's products, an int32 code, to the code of its output."""

    FLOAT32 = "float32"
    """Multiply by a float32 number and round to the nearest code, ties to even (ONNX Runtime, XNNPACK)."""
    GEMMLOWP = "gemmlowp"
    """Multiply by a 31-bit fixed-point number and shift, rounding twice (TensorFlow Lite's reference kernels)."""


@dataclass(frozen=True)
class Grids:
    """Which grids of weights, or of activations, a target can express.

    Parameters
    ----------
    widths : mapping of QuantizationMethod to sequence of int
        The widths that codes may have, by quantization method; a method that is missing can't be expressed.
    per_tensor_only : mapping of QuantizationMethod to sequence of str
        The op kinds whose weights must share one threshold per tensor with a method.
    """

    widths: Mapping[QuantizationMethod, Sequence[int]]
    per_tensor_only: Mapping[QuantizationMethod, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a model can be deployed with.

    Parameters
    ----------
    name : str
        What recipes call it.
    title : str
        What it is, for readers.
    weights, activations : Grids
        The grids that it can express. Grids with and without a sign can be expressed by every target: codes are
        shifted where a format has only one kind.
    biases : tuple of {"float", "int32"}
        How the bias of a quantized layer may be represented.
    groups, experts : bool
        Whether weights may have a scale for each group of a channel's inputs, and for each expert of a tensor that
        holds several matrices.
    dynamic : bool
        Whether activations may have scales that are computed from the tensor itself.
    tie_rule : TieRule or None
        Where a value half way between two codes goes; None where this is left to the backend that trained the model.
    tie_rules : mapping of str to TieRule
        Operations whose results are rounded by another rule, by their names in `trainable_core.export.network`.
    requantization : Requantization or None
        How the sum of products becomes a code; None where the target computes with real numbers.
    """

    name: str
    title: str
    weights: Grids
    activations: Grids
    biases: tuple[Bias, ...]
    tie_rule: TieRule | None
    requantization: Requantization | None
    tie_rules: Mapping[str, TieRule] = field(default_factory=dict)
    groups: bool = False
    experts: bool = False
    dynamic: bool = False

    def tie_rule_of(self, op: str) -> TieRule | None:
        """Return where a value half way between two codes goes that an operation of a network gives.

        Parameters
        ----------
        op : str
            Its name in `trainable_core.export.network`.
        """
        return self.tie_rules.get(op, self.tie_rule)

    def check_grid(
        self,
        subject: str,
        kind: QuantizationTarget,
        method: QuantizationMethod,
        widths: Iterable[int],
        *,
        op: str = "",
        per_channel: bool = False,
    ) -> None:
        """Refuse a grid that the target can't express.

        Parameters
        ----------
        subject : str
            Layer and tensor.
        kind : QuantizationTarget
            Whether it is the grid of weights or of activations.
        method : QuantizationMethod
            The grid's kind.
        widths : iterable of int
            Every width that its codes may have.
        op : str
            The layer's op kind.
        per_channel : bool
            Whether each channel has a threshold of its own.

        Raises
        ------
        UnsupportedConfigError
            Names the layer, and says what the target can express.
        """
        is_weight = kind is QuantizationTarget.Weights
        grids, tensors = (self.weights, "weights") if is_weight else (self.activations, "activations")
        if method not in grids.widths:
            raise UnsupportedConfigError(
                subject, f"{self.name} has no {method} for {tensors}", f"use {_listed(map(str, grids.widths))}."
            )
        known = grids.widths[method]
        for width in widths:
            if width not in known:
                problem = f"{self.name} can't express {method} with {width} bits for {tensors}"
                raise UnsupportedConfigError(subject, problem, f"use {_ranges(known)} bits.")
        if per_channel and op in grids.per_tensor_only.get(method, ()):
            problem = f"{self.name} can't express {method} weights of kind {op} with one range per channel"
            raise UnsupportedConfigError(subject, problem, "use per_channel: false, or SYMMETRIC.")

    def check_blocks(self, subject: str, *, groups: bool, experts: bool) -> None:
        """Refuse weights with a scale for each group, or for each expert, where the target can't express them.

        Raises
        ------
        UnsupportedConfigError
            Names the layer.
        """
        if groups and not self.groups:
            hint = 'use target: native, or granularity: "channel".'
            raise UnsupportedConfigError(subject, f"{self.name} has no scales for groups of weights", hint)
        if experts and not self.experts:
            problem = f"it holds one matrix for each of several experts, and {self.name} has no scales for each of them"
            hint = 'use target: native, or a rule {"match": {"name": "*.experts"}, "skip": true}.'
            raise UnsupportedConfigError(subject, problem, hint)

    def check_dynamic(self, subject: str) -> None:
        """Refuse activations with scales that are computed from the tensor itself, where the target has none.

        Raises
        ------
        UnsupportedConfigError
            Names the layer.
        """
        if not self.dynamic:
            problem = f"{self.name} has no scales that are computed from the activation itself"
            raise UnsupportedConfigError(subject, problem, "use target: native, or another training method.")

    def check_bias(self, subject: str, bias: Bias) -> None:
        """Refuse the representation of a quantized layer's bias that the target can't express.

        Raises
        ------
        UnsupportedConfigError
            Names the layer, and says what the target can express.
        """
        if bias not in self.biases:
            problem = f"{self.name} can't express a {bias} bias of a layer with quantized weights"
            raise UnsupportedConfigError(subject, problem, f"use bias: {_listed(self.biases)}.")


def _listed(words: Iterable[str]) -> str:
    """Return words as a sentence lists them.

    Examples
    --------
    >>> _listed(["a"]), _listed(["a", "b", "c"])
    ('a', 'a, b or c')
    """
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def _ranges(numbers: Sequence[int]) -> str:
    """Return sorted numbers in words, consecutive ones as a range.

    Examples
    --------
    >>> _ranges([8]), _ranges([2, 3, 4, 16]), _ranges(range(1, 9))
    ('8', '2 to 4 or 16', '1 to 8')
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return _listed(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)
