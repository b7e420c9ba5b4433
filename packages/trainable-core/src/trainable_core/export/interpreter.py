"""NumPy on the integers of a written file: every code that a runtime must give.

The file is the document: its nodes say what is computed. Between DequantizeLinear and QuantizeLinear the operation is
carried out on codes (`trainable_core.integer`). What is float in the file is computed by onnx's reference
implementation, which promises no bits; so codes behind a float island can be given instead, as a runtime found them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainable_core.errors import InvalidArgumentError
from trainable_core.export.graph import Array, Graph, Node, attribute, used_by
from trainable_core.export.islands import FLOAT_RESULT, INTEGER
from trainable_core.export.libraries import library
from trainable_core.export.passes import window_of
from trainable_core.integer import certificate, elementwise, pooling, products
from trainable_core.integer.certificate import Certificate
from trainable_core.integer.products import Window
from trainable_core.integer.tensor import Quantized
from trainable_core.qparams import QParams
from trainable_core.reference.bias import bias_scale

Arrays = dict[str, Array]


@dataclass(frozen=True)
class Unit:
    """An operation between DequantizeLinear and QuantizeLinear, which runtimes fuse into an integer kernel.

    Parameters
    ----------
    node : onnx.NodeProto
        The operation.
    inputs : tuple of str
        Names of the codes that it reads; an empty one for an input that is left out.
    output : QParams or None
        Grid of its codes; None where it gives its sums in float.
    """

    node: Node
    inputs: tuple[str, ...]
    output: QParams | None


class Interpreter:
    """Computes a file's tensors.

    Parameters
    ----------
    graph : Graph
        Of the file.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.producers, self.readers = graph.producers(), graph.readers()
        self.outputs = graph.output_names()
        self.units: dict[str, Unit] = {}
        """By the name of the codes, or of the float sums, that a unit gives."""
        for node in graph.nodes:
            self._note(node)
        self._evaluators: dict[int, Any] = {}

    # ---- what is a unit ---------------------------------------------------------------------------------------------

    def _note(self, node: Node) -> None:
        if node.op_type == "QuantizeLinear":
            before = self.producers.get(node.input[0])
            if before is None or before.op_type not in INTEGER or before.domain:
                return
            if len(self.readers[node.input[0]]) > 1 or node.input[0] in self.outputs:
                return
            inputs = self._codes_of(before)
            if inputs is not None and self.grid_of(node).quant_max < 2**8:
                self.units[node.output[0]] = Unit(before, inputs, self.grid_of(node))
        elif node.op_type in FLOAT_RESULT and not node.domain:
            quantizers = [each for each in self.readers.get(node.output[0], []) if each.op_type == "QuantizeLinear"]
            inputs = self._codes_of(node)
            if inputs is not None and not quantizers:
                self.units[node.output[0]] = Unit(node, inputs, None)

    def _codes_of(self, node: Node) -> tuple[str, ...] | None:
        """Return the codes that an operation reads; None where it reads a float tensor or wide codes."""
        found = []
        for index, name in enumerate(node.input):
            before = self.producers.get(name)
            if not name:
                found.append("")
                continue
            if before is None or before.op_type != "DequantizeLinear":
                return None
            zero = self.graph.constants[before.input[2]]
            is_bias = node.op_type in ("Conv", "Gemm") and index == 2  # noqa: PLR2004 - the third input
            if zero.dtype.itemsize != (4 if is_bias else 1):
                return None
            if node.op_type == "Conv" and index == 1 and np.unique(zero).size > 1:
                return None
            found.append(name)
        if node.op_type == "Gemm" and (attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0)) != (1.0, 1.0):
            return None
        if node.op_type in ("Conv", "AveragePool") and window_of(node, 1) is None:
            return None
        return tuple(found)

    def grid_of(self, node: Node) -> QParams:
        """Return the grid of a QuantizeLinear or DequantizeLinear node: all codes of its dtype."""
        scale, zero = self.graph.constants[node.input[1]], self.graph.constants[node.input[2]]
        info = np.iinfo(zero.dtype)
        axis = int(attribute(node, "axis", 1)) if scale.ndim else None
        return QParams(scale, np.asarray(zero, np.int32), int(info.min), int(info.max), axis)

    # ---- running ----------------------------------------------------------------------------------------------------

    def run(
        self, feeds: Mapping[str, Array], wanted: Collection[str], given: Mapping[str, Array] | None = None
    ) -> Arrays:
        """Return the tensors that are wanted.

        Parameters
        ----------
        feeds : mapping of str to array
            The graph's inputs.
        wanted : collection of str
            Names of tensors.
        given : mapping of str to array, optional
            Tensors that are not to be computed, because a runtime's are to be taken.
        """
        known: Arrays = {**self.graph.constants, **feeds, **(given or {})}
        stack = list(wanted)
        while stack:
            name = stack[-1]
            if name in known:
                stack.pop()
                continue
            needed = self._needed(name)
            missing = [each for each in needed if each not in known]
            if missing:
                stack += missing
                continue
            known |= self._computed(name, known)
            stack.pop()
        return {name: known[name] for name in wanted}

    def _needed(self, name: str) -> list[str]:
        unit = self.units.get(name)
        if unit is not None:
            return [self.producers[each].input[0] for each in unit.inputs if each]
        node = self.producers.get(name)
        if node is None:
            raise InvalidArgumentError("the graph", f"it has no tensor {name!r}")
        return list(used_by(node))

    def _computed(self, name: str, known: Arrays) -> Arrays:
        unit = self.units.get(name)
        if unit is not None:
            return {name: self._unit(unit, known)}
        node = self.producers[name]
        if node.op_type == "DequantizeLinear":
            return {name: Quantized(known[node.input[0]].astype(np.int32), self.grid_of(node)).values}
        if node.op_type == "QuantizeLinear":
            codes = elementwise.quantize(known[node.input[0]], self.grid_of(node)).codes
            return {name: codes.astype(self.graph.constants[node.input[2]].dtype)}
        first = known[node.input[0]] if node.input and node.input[0] else None
        if node.op_type == "MaxPool" and first is not None and first.dtype.kind in "iu":
            return {name: _max_pool(node, first)}
        return self._reference(node, known)

    def _reference(self, node: Node, known: Arrays) -> Arrays:
        """Return what onnx's reference implementation gives."""
        evaluator = self._evaluators.get(id(node))
        if evaluator is None:
            reference = library("onnx.reference", "reading an ONNX graph")
            evaluator = self._evaluators[id(node)] = reference.ReferenceEvaluator(node)
        feeds = {name: known[name] for name in used_by(node)}
        results = evaluator.run(None, feeds)
        return {name: np.asarray(value) for name, value in zip(node.output, results, strict=False) if name}

    def operands(self, unit: Unit, known: Mapping[str, Array]) -> list[Quantized | None]:
        """Return the operands of a unit; None for an input that is left out."""
        found: list[Quantized | None] = []
        for name in unit.inputs:
            node = self.producers.get(name)
            codes = None if node is None else known[node.input[0]]
            found.append(
                None if node is None or codes is None else Quantized(codes.astype(np.int32), self.grid_of(node))
            )
        return found

    def _unit(self, unit: Unit, known: Arrays) -> Array:
        operands = self.operands(unit, known)
        if unit.output is None:
            return _sums(unit.node, operands)
        result = _KERNELS[unit.node.op_type](unit.node, operands, unit.output)
        info = np.uint8 if unit.output.quant_min == 0 else np.int8
        return result.codes.astype(info)

    def certificate(self, name: str) -> Certificate | None:
        """Return the certificate of a unit; None where there is none for its operation."""
        unit = self.units.get(name)
        if unit is None:
            return None
        grids = [self.grid_of(self.producers[each]) for each in unit.inputs if each]
        if unit.node.op_type == "Add" and unit.output is not None:
            return certificate.of_sum(grids, unit.output)
        if unit.node.op_type not in ("Conv", "Gemm", "MatMul"):
            return None
        constants = self.graph.constants
        codes = [self.producers[each].input[0] for each in unit.inputs if each]
        if codes[1] not in constants:
            return None
        weight = Quantized(constants[codes[1]].astype(np.int32), grids[1])
        bias = constants[codes[2]] if len(codes) > 2 else None  # noqa: PLR2004 - the third input
        x = self._reached(codes[0], grids[0])
        axis = 0 if unit.node.op_type == "Conv" or attribute(unit.node, "transB", 0) else 1
        return certificate.of_products(x, weight, bias, unit.output, axis)

    def _reached(self, codes: str, grid: QParams) -> QParams:
        """Return the grid of codes with the ends that a Clip before leaves of it."""
        node = self.producers.get(codes)
        while node is not None and node.op_type not in ("Clip", "QuantizeLinear"):
            node = self.producers.get(node.input[0]) if node.input else None
        if node is None or node.op_type != "Clip":
            return grid
        low, high = (int(self.graph.constants[name]) for name in list(node.input)[1:3])
        return QParams(grid.scale, grid.zero_point, low, high, grid.channels_axis)


def _bias(operands: Sequence[Quantized | None]) -> Array | None:
    bias = operands[2] if len(operands) > 2 else None  # noqa: PLR2004 - the third operand
    return None if bias is None else bias.codes


def _both(operands: Sequence[Quantized | None]) -> tuple[Quantized, Quantized]:
    first, second = operands[:2]
    assert first is not None  # noqa: S101 - ONNX requires both
    assert second is not None  # noqa: S101
    return first, second


def _first(operands: Sequence[Quantized | None]) -> Quantized:
    assert operands[0] is not None  # noqa: S101 - ONNX requires it
    return operands[0]


def _turned(node: Node, weight: Quantized) -> Quantized:
    """Return the weight of a ``Gemm`` as a linear layer has it: (outputs, inputs)."""
    if attribute(node, "transB", 0):
        return weight
    grid = weight.grid
    axis = None if grid.channels_axis is None else 1 - grid.channels_axis % 2
    return Quantized(weight.codes.T, QParams(grid.scale, grid.zero_point, grid.quant_min, grid.quant_max, axis))


def _gemm(node: Node, operands: Sequence[Quantized | None], output: QParams) -> Quantized:
    x, weight = _both(operands)
    x = x if not attribute(node, "transA", 0) else x.moved(np.transpose)
    return products.linear(x, _turned(node, weight), _bias(operands), output)


def _sums(node: Node, operands: Sequence[Quantized | None]) -> Array:
    """Return the sums of a product in float: ``float32(sum) * float32(s_x * s_w)``."""
    x, weight = _both(operands)
    if node.op_type == "Gemm":
        turned = _turned(node, weight)
        sums = products.with_bias(products.matmul_codes(x.counted, turned.counted.T), _bias(operands), -1)
    else:
        sums = products.with_bias(products.matmul_codes(x.counted, weight.counted), None, -1)
    return np.asarray(sums.astype(np.float32) * bias_scale(x.grid.scale, weight.grid.scale))


def _conv(node: Node, operands: Sequence[Quantized | None], output: QParams) -> Quantized:
    x, weight = _both(operands)
    window = window_of(node, x.codes.ndim - 2)
    assert window is not None  # noqa: S101 - units have no padding that is computed
    return products.convolution(x, weight, _bias(operands), output, window)


def _window(node: Node, rank: int) -> tuple[tuple[int, ...], Window, bool]:
    window = window_of(node, rank)
    assert window is not None  # noqa: S101 - as above
    return tuple(attribute(node, "kernel_shape")), window, bool(attribute(node, "ceil_mode", 0))


def _max_pool(node: Node, codes: Array) -> Array:
    grid = QParams(
        np.ones((), np.float32), np.zeros((), np.int32), int(np.iinfo(codes.dtype).min), int(np.iinfo(codes.dtype).max)
    )
    kernel, window, ceil = _window(node, codes.ndim - 2)
    return pooling.max_pool(Quantized(codes.astype(np.int32), grid), kernel, window, ceil=ceil).codes.astype(
        codes.dtype
    )


def _average_pool(node: Node, operands: Sequence[Quantized | None], output: QParams) -> Quantized:
    x = _first(operands)
    kernel, window, ceil = _window(node, x.codes.ndim - 2)
    counts = bool(attribute(node, "count_include_pad", 0))
    return pooling.average_pool(x, kernel, output, window, ceil=ceil, count_include_pad=counts)


def _concat(node: Node, operands: Sequence[Quantized | None], output: QParams) -> Quantized:
    return elementwise.concatenate(
        [each for each in operands if each is not None], output, int(attribute(node, "axis"))
    )


_KERNELS: dict[str, Callable[[Node, Sequence[Quantized | None], QParams], Quantized]] = {
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": lambda _, operands, output: products.matmul(*_both(operands), output),
    "Add": lambda _, operands, output: elementwise.add(*_both(operands), output),
    "Mul": lambda _, operands, output: elementwise.multiply(*_both(operands), output),
    "Concat": _concat,
    "AveragePool": _average_pool,
    "GlobalAveragePool": lambda _, operands, output: pooling.global_average_pool(_first(operands), output),
}
