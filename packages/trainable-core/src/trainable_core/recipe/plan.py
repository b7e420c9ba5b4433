"""What becomes of each layer of a model: which quantizers it gets, or why none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from trainable_core.config import TrainableQuantizerConfig
from trainable_core.recipe.layers import LayerInfo
from trainable_core.targets.target import Bias


@dataclass(frozen=True)
class QuantizerPlan:
    """Which quantizer to build: its config, its training method, its further arguments, and modifiers by name."""

    config: TrainableQuantizerConfig
    training_method: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    modifiers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


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
    bias : {"float", "int32"}
        How its bias is represented. An int32 bias is a code on the grid of the layer's sums of products, whose scale is
        that of its input times that of its weight.
    integer : bool
        Whether it is to be computed in integers: placement ``integer``.
    float_inputs : QuantizerPlan or None
        The quantizer of each of its inputs that no other quantizer reaches; None where those stay as they are.
    """

    layer: LayerInfo
    weights: Mapping[str, QuantizerPlan]
    activation: QuantizerPlan | None
    placement: Literal["inputs", "outputs"]
    reason: str = ""
    bias: Bias = "float"
    integer: bool = False
    float_inputs: QuantizerPlan | None = None
