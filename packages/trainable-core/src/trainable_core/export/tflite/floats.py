"""Float islands: what no integer kernel computes as the model does, between DEQUANTIZE and QUANTIZE.

Each function takes the lowering, the step and the float tensors that it reads, and returns the one that it makes. The
runtime computes them by kernels of its own, so their last bits are the runtime's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from trainable_core.export.network import Step


class Lowering(Protocol):
    """What writes operators: `trainable_core.export.tflite.lowering.Lowering`, which asks for these functions."""

    def real(self, step: Step, code: str, inputs: Sequence[str], **options: Any) -> str:
        """Add an operator on real numbers with the shape of a step's result; returns its output."""

    def number(self, value: ArrayLike) -> str:
        """Return a constant of real numbers."""

    def whole(self, wish: str, values: Sequence[int]) -> str:
        """Return a constant of whole numbers."""


TABLES = "kernels on integers have a scale of their own for its result, or compute it by tables"
SUMS = "kernels add two tensors, and a second sum would round twice"
BORDERS = "an average at a border that is padded is one of fewer values"
CONSTANTS = "its numbers are no quantized weights"
INTERPOLATION = "kernels on integers interpolate in fixed point"
OWN_FUNCTION = "its activation function is computed of sums that no quantizer has made codes of"

SIX, THREE, SIXTH = np.float32(6), np.float32(3), np.float32(1 / 6)


def _one(code: str, **options: Any) -> Callable[[Lowering, Step, Sequence[str]], str]:
    def emit(lowering: Lowering, step: Step, inputs: Sequence[str]) -> str:
        return lowering.real(step, code, inputs, **options)

    return emit


def _silu(lowering: Lowering, step: Step, inputs: Sequence[str]) -> str:
    return lowering.real(step, "MUL", [*inputs, lowering.real(step, "LOGISTIC", inputs)])


def _hard_sigmoid(lowering: Lowering, step: Step, inputs: Sequence[str]) -> str:
    """Return ``relu6(x + 3) / 6``."""
    raised = lowering.real(step, "ADD", [*inputs, lowering.number(THREE)], fusedActivationFunction="RELU6")
    return lowering.real(step, "MUL", [raised, lowering.number(SIXTH)])


def _clip(lowering: Lowering, step: Step, inputs: Sequence[str]) -> str:
    low, high = step.options["low"], step.options["high"]
    (result,) = inputs
    if low is not None:
        result = lowering.real(step, "MAXIMUM", [result, lowering.number(np.float32(low))])
    if high is not None:
        result = lowering.real(step, "MINIMUM", [result, lowering.number(np.float32(high))])
    return result


def _sum(lowering: Lowering, step: Step, inputs: Sequence[str]) -> str:
    result = inputs[0]
    for each in inputs[1:]:
        result = lowering.real(step, "ADD", [result, each])
    return result


def _arithmetic(lowering: Lowering, step: Step, inputs: Sequence[str]) -> str:
    (result,) = inputs
    for op, value in step.options["parts"]:
        result = lowering.real(step, op.upper(), [result, lowering.number(np.asarray(value, np.float32))])
    return result


def _average_pool(lowering: Lowering, step: Step, inputs: Sequence[str]) -> str:
    (height, width), (down, across) = step.options["size"], step.options["strides"]
    options = {"filterHeight": height, "filterWidth": width, "strideH": down, "strideW": across}
    padding = step.options["padding"].upper()
    return lowering.real(step, "AVERAGE_POOL_2D", inputs, padding=padding, **options)


def _resize(lowering: Lowering, step: Step, inputs: Sequence[str]) -> str:
    size = lowering.whole(f"{step.layer}/size", step.options["size"])
    return lowering.real(step, "RESIZE_BILINEAR", [*inputs, size], halfPixelCenters=True)


def _leaky_relu(lowering: Lowering, step: Step, inputs: Sequence[str]) -> str:
    return lowering.real(step, "LEAKY_RELU", inputs, alpha=float(np.float32(step.options["slope"])))


EMITTERS: Mapping[str, tuple[Callable[[Lowering, Step, Sequence[str]], str], str]] = {
    "add": (_sum, SUMS),
    "arithmetic": (_arithmetic, CONSTANTS),
    "average_pool": (_average_pool, BORDERS),
    "clip": (_clip, ""),
    "elu": (_one("ELU"), TABLES),
    "gelu": (_one("GELU"), TABLES),
    "hard_sigmoid": (_hard_sigmoid, TABLES),
    "hard_swish": (_one("HARD_SWISH"), TABLES),
    "leaky_relu": (_leaky_relu, TABLES),
    "resize_bilinear": (_resize, INTERPOLATION),
    "sigmoid": (_one("LOGISTIC"), TABLES),
    "silu": (_silu, TABLES),
    "softmax": (_one("SOFTMAX", beta=1.0), "a softmax of integers is an approximation"),
    "tanh": (_one("TANH"), TABLES),
}
"""Operations that can be computed in float, each with the reason why it is; a clamp has that of what it clamps."""
