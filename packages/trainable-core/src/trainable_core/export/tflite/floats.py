"""Float islands: what no integer kernel computes as the model does, between DEQUANTIZE and QUANTIZE.

Each function takes the program, the step and the float tensors that it reads, and returns the one that it makes. The
runtime computes them by kernels of its own, so their last bits are the runtime's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from trainable_core.export.network import Step

TABLES = "kernels on integers have a scale of their own for its result, or compute it by tables"
SUMS = "kernels add two tensors, and a second sum would round twice"
BORDERS = "an average at a border that is padded is one of fewer values"
CONSTANTS = "its numbers are no quantized weights"
INTERPOLATION = "kernels on integers interpolate in fixed point"
OWN_FUNCTION = "its activation function is computed of sums that no quantizer has made codes of"

THREE, SIXTH = np.float32(3), np.float32(1 / 6)


class RealProgram(Protocol):
    """A program that operators on real numbers are added to."""

    def real(self, step: Step, code: str, inputs: Sequence[str], **options: Any) -> str:
        """Add an operator on real numbers with the shape of a step's result; returns its output."""

    def number(self, value: ArrayLike) -> str:
        """Return a constant of real numbers."""

    def whole(self, wish: str, values: Sequence[int]) -> str:
        """Return a constant of whole numbers."""


def _one(code: str, **options: Any) -> Callable[[RealProgram, Step, Sequence[str]], str]:
    def emit(program: RealProgram, step: Step, inputs: Sequence[str]) -> str:
        return program.real(step, code, inputs, **options)

    return emit


def _silu(program: RealProgram, step: Step, inputs: Sequence[str]) -> str:
    return program.real(step, "MUL", [*inputs, program.real(step, "LOGISTIC", inputs)])


def _hard_sigmoid(program: RealProgram, step: Step, inputs: Sequence[str]) -> str:
    """Return ``relu6(x + 3) / 6``."""
    raised = program.real(step, "ADD", [*inputs, program.number(THREE)], fusedActivationFunction="RELU6")
    return program.real(step, "MUL", [raised, program.number(SIXTH)])


def _clip(program: RealProgram, step: Step, inputs: Sequence[str]) -> str:
    low, high = step.options["low"], step.options["high"]
    (result,) = inputs
    if low is not None:
        result = program.real(step, "MAXIMUM", [result, program.number(np.float32(low))])
    if high is not None:
        result = program.real(step, "MINIMUM", [result, program.number(np.float32(high))])
    return result


def _sum(program: RealProgram, step: Step, inputs: Sequence[str]) -> str:
    result = inputs[0]
    for each in inputs[1:]:
        result = program.real(step, "ADD", [result, each])
    return result


def _arithmetic(program: RealProgram, step: Step, inputs: Sequence[str]) -> str:
    (result,) = inputs
    for op, value in step.options["parts"]:
        result = program.real(step, op.upper(), [result, program.number(np.asarray(value, np.float32))])
    return result


def _average_pool(program: RealProgram, step: Step, inputs: Sequence[str]) -> str:
    (height, width), (down, across) = step.options["size"], step.options["strides"]
    options = {"filterHeight": height, "filterWidth": width, "strideH": down, "strideW": across}
    padding = step.options["padding"].upper()
    return program.real(step, "AVERAGE_POOL_2D", inputs, padding=padding, **options)


def _resize(program: RealProgram, step: Step, inputs: Sequence[str]) -> str:
    size = program.whole(f"{step.layer}/size", step.options["size"])
    return program.real(step, "RESIZE_BILINEAR", [*inputs, size], halfPixelCenters=True)


def _leaky_relu(program: RealProgram, step: Step, inputs: Sequence[str]) -> str:
    return program.real(step, "LEAKY_RELU", inputs, alpha=float(np.float32(step.options["slope"])))


EMITTERS: Mapping[str, tuple[Callable[[RealProgram, Step, Sequence[str]], str], str]] = {
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
