"""A finalized model operation by operation, as a backend tells it that knows its graph: channels last.

It is what `trainable_core.export.tflite` writes a file of. Real numbers are its tensors; where a quantizer is called
there is a step of its own, ``quantize``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainable_core.enums import TieRule
from trainable_core.export.source import QuantizerRecord
from trainable_core.qparams import Float32

Shape = tuple[int | None, ...]
"""A dimension that is not known is None, as that of the rows."""

OPERATIONS = frozenset(
    {
        "quantize", "conv", "depthwise_conv", "conv_transpose", "linear", "add", "mul", "cat", "max_pool",
        "average_pool", "mean", "max", "clip", "pad", "crop", "resize_nearest", "resize_bilinear", "reshape", "softmax",
        "sigmoid", "tanh", "silu", "hard_sigmoid", "hard_swish", "leaky_relu", "elu", "gelu", "arithmetic",
    }
)  # fmt: skip
"""What a step may do; a backend tells any other one by a name of its own."""


@dataclass(frozen=True)
class Step:
    """One operation.

    Parameters
    ----------
    op : str
        One of `OPERATIONS`, or the framework's name of another one.
    layer : str
        The layer or functional operation that it belongs to.
    inputs : tuple of str
        Tensors that it reads.
    output : str
        The tensor that it makes.
    options : mapping
        By operation:

        - ``quantize``: ``quantizer``, the name of its record.
        - ``conv``, ``depthwise_conv``, ``conv_transpose``: ``strides``, ``dilations``, ``padding`` (``same`` or
          ``valid``), ``groups``; weights are HWIO, HWCM for a depthwise and HWOI for a transposed convolution.
        - ``linear``: nothing; weights are (inputs, outputs).
        - ``cat``: ``axis``.
        - ``max_pool``, ``average_pool``: ``size``, ``strides``, ``padding``.
        - ``mean``, ``max``: ``axes``, ``keepdims``.
        - ``clip``: ``low`` and ``high``, real numbers or None.
        - ``pad``: ``pads``, (before, after) for each axis; zeros are padded.
        - ``crop``: ``begins``, the first place that is kept along each axis.
        - ``resize_nearest``, ``resize_bilinear``: ``size``, height and width of the result; bilinear with the centers
          of pixels half way between their borders.
        - ``reshape``: ``shape``, without that of the rows.
        - ``leaky_relu``: ``slope`` below zero.
        - ``arithmetic``: ``parts``, pairs of ``add``, ``sub``, ``mul`` or ``div`` and float32 numbers, one or one for
          each channel, carried out in order.
        - ``softmax``: ``axis``.
        - ``gelu``: the exact one; ``elu``: of slope 1; ``hard_sigmoid``: ``relu6(x + 3) / 6``.
    weight : QuantizerRecord, optional
        Its quantized weight.
    bias : float32 array, optional
        Its bias in real numbers, as the model computes with it.
    obstacle : str
        Why no integer kernel computes it as it is set up; empty where nothing is in the way.
    """

    op: str
    layer: str
    inputs: tuple[str, ...]
    output: str
    options: Mapping[str, Any] = field(default_factory=dict)
    weight: QuantizerRecord | None = None
    bias: Float32 | None = None
    obstacle: str = ""


@dataclass(frozen=True)
class Network:
    """A finalized model.

    Parameters
    ----------
    inputs, outputs : sequence of str
        Its tensors, in order.
    steps : sequence of Step
        In an order in which they can be run.
    shapes : mapping of str to tuple
        Shape of each tensor, that of the rows included.
    quantizers : mapping of str to QuantizerRecord
        By name.
    tie_rule : TieRule
        Where its backend puts a value half way between two codes.
    recipe : mapping
        The recipe, JSON-clean.
    versions : mapping of str to str
        Versions of the libraries that made it, by name.
    """

    inputs: Sequence[str]
    outputs: Sequence[str]
    steps: Sequence[Step]
    shapes: Mapping[str, Shape]
    quantizers: Mapping[str, QuantizerRecord]
    tie_rule: TieRule
    recipe: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def layers(self) -> list[str]:
        """The names of its layers and functional operations, in order."""
        return list(dict.fromkeys(step.layer for step in self.steps))
