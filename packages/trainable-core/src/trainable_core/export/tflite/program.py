"""What is in a TensorFlow Lite file: operators, and the tensors between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trainable_core.export.graph import Array
from trainable_core.qparams import QParams

RANGES = {"int8": (-128, 127), "int4": (-8, 7), "int32": (-(2**31), 2**31 - 1)}
"""First and last code of each type of integers."""

PASSING = frozenset(
    {"DEPTH_TO_SPACE", "MAX_POOL_2D", "PAD", "REDUCE_MAX", "RESHAPE", "RESIZE_NEAREST_NEIGHBOR", "SLICE"}
)
"""Operators that pass on the codes of their first input."""


@dataclass(frozen=True)
class TfliteTensor:
    """A tensor of a file.

    Parameters
    ----------
    name : str
        Unique in the file.
    kind : {"int8", "int4", "int32", "float32"}
        Type of its elements.
    shape : tuple of int or None
        A dimension that is free is None.
    scale : float32 array, shape () or (C,), or None
        None where it is not quantized.
    zero_point : int32 array, shape of `scale`, or None
        Code of zero.
    axis : int or None
        Axis of the channels that have scales of their own.
    data : array or None
        The elements of a constant; those of ``int4`` are held as int8.
    """

    name: str
    kind: str
    shape: tuple[int | None, ...]
    scale: Array | None = None
    zero_point: Array | None = None
    axis: int | None = None
    data: Array | None = None

    @property
    def is_quantized(self) -> bool:
        """Whether its elements are codes."""
        return self.scale is not None

    @property
    def grid(self) -> QParams:
        """The grid of its codes: all codes of its type."""
        assert self.scale is not None  # noqa: S101 - asked of quantized tensors only
        assert self.zero_point is not None  # noqa: S101 - comes with the scale
        low, high = RANGES[self.kind]
        scale, zero_point = np.asarray(self.scale, np.float32), np.asarray(self.zero_point, np.int32)
        return QParams(scale, zero_point, low, high, self.axis)


@dataclass(frozen=True)
class TfliteOperator:
    """An operator of a file.

    Parameters
    ----------
    code : str
        Its name in the schema, such as ``CONV_2D``.
    inputs, outputs : tuple of str
        Names of tensors.
    options : mapping
        By their names in the schema; paddings and activation functions by name.
    """

    code: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Program:
    """The contents of a file.

    Parameters
    ----------
    tensors : dict of str to TfliteTensor
        By name.
    operators : list of TfliteOperator
        In the order in which they run.
    inputs, outputs : list of str
        Of the file, in order.
    metadata : str
        The document of `export`; empty where there is none.
    """

    tensors: dict[str, TfliteTensor] = field(default_factory=dict)
    operators: list[TfliteOperator] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    metadata: str = ""

    def makers(self) -> dict[str, TfliteOperator]:
        """Return the operator that makes each tensor."""
        return {name: operator for operator in self.operators for name in operator.outputs}

    def source(self, name: str) -> str:
        """Return the tensor whose codes another one passes on: in another shape or order, or some of them."""
        makers = self.makers()
        while name in makers and makers[name].code in PASSING:
            name = makers[name].inputs[0]
        return name

    def constants(self) -> dict[str, TfliteTensor]:
        """Return the tensors with data, by name."""
        return {name: tensor for name, tensor in self.tensors.items() if tensor.data is not None}
