"""What becomes of each layer of a model: which quantizers it gets, or why none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from trainable_core.config import TrainableQuantizerConfig
from trainable_core.enums import LUT_METHODS, QuantizationMethod, QuantizationTarget
from trainable_core.errors import UnsupportedConfigError
from trainable_core.recipe.layers import LayerInfo


@dataclass(frozen=True)
class QuantizerPlan:
    """Which quantizer to build: its config, its training method and its further arguments."""

    config: TrainableQuantizerConfig
    training_method: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer.

    Parameters
    ----------
    layer : LayerInfo
        The layer.
    weights : mapping of str to QuantizerPlan
        By weight attribute; empty where weights stay float.
    activation : QuantizerPlan or None
        The quantizer of its inputs or of its output.
    placement : {"inputs", "outputs"}
        Where the activation quantizer stands.
    reason : str
        Why nothing is quantized; empty where something is.
    """

    layer: LayerInfo
    weights: Mapping[str, QuantizerPlan]
    activation: QuantizerPlan | None
    placement: Literal["inputs", "outputs"]
    reason: str = ""


def check_target(target: str, subject: str, method: QuantizationMethod, n_bits: int, kind: QuantizationTarget) -> None:
    """Refuse a grid that the deployment target has no inferable quantizer for.

    Raises
    ------
    UnsupportedConfigError
        Names the layer. mctq's look-up tables hold 8-bit codes, and activations have no LUT_SYM_QUANTIZER.
    """
    if method not in LUT_METHODS:
        return
    if n_bits > 8:  # noqa: PLR2004 - mctq's LUT_VALUES_BITWIDTH
        raise UnsupportedConfigError(
            subject, f"{target} can't express {method} with {n_bits} bits", "use at most 8 bits."
        )
    if kind is QuantizationTarget.Activation and method is QuantizationMethod.LUT_SYM_QUANTIZER:
        raise UnsupportedConfigError(subject, f"{target} has no {method} for activations", "use LUT_POT_QUANTIZER.")
