"""From ``Quantize`` nodes to QuantizeLinear, Clip and DequantizeLinear with integer initializers.

What only moves values, as a reshape does, moves codes instead; so between two layers there is nothing but codes.
Whatever else reads a quantized tensor gets a DequantizeLinear of its own, and a runtime fuses it with the
QuantizeLinear nodes around into an integer kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trainable_core.export.containers import Container, for_activation, for_weight
from trainable_core.export.graph import Array, Graph, Node, attribute
from trainable_core.export.libraries import library
from trainable_core.export.passes import HIGH, LOW, MOVES, Records, calls_of, clip_ends, is_quantizer
from trainable_core.export.source import QuantizerRecord
from trainable_core.integer.requantization import INT32_MAX, INT32_MIN
from trainable_core.integer.tensor import Quantized
from trainable_core.reference import affine
from trainable_core.reference.bias import bias_scale

OPSET = 21
"""The first one whose QuantizeLinear takes 16-bit tensors."""

PRODUCTS = {"Conv": 0, "Gemm": 1}
"""Operations with a bias, and the axis of the output channels in their weight as it is stored."""

APPROXIMATED = frozenset(("LeakyRelu", "ReduceMean", "Sigmoid", "Softmax"))
"""Float operations that ONNX Runtime would replace, between quantized tensors, by tables and integers of its own. What
these give differs from the trained model in up to a tenth of the codes; a ``Max`` with the lowest number keeps them
float."""

SELECTS = MOVES | {"Split", "MaxPool", "Pad", "Relu", "Concat", "Gather", "Expand", "Tile", "Shape"}
"""Operations that can be done to codes."""


@dataclass(frozen=True)
class Coded:
    """A tensor whose codes stand under a name.

    Parameters
    ----------
    name : str
        Of the tensor of stored codes.
    box : Container
        How they are stored.
    scale, zero_point : str
        Names of the constants.
    constant : array or None
        The stored codes of a weight.
    """

    name: str
    box: Container
    scale: str
    zero_point: str
    constant: Array | None = None


@dataclass
class Lowered:
    """A lowered graph, and where in it everything is.

    Parameters
    ----------
    graph : Graph
        With QuantizeLinear and DequantizeLinear.
    weights : dict of str to list of str
        Names of the constants with a weight's stored codes, by the name of its quantizer.
    activations : dict of str to dict of int to str
        Names of the tensors with stored codes that a quantizer gave, by the number of its call.
    boxes : dict of str to Container
        How the codes under a name are stored.
    biases : dict of str to str
        Layer by the name of the constant with its bias's codes.
    kept_float : dict of str to str
        Why a node is not made of integers, by the name of its output.
    """

    graph: Graph
    weights: dict[str, list[str]] = field(default_factory=dict)
    activations: dict[str, dict[int, str]] = field(default_factory=dict)
    boxes: dict[str, Container] = field(default_factory=dict)
    biases: dict[str, str] = field(default_factory=dict)
    kept_float: dict[str, str] = field(default_factory=dict)


def lower(graph: Graph, records: Records) -> Lowered:
    """Return the graph with integers in the place of its ``Quantize`` nodes; `graph` itself is changed."""
    return _Lowering(graph, records).run()


class _Lowering:
    """One pass over the nodes, in order."""

    def __init__(self, graph: Graph, records: Records) -> None:
        self.graph, self.records = graph, records
        self.result = Lowered(graph)
        self.coded: dict[str, Coded] = {}
        self.made: list[Node] = []
        self.numbers: dict[tuple[Any, ...], str] = {}
        self.readers = graph.readers()
        self.moved: dict[str, Coded] = {}
        self.nodes_of_quantizers: list[Node] = []

    def run(self) -> Lowered:
        """Lower every node."""
        for node in self.graph.nodes:
            if is_quantizer(node):
                self._quantizer(node)
            elif not self._on_codes(node):
                self._in_float(node)
        for node in self.nodes_of_quantizers:
            for name, call, result in calls_of(node):
                if result in self.coded:
                    self.result.activations.setdefault(name, {})[call] = self.coded[result].name
        for info in self.graph.outputs:
            if info.name in self.coded:
                self.made.append(self._dequantize(self.coded[info.name], info.name))
        self.graph.nodes = self.made
        self.graph.opsets[""] = max(self.graph.opsets.get("", OPSET), OPSET)
        self.graph.sweep()
        self.result.boxes |= {each.name: each.box for each in [*self.coded.values(), *self.moved.values()]}
        self._forget_unused()
        self._tidy()
        return self.result

    def _tidy(self) -> None:
        """Give constants the names that those had which are not used any more, as of a weight before it was turned."""
        new: dict[str, str] = {}
        for name in self.graph.constants:
            wish, _, count = name.rpartition("_")
            if count.isdigit() and wish.endswith((".codes", ".scale", ".zero_point")):
                free = wish not in self.graph.constants and wish not in new.values()
                new |= {name: wish} if free else {}
        for old, name in new.items():
            self.graph.rename_reads(old, name)
            self.graph.constants[name] = self.graph.constants.pop(old)
        result = self.result
        result.weights = {key: [new.get(name, name) for name in names] for key, names in result.weights.items()}
        result.boxes = {new.get(name, name): box for name, box in result.boxes.items()}
        result.biases = {new.get(name, name): new.get(weight, weight) for name, weight in result.biases.items()}

    def _forget_unused(self) -> None:
        names = set(self.graph.constants) | {name for node in self.graph.nodes for name in node.output}
        for key, found in list(self.result.weights.items()):
            self.result.weights[key] = [name for name in found if name in names]
        for calls in self.result.activations.values():
            for call in [call for call, name in calls.items() if name not in names]:
                del calls[call]
        self.result.boxes = {name: box for name, box in self.result.boxes.items() if name in names}

    # ---- quantizers -------------------------------------------------------------------------------------------------

    def _quantizer(self, node: Node) -> None:
        record = self.records[attribute(node, "name")]
        result = node.output[0]
        if record.codes is not None:
            self.coded[result] = self._weight(record, result)
            return
        box = for_activation(record.grid)
        low = int(attribute(node, LOW, record.grid.quant_min)) - record.grid.quant_min
        high = int(attribute(node, HIGH, record.grid.quant_max)) - record.grid.quant_min
        scale, zero_point = self._numbers(record.name, box)
        source = node.input[0]
        value = self.graph.constant(source)
        if value is not None and record.grid.channels_axis is None:
            stored = np.clip(affine.quantize(value, record.grid) - record.grid.quant_min, low, high).astype(box.dtype)
            name = self.graph.add_constant(f"{record.name}.constant_codes", stored)
            self.coded[result] = Coded(name, box, scale, zero_point)
            self.nodes_of_quantizers.append(node)
            return
        before = self.coded.get(source)
        if before is not None:
            coded = self._again(node, before, box, (low, high))
        else:
            coded = self._fresh(node, source, box, (low, high), guarded=False)
        self.coded[result] = Coded(coded, box, scale, zero_point)
        self.nodes_of_quantizers.append(node)

    def _again(self, node: Node, before: Coded, box: Container, ends: tuple[int, int]) -> str:
        """Quantize what is quantized: on the same grid it is clipped, on another one it is dequantized first."""
        same = all(
            np.array_equal(getattr(before.box, each), getattr(box, each)) for each in ("scale", "zero_point", "dtype")
        )
        if same and ends[0] <= before.box.low and before.box.high <= ends[1]:
            return before.name
        if same and box.is_byte and before.box.per_tensor:
            return self._clipped(node, before.name, box, ends)
        value = self.graph.fresh(f"{before.name}_value")
        self.made.append(self._dequantize(before, value, node))
        return self._fresh(node, value, box, ends, guarded=True)

    def _fresh(self, node: Node, source: str, box: Container, ends: tuple[int, int], *, guarded: bool) -> str:
        """Quantize a float tensor; with a guard, runtimes don't merge it with a quantization before it."""
        info = np.iinfo(box.dtype)
        narrow = ends != (info.min, info.max)
        scale, zero_point = self._numbers(attribute(node, "name"), box)
        if narrow and not box.is_byte:  # runtimes clip no 16-bit integers
            limits = (np.array(ends, np.int64) - np.int64(box.zero_point)).astype(np.float32) * box.scale
            names = [
                self.graph.add_constant(f"{source}_{end}", each) for end, each in zip((LOW, HIGH), limits, strict=True)
            ]
            clipped = self.graph.fresh(f"{source}_clipped")
            self.made.append(self.graph.make("Clip", [source, *names], [clipped], like=node))
            source, narrow = clipped, False
        source = self._apart(node, source)
        codes = self.graph.fresh(f"{node.output[0]}_codes")
        self.made.append(self.graph.make("QuantizeLinear", [source, scale, zero_point], [codes], like=node))
        return self._clipped(node, codes, box, ends) if narrow or (guarded and box.is_byte) else codes

    def _apart(self, node: Node, source: str) -> str:
        """Return the tensor to quantize, with a node in between where a runtime would take an approximation instead."""
        before = next((each for each in reversed(self.made) if source in each.output), None)
        if before is None or before.domain or before.op_type not in APPROXIMATED:
            return source
        return self._kept(node, source)

    def _kept(self, node: Node, source: str) -> str:
        """Return a tensor's values behind a node that no runtime fuses with what is around it."""
        lowest = self._number(np.asarray(np.finfo(np.float32).min, np.float32))
        kept = self.graph.fresh(f"{source}_kept")
        self.made.append(self.graph.make("Max", [source, lowest], [kept], like=node))
        return kept

    def _clipped(self, node: Node, codes: str, box: Container, ends: tuple[int, int]) -> str:
        limits = [self._number(np.asarray(end, box.dtype)) for end in ends]
        name = self.graph.fresh(f"{node.output[0]}_clipped")
        self.made.append(self.graph.make("Clip", [codes, *limits], [name], like=node))
        return name

    def _weight(self, record: QuantizerRecord, result: str) -> Coded:
        assert record.codes is not None  # noqa: S101 - asked by the caller
        users = {user.op_type for user in self.readers.get(result, [])}
        if users == {"Gather"} and record.grid.channels_axis is None:  # a table: what is looked up is an activation
            box = for_activation(record.grid)
            stored: Array = (record.codes - record.grid.quant_min).astype(box.dtype)
        else:
            box, stored = for_weight(Quantized(record.codes, record.grid))
        return self._constant(record.name, stored, box)

    def _constant(self, name: str, stored: Array, box: Container) -> Coded:
        name = name.partition("#")[0]  # what was moved or spread is still the quantizer's
        key = (name, stored.shape, stored.tobytes())
        if key not in self.numbers:
            self.numbers[key] = self.graph.add_constant(f"{name}.codes", stored)
            self.result.weights.setdefault(name, []).append(self.numbers[key])
        coded = Coded(self.numbers[key], box, *self._numbers(name, box), constant=stored)
        self.moved[coded.name] = coded
        return coded

    def _numbers(self, name: str, box: Container) -> tuple[str, str]:
        """Return the names of a quantizer's scale and zero point."""
        key = (name, box.scale.tobytes(), box.zero_point.tobytes(), box.dtype, "numbers")
        if key not in self.numbers:
            self.numbers[key] = self.graph.add_constant(f"{name}.scale", np.asarray(box.scale, np.float32))
            self.numbers[(*key, "zero")] = self.graph.add_constant(f"{name}.zero_point", box.zero_point)
        return self.numbers[key], self.numbers[(*key, "zero")]

    def _number(self, value: Array) -> str:
        key = (value.dtype, value.shape, value.tobytes())
        if key not in self.numbers:
            self.numbers[key] = self.graph.add_constant(f"{value.dtype}_{value}", value)
        return self.numbers[key]

    def _dequantize(self, coded: Coded, result: str, like: Node = None) -> Node:
        axis = None if coded.box.axis is None else coded.box.axis
        return self.graph.make(
            "DequantizeLinear", [coded.name, coded.scale, coded.zero_point], [result], like=like, axis=axis
        )

    # ---- what moves codes -------------------------------------------------------------------------------------------

    def _on_codes(self, node: Node) -> bool:
        """Do to codes what a node does to values, where that is the same; return whether it is."""
        if node.domain or node.op_type not in SELECTS or not node.input or node.input[0] not in self.coded:
            return False
        source = self.coded[node.input[0]]
        if node.op_type == "Shape":
            node.input[0] = source.name
            self.made.append(node)
            return True
        if any(name in self.coded for name in list(node.input)[1:]) and node.op_type != "Concat":
            return False
        if source.constant is not None and node.op_type in MOVES | {"Split"}:
            return self._move_constant(node, source)
        if not source.box.per_tensor:
            return False
        inputs = self._code_inputs(node, source)
        if inputs is None:
            return False
        outputs = [self.graph.fresh(f"{name}_codes") for name in node.output if name]
        kind = "Clip" if node.op_type == "Relu" else node.op_type
        changed = self.graph.make(kind, inputs, outputs, like=node)
        if kind == node.op_type:
            changed.attribute.extend(node.attribute)
        self.made.append(changed)
        for name, codes in zip((each for each in node.output if each), outputs, strict=True):
            self.coded[name] = Coded(codes, source.box, source.scale, source.zero_point)
        return True

    def _code_inputs(self, node: Node, source: Coded) -> list[str] | None:
        """Return the inputs of a node that does to codes what it did to values; None where there is no such node."""
        box, inputs = source.box, [source.name, *list(node.input)[1:]]
        if node.op_type == "Concat":
            parts = [self.coded.get(name) for name in node.input]
            if not all(part is not None and _is_same(part, source) for part in parts):
                return None
            return [part.name for part in parts if part is not None]
        if node.op_type in ("Relu", "MaxPool") and not box.is_byte:
            return None
        if node.op_type == "MaxPool" and len(node.output) > 1:
            return None
        if node.op_type == "Relu":
            ends = clip_ends(self.graph, node)
            assert ends is not None  # noqa: S101 - a Relu has constant ends
            return [
                source.name,
                self._number(np.asarray(box.zero_point)),
                self._number(np.asarray(box.high, box.dtype)),
            ]
        if node.op_type == "Pad" and attribute(node, "mode", "constant") == "constant":
            value = self.graph.constant(inputs[2]) if len(inputs) > 2 and inputs[2] else np.zeros(())  # noqa: PLR2004
            if value is None or np.any(value):
                return None
            rest = inputs[3:]
            return [source.name, inputs[1], self._number(np.asarray(box.zero_point).reshape(())), *rest]
        return inputs

    def _move_constant(self, node: Node, source: Coded) -> bool:
        """Move the codes of a weight, and the scales of its channels with them, once and for all."""
        assert source.constant is not None  # noqa: S101 - asked by the caller
        arguments = [self.graph.constant(name) if name else None for name in list(node.input)[1:]]
        if any(value is None for value, name in zip(arguments, list(node.input)[1:], strict=True) if name):
            return False
        shape, box = source.constant.shape, source.box
        stored = evaluate(node, source.constant, arguments)
        number = {
            each: evaluate(node, _along(getattr(box, each), box.axis, shape), arguments)
            for each in ("scale", "zero_point")
        }
        parts = []
        for index in range(len(stored)):
            found = _channels(number["scale"][index], number["zero_point"][index])
            if found is None:
                return False
            scale, zero_point, axis = found
            parts.append(Container(box.dtype, scale, zero_point.astype(box.dtype), box.low, box.high, axis))
        name = self._quantizer_of(source)
        for index, (result, part) in enumerate(zip(node.output, parts, strict=True)):
            self.coded[result] = self._constant(name, np.ascontiguousarray(stored[index]), part)
        return True

    def _quantizer_of(self, coded: Coded) -> str:
        return next((name for name, codes in self.result.weights.items() if coded.name in codes), coded.name)

    # ---- everything else --------------------------------------------------------------------------------------------

    def _in_float(self, node: Node) -> None:
        """Keep a node, and give it dequantized values of what is quantized."""
        axis = PRODUCTS.get(node.op_type) if not node.domain else None
        if axis is not None and node.input[1] in self.coded:
            self._product(node, axis)
            return
        self._read(node)
        self.made.append(node)

    def _read(self, node: Node) -> None:
        """Let a node that stays read dequantized values."""
        mixed = node.op_type in ("Gemm", "MatMul") and node.input[0] not in self.coded
        for index, name in enumerate(node.input):
            if name in self.coded:
                coded = self.coded[name]
                value = self.graph.fresh(f"{coded.name}_value")
                self.made.append(self._dequantize(coded, value, node))
                if mixed and coded.constant is not None:  # a runtime would quantize the float operand to 8 bits
                    value = self._kept(node, value)
                node.input[index] = value

    def _product(self, node: Node, axis: int) -> None:
        """Keep a layer with weights, its weights transposed as kernels take them and its bias in integers."""
        x, weight = self.coded.get(node.input[0]), self.coded[node.input[1]]
        if node.op_type == "Gemm" and attribute(node, "transB", 0) and weight.constant is not None:
            weight = self._transposed(node, weight)
        bias = node.input[2] if len(node.input) > 2 else ""  # noqa: PLR2004 - the third input
        result = node.output[0]
        if bias and bias not in self.coded:
            self._bias(node, x, weight, bias, axis, result)
        self._read(node)
        self.made.append(node)
        if node.output[0] != result:  # the bias is added behind it
            self.made.append(self._addition(node, bias, result))

    def _transposed(self, node: Node, weight: Coded) -> Coded:
        assert weight.constant is not None  # noqa: S101 - asked by the caller
        box = weight.box
        axis = None if box.axis is None else 1 - box.axis
        turned = Container(box.dtype, box.scale, box.zero_point, box.low, box.high, axis)
        stored = np.ascontiguousarray(weight.constant.T)
        coded = self._constant(self._quantizer_of(weight), stored, turned)
        kept = [each for each in node.attribute if each.name != "transB"]
        del node.attribute[:]
        node.attribute.extend(kept)
        name = self.graph.fresh(f"{coded.name}_turned")
        self.coded[name] = coded
        node.input[1] = name
        return coded

    def _bias(self, node: Node, x: Coded | None, weight: Coded, bias: str, axis: int, result: str) -> None:
        """Give a layer its bias in integers, or add it behind the layer where it is on no grid of integers."""
        value = self.graph.constant(bias)
        if value is None or x is None or not x.box.per_tensor or weight.box.axis not in (None, axis):
            return
        scale = bias_scale(x.box.grid.scale, weight.box.grid.scale)
        codes = bias_codes(value, scale)
        if codes is None:
            self.result.kept_float[result] = OFF_GRID
            node.output[0] = self.graph.fresh(f"{result}_sums")
            del node.input[2]
            return
        name = self.graph.add_constant(f"{bias}.codes", codes)
        box = Container(
            codes.dtype, scale, np.zeros_like(scale, np.int32), INT32_MIN, INT32_MAX, 0 if scale.ndim else None
        )
        key = self.graph.add_constant(f"{bias}.scale", scale)
        zero = self.graph.add_constant(f"{bias}.zero_point", box.zero_point)
        coded = Coded(name, box, key, zero, codes)
        self.result.biases[name] = weight.name
        self.moved[name] = coded
        self.coded[self.graph.fresh(f"{name}_bias")] = coded
        node.input[2] = next(key for key, each in self.coded.items() if each is coded)

    def _addition(self, node: Node, bias: str, result: str) -> Node:
        value = self.graph.constants[bias]
        if node.op_type == "Conv":
            rank = self.graph.rank(result) or self.graph.rank(node.input[0]) or 4
            bias = self.graph.add_constant(f"{bias}_along", value.reshape(-1, *(1,) * (rank - 2)))
        return self.graph.make("Add", [node.output[0], bias], [result], like=node)


OFF_GRID = "its bias is not on the grid of the sums; `bias: int32` in the recipe trains it there"
"""Why the addition of a bias stays float."""


def bias_codes(bias: Array, scale: Array) -> Array | None:
    """Return the int32 codes of a bias on the grid of a layer's sums; None where a value is not on it.

    Examples
    --------
    >>> bias_codes(np.float32([1.5, -0.25]), np.float32(0.25)), bias_codes(np.float32([0.3]), np.float32(0.25))
    (array([ 6, -1], dtype=int32), None)
    """
    width = np.asarray(scale, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        steps = np.rint(bias / width)
        if not (np.abs(steps) < -float(INT32_MIN)).all():
            return None
        for _ in range(2):  # beyond 24 bits the quotient may be the number beside the code
            wrong = steps * width - bias
            steps = np.where(wrong > 0, np.nextafter(steps, np.float32(-np.inf)), steps)
            steps = np.where(wrong < 0, np.nextafter(steps, np.float32(np.inf)), steps)
        whole = np.array_equal(steps, np.rint(steps))
        return steps.astype(np.int32) if whole and np.array_equal(steps * width, bias) else None


def evaluate(node: Node, data: Array, arguments: list[Array | None]) -> list[Array]:
    """Return what a node that moves values gives for an array."""
    reference = library("onnx.reference", "an ONNX graph")
    names = list(node.input)
    feeds = {names[0]: data} | {n: v for n, v in zip(names[1:], arguments, strict=True) if n and v is not None}
    found: list[Array] = reference.ReferenceEvaluator(node).run(None, feeds)
    return found


def _along(numbers: Array, axis: int | None, shape: tuple[int, ...]) -> Array:
    """Return numbers of channels as an array of a weight's shape."""
    if axis is None:
        return np.broadcast_to(numbers, shape).copy()
    along = [1] * len(shape)
    along[axis] = -1
    return np.broadcast_to(np.reshape(numbers, along), shape).copy()


def _channels(scale: Array, zero_point: Array) -> tuple[Array, Array, int | None] | None:
    """Return the numbers of channels, and their axis, from arrays of a weight's shape; None where there is none."""
    for axis in (None, *range(scale.ndim)):
        index = tuple(slice(None) if i == axis else slice(0, 1) for i in range(scale.ndim))
        if all((each == each[index]).all() for each in (scale, zero_point)):
            shape = () if axis is None else (-1,)
            return scale[index].reshape(shape), zero_point[index].reshape(shape), axis
    return None


def _is_same(one: Coded, other: Coded) -> bool:
    return one.box.dtype == other.box.dtype and all(
        np.array_equal(getattr(one.box, each), getattr(other.box, each)) for each in ("scale", "zero_point", "axis")
    )
