"""TensorFlow Lite files: what becomes of a model's operations, and what is refused."""

from dataclasses import replace
from importlib.util import find_spec
from math import erf

import numpy as np
import pytest

from trainable_core.enums import TieRule
from trainable_core.errors import DocumentError, IntegerRangeError, UnsupportedConfigError
from trainable_core.export.network import Network, Step
from trainable_core.export.source import QuantizerRecord
from trainable_core.export.tflite import document
from trainable_core.export.tflite.flatbuffer import from_bytes, packed, unpacked
from trainable_core.export.tflite.interpreter import Interpreter
from trainable_core.export.tflite.lowering import lower
from trainable_core.integer import lite
from trainable_core.qparams import QParams

WINDOW = {"strides": (1, 1), "dilations": (1, 1), "padding": "valid", "groups": 1}


class Builder:
    """A network by hand."""

    def __init__(self, *shape: int) -> None:
        self.shapes, self.steps, self.quantizers = {"x": (None, *shape)}, [], {}

    def step(self, op, shape, *inputs, layer="", **facts):
        name = f"{op}{len(self.steps)}"
        self.shapes[name] = (None, *shape)
        self.steps.append(Step(op, layer or name, inputs, name, **facts))
        return name

    def quantize(self, source, scale, zero=0, low=-128):
        name = f"q{len(self.steps)}: output"
        grid = QParams(np.float32(scale), np.int32(zero), low, low + 255)
        self.quantizers[name] = QuantizerRecord(name, source, "output", 8, grid)
        return self.step("quantize", self.shapes[source][1:], source, options={"quantizer": name})

    def weight(self, codes, scale, n_bits=8, axis=None):
        codes = np.asarray(codes, np.int32)
        scale = np.asarray(scale, np.float32)
        grid = QParams(scale, np.zeros(scale.shape, np.int32), -(2 ** (n_bits - 1)), 2 ** (n_bits - 1) - 1, axis)
        name = f"w{len(self.steps)}.kernel"
        self.quantizers[name] = QuantizerRecord(name, f"w{len(self.steps)}", "kernel", n_bits, grid, codes)
        return self.quantizers[name]

    def network(self, *outputs):
        return Network(["x"], outputs, self.steps, self.shapes, self.quantizers, TieRule.HALF_UP)


def linear(**facts) -> Builder:
    """Return a network of one linear layer: 2 inputs, 3 outputs, one scale for each."""
    b = Builder(2)
    x = b.quantize("x", 0.5)
    weight = b.weight([[1, 2, 3], [4, 5, -6]], [0.5, 0.25, 0.125], axis=1)
    bias = np.float32([0.25, -0.25, 0.0625])
    b.quantize(b.step("linear", (3,), x, **{"weight": weight, "bias": bias, **facts}), 1.0)
    return b


def computed(network, x, **options):
    """Return the codes of a network's first output, by NumPy on its program."""
    program = lower(network, **options).program
    (name,) = program.outputs
    return Interpreter(program).run({"x": np.asarray(x, np.int8)}, [name], {})[name].tolist()


def test_a_linear_layer_is_a_convolution_with_the_models_own_numbers():
    b = linear()
    lowered = lower(b.network("quantize2"))
    assert [each.code for each in lowered.program.operators] == ["RESHAPE", "CONV_2D", "RESHAPE"]
    tensors = lowered.program.tensors
    weight, bias = (tensors[name] for name in lowered.program.operators[1].inputs[1:])
    assert weight.data.reshape(3, 2).tolist() == [[1, 4], [2, 5], [3, -6]]
    assert weight.scale.tolist() == [0.5, 0.25, 0.125]
    assert weight.axis == 0
    assert bias.data.tolist() == [1, -2, 1]  # 0.25 / (0.5 * 0.5) and so on
    assert bias.scale.tolist() == [0.25, 0.125, 0.0625]
    # codes 2 and 3: (2 + 12 + 1) / 4 = 3.75, (4 + 15 - 2) / 8 = 2.125, (6 - 18 + 1) / 16 = -0.6875
    assert computed(b.network("quantize2"), [[2, 3]]) == [[4, 2, -1]]


def test_one_scale_for_all_outputs_is_a_fully_connected_operator():
    b = Builder(2)
    weight = b.weight([[1], [3]], 0.5)
    b.quantize(b.step("linear", (1,), b.quantize("x", 0.5), weight=weight), 1.0)
    (operator,) = lower(b.network("quantize2")).program.operators
    assert operator.code == "FULLY_CONNECTED"
    assert computed(b.network("quantize2"), [[1, 3]]) == [[2]]  # 10 / 4 is a tie, which goes to the even code


def test_codes_of_a_grid_from_zero_are_shifted():
    b = Builder(2)
    b.quantize(b.quantize("x", 0.5, 10, 0), 0.25, 20, 0)
    program = lower(b.network("quantize1")).program
    assert int(program.tensors["x"].zero_point) == 10 - 128
    assert [each.code for each in program.operators] == ["MUL"]
    assert computed(b.network("quantize1"), [[-118, -117]]) == [[20 - 128, 22 - 128]]


@pytest.mark.parametrize(
    ("low", "high", "scale", "zero", "expected"),
    [
        (0.0, None, 0.1, 0, "RELU"),
        (0.0, None, 0.1, -128, "NONE"),
        (0.0, 6.0, 0.1, 0, "RELU6"),
        (0.0, 6.0, 0.01, 0, "RELU"),
        (0.0, 6.0, 0.01, -128, "NONE"),
    ],
)
def test_a_clamp_becomes_an_activation_function_where_codes_would_leave_it(low, high, scale, zero, expected):
    b = Builder(2)
    total = b.step("add", (2,), *[b.quantize("x", 0.5)] * 2)
    b.quantize(b.step("clip", (2,), total, options={"low": low, "high": high}), scale, zero)
    (operator,) = lower(b.network("quantize3")).program.operators
    assert operator.options["fusedActivationFunction"] == expected


def test_a_quantizer_behind_what_moves_values_stands_before_it():
    b = Builder(2, 2, 1)
    padded = b.step("pad", (4, 4, 1), "x", options={"pads": ((0, 0), (1, 1), (1, 1), (0, 0))})
    b.quantize(padded, 0.5, 3)
    assert [each.code for each in lower(b.network("quantize1")).program.operators] == ["PAD"]
    assert np.array(computed(b.network("quantize1"), np.full((1, 2, 2, 1), 9)))[0, :2, :2, 0].tolist() == [
        [3, 3],
        [3, 9],
    ]


def test_an_average_pool_and_a_transposed_convolution():
    b = Builder(2, 2, 1)
    x = b.quantize("x", 1.0)
    pool = {"size": (2, 2), "strides": (2, 2), "padding": "valid"}
    b.quantize(b.step("average_pool", (1, 1, 1), x, options=pool), 0.5)
    assert computed(b.network("quantize2"), np.int8([1, 2, 3, 4]).reshape(1, 2, 2, 1)) == [[[[5]]]]  # 2.5 / 0.5
    b = Builder(1, 2, 1)
    weight = b.weight([[[[1]], [[2]], [[3]]]], 1.0)  # a kernel of 1 by 3
    options = {**WINDOW, "strides": (2, 2), "padding": "valid"}
    made = b.step("conv_transpose", (2, 5, 1), b.quantize("x", 1.0), weight=weight, options=options)
    b.quantize(made, 1.0)
    # 10 and 20, two apart, each times (1, 2, 3); the second row is what a kernel of one row leaves of two
    expected = [[[[10], [20], [50], [40], [60]], [[0]] * 5]]
    assert computed(b.network("quantize2"), np.int8([10, 20]).reshape(1, 1, 2, 1)) == expected


def test_weights_of_4_bits_are_packed_on_demand():
    b = Builder(2)
    weight = b.weight([[7, -8], [1, -1]], [0.5, 0.5], n_bits=4, axis=1)
    b.quantize(b.step("linear", (2,), b.quantize("x", 0.5), weight=weight), 1.0)
    kinds = {}
    for pack in (False, True):
        program = lower(b.network("quantize2"), packed=pack).program
        kinds[pack] = program.tensors[weight.name].kind
    assert kinds == {False: "int8", True: "int4"}
    codes = np.int8([7, -8, 1, -1, 3])
    assert packed(codes).tolist() == [0x87, 0xF1, 0x03]
    assert unpacked(packed(codes), 5).tolist() == codes.tolist()


def _refused(build, *facts):
    return pytest.param(build, facts, id=" ".join(facts))


def _one(op, **facts):
    def build():
        b = Builder(2, 2, 2)
        b.quantize(b.step(op, (2, 2, 2), b.quantize("x", 0.5), layer="here", **facts), 0.5)
        return b.network("quantize2")

    return build


def _float_input():
    b = Builder(2)
    b.step("add", (2,), "x", "x", layer="here")
    return b.network("add0")


def _float_output():
    b = Builder(2)
    x = b.quantize("x", 0.5)
    b.step("add", (2,), x, x, layer="here")
    return b.network("add1")


def _clamped_at(low, high, scale=0.1):
    def build():
        b = Builder(2)
        total = b.step("add", (2,), *[b.quantize("x", 0.5)] * 2, layer="here")
        b.quantize(b.step("clip", (2,), total, options={"low": low, "high": high}, layer="here"), scale)
        return b.network("quantize3")

    return build


def _tanh_of_a_sum():
    b = Builder(2)
    x = b.quantize("x", 0.5)
    b.quantize(b.step("tanh", (2,), b.step("add", (2,), x, x, layer="here")), 0.1)
    return b.network("quantize3")


def _tiny_output():
    b = Builder(2)
    b.quantize(b.step("linear", (1,), b.quantize("x", 0.5), weight=b.weight([[1], [3]], 1.0)), 2.0**-9)
    return b.network("quantize2")


REFUSED = [
    _refused(_one("selu"), "here", "selu"),
    _refused(_one("mul", obstacle="it is written in Latin"), "here", "Latin"),
    _refused(_one("mul"), "here", "two operands"),
    _refused(_one("conv", options=WINDOW), "here", "weights are not quantized"),
    _refused(_one("softmax", options={"axis": 1}), "here", "another axis"),
    _refused(_float_input, "here", "not quantized"),
    _refused(_float_output, "here", "not quantized", "placement"),
    _refused(_clamped_at(-1.0, None), "here", "clamps at -1"),
    _refused(_clamped_at(0.0, 5.0), "here", "clamps at 5"),
    _refused(_clamped_at(0.0, 6.0, 4.0 / 3.0), "here", "half way"),  # 6 / (4 / 3) is 4.5
    _refused(_tanh_of_a_sum, "here", "not quantized"),
    _refused(_tiny_output, "q2: output", "256", "nearly always zero"),
    _refused(lambda: linear(bias=np.float32([0.3, 0, 0])).network("quantize2"), "bias: int32"),
]


@pytest.mark.parametrize(("build", "facts"), REFUSED)
def test_what_integer_kernels_can_not_compute_is_refused(build, facts):
    with pytest.raises(UnsupportedConfigError) as caught:
        lower(build())
    assert all(fact in str(caught.value) for fact in facts)


def test_a_bias_beyond_int32_is_refused():
    with pytest.raises(IntegerRangeError):
        lower(linear(bias=np.float32([2.0**31, 0, 0])).network("quantize2"))


@pytest.mark.parametrize("content", [b"", b"TFL3", b"    ONNX....", b"\x10\0\0\0TFL3" + b"\xff" * 40])
def test_what_is_no_file_is_refused(content, tmp_path):
    pytest.importorskip("ai_edge_litert", reason="the schema comes with the extra `tflite`")
    (tmp_path / "model.tflite").write_bytes(content)
    with pytest.raises(DocumentError):
        document.read(tmp_path / "model.tflite")


def test_a_file_holds_what_was_written_and_a_change_is_named(tmp_path):
    pytest.importorskip("ai_edge_litert", reason="the schema comes with the extra `tflite`")
    network = linear().network("quantize2")
    report = document.write(network, tmp_path / "model.tflite")
    program, content = document.read(tmp_path / "model.tflite")
    assert report.size == len(content)
    wanted = document.build(network)
    assert document.compared(program, wanted) == {}
    assert document.changes_in(program, document.metadata_of(program, "")) == {}
    name = next(name for name in program.tensors if name.endswith("kernel"))
    tensor = program.tensors[name]
    for changed in (
        replace(tensor, data=tensor.data + (np.arange(6).reshape(tensor.shape) == 4).astype(np.int8)),
        replace(tensor, scale=np.nextafter(tensor.scale, np.float32(1))),
        replace(tensor, axis=1),
    ):
        program.tensors[name] = changed
        assert list(document.compared(program, wanted)) == [name]
        assert list(document.changes_in(program, document.metadata_of(program, ""))) == [name]
    with pytest.raises(DocumentError, match="not written by"):
        document.metadata_of(from_bytes(_without_metadata(wanted), ""), "")


def _without_metadata(program):
    from trainable_core.export.tflite.flatbuffer import to_bytes

    return to_bytes(replace(program, metadata=""))


needs_runtime = pytest.mark.skipif(
    not any(find_spec(name) for name in ("ai_edge_litert", "tensorflow")), reason="LiteRT comes with the extra `tflite`"
)


@needs_runtime
@pytest.mark.parametrize("kernels", ["default", "builtin", "reference"])
@pytest.mark.parametrize("seed", [0, 1])
def test_numpy_predicts_every_code_of_the_runtime(kernels, seed, tmp_path):
    from trainable_core.export.tflite.verification import Verification

    document.write(everything(np.random.default_rng(seed)), tmp_path / "model.tflite")
    verification = Verification(tmp_path / "model.tflite", kernels)
    random = np.random.default_rng(seed)
    for rows in (1, 7):
        verification.run({"x": random.integers(-128, 128, (rows, 7, 7, 3)).astype(np.int8)})
    report = verification.report
    assert {row.layer: row.numpy.different for row in report.rows if row.numpy} == {
        row.layer: 0 for row in report.rows if row.numpy
    }
    assert sum(row.numpy.codes for row in report.rows if row.numpy) > 2000
    family = {"default": lite.XNNPACK, "builtin": lite.OPTIMIZED, "reference": lite.REFERENCE}[kernels]
    assert family in {row.kernel.partition("(")[2].rstrip(")") for row in report.rows}
    assert report.ok


def everything(random) -> Network:
    """Return a network with each operation that is written, with random scales, zero points and codes."""
    b = Builder(7, 7, 3)

    def quantize(source):
        return b.quantize(source, random.uniform(0.01, 0.05), int(random.integers(-128, 128)))

    def weight(shape, axis):
        scale = random.uniform(0.002, 0.01, shape[axis])
        return b.weight(random.integers(-127, 128, shape), scale, axis=axis)

    window = {**WINDOW, "padding": "same"}
    first = quantize(b.step("conv", (7, 7, 4), quantize("x"), weight=weight((3, 3, 3, 4), 3), options=window))
    clip = {"options": {"low": 0.0, "high": None}}
    other = b.step("depthwise_conv", (7, 7, 4), first, weight=weight((3, 3, 4, 1), 2), options=window)
    other = quantize(b.step("clip", (7, 7, 4), other, **clip))
    total = quantize(b.step("clip", (7, 7, 4), b.step("add", (7, 7, 4), first, other), **clip))
    joined = quantize(b.step("cat", (7, 7, 8), total, first, options={"axis": -1}))
    pool = {"size": (3, 3), "strides": (2, 2)}
    largest = b.step("max_pool", (4, 4, 8), joined, options={**pool, "padding": "same"})
    mean = quantize(b.step("average_pool", (1, 1, 8), largest, options={**pool, "padding": "valid"}))
    options = {**WINDOW, "strides": (2, 2)}
    wide = quantize(b.step("conv_transpose", (3, 3, 2), mean, weight=weight((3, 3, 2, 8), 2), options=options))
    scaled = quantize(b.step("mul", (3, 3, 2), wide, wide))
    averaged = quantize(b.step("mean", (2,), scaled, options={"axes": (1, 2), "keepdims": False}))
    wider = b.step("resize_nearest", (7, 5, 2), scaled, options={"size": (7, 5)})
    scaled = b.step("crop", (3, 3, 2), wider, options={"begins": (0, 3, 1, 0)})
    largest = quantize(b.step("max", (2,), scaled, options={"axes": (1, 2), "keepdims": False}))
    flat = b.step("reshape", (18,), scaled, options={"shape": (18,)})
    one = quantize(b.step("linear", (2,), flat, weight=weight((18, 2), 1)))
    both = quantize(b.step("add", (2,), one, averaged))
    return b.network(quantize(b.step("mul", (2,), both, largest)))


X = np.arange(-128, 128)
SCALE, RESULT = 0.0625, 0.03125

FUNCTIONS = {
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "hard_sigmoid": lambda x: np.clip(x + 3, 0, 6) / 6,
    "hard_swish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "leaky_relu": lambda x: np.where(x < 0, 0.3 * x, x),
    "elu": lambda x: np.where(x < 0, np.expm1(x), x),
    "gelu": lambda x: x * 0.5 * (1 + np.vectorize(erf)(x / np.sqrt(2))),
    "arithmetic": lambda x: (x * 0.3 + 0.7) / 1.7,
    "add": lambda x: 3 * x,
}


@needs_runtime
@pytest.mark.parametrize("op", FUNCTIONS)
def test_an_island_in_float_gives_the_nearest_code(op, tmp_path):
    """A float32 result of a few roundings is within 2**-20 of it or of 1: a 2**-15th of a step of the result."""
    from trainable_core.export.tflite.verification import Verification

    options = {"leaky_relu": {"slope": 0.3}, "arithmetic": {"parts": (("mul", 0.3), ("add", 0.7), ("div", 1.7))}}
    b = Builder(1)
    given = b.quantize("x", SCALE)
    inputs = [given] * (3 if op == "add" else 1)
    b.quantize(b.step(op, (1,), *inputs, layer="here", options=options.get(op, {})), RESULT, 5)
    report = document.write(b.network("quantize2"), tmp_path / "model.tflite")
    assert [each.layer for each in report.islands] == ["here"]
    verification = Verification(tmp_path / "model.tflite")
    (found,) = verification.run({"x": X[:, np.newaxis].astype(np.int8)}).values()
    steps = FUNCTIONS[op](X * SCALE) / RESULT
    clear = np.abs(steps - np.floor(steps) - 0.5) > 2.0**-15 * np.maximum(1, np.abs(steps))
    expected = np.clip(np.rint(steps) + 5, -128, 127) - 5
    assert clear.sum() > 200
    np.testing.assert_array_equal(found[clear, 0] / RESULT, expected[clear])
    assert np.abs(found[:, 0] / RESULT - expected).max() <= 1
    assert verification.report.ok


@needs_runtime
def test_a_layer_with_a_function_of_its_own_is_computed_in_float_of_its_integer_weights(tmp_path):
    from trainable_core.export.tflite.verification import Verification

    b = Builder(2)
    x = b.quantize("x", 0.5)
    weight = b.weight([[1, 2, 3], [4, 5, -6]], [0.5, 0.25, 0.125], axis=1)
    sums = b.step("linear", (3,), x, layer="here", weight=weight, bias=np.float32([0.25, -0.25, 0.0625]))
    b.quantize(b.step("sigmoid", (3,), sums, layer="here"), 2.0**-8, -128)
    report = document.write(b.network("quantize3"), tmp_path / "model.tflite")
    assert [(each.layer, each.op) for each in report.islands] == [("here", "SIGMOID")]
    verification = Verification(tmp_path / "model.tflite")
    (found,) = verification.run({"x": np.int8([[2, 3]])}).values()
    sums = np.array([2 + 12 + 1, 4 + 15 - 2, 6 - 18 + 1]) * [0.25, 0.125, 0.0625]
    np.testing.assert_array_equal(found[0], np.rint(256 / (1 + np.exp(-sums))) / 256)
    assert verification.program.tensors[weight.name].data.tolist() == [[1, 4], [2, 5], [3, -6]]


@needs_runtime
def test_an_input_on_two_grids_is_an_input_in_float(tmp_path):
    from trainable_core.export.tflite.verification import Verification

    b = Builder(2)
    padded = b.step("pad", (2,), "x", options={"pads": ((0, 0), (0, 0))})
    b.quantize(b.step("add", (2,), b.quantize("x", 0.5), b.quantize(padded, 0.25)), 0.25)
    document.write(b.network("quantize4"), tmp_path / "model.tflite")
    verification = Verification(tmp_path / "model.tflite")
    assert verification.program.tensors["x"].kind == "float32"
    (found,) = verification.run({"x": np.float32([[0.8, -0.3]])}).values()
    assert found.tolist() == [[1.75, -0.75]]  # 1.0 and 0.75, -0.5 and -0.25
    assert verification.report.ok


@needs_runtime
def test_what_is_read_in_float_is_an_input_in_float(tmp_path):
    from trainable_core.export.tflite.verification import Verification

    b = Builder(2)
    scaled = b.step("arithmetic", (2,), "x", options={"parts": (("mul", np.float32([0.5, 0.25])), ("add", 1.0))})
    b.quantize(scaled, 0.125)
    document.write(b.network("quantize1"), tmp_path / "model.tflite")
    verification = Verification(tmp_path / "model.tflite")
    assert verification.program.tensors["x"].kind == "float32"
    (found,) = verification.run({"x": np.float32([[0.7, -3.3]])}).values()
    assert found.tolist() == [[1.375, 0.125]]  # 1.35 and 0.175 in eighths


@pytest.mark.parametrize(("zero", "expected"), [(0, [[0, 5, 0, 2]]), (-128, [[-3, 5, -1, 2]])])
def test_a_clamped_input_is_taken_on_the_grid_behind_the_clamp(zero, expected):
    b = Builder(4)
    b.quantize(b.step("clip", (4,), "x", options={"low": 0.0, "high": None}), 1.0, zero)
    assert computed(b.network("quantize1"), [[-3, 5, -1, 2]]) == expected  # all codes of the other grid are positive


def test_a_clamp_behind_what_moves_values_holds():
    b = Builder(4)
    total = b.step("add", (4,), *[b.quantize("x", 0.5)] * 2)
    moved = b.step("reshape", (2, 2), total, options={"shape": (2, 2)})
    b.quantize(b.step("clip", (2, 2), moved, options={"low": 0.0, "high": None}), 1.0)
    assert computed(b.network("quantize4"), [[-3, 5, -1, 2]]) == [[[0, 5], [0, 2]]]
