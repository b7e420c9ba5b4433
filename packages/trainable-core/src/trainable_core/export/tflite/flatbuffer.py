"""From a program to the bytes of a file and back, by the schema that comes with the runtime."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from trainable_core.errors import DocumentError
from trainable_core.export.files import TFLITE
from trainable_core.export.graph import Array
from trainable_core.export.libraries import first_of
from trainable_core.export.tflite.program import Program, TfliteOperator, TfliteTensor

EXTRA = "trainable-core[tflite]"

SCHEMAS = ("ai_edge_litert.schema_py_generated", "tensorflow.lite.python.schema_py_generated")
"""Modules with the schema: LiteRT's, or TensorFlow's."""

KEY = "trainable"
"""Name of the file's metadata that holds the document."""

SIGNATURE = "serving_default"
"""Name by which runtimes call the model with inputs by name."""

TYPES = {"float32": "FLOAT32", "int32": "INT32", "int8": "INT8", "int4": "INT4"}
DTYPES: dict[str, type[Any]] = {"float32": np.float32, "int32": np.int32, "int8": np.int8, "int4": np.int8}

OPTIONS = {
    "ADD": "AddOptions",
    "AVERAGE_POOL_2D": "Pool2DOptions",
    "CONCATENATION": "ConcatenationOptions",
    "CONV_2D": "Conv2DOptions",
    "DEPTH_TO_SPACE": "DepthToSpaceOptions",
    "DEPTHWISE_CONV_2D": "DepthwiseConv2DOptions",
    "DEQUANTIZE": "DequantizeOptions",
    "DIV": "DivOptions",
    "ELU": "",
    "FULLY_CONNECTED": "FullyConnectedOptions",
    "GELU": "GeluOptions",
    "HARD_SWISH": "HardSwishOptions",
    "LEAKY_RELU": "LeakyReluOptions",
    "LOGISTIC": "",
    "MAXIMUM": "MaximumMinimumOptions",
    "MAX_POOL_2D": "Pool2DOptions",
    "MEAN": "ReducerOptions",
    "MINIMUM": "MaximumMinimumOptions",
    "MUL": "MulOptions",
    "PAD": "PadOptions",
    "QUANTIZE": "QuantizeOptions",
    "REDUCE_MAX": "ReducerOptions",
    "RESHAPE": "ReshapeOptions",
    "RESIZE_BILINEAR": "ResizeBilinearOptions",
    "RESIZE_NEAREST_NEIGHBOR": "ResizeNearestNeighborOptions",
    "SLICE": "SliceOptions",
    "SOFTMAX": "SoftmaxOptions",
    "SUB": "SubOptions",
    "TANH": "",
}
"""The operators that are written, each with the table of its options, if it has any."""

NAMES = {"padding": "Padding", "fusedActivationFunction": "ActivationFunctionType"}
"""Options that are names, and where the schema has their numbers."""

UNTOLD = frozenset({"potScaleInt16"})
"""Options that say nothing of 8-bit tensors."""

VERSIONS = {
    "ADD": 2, "CONCATENATION": 2, "CONV_2D": 3, "DEPTHWISE_CONV_2D": 3, "DEQUANTIZE": 2, "FULLY_CONNECTED": 4,
    "MAX_POOL_2D": 2, "MEAN": 2, "PAD": 2, "REDUCE_MAX": 2, "RESIZE_NEAREST_NEIGHBOR": 2, "SLICE": 2,
}  # fmt: skip
"""Version of the operator that takes int8 tensors; 1 where that does."""

INT4_VERSIONS = {"CONV_2D": 7, "DEPTHWISE_CONV_2D": 7, "FULLY_CONNECTED": 10}
"""Version that takes weights of 4 bits."""

FLOAT_VERSIONS = {"RESIZE_BILINEAR": 3}
"""Version of the operator on real numbers; 1 where nothing is said."""

PER_CHANNEL = 5
"""Version of DEQUANTIZE that takes a scale for each channel."""

GROUPED = 6
"""Version of CONV_2D whose input has more channels than its weight."""

BUILTIN_LIMIT = 127
"""The largest number of an operator that fits into the field that old runtimes read."""


def packed(codes: Array) -> Array:
    """Return 4-bit codes two in a byte, the first in the lower half.

    Examples
    --------
    >>> packed(np.array([1, -1, 3], np.int8))
    array([241,   3], dtype=uint8)
    """
    flat = codes.reshape(-1).astype(np.uint8) & 0x0F
    flat = np.concatenate([flat, np.zeros(flat.size % 2, np.uint8)])
    return np.asarray(flat[::2] | (flat[1::2] << 4), np.uint8)


def unpacked(data: Array, size: int) -> Array:
    """Return the 4-bit codes that `packed` was called on, as int8.

    Examples
    --------
    >>> unpacked(np.array([241, 3], np.uint8), 3)
    array([ 1, -1,  3], dtype=int8)
    """
    pairs = np.stack([data & 0x0F, data >> 4], axis=-1).reshape(-1)[:size].astype(np.int8)
    return np.asarray(np.where(pairs > 7, pairs - 16, pairs), np.int8)  # noqa: PLR2004 - the last code of 4 bits


def to_bytes(program: Program, purpose: str = "writing a TensorFlow Lite file") -> bytes:
    """Return the bytes of a file.

    Raises
    ------
    MissingLibraryError
        When no library with the schema is installed.
    """
    schema = first_of(SCHEMAS, purpose, EXTRA)
    flatbuffers = first_of(("flatbuffers",), purpose, EXTRA)
    model = _Writer(schema, program).model()
    builder = flatbuffers.Builder(1 << 16)
    builder.Finish(model.Pack(builder), file_identifier=TFLITE)
    return bytes(builder.Output())


class _Writer:
    def __init__(self, schema: Any, program: Program) -> None:
        self.schema, self.program = schema, program
        self.buffers = [schema.BufferT()]  # the first one is that of all tensors without data
        self.places = {name: index for index, name in enumerate(program.tensors)}
        self.codes: list[tuple[str, int]] = []

    def model(self) -> Any:
        """Return the root table."""
        schema, program = self.schema, self.program
        graph = schema.SubGraphT()
        graph.name = "main"
        graph.tensors = [self._tensor(each) for each in program.tensors.values()]
        graph.inputs, graph.outputs = self._indices(program.inputs), self._indices(program.outputs)
        graph.operators = [self._operator(each) for each in program.operators]
        model = schema.ModelT()
        model.version = 3
        model.description = "trainable"
        model.subgraphs = [graph]
        model.operatorCodes = [self._code(*each) for each in self.codes]
        model.signatureDefs = [self._signature()]
        if program.metadata:
            entry = schema.MetadataT()
            entry.name, entry.buffer = KEY, self._buffer(program.metadata.encode())
            model.metadata = [entry]
        model.buffers = self.buffers
        return model

    def _indices(self, names: Any) -> list[int]:
        return [self.places[name] for name in names]

    def _buffer(self, content: bytes) -> int:
        buffer = self.schema.BufferT()
        buffer.data = np.frombuffer(content, np.uint8)
        self.buffers.append(buffer)
        return len(self.buffers) - 1

    def _tensor(self, tensor: TfliteTensor) -> Any:
        made = self.schema.TensorT()
        made.name = tensor.name
        made.type = getattr(self.schema.TensorType, TYPES[tensor.kind])
        made.hasRank = True
        made.shape = [1 if size is None else size for size in tensor.shape]
        if None in tensor.shape:
            made.shapeSignature = [-1 if size is None else size for size in tensor.shape]
        if tensor.is_quantized:
            grid, numbers = tensor.grid, self.schema.QuantizationParametersT()
            numbers.scale = grid.scale.reshape(-1)
            numbers.zeroPoint = grid.zero_point.reshape(-1).astype(np.int64)
            numbers.quantizedDimension = tensor.axis or 0
            made.quantization = numbers
        if tensor.data is not None:
            data = packed(tensor.data) if tensor.kind == "int4" else tensor.data.astype(DTYPES[tensor.kind])
            made.buffer = self._buffer(np.ascontiguousarray(data).tobytes())
        return made

    def _operator(self, operator: TfliteOperator) -> Any:
        made = self.schema.OperatorT()
        key = (operator.code, self._version(operator))
        if key not in self.codes:
            self.codes.append(key)
        made.opcodeIndex = self.codes.index(key)
        made.inputs, made.outputs = self._indices(operator.inputs), self._indices(operator.outputs)
        table = OPTIONS[operator.code]
        if not table:
            return made
        made.builtinOptionsType = getattr(self.schema.BuiltinOptions, table)
        options = made.builtinOptions = getattr(self.schema, f"{table}T")()
        for name, value in operator.options.items():
            setattr(options, name, getattr(getattr(self.schema, NAMES[name]), value) if name in NAMES else value)
        return made

    def _version(self, operator: TfliteOperator) -> int:
        tensors = self.program.tensors
        kinds = [tensors[name].kind for name in operator.inputs]
        if operator.code not in ("DEQUANTIZE", "QUANTIZE") and tensors[operator.outputs[0]].kind == "float32":
            return FLOAT_VERSIONS.get(operator.code, 1)
        if operator.code == "DEQUANTIZE" and tensors[operator.inputs[0]].axis is not None:
            return PER_CHANNEL
        if operator.code in INT4_VERSIONS and kinds[1] == "int4":
            return INT4_VERSIONS[operator.code]
        if operator.code == "CONV_2D":
            channels, per_group = (tensors[name].shape[-1] for name in operator.inputs[:2])
            return GROUPED if channels != per_group else VERSIONS["CONV_2D"]
        if operator.code == "MUL":  # products that are scaled up have a version of their own
            a, b, y = (tensors[name].grid.scale for name in (*operator.inputs, *operator.outputs))
            return 3 if float(a) * float(b) >= float(y) else 2
        return VERSIONS.get(operator.code, 1)

    def _code(self, name: str, version: int) -> Any:
        made = self.schema.OperatorCodeT()
        made.builtinCode = getattr(self.schema.BuiltinOperator, name)
        made.deprecatedBuiltinCode = min(made.builtinCode, BUILTIN_LIMIT)
        made.version = version
        return made

    def _signature(self) -> Any:
        made = self.schema.SignatureDefT()
        made.signatureKey = SIGNATURE
        made.inputs = [self._named(name, name) for name in self.program.inputs]
        # an input that is an output as well, or one output twice, must have a name of its own
        made.outputs = [self._named(f"output_{i}", name) for i, name in enumerate(self.program.outputs)]
        return made

    def _named(self, name: str, tensor: str) -> Any:
        made = self.schema.TensorMapT()
        made.name, made.tensorIndex = name, self.places[tensor]
        return made


def from_bytes(content: bytes, path: object) -> Program:
    """Return the contents of a file.

    Raises
    ------
    DocumentError
        When it is damaged, no TensorFlow Lite file, or has operators that `export` does not write.
    MissingLibraryError
        When no library with the schema is installed.
    """
    schema = first_of(SCHEMAS, "reading a TensorFlow Lite file", EXTRA)
    if content[4:8] != TFLITE:
        raise DocumentError(path, "no TensorFlow Lite file")
    try:
        return _read(schema, schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0)))
    except KeyError as error:
        raise DocumentError(path, f"it has {error.args[0]}, which `export` does not write") from error
    except Exception as error:  # flatbuffers raises whatever the damage leads it to
        raise DocumentError(path, f"truncated or damaged: {error!r}") from error


def _read(schema: Any, model: Any) -> Program:
    (graph,) = model.subgraphs
    kinds = {getattr(schema.TensorType, name): kind for kind, name in TYPES.items()}
    codes = {number: name for name, number in vars(schema.BuiltinOperator).items() if isinstance(number, int)}
    tensors = [_tensor_of(each, model.buffers, kinds) for each in graph.tensors]
    names = [each.name for each in tensors]
    operators = []
    for each in graph.operators:
        code = model.operatorCodes[each.opcodeIndex]
        number = max(code.builtinCode, code.deprecatedBuiltinCode)
        operators.append(
            TfliteOperator(
                codes[number],
                tuple(names[i] for i in each.inputs),
                tuple(names[i] for i in each.outputs),
                _options_of(schema, codes[number], each.builtinOptions),
            )
        )
    documents = [each for each in model.metadata or () if _text(each.name) == KEY]
    metadata = bytes(np.asarray(model.buffers[documents[0].buffer].data, np.uint8)).decode() if documents else ""
    inputs, outputs = ([names[i] for i in places] for places in (graph.inputs, graph.outputs))
    return Program(dict(zip(names, tensors, strict=True)), operators, inputs, outputs, metadata)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _tensor_of(given: Any, buffers: Any, kinds: Mapping[int, str]) -> TfliteTensor:
    if given.type not in kinds:
        raise KeyError(f"a tensor of type {given.type}")
    kind = kinds[given.type]
    sizes = given.shape if given.shapeSignature is None or not len(given.shapeSignature) else given.shapeSignature
    shape = tuple(None if size < 0 else int(size) for size in (() if sizes is None else sizes))
    scale, zero_point, axis = None, None, None
    numbers = given.quantization
    if numbers is not None and numbers.scale is not None and len(numbers.scale):
        scale = np.asarray(numbers.scale, np.float32)
        zero_point = np.asarray(numbers.zeroPoint, np.int32)
        if scale.size == 1:
            scale, zero_point = scale.reshape(()), zero_point.reshape(())
        else:
            axis = int(numbers.quantizedDimension)
    data = None
    content = buffers[given.buffer].data
    if content is not None and len(content):
        raw = np.asarray(content, np.uint8)
        size = int(np.prod([int(each) for each in given.shape], dtype=np.int64))
        flat = unpacked(raw, size) if kind == "int4" else np.frombuffer(raw.tobytes(), DTYPES[kind])
        data = flat.reshape([int(each) for each in given.shape])
    return TfliteTensor(_text(given.name), kind, shape, scale, zero_point, axis, data)


def _options_of(schema: Any, code: str, options: Any) -> dict[str, Any]:
    if code not in OPTIONS:
        raise KeyError(f"the operator {code}")
    found = {}
    for name, value in vars(options).items() if options is not None else ():
        if name in NAMES:
            known = vars(getattr(schema, NAMES[name])).items()
            found[name] = next(text for text, number in known if number == value and isinstance(number, int))
        elif value is not None and name not in UNTOLD:
            found[name] = np.asarray(value).tolist()
    return found
