"""NumPy's integer arithmetic against ONNX Runtime's kernels: every code equal."""

from __future__ import annotations

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="onnx comes with the extra `onnx`")
pytest.importorskip("onnxruntime", reason="ONNX Runtime comes with the extra `onnx`")

from trainable_core.export.graph import Graph  # noqa: E402 - needs onnx
from trainable_core.export.interpreter import Interpreter  # noqa: E402
from trainable_core.export.runtime import Processor, Runtime  # noqa: E402
from trainable_core.export.verification import VerificationReport  # noqa: E402
from trainable_core.integer.elementwise import add  # noqa: E402
from trainable_core.integer.tensor import Quantized  # noqa: E402
from trainable_core.qparams import QParams  # noqa: E402


class Builder:
    """A Q/DQ graph by hand, with random scales, zero points and weights."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes, self.constants, self.inputs, self.count = [], [], [], 0

    def name(self) -> str:
        self.count += 1
        return f"t{self.count}"

    def constant(self, value) -> str:
        name = self.name()
        self.constants.append(onnx.numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, op: str, *inputs: str, **attributes) -> str:
        name = self.name()
        self.nodes.append(onnx.helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def numbers(self, low: float = 0.01, high: float = 0.06):
        self.scale = np.float32(self.random.uniform(low, high))
        return self.constant(self.scale), self.constant(np.uint8(self.random.integers(0, 256)))

    def quantized(self, source: str, low: float = 0.01, high: float = 0.06) -> str:
        return self.node("QuantizeLinear", source, *self.numbers(low, high))

    def activation(self, *shape: int) -> str:
        name = self.name()
        self.inputs.append((name, shape))
        numbers = self.numbers()
        codes = self.node("QuantizeLinear", name, *numbers)
        return self.node("DequantizeLinear", codes, *numbers)

    def weight(self, shape, axis=None) -> str:
        count = () if axis is None else (shape[axis],)
        self.weight_scale = self.random.uniform(0.001, 0.02, count).astype(np.float32)
        codes = self.constant(self.random.integers(-128, 128, shape).astype(np.int8))
        numbers = self.constant(self.weight_scale), self.constant(np.zeros(count, np.int8))
        return self.node("DequantizeLinear", codes, *numbers, **({} if axis is None else {"axis": axis}))

    def bias(self, count: int, scale) -> str:
        scale = np.broadcast_to(np.float32(scale) * self.weight_scale, (count,)).copy()
        codes = self.constant(self.random.integers(-20000, 20000, count).astype(np.int32))
        return self.node(
            "DequantizeLinear", codes, self.constant(scale), self.constant(np.zeros(count, np.int32)), axis=0
        )

    def compare(self, result: str, kernel: str, batches: int = 2, kind: int | None = None) -> None:
        helper = onnx.helper
        inputs = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in self.inputs]
        kind = onnx.TensorProto.UINT8 if kind is None else kind
        outputs = [helper.make_tensor_value_info(result, kind, None)]
        graph = helper.make_graph(self.nodes, "hand-made", inputs, outputs, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        runtime, interpreter = Runtime(model), Interpreter(Graph(model))
        assert runtime.kernels[result] == kernel
        assert result in interpreter.units
        for _ in range(batches):
            feeds = {name: self.random.normal(size=shape).astype(np.float32) * 3 for name, shape in self.inputs}
            assert np.array_equal(runtime.run(feeds)[result], interpreter.run(feeds, [result])[result])


CONVOLUTIONS = {
    "padded": ((2, 8, 9, 9), (16, 8, 3, 3), {"pads": [1, 1, 1, 1]}),
    "strided": ((2, 8, 9, 9), (16, 8, 3, 3), {"strides": [2, 2]}),
    "depthwise": ((2, 8, 9, 9), (8, 1, 3, 3), {"group": 8, "pads": [1, 1, 1, 1]}),
    "grouped": ((2, 8, 9, 9), (12, 4, 3, 3), {"group": 2}),
    "dilated": ((2, 4, 9, 9), (6, 4, 3, 3), {"dilations": [2, 2], "pads": [2, 1, 2, 1]}),
    "pointwise": ((2, 32, 7, 7), (64, 32, 1, 1), {}),
    "one axis": ((2, 8, 20), (16, 8, 5), {"pads": [2, 2]}),
    "three axes": ((1, 3, 5, 5, 5), (4, 3, 3, 3, 3), {}),
    "long sums": ((1, 256, 5, 5), (32, 256, 3, 3), {}),
}


@pytest.mark.parametrize("axis", [0, None], ids=["per channel", "per tensor"])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions(case, axis):
    shape, weights, attributes = CONVOLUTIONS[case]
    build = Builder(len(case))
    x = build.activation(*shape)
    scale = build.scale
    inputs = x, build.weight(weights, axis), build.bias(weights[0], scale)
    build.compare(build.quantized(build.node("Conv", *inputs, **attributes), 0.1, 0.5), "QLinearConv")


@pytest.mark.parametrize("axis", [1, None], ids=["per channel", "per tensor"])
def test_matrix_products(axis):
    build = Builder(1)
    x = build.activation(5, 40)
    scale = build.scale
    inputs = x, build.weight((40, 24), axis), build.bias(24, scale)
    build.compare(build.quantized(build.node("Gemm", *inputs), 0.1, 0.5), "QGemm")
    build = Builder(2)
    x = build.activation(5, 40)
    scale = build.scale
    inputs = x, build.weight((40, 24), axis), build.bias(24, scale)
    build.compare(build.node("Gemm", *inputs), "QGemm", kind=onnx.TensorProto.FLOAT)
    build = Builder(3)
    x = build.activation(3, 5, 40)
    build.compare(build.quantized(build.node("MatMul", x, build.weight((40, 24), axis)), 0.1, 0.5), "QLinearMatMul")


def test_a_product_of_two_activations():
    build = Builder(4)
    x, y = build.activation(2, 3, 5, 8), build.activation(2, 3, 8, 6)
    build.compare(build.quantized(build.node("MatMul", x, y), 0.05, 0.2), "QLinearMatMul")


@pytest.mark.parametrize(("op", "kernel"), [("Add", "QLinearAdd"), ("Mul", "QLinearMul")])
@pytest.mark.parametrize("other", [(2, 4, 5, 5), (2, 4, 1, 1)], ids=["same shape", "broadcast"])
def test_elementwise(op, kernel, other):
    for seed in range(4):
        build = Builder(seed)
        x, y = build.activation(2, 4, 5, 5), build.activation(*other)
        build.compare(build.quantized(build.node(op, x, y)), kernel, batches=5)


def test_concatenation():
    build = Builder(5)
    x, y = build.activation(2, 3, 4, 4), build.activation(2, 5, 4, 4)
    build.compare(build.quantized(build.node("Concat", x, y, axis=1)), "QLinearConcat")


@pytest.mark.parametrize("ceil", [0, 1])
@pytest.mark.parametrize("counts", [0, 1])
def test_average_pooling(ceil, counts):
    build = Builder(6)
    attributes = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}
    pooled = build.node(
        "AveragePool", build.activation(2, 5, 8, 8), **attributes, ceil_mode=ceil, count_include_pad=counts
    )
    build.compare(build.quantized(pooled), "QLinearAveragePool")


@pytest.mark.parametrize("size", [4, 5, 7])
def test_global_average_pooling(size):
    build = Builder(7)
    pooled = build.node("GlobalAveragePool", build.activation(3, 40, size, size))
    build.compare(build.quantized(pooled, 0.003, 0.02), "QLinearGlobalAveragePool")


def sums(scales, zeros, a, b):
    """Return what ONNX Runtime's QLinearAdd gives for codes."""
    import onnxruntime

    values = [np.float32(scales[0]), np.uint8(zeros[0]), np.float32(scales[1]), np.uint8(zeros[1])]
    values += [np.float32(scales[2]), np.uint8(zeros[2])]
    names = ["a_scale", "a_zero", "b_scale", "b_zero", "y_scale", "y_zero"]
    constants = [onnx.numpy_helper.from_array(np.asarray(v), n) for n, v in zip(names, values, strict=True)]
    inputs = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, [len(a)]) for name in "ab"]
    order = ["a", *names[:2], "b", *names[2:]]
    node = onnx.helper.make_node("QLinearAdd", order, ["y"], domain="com.microsoft")
    outputs = [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.UINT8, [len(a)])]
    graph = onnx.helper.make_graph([node], "sum", inputs, outputs, constants)
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"a": a, "b": b})[0]


def test_every_pair_of_codes_is_added_alike():
    random = np.random.default_rng(8)
    a, b = (each.reshape(-1).astype(np.uint8) for each in np.meshgrid(range(256), range(256)))
    for _ in range(8):
        scales, zeros = random.uniform(0.005, 0.06, 3).astype(np.float32), random.integers(0, 256, 3)
        grids = [QParams(scale, np.int32(zero), 0, 255) for scale, zero in zip(scales, zeros, strict=True)]
        x, y = (Quantized(codes.astype(np.int32), to) for codes, to in zip((a, b), grids, strict=False))
        assert np.array_equal(add(x, y, grids[2]).codes, sums(scales, zeros, a, b))


def test_a_processor_without_vnni_needs_the_sessions_entry():
    """Sums saturate there by default; where they do, the report of `verify` says what a session needs."""
    assert Processor("onnxruntime 1.32", ("avx2",)).saturates
    assert Processor("onnxruntime 1.32", ("avx2", "avx512f")).saturates
    for flags in (("avx2", "avx_vnni"), ("avx2", "avx512f", "avx512_vnni"), ("asimddp",), ()):
        assert not Processor("onnxruntime 1.32", flags).saturates
    assert not Processor("LiteRT 2.3", ("avx2",)).saturates
    for flags in (("avx2",), ("avx2", "avx_vnni")):
        found = VerificationReport("model.onnx", processor=Processor("onnxruntime 1.32", flags))
        assert ("session.x64quantprecision=1" in found.summary()) is (flags == ("avx2",))
