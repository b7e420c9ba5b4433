"""A network, whose channels come last, as an ONNX graph, whose channels come first.

Images are turned where they enter and leave the model, and around what puts their axes together. What follows is the
same as for a backend that traces its models: see `qdq`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from trainable_core.errors import UnsupportedConfigError
from trainable_core.export.graph import Array
from trainable_core.export.libraries import library
from trainable_core.export.network import OPERATIONS, Network, Shape, Step
from trainable_core.export.source import DOMAIN, QUANTIZE, QuantizerRecord, Source

IMAGE = 4
"""Number of dimensions of what is turned: rows, height, width, channels."""

FIRST, LAST = (0, 3, 1, 2), (0, 2, 3, 1)
"""Axes of an image, from channels last to channels first and back."""

OPSET = 20


def source_of(network: Network) -> Source:
    """Return a network as the writers of ONNX files take a model.

    Raises
    ------
    UnsupportedConfigError
        When it has an operation that ONNX has no counterpart for here; names the layer.
    MissingLibraryError
        When onnx is not installed.
    """
    return _Turning(network).source()


class _Turning:
    def __init__(self, network: Network) -> None:
        self.onnx = library("onnx", "export")
        self.network = network
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.records: dict[str, QuantizerRecord] = {}
        self.names: dict[str, str] = {}
        self.weights: dict[str, Shape] = {}
        self.taken: set[str] = set()

    def source(self) -> Source:
        """Return the whole model."""
        network, helper = self.network, self.onnx.helper
        inputs, outputs = [], []
        for name in network.inputs:
            inputs.append(self._info(name, network.shapes[name]))
            self.taken.add(name)
            self.names[name] = name
            if self._is_image(name):
                self.names[name] = self._node("Transpose", [name], f"{name}/turned", perm=FIRST)
        for step in network.steps:
            self._step(step)
        for name in network.outputs:
            result = f"{name}/output"
            if self._is_image(name):
                self._node("Transpose", [self.names[name]], result, perm=LAST)
            else:
                self._node("Identity", [self.names[name]], result)
            outputs.append(self._info(self.nodes[-1].output[0], network.shapes[name]))
        graph = helper.make_graph(self.nodes, "model", inputs, outputs, self.constants, value_info=self._shapes())
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
        model = helper.make_model(graph, opset_imports=opsets)
        activations = {name: each for name, each in network.quantizers.items() if each.codes is None}
        return Source(model, {**activations, **self.records}, network.recipe, network.versions, network.layers)

    def _is_image(self, name: str) -> bool:
        return len(self.network.shapes[name]) == IMAGE

    def _info(self, name: str, shape: Shape) -> Any:
        sizes = [f"{name}_{axis}" if size is None else size for axis, size in enumerate(shape)]
        return self.onnx.helper.make_tensor_value_info(name, self.onnx.TensorProto.FLOAT, sizes)

    def _shapes(self) -> list[Any]:
        """Return what is known of the tensors inside."""
        found = [self._info(name, shape) for name, shape in self.weights.items()]
        for name, made in self.names.items():
            shape = self.network.shapes[name]
            turned = tuple(shape[axis] for axis in FIRST) if len(shape) == IMAGE else shape
            if made not in self.network.inputs:
                found.append(self._info(made, turned))
        return found

    def _fresh(self, wish: str) -> str:
        name, count = wish, 1
        while name in self.taken:
            count += 1
            name = f"{wish}_{count}"
        self.taken.add(name)
        return name

    def _node(self, op: str, inputs: Sequence[str], wish: str, layer: str = "", domain: str = "", **facts: Any) -> str:
        result = self._fresh(wish)
        made = self.onnx.helper.make_node(op, list(inputs), [result], domain=domain)
        # not by the arguments above, among which `name` is that of the node
        made.attribute.extend(self.onnx.helper.make_attribute(key, value) for key, value in facts.items())
        made.name = f"{op}_{result}"
        if layer:
            scopes = self.onnx.StringStringEntryProto()
            scopes.key, scopes.value = "name_scopes", str([layer, made.name])
            made.metadata_props.append(scopes)
        self.nodes.append(made)
        return result

    def _constant(self, wish: str, value: Array) -> str:
        name = self._fresh(wish)
        self.constants.append(self.onnx.numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    # ---- steps ------------------------------------------------------------------------------------------------------

    def _step(self, step: Step) -> None:
        if step.op not in OPERATIONS or step.obstacle:
            problem = step.obstacle or f"{step.op} is not written from a Keras graph"
            raise UnsupportedConfigError(step.layer, f"it can't be an ONNX node: {problem}")
        given = [self.names[name] for name in step.inputs]
        self.names[step.output] = _MAKERS[step.op](self, step, given)

    def _quantize(self, step: Step, given: list[str]) -> str:
        name = step.options["quantizer"]
        return self._node(QUANTIZE, given, step.output, step.layer, DOMAIN, name=name)

    def _weight(self, step: Step, turn: Callable[[Array], Array], axis: int, repeats: int = 1) -> str:
        """Add a layer's weight with its quantizer."""
        record = step.weight
        if record is None:
            raise UnsupportedConfigError(step.layer, "its weights are not quantized, and are not told")
        assert record.codes is not None  # noqa: S101 - a weight's record
        grid, values = record.grid, record.codes
        along = grid.along(values.ndim)
        real = (values - along.zero_point).astype(np.float32) * along.scale
        if grid.channels_axis is not None:
            grid = replace(
                grid,
                scale=np.repeat(grid.scale, repeats),
                zero_point=np.repeat(grid.zero_point, repeats),
                channels_axis=axis,
            )
        codes = np.ascontiguousarray(turn(record.codes))
        self.records[record.name] = replace(record, grid=grid, codes=codes)
        constant = self._constant(f"{record.name}/real", turn(np.asarray(real, np.float32)))
        result = self._node(QUANTIZE, [constant], record.name, step.layer, DOMAIN, name=record.name)
        self.weights[result] = codes.shape
        return result

    def _bias(self, step: Step) -> list[str]:
        return [] if step.bias is None else [self._constant(f"{step.layer}.bias", step.bias)]

    def _pads(self, step: Step, kernel: Sequence[int]) -> dict[str, Any]:
        """Return the attributes of padding: explicit where the size of the input is known."""
        if step.options["padding"] == "valid":
            return {}
        sizes = self.network.shapes[step.inputs[0]][1:3]
        if None in sizes:
            return {"auto_pad": "SAME_UPPER"}
        dilations = step.options.get("dilations", (1, 1))
        begins, ends = [], []
        for size, k, s, d in zip(sizes, kernel, step.options["strides"], dilations, strict=True):
            known = int(size or 0)
            total = max((-(-known // s) - 1) * s + (k - 1) * d + 1 - known, 0)
            begins.append(total // 2)
            ends.append(total - total // 2)
        return {"pads": [*begins, *ends]}

    def _conv(self, step: Step, given: list[str]) -> str:
        options = step.options
        groups = int(options["groups"])
        assert step.weight is None or step.weight.codes is not None  # noqa: S101 - a weight's record
        shape = (0, 0, 0, 0) if step.weight is None or step.weight.codes is None else step.weight.codes.shape
        if step.op == "depthwise_conv":
            _, _, channels, multiplier = shape

            def turn(w: Array) -> Array:
                return np.asarray(w.transpose(2, 3, 0, 1).reshape(channels * multiplier, 1, *w.shape[:2]))

            groups, weight = channels, self._weight(step, turn, 0, multiplier)
        else:
            weight = self._weight(step, lambda w: w.transpose(3, 2, 0, 1), 0)
        facts = {"strides": options["strides"], "dilations": options["dilations"], "group": groups}
        facts |= {"kernel_shape": shape[:2], **self._pads(step, shape[:2])}
        return self._node("Conv", [*given, weight, *self._bias(step)], step.output, step.layer, **facts)

    def _conv_transpose(self, step: Step, given: list[str]) -> str:
        weight = self._weight(step, lambda w: w.transpose(3, 2, 0, 1), 1)
        record = self.records[self.nodes[-1].output[0]]
        assert record.codes is not None  # noqa: S101 - as above
        kernel, options = record.codes.shape[2:], step.options
        before, after = (self.network.shapes[name][1:3] for name in (step.inputs[0], step.output))
        begins, ends, more = [], [], []
        for n, out, k, s, d in zip(before, after, kernel, options["strides"], options["dilations"], strict=True):
            whole = (int(n or 0) - 1) * s + (k - 1) * d + 1
            cut = whole - int(out or 0) if n is not None and out is not None else max(k - s, 0)
            begin = max(cut, 0) // 2 if options["padding"] == "same" else 0
            begins.append(begin)
            ends.append(max(cut, 0) - begin)
            more.append(max(-cut, 0))
        facts = {"strides": options["strides"], "dilations": options["dilations"], "kernel_shape": kernel}
        facts |= {"pads": [*begins, *ends], "output_padding": more}
        return self._node("ConvTranspose", [*given, weight, *self._bias(step)], step.output, step.layer, **facts)

    def _linear(self, step: Step, given: list[str]) -> str:
        source = given[0]
        if self._is_image(step.inputs[0]):
            source = self._node("Transpose", [source], f"{step.layer}/last", step.layer, perm=LAST)
        if len(self.network.shapes[step.inputs[0]]) == 2:  # noqa: PLR2004 - rows and channels
            weight = self._weight(step, np.transpose, 0)
            return self._node("Gemm", [source, weight, *self._bias(step)], step.output, step.layer, transB=1)
        result = self._node("MatMul", [source, self._weight(step, lambda w: w, 1)], f"{step.layer}/product", step.layer)
        if step.bias is not None:
            result = self._node("Add", [result, *self._bias(step)], f"{step.layer}/sum", step.layer)
        return self._first(step, result)

    def _first(self, step: Step, name: str) -> str:
        """Return a result with channels last as the other images are."""
        if not self._is_image(step.output):
            return name
        return self._node("Transpose", [name], step.output, step.layer, perm=FIRST)

    def _elementwise(self, step: Step, given: list[str]) -> str:
        result = given[0]
        for index, other in enumerate(given[1:], start=2):
            wish = step.output if index == len(given) else f"{step.layer}/part"
            result = self._node({"add": "Add", "mul": "Mul"}[step.op], [result, other], wish, step.layer)
        return result

    def _axis(self, name: str, axis: int) -> int:
        """Return the place of an axis in the tensor as it stands in the graph."""
        rank = len(self.network.shapes[name])
        return FIRST.index(axis % rank) if rank == IMAGE else axis % rank

    def _cat(self, step: Step, given: list[str]) -> str:
        return self._node("Concat", given, step.output, step.layer, axis=self._axis(step.output, step.options["axis"]))

    def _pool(self, step: Step, given: list[str]) -> str:
        kernel = step.options["size"]
        facts = {"kernel_shape": kernel, "strides": step.options["strides"], **self._pads(step, kernel)}
        op = {"max_pool": "MaxPool", "average_pool": "AveragePool"}[step.op]
        return self._node(op, given, step.output, step.layer, **facts)

    def _mean(self, step: Step, given: list[str]) -> str:
        axes = sorted(self._axis(step.inputs[0], axis) for axis in step.options["axes"])
        constant = self._constant(f"{step.layer}/axes", np.asarray(axes, np.int64))
        keeps = int(step.options["keepdims"])
        return self._node("ReduceMean", [given[0], constant], step.output, step.layer, keepdims=keeps)

    def _clip(self, step: Step, given: list[str]) -> str:
        low, high = step.options["low"], step.options["high"]
        if (low, high) == (0.0, None):
            return self._node("Relu", given, step.output, step.layer)
        ends = [
            "" if end is None else self._constant(f"{step.layer}/end", np.asarray(end, np.float32))
            for end in (low, high)
        ]
        return self._node("Clip", [given[0], *ends], step.output, step.layer)

    def _pad(self, step: Step, given: list[str]) -> str:
        pads = [step.options["pads"][axis] for axis in FIRST]
        flat = [each[side] for side in (0, 1) for each in pads]
        constant = self._constant(f"{step.layer}/pads", np.asarray(flat, np.int64))
        return self._node("Pad", [given[0], constant], step.output, step.layer)

    def _reshape(self, step: Step, given: list[str]) -> str:
        source = given[0]
        if self._is_image(step.inputs[0]):
            source = self._node("Transpose", [source], f"{step.layer}/last", step.layer, perm=LAST)
        shape = [0, *(-1 if size is None else size for size in step.options["shape"])]
        constant = self._constant(f"{step.layer}/shape", np.asarray(shape, np.int64))
        wish = f"{step.layer}/reshaped" if self._is_image(step.output) else step.output
        return self._first(step, self._node("Reshape", [source, constant], wish, step.layer))

    def _softmax(self, step: Step, given: list[str]) -> str:
        axis = self._axis(step.inputs[0], step.options["axis"])
        return self._node("Softmax", given, step.output, step.layer, axis=axis)

    def _crop(self, step: Step, given: list[str]) -> str:
        begins = [int(step.options["begins"][axis]) for axis in FIRST]
        sizes = [self.network.shapes[step.output][axis] for axis in FIRST]
        cut = [axis for axis in (2, 3) if sizes[axis] is not None]
        starts = np.asarray([begins[axis] for axis in cut], np.int64)
        ends = np.asarray([begins[axis] + int(sizes[axis] or 0) for axis in cut], np.int64)
        numbers = {"starts": starts, "ends": ends, "axes": np.asarray(cut, np.int64)}
        constants = [self._constant(f"{step.layer}/{key}", value) for key, value in numbers.items()]
        return self._node("Slice", [given[0], *constants], step.output, step.layer)

    def _max(self, step: Step, given: list[str]) -> str:
        axes = sorted(self._axis(step.inputs[0], axis) for axis in step.options["axes"])
        constant = self._constant(f"{step.layer}/axes", np.asarray(axes, np.int64))
        keeps = int(step.options["keepdims"])
        return self._node("ReduceMax", [given[0], constant], step.output, step.layer, keepdims=keeps)

    def _resize(self, step: Step, given: list[str]) -> str:
        sizes = [
            int(each or 0) / int(old or 1)
            for each, old in zip(
                self.network.shapes[step.output][1:3], self.network.shapes[step.inputs[0]][1:3], strict=True
            )
        ]
        scales = self._constant(f"{step.layer}/scales", np.asarray([1, 1, *sizes], np.float32))
        nearest = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        facts = nearest if step.op == "resize_nearest" else {"mode": "linear"}
        return self._node("Resize", [given[0], "", scales], step.output, step.layer, **facts)

    def _arithmetic(self, step: Step, given: list[str]) -> str:
        result = given[0]
        for index, (op, value) in enumerate(step.options["parts"], start=1):
            number = np.asarray(value, np.float32)
            if number.size > 1 and self._is_image(step.output):
                number = number.reshape(-1, 1, 1)
            constant = self._constant(f"{step.layer}/{op}", number)
            wish = step.output if index == len(step.options["parts"]) else f"{step.layer}/part"
            result = self._node(op.capitalize(), [result, constant], wish, step.layer)
        return result

    def _function(self, step: Step, given: list[str]) -> str:
        facts: dict[str, Any] = {}
        if step.op == "leaky_relu":
            facts = {"alpha": float(step.options["slope"])}
        if step.op == "hard_sigmoid":
            facts = {"alpha": 1 / 6, "beta": 0.5}
        if step.op == "silu":
            gate = self._node("Sigmoid", given, f"{step.layer}/gate", step.layer)
            return self._node("Mul", [*given, gate], step.output, step.layer)
        return self._node(_FUNCTIONS[step.op], given, step.output, step.layer, **facts)


_FUNCTIONS = {
    "elu": "Elu", "gelu": "Gelu", "hard_sigmoid": "HardSigmoid", "hard_swish": "HardSwish", "leaky_relu": "LeakyRelu",
    "sigmoid": "Sigmoid", "silu": "", "tanh": "Tanh",
}  # fmt: skip
"""Activation functions, by the name of the node that is one."""

_MAKERS: dict[str, Callable[[_Turning, Step, list[str]], str]] = {
    "add": _Turning._elementwise,  # noqa: SLF001 - its own
    "arithmetic": _Turning._arithmetic,  # noqa: SLF001 - its own
    "average_pool": _Turning._pool,  # noqa: SLF001 - its own
    "cat": _Turning._cat,  # noqa: SLF001 - its own
    "clip": _Turning._clip,  # noqa: SLF001 - its own
    "conv": _Turning._conv,  # noqa: SLF001 - its own
    "conv_transpose": _Turning._conv_transpose,  # noqa: SLF001 - its own
    "depthwise_conv": _Turning._conv,  # noqa: SLF001 - its own
    "crop": _Turning._crop,  # noqa: SLF001 - its own
    "linear": _Turning._linear,  # noqa: SLF001 - its own
    "max": _Turning._max,  # noqa: SLF001 - its own
    "max_pool": _Turning._pool,  # noqa: SLF001 - its own
    "mean": _Turning._mean,  # noqa: SLF001 - its own
    "mul": _Turning._elementwise,  # noqa: SLF001 - its own
    "pad": _Turning._pad,  # noqa: SLF001 - its own
    "quantize": _Turning._quantize,  # noqa: SLF001 - its own
    "resize_bilinear": _Turning._resize,  # noqa: SLF001 - its own
    "resize_nearest": _Turning._resize,  # noqa: SLF001 - its own
    "reshape": _Turning._reshape,  # noqa: SLF001 - its own
    "softmax": _Turning._softmax,  # noqa: SLF001 - its own
    **dict.fromkeys(_FUNCTIONS, _Turning._function),  # noqa: SLF001 - its own
}
