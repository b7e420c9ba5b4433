"""Which nodes of a lowered graph stay float, and why."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainable_core.export.containers import Container
from trainable_core.export.graph import Graph, Node, attribute, layer_of
from trainable_core.export.lowering import Lowered

INTEGER = frozenset(("Conv", "Gemm", "MatMul", "Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool"))
"""Operations between DequantizeLinear and QuantizeLinear for which ONNX Runtime has an integer kernel that is
predicted."""

FLOAT_RESULT = frozenset(("Gemm", "MatMul"))
"""Those that may give their integer sums in float."""

NO_FLOAT = frozenset(
    (
        "ArgMax", "ArgMin", "Equal", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual", "NonZero",
        "Not", "Shape", "Size", "And", "Or", "Xor",
    )
)  # fmt: skip
"""Operations whose result is not made of real numbers, whatever they read."""

FLOAT_TYPES = frozenset((1, 10, 11, 16))
"""ONNX's numbers for float32, float16, float64 and bfloat16."""


@dataclass(frozen=True)
class Island:
    """A node that stays float.

    Parameters
    ----------
    layer : str
        The layer whose code made it, or its own name.
    op : str
        Its operation.
    reason : str
        Why it is not made of integers.
    """

    layer: str
    op: str
    reason: str


def find(lowered: Lowered) -> list[Island]:
    """Return the nodes that stay float, in the graph's order."""
    return _Search(lowered).run()


class _Search:
    def __init__(self, lowered: Lowered) -> None:
        self.lowered, self.graph = lowered, lowered.graph
        self.producers, self.readers = self.graph.producers(), self.graph.readers()
        self.outputs = self.graph.output_names()
        self.floats = {each.name for each in self.graph.inputs if each.type.tensor_type.elem_type in FLOAT_TYPES}
        self.floats |= {name for name, value in self.graph.constants.items() if value.dtype.kind == "f"}

    def run(self) -> list[Island]:
        """Look at every node."""
        found = []
        for node in self.graph.nodes:
            if not self._is_float(node):
                continue
            self.floats.update(node.output)
            if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                continue
            reason = "" if is_barrier(self.graph, node) else self._reason(node)
            if reason:
                found.append(Island(layer_of(node) or node.name, node.op_type, reason))
        return found

    def _is_float(self, node: Node) -> bool:
        if node.op_type == "DequantizeLinear":
            return True
        if node.op_type in NO_FLOAT or node.op_type == "QuantizeLinear":
            return False
        if node.op_type == "Cast":
            return int(attribute(node, "to")) in FLOAT_TYPES
        if node.op_type in ("ConstantOfShape", "Range"):
            return False
        return any(name in self.floats for name in node.input[: 1 if node.op_type == "Gather" else None])

    def _reason(self, node: Node) -> str:
        """Return why a node is not computed in integers; empty where it is."""
        told = self.lowered.kept_float.get(node.output[0])
        if told:
            return told
        if node.domain or node.op_type not in INTEGER:
            return f"{node.op_type} is computed in float; there is no integer kernel for it"
        return unfit(self.graph, node, self.producers, self.lowered.boxes) or self._result(node)

    def _result(self, node: Node) -> str:
        """Return what is wrong with who reads a node's result; empty where one quantizer does."""
        readers = self.readers.get(node.output[0], [])
        quantizers = [each for each in readers if each.op_type == "QuantizeLinear"]
        if len(quantizers) == 1 and len(readers) == 1 and node.output[0] not in self.outputs:
            box = self.lowered.boxes.get(quantizers[0].output[0])
            return wide(box) if box is not None else ""
        if node.op_type in FLOAT_RESULT and not quantizers:
            return ""
        if not quantizers:
            return "its output is not quantized"
        return f"its output is read by {len(readers)} quantizers and others; an integer kernel gives one"


def is_barrier(graph: Graph, node: Node) -> bool:
    """Return whether a node only keeps a runtime from replacing the float operation before it."""
    if node.op_type != "Max" or len(node.input) != 2:  # noqa: PLR2004 - a value and the lowest number
        return False
    lowest = graph.constants.get(node.input[1])
    return lowest is not None and lowest.size == 1 and bool(lowest == np.finfo(np.float32).min)


def unfit(graph: Graph, node: Node, producers: dict[str, Node], boxes: dict[str, Container]) -> str:
    """Return why no integer kernel takes a node's inputs; empty where one does."""
    count = {"Conv": 3, "Gemm": 3}.get(node.op_type, len(node.input))
    for index, name in enumerate(list(node.input)[:count]):
        if not name:
            continue
        before = producers.get(name)
        if before is None or before.op_type != "DequantizeLinear":
            what = "its constant operand" if name in graph.constants else "what it reads"
            return f"{what} is not quantized"
        box = boxes[before.input[0]]
        problem = (
            _weight(node, box)
            if index == 1
            else wide(box)
            if index == 0 or node.op_type not in ("Conv", "Gemm")
            else ""
        )
        if problem:
            return problem
    if node.op_type == "Gemm" and (attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0)) != (1.0, 1.0):
        return "its result is scaled"
    if node.op_type == "Conv" and attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return "its padding depends on the size of its input"
    return ""


def _weight(node: Node, box: Container) -> str:
    """Return why no integer kernel takes a second operand; empty where one does."""
    if box.is_byte:
        return ""
    if node.op_type == "Conv" and not box.per_tensor:
        return "the channels of its weight have different zero points, and their codes do not fit into 8 bits without"
    return wide(box)


def wide(box: Container) -> str:
    """Return why no integer kernel takes codes of this width; empty where one does."""
    return "" if box.is_byte else f"its codes are {box.dtype.itemsize * 8}-bit, and integer kernels take 8 bits"
