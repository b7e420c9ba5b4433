"""From a model's operations to operators on codes.

An operation is pending until the quantizer behind it is met, which says on which grid its codes are; clamps in between
become the operator's activation function. A quantizer behind what only moves values stands before it instead. What no
integer kernel computes as the model does is a float island (`floats`), or is refused, with the layer's name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from trainable_core.errors import UnsupportedConfigError
from trainable_core.export.graph import Array
from trainable_core.export.islands import Island
from trainable_core.export.network import OPERATIONS, Network, Shape, Step
from trainable_core.export.source import QuantizerRecord
from trainable_core.export.subpixel import Phases
from trainable_core.export.tflite import floats
from trainable_core.export.tflite.program import RANGES, Program, TfliteOperator, TfliteTensor
from trainable_core.integer.products import Window
from trainable_core.integer.tensor import Quantized
from trainable_core.qparams import QParams
from trainable_core.reference.bias import bias_scale, check_bias

INT4_BITS = 4
"""Weights of at most so many bits can be packed."""


@dataclass(frozen=True)
class Value:
    """What a tensor of the model is in the file.

    Parameters
    ----------
    name : str
        The file's tensor: of codes, or of real numbers in a float island; empty where there is none yet.
    pending : Step or None
        The operation that waits for a grid; None for an input of the model that no quantizer has read so far.
    low, high : float or None
        What its result is clamped to.
    clamp : str
        The layer that clamps it.
    """

    name: str = ""
    pending: Step | None = None
    low: float | None = None
    high: float | None = None
    clamp: str = ""


@dataclass
class Lowered:
    """What is to be written.

    Parameters
    ----------
    program : Program
        Without metadata.
    weights, activations : dict of str to list of str
        By the name of each quantizer: the file's tensors with its codes, one for each call.
    biases : dict of str to str
        The tensor of the weight that each bias goes with.
    islands : list of Island
        What is computed in float.
    """

    program: Program
    weights: dict[str, list[str]]
    activations: dict[str, list[str]]
    biases: dict[str, str]
    islands: list[Island]


def lower(network: Network, *, packed: bool = False) -> Lowered:
    """Return a model as operators on codes.

    Parameters
    ----------
    network : Network
        The model.
    packed : bool
        Whether weights of at most 4 bits are ``int4``, two in a byte.

    Raises
    ------
    UnsupportedConfigError
        When integer kernels can't compute a layer; names it, and says why.
    """
    return Lowering(network, packed=packed).run()


def codes_of_weight(record: QuantizerRecord, *, packed: bool) -> tuple[str, Array, QParams]:
    """Return the type that a weight's codes are stored in, the codes counted from zero, and their grid."""
    assert record.codes is not None  # noqa: S101 - a weight's record
    counted = Quantized(record.codes, record.grid).counted
    kind = "int4" if packed and record.n_bits <= INT4_BITS else "int8"
    grid = replace(record.grid, zero_point=np.zeros_like(record.grid.zero_point))
    if grid.channels_axis is not None and grid.scale.size == 1:
        grid = replace(grid, scale=grid.scale.reshape(()), zero_point=grid.zero_point.reshape(()), channels_axis=None)
    return kind, counted.astype(np.int8), grid


class Lowering:
    """A model on the way to operators on codes.

    Parameters
    ----------
    network : Network
        The model.
    packed : bool
        Whether weights of at most 4 bits are ``int4``.
    """

    def __init__(self, network: Network, *, packed: bool) -> None:
        self.network, self.packed = network, packed
        self.program = Program()
        self.values: dict[str, Value] = {}
        self.found = Lowered(self.program, {}, {}, {}, [])
        self.readers = Counter(name for step in network.steps for name in step.inputs)
        self.readers.update(network.outputs)
        self.made: dict[tuple[str, str], str] = {}
        self.taken: set[str] = set()
        self.dequantized: dict[str, str] = {}
        self.real_inputs = self._real_inputs()

    def run(self) -> Lowered:
        """Lower every step, and give the file its outputs."""
        for name in self.network.inputs:
            self.values[name] = Value(pending=None)
            if name in self.real_inputs:
                self.program.tensors[name] = TfliteTensor(name, "float32", tuple(self._shape(name)))
                self.values[name] = Value(name)
        for step in self.network.steps:
            self._step(step)
        for name in self.network.outputs:
            self.program.outputs.append(self._known(name, "the model's output"))
        self.program.inputs = [self._input(name) for name in self.network.inputs]
        return self.found

    def _real_inputs(self) -> set[str]:
        """Return the inputs of the model that the file takes as real numbers: read in float, or on several grids."""
        found, grids = set(), {name: list[QParams]() for name in self.network.inputs}
        reach = {name: name for name in self.network.inputs}
        for step in self.network.steps:
            if floats_reason(step, self._shape):
                found |= {reach[name] for name in step.inputs if name in reach}
            elif step.inputs and step.inputs[0] in reach:
                name = reach[step.inputs[0]]
                if step.op == "quantize":
                    grids[name].append(self.network.quantizers[step.options["quantizer"]].grid)
                elif step.op == "clip" or step.op in _MOVES:
                    reach[step.output] = name
        return found | {name for name, known in grids.items() if any(not _same(known[0], each) for each in known[1:])}

    # ---- refusals ---------------------------------------------------------------------------------------------------

    @staticmethod
    def _refuse(layer: str, problem: str, hint: str = "") -> UnsupportedConfigError:
        return UnsupportedConfigError(layer, f"TensorFlow Lite's integer kernels can't compute it: {problem}", hint)

    def _input(self, name: str) -> str:
        if name not in self.taken and name not in self.real_inputs:
            raise self._refuse(name, "no quantizer reads this input of the model", _PLACEMENT)
        return name

    def _known(self, name: str, reader: str) -> str:
        """Return the file's tensor of what a step reads."""
        value = self.values[name]
        if value.name:
            return value.name
        if value.pending is None:
            raise self._refuse(reader, f"it reads the model's input {name}, which is not quantized", _PLACEMENT)
        if value.pending.op == "clip":  # of codes: they stay on their grid
            self._known(value.pending.inputs[0], value.pending.layer)
            made = self._quantized(name, self._grid_of(value.pending.inputs[0]), None)
            self.values[name] = Value(made)
            return made
        raise self._refuse(value.pending.layer, "its output is not quantized", _PLACEMENT)

    # ---- steps ------------------------------------------------------------------------------------------------------

    def _step(self, step: Step) -> None:
        if step.obstacle:
            raise self._refuse(step.layer, step.obstacle)
        if step.op not in OPERATIONS:
            problem = f"no operator of TensorFlow Lite is known for {step.op}, neither on integers nor in float"
            raise UnsupportedConfigError(step.layer, problem, "docs/export.md lists the layers that can be written.")
        if step.op == "quantize":
            record = self.network.quantizers[step.options["quantizer"]]
            name = self._quantized(step.inputs[0], record.grid, record)
            self.found.activations.setdefault(record.name, []).append(name)
            self.values[step.output] = Value(name)
        elif floats_reason(step, self._shape) or (step.op == "clip" and self._is_real(step.inputs[0])):
            self._float(step)
        elif step.op == "clip":
            self._clip(step)
        elif step.op in _MOVES:
            self._move(step)
        else:
            self.values[step.output] = Value(pending=step)

    def _clip(self, step: Step) -> None:
        """Note a clamp of what is pending, or of codes."""
        low, high = step.options["low"], step.options["high"]
        value = self.values[step.inputs[0]]
        if value.name or value.pending is None or self.readers[step.inputs[0]] > 1:
            if value.pending is not None and not value.name:
                self._known(step.inputs[0], step.layer)
            self.values[step.output] = Value(pending=step, low=low, high=high, clamp=step.layer)
            return
        lows = [each for each in (low, value.low) if each is not None]
        highs = [each for each in (high, value.high) if each is not None]
        self.values[step.output] = replace(
            value, low=max(lows, default=None), high=min(highs, default=None), clamp=step.layer
        )

    # ---- float islands ----------------------------------------------------------------------------------------------

    def _is_real(self, name: str) -> bool:
        """Return whether a tensor of the model is one of real numbers in the file."""
        value = self.values[name]
        return bool(value.name) and self.program.tensors[value.name].kind == "float32"

    def _float(self, step: Step) -> None:
        """Compute a step in float, between DEQUANTIZE and QUANTIZE."""
        emit, reason = floats.EMITTERS[step.op]
        before = self.values[step.inputs[0]].pending
        if before is not None and before.layer == step.layer and before.op in _OWN_FUNCTIONS:
            sources, reason = [self._float_layer(before)], floats.OWN_FUNCTION
        else:
            sources = [self._real(name, step.layer) for name in step.inputs]
        if step.op == "softmax" and step.options["axis"] % len(self._shape(step.output)) != self._last_axis(step):
            raise self._refuse(step.layer, "its softmax is along another axis than the last")
        self.values[step.output] = Value(emit(self, step, sources))
        if reason:
            self.found.islands.append(Island(step.layer, step.op.upper(), reason))

    def _last_axis(self, step: Step) -> int:
        return len(self._shape(step.output)) - 1

    def _real(self, name: str, reader: str) -> str:
        """Return a tensor of the model as real numbers in the file."""
        if self._is_real(name):
            return self.values[name].name
        codes = self._known(name, reader)
        if codes not in self.dequantized:
            self.dequantized[codes] = self._tensor(f"{codes}/real", "float32", self._shape(name))
            self._operator("DEQUANTIZE", (codes,), self.dequantized[codes])
        return self.dequantized[codes]

    def real(self, step: Step, code: str, inputs: Sequence[str], **options: Any) -> str:
        """Add an operator on real numbers with the shape of a step's result; returns its output."""
        result = self._tensor(f"{step.layer}/{code.lower()}", "float32", self._shape(step.output))
        self._operator(code, inputs, result, **options)
        return result

    def number(self, value: ArrayLike) -> str:
        """Return a constant of real numbers."""
        return self._constant("real", "float32", np.atleast_1d(np.asarray(value, np.float32)))

    def whole(self, wish: str, values: Sequence[int]) -> str:
        """Return a constant of whole numbers."""
        return self._constant(wish, "int32", np.asarray(values, np.int32))

    def _float_layer(self, step: Step) -> str:
        """Compute a layer in float, of its integer weights."""
        source = self._real(step.inputs[0], step.layer)
        record = self._record(step)
        if step.op == "linear":
            turn, axis, repeats = (lambda w: w.T), 0, 1
        elif step.op == "depthwise_conv":
            height, width, channels, repeats = self._codes_shape(step)
            turn, axis = (lambda w: w.reshape(1, height, width, channels * repeats)), -1
        else:
            turn, axis, repeats = (lambda w: w.transpose(3, 0, 1, 2)), 0, 1
        name, _ = self._weight(step, turn, axis, repeats)
        weight = self._tensor(f"{record.name}/real", "float32", self.program.tensors[name].shape)
        self._operator("DEQUANTIZE", (name,), weight)
        outputs = int(self._shape(step.output)[-1] or 0)
        bias = self.number(np.zeros(outputs, np.float32) if step.bias is None else step.bias)
        inputs = [source, weight, bias]
        if step.op == "linear":
            return self.real(step, "FULLY_CONNECTED", inputs, keepNumDims=len(self._shape(step.output)) > 2)  # noqa: PLR2004 - rows and channels
        if step.op == "depthwise_conv":
            return self.real(step, "DEPTHWISE_CONV_2D", inputs, depthMultiplier=repeats, **_window_options(step))
        return self.real(step, "CONV_2D", inputs, **_window_options(step))

    def _move(self, step: Step) -> None:
        value = self.values[step.inputs[0]]
        if value.name:
            self.values[step.output] = Value(self._moved(step, value.name))
        else:
            self.values[step.output] = Value(pending=step)

    # ---- quantizers -------------------------------------------------------------------------------------------------

    def _quantized(self, name: str, grid: QParams, record: QuantizerRecord | None) -> str:
        """Return the file's tensor with the codes of a tensor of the model on a grid."""
        key = (name, "" if record is None else record.name)
        if key not in self.made:
            self.made[key] = self._make(name, grid, record)
        return self.made[key]

    def _make(self, name: str, grid: QParams, record: QuantizerRecord | None) -> str:
        value = self.values[name]
        label = name if record is None else record.name
        step = value.pending
        if value.name:
            return self._requantized(name, value, grid, label)
        if step is None:
            return self._taken(name, grid)
        if step.op in _MOVES:
            if self.readers[name] > 1:
                raise self._refuse(step.layer, "its output is read with and without a quantizer", _PLACEMENT)
            self._clamp_before(step, value)
            return self._moved(step, self._quantized(step.inputs[0], grid, record), label)
        if self.readers[name] > 1 and step.op != "clip":
            raise self._refuse(step.layer, "its output is read by a quantizer and by others", _PLACEMENT)
        if step.op == "clip":
            return self._clipped(step, value, grid, label)
        result = self._codes(label, grid, self._shape(step.output))
        _EMITTERS[step.op](self, step, result, self._activation(value, grid))
        return result

    def _clamp_before(self, step: Step, value: Value) -> None:
        """Clamp what is moved in the place of the moved values."""
        if not value.clamp:
            return
        if self.readers[step.inputs[0]] > 1:
            raise self._refuse(value.clamp, "what it clamps is read by others as well", _PLACEMENT)
        inner = self.values[step.inputs[0]]
        lows = [each for each in (inner.low, value.low) if each is not None]
        highs = [each for each in (inner.high, value.high) if each is not None]
        low, high = max(lows, default=None), min(highs, default=None)
        self.values[step.inputs[0]] = replace(inner, low=low, high=high, clamp=value.clamp)

    def _taken(self, name: str, grid: QParams) -> str:
        """Return an input of the model as codes: whoever runs the file quantizes it."""
        if name not in self.taken:
            self.taken.add(name)
            made = self._codes(name, grid, self._shape(name))
            self.program.tensors[name] = replace(self.program.tensors.pop(made), name=name)
        return name

    def _requantized(self, name: str, value: Value, grid: QParams, label: str) -> str:
        """Return codes, or real numbers, as codes on another grid."""
        tensor = self.program.tensors[value.name]
        if tensor.kind == "float32":
            result = self._codes(label, grid, self._shape(name))
            self._operator("QUANTIZE", (value.name,), result)
            return result
        if _same(self._grid_of(name), grid):
            return value.name
        result = self._codes(label, grid, self._shape(name))
        self._multiply_by_one(value.name, result, "NONE")
        return result

    def _clipped(self, step: Step, value: Value, grid: QParams, label: str) -> str:
        """Return a clamp of codes, which are put on the grid in the same operator; an input is taken on it."""
        inner = self.values[step.inputs[0]]
        if not inner.name and inner.pending is None:
            before = self._taken(step.inputs[0], grid)
            if self._activation(value, grid) == "NONE":
                return before
        else:
            before = self._known(step.inputs[0], step.layer)
        result = self._codes(label, grid, self._shape(step.output))
        self._multiply_by_one(before, result, self._activation(value, grid))
        return result

    def _multiply_by_one(self, codes: str, result: str, activation: str) -> None:
        """Put codes on another grid: times 1.0.

        QUANTIZE would do, but XNNPACK's has a factor of eight bits; that of MUL is a float32.
        """
        one = "one"
        if one not in self.program.tensors:
            self._constant(one, "int8", np.ones((1,), np.int8), np.float32(1), np.int32(0))
        self._operator("MUL", (codes, one), result, fusedActivationFunction=activation)

    def _activation(self, value: Value, grid: QParams) -> str:
        """Return the activation function of an operator that clamps a result on a grid."""
        scale, zero = np.float32(grid.scale), int(grid.zero_point)
        low = grid.quant_min if value.low is None else zero + int(np.rint(value.low / scale))
        high, rounded = float("inf"), float("inf")
        if value.high is not None:
            high, rounded = float(np.float32(value.high) / scale), float(np.floor(np.float32(value.high) / scale + 0.5))
        clamps_low, clamps_high = low > grid.quant_min, rounded + zero < grid.quant_max
        if value.low not in (None, 0.0) and clamps_low:
            raise self._refuse(value.clamp, f"it clamps at {value.low}, and kernels at 0 alone")
        if not clamps_high:
            return "RELU" if clamps_low else "NONE"
        if value.high != 6.0 or value.low != 0.0:  # noqa: PLR2004 - the six of ReLU6
            raise self._refuse(value.clamp, f"it clamps at {value.high}, and kernels at 0 and at 6 alone")
        if abs(high - np.floor(high) - 0.5) < 2.0**-10:  # kernels compute the code by themselves, and may round down
            raise self._refuse(value.clamp, "6 lies half way between two codes, and kernels disagree about its code")
        return "RELU6"

    # ---- tensors and operators --------------------------------------------------------------------------------------

    def _shape(self, name: str) -> Shape:
        return self.network.shapes[name]

    def _grid_of(self, name: str) -> QParams:
        """Return the grid of a tensor of the model that is codes in the file, counted as the file's are."""
        return self.program.tensors[self.values[name].name].grid

    def _fresh(self, wish: str) -> str:
        name, count = wish, 1
        while name in self.program.tensors or name in self.network.inputs:
            count += 1
            name = f"{wish}_{count}"
        return name

    def _tensor(self, wish: str, kind: str, shape: Shape, **numbers: Any) -> str:
        name = self._fresh(wish)
        self.program.tensors[name] = TfliteTensor(name, kind, tuple(shape), **numbers)
        return name

    def _codes(self, wish: str, grid: QParams, shape: Shape) -> str:
        """Add a tensor of an activation's codes, shifted so that the first code is that of int8."""
        low, high = RANGES["int8"]
        if grid.quant_max - grid.quant_min != high - low:
            raise self._refuse(wish, f"its codes {grid.quant_min} to {grid.quant_max} don't fill 8 bits")
        zero = np.asarray(grid.zero_point - grid.quant_min + low, np.int32)
        return self._tensor(wish, "int8", shape, scale=np.asarray(grid.scale, np.float32), zero_point=zero)

    def _constant(
        self, wish: str, kind: str, data: Array, scale: Any = None, zero_point: Any = None, axis: int | None = None
    ) -> str:
        name = self._fresh(wish)
        self.program.tensors[name] = TfliteTensor(name, kind, data.shape, scale, zero_point, axis, data)
        return name

    def _operator(self, code: str, inputs: Sequence[str], output: str, **options: Any) -> None:
        result = self.program.tensors[output]
        if code in _PRODUCTS and result.scale is not None:
            x, weight = (self.program.tensors[name].grid.scale for name in inputs[:2])
            factor = float(np.max(np.float64(x) * np.float64(weight) / np.float64(result.scale)))
            if factor >= FACTORS:
                problem = (
                    f"a unit of its sums is {factor:.3g} steps of its output, and XNNPACK takes less than {FACTORS}"
                )
                raise self._refuse(output, problem, "is its output nearly always zero?")
        self.program.operators.append(TfliteOperator(code, tuple(inputs), (output,), options))

    # ---- layers -----------------------------------------------------------------------------------------------------

    def _input_of(self, step: Step, index: int = 0) -> str:
        """Return the codes that an operation reads."""
        name = self._known(step.inputs[index], step.layer)
        if self.program.tensors[name].kind == "float32":
            raise self._refuse(step.layer, "it reads what is computed in float", _PLACEMENT)
        return name

    def _weight(self, step: Step, turn: Callable[[Array], Array], axis: int, repeats: int = 1) -> tuple[str, QParams]:
        """Add a layer's weight as an operator has it; returns its tensor and grid."""
        record = self._record(step)
        kind, codes, grid = codes_of_weight(record, packed=self.packed)
        codes = np.ascontiguousarray(turn(codes))
        channels = None if grid.channels_axis is None else axis % codes.ndim
        if channels is not None and repeats > 1:
            grid = replace(grid, scale=np.repeat(grid.scale, repeats), zero_point=np.repeat(grid.zero_point, repeats))
        name = self._constant(record.name, kind, codes, grid.scale, grid.zero_point, channels)
        self.found.weights.setdefault(record.name, []).append(name)
        return name, replace(grid, channels_axis=channels)

    def _record(self, step: Step) -> QuantizerRecord:
        if step.weight is None:
            raise self._refuse(step.layer, "its weights are not quantized")
        return step.weight

    def _bias(self, step: Step, source: str, weight: tuple[str, QParams], outputs: int, turn: Any = None) -> str:
        """Add a layer's bias as codes of the sums; zeros where it has none."""
        name, grid = weight
        scale = bias_scale(self.program.tensors[source].scale, grid.scale)
        real = np.zeros(outputs, np.float32) if step.bias is None else step.bias
        real = real if turn is None else turn(real)
        check_bias(f"{step.layer}.bias", real, scale)
        steps = real.astype(np.float64) / scale.astype(np.float64)
        # the model's bias is a float32 product of a code and the scale: off by one rounding
        if np.any(np.abs(steps - np.rint(steps)) > np.abs(steps) * 2.0**-23):
            raise self._refuse(step.layer, "its bias is not on the grid of its sums", "bias: int32.")
        axis = None if scale.ndim == 0 else 0
        made = self._constant(
            f"{step.layer}.bias", "int32", np.rint(steps).astype(np.int32), scale, np.zeros(scale.shape, np.int32), axis
        )
        self.found.biases[made] = name
        return made

    def _conv(self, step: Step, result: str, activation: str) -> None:
        source = self._input_of(step)
        options = _window_options(step)
        if step.op == "depthwise_conv":
            _, _, channels, multiplier = self._codes_shape(step)
            weight = self._weight(step, lambda w: w.reshape(1, *w.shape[:2], channels * multiplier), -1, multiplier)
            bias = self._bias(step, source, weight, channels * multiplier)
            options["depthMultiplier"] = multiplier
            code = "DEPTHWISE_CONV_2D"
        else:
            weight = self._weight(step, lambda w: w.transpose(3, 0, 1, 2), 0)
            bias = self._bias(step, source, weight, self._codes_shape(step)[-1])
            code = "CONV_2D"
        self._operator(code, (source, weight[0], bias), result, fusedActivationFunction=activation, **options)

    def _codes_shape(self, step: Step) -> tuple[int, ...]:
        codes = self._record(step).codes
        assert codes is not None  # noqa: S101 - a weight's record
        return codes.shape

    def _linear(self, step: Step, result: str, activation: str) -> None:
        source = self._input_of(step)
        inputs, outputs = self._codes_shape(step)
        shape, out = self._shape(step.inputs[0]), self._shape(step.output)
        if len(shape) == 2 and self._record(step).grid.scale.size == 1:  # noqa: PLR2004 - rows and channels
            weight = self._weight(step, np.transpose, 0)
            bias = self._bias(step, source, weight, outputs)
            self._operator("FULLY_CONNECTED", (source, weight[0], bias), result, fusedActivationFunction=activation)
            return
        # per channel as a convolution, which every runtime knows: older ones take the first scale for all channels
        middle = tuple(shape[1:-1])
        if len(middle) > 2:  # noqa: PLR2004 - the axes of an image
            raise self._refuse(step.layer, f"its input has the shape {shape}")
        spatial = ((1,) * (2 - len(middle))) + middle
        grid = self.program.tensors[source]
        before = source
        if len(middle) != 2:  # noqa: PLR2004 - as above
            before = self._like(f"{step.layer}/input", grid, (shape[0], *spatial, inputs))
            self._reshape(source, before)
        weight = self._weight(step, lambda w: w.T.reshape(outputs, 1, 1, inputs), 0)
        bias = self._bias(step, source, weight, outputs)
        after = result
        if len(middle) != 2:  # noqa: PLR2004 - as above
            after = self._like(f"{step.layer}/output", self.program.tensors[result], (out[0], *spatial, outputs))
        options = {"padding": "VALID", "strideW": 1, "strideH": 1, "dilationWFactor": 1, "dilationHFactor": 1}
        self._operator("CONV_2D", (before, weight[0], bias), after, fusedActivationFunction=activation, **options)
        if after != result:
            self._reshape(after, result)

    def _like(self, wish: str, tensor: TfliteTensor, shape: Shape) -> str:
        return self._tensor(wish, tensor.kind, shape, scale=tensor.scale, zero_point=tensor.zero_point)

    def _reshape(self, source: str, result: str) -> None:
        shape = self.program.tensors[result].shape
        if sum(size is None for size in shape) > 1:
            raise self._refuse(result, f"a shape of several unknown sizes: {shape}")
        sizes = [-1 if size is None else size for size in shape]
        constant = self._constant(f"{result}/shape", "int32", np.asarray(sizes, np.int32))
        self._operator("RESHAPE", (source, constant), result, newShape=sizes)

    def _two(self, step: Step, result: str, activation: str) -> None:
        """Add or multiply."""
        if len(step.inputs) != 2:  # noqa: PLR2004 - kernels take two
            raise self._refuse(step.layer, f"kernels take two operands, and it has {len(step.inputs)}")
        sources = [self._input_of(step, index) for index in range(2)]
        code = "ADD" if step.op == "add" else "MUL"
        self._operator(code, sources, result, fusedActivationFunction=activation)

    def _cat(self, step: Step, result: str, activation: str) -> None:
        """Concatenate; what is on another grid than the result is put on it before."""
        grid = self.program.tensors[result].grid
        parts = []
        for index, name in enumerate(step.inputs):
            source = self._input_of(step, index)
            if activation != "NONE" or not _same(self.program.tensors[source].grid, grid):
                part = self._like(f"{step.layer}/input_{index}", self.program.tensors[result], self._shape(name))
                self._multiply_by_one(source, part, activation)
                source = part
            parts.append(source)
        axis = step.options["axis"] % len(self._shape(step.output))
        self._operator("CONCATENATION", parts, result, axis=axis, fusedActivationFunction="NONE")

    def _mean(self, step: Step, result: str, activation: str) -> None:
        source = self._input_of(step)
        axes = self.whole(f"{step.layer}/axes", step.options["axes"])
        mean = result
        if activation != "NONE":  # MEAN has none
            mean = self._like(f"{step.layer}/mean", self.program.tensors[result], self._shape(step.output))
        self._operator("MEAN", (source, axes), mean, keepDims=bool(step.options["keepdims"]))
        if mean != result:
            self._multiply_by_one(mean, result, activation)

    def _average_pool(self, step: Step, result: str, activation: str) -> None:
        """Write an average as the depthwise convolution with ones on a scale of 1 / n.

        AVERAGE_POOL_2D gives codes on the grid of its input only.
        """
        source = self._input_of(step)
        shape, size = self._shape(step.inputs[0]), tuple(step.options["size"])
        channels = shape[-1]
        scale = np.float32(1 / prod(size))
        weight = self._constant(
            f"{step.layer}/ones", "int8", np.ones((1, *size, channels), np.int8), scale, np.int32(0)
        )
        grid = QParams(np.asarray(scale), np.asarray(0, np.int32), *RANGES["int8"])
        bias = self._bias(step, source, (weight, grid), int(channels or 0))
        options = {**_strides(step.options["strides"]), "padding": "VALID", "depthMultiplier": 1}
        options |= {"dilationWFactor": 1, "dilationHFactor": 1}
        self._operator(
            "DEPTHWISE_CONV_2D", (source, weight, bias), result, fusedActivationFunction=activation, **options
        )

    def _conv_transpose(self, step: Step, result: str, activation: str) -> None:
        """Write a transposed convolution as a convolution with a channel for each position between two inputs.

        TRANSPOSE_CONV needs the number of rows.
        """
        source = self._input_of(step)
        shape, out = self._shape(step.inputs[0]), self._shape(step.output)
        strides = tuple(step.options["strides"])
        if strides[0] != strides[1] or None in shape[1:] or None in out[1:]:
            raise self._refuse(step.layer, "a transposed convolution needs equal strides and a known size of its input")
        record, phases = self._phases(step, shape, out)
        kind, codes, grid = codes_of_weight(record, packed=self.packed)
        count = strides[0] ** 2
        codes = np.ascontiguousarray(codes.transpose(0, 2, 3, 1))
        weight = self._constant(record.name, kind, codes, grid.scale, grid.zero_point, grid.channels_axis)
        self.found.weights.setdefault(record.name, []).append(weight)
        bias = self._bias(step, source, (weight, grid), phases.outputs, phases.spread_bias)
        rows, sizes = shape[0], [int(size or 0) for size in shape[1:3]]
        before = source
        if any(phases.pads):
            pads = list(zip(phases.pads[:2], phases.pads[2:], strict=True))
            padded = [size + sum(each) for size, each in zip(sizes, pads, strict=True)]
            before = self._like(f"{step.layer}/padded", self.program.tensors[source], (rows, *padded, shape[-1]))
            self._pad(source, before, [(0, 0), *pads, (0, 0)])
        counts = phases.counts(sizes)
        tensor = self.program.tensors[result]
        spread = self._like(f"{step.layer}/phases", tensor, (rows, *counts, phases.outputs * count))
        options = {"padding": "VALID", "strideW": 1, "strideH": 1, "dilationWFactor": 1, "dilationHFactor": 1}
        self._operator("CONV_2D", (before, weight, bias), spread, fusedActivationFunction=activation, **options)
        begins, wanted = phases.cut(sizes)
        whole = [size * strides[0] for size in counts]
        if whole == wanted:
            self._operator("DEPTH_TO_SPACE", (spread,), result, blockSize=strides[0])
            return
        inter = self._like(f"{step.layer}/interleaved", tensor, (rows, *whole, phases.outputs))
        self._operator("DEPTH_TO_SPACE", (spread,), inter, blockSize=strides[0])
        begin = self._constant(f"{step.layer}/begin", "int32", np.asarray([0, *begins, 0], np.int32))
        size = self._constant(f"{step.layer}/size", "int32", np.asarray([-1, *wanted, phases.outputs], np.int32))
        self._operator("SLICE", (inter, begin, size), result)

    def _phases(self, step: Step, shape: Shape, out: Shape) -> tuple[QuantizerRecord, Phases]:
        """Return the record of the convolution's weight, and how the transposed convolution is split."""
        record = self._record(step)
        assert record.codes is not None  # noqa: S101 - a weight's record
        axis = None if record.grid.channels_axis is None else 1
        turned = replace(
            record, codes=record.codes.transpose(3, 2, 0, 1), grid=replace(record.grid, channels_axis=axis)
        )
        assert turned.codes is not None  # noqa: S101 - just made
        strides, dilations = step.options["strides"], step.options["dilations"]
        begins, ends, more = [], [], []
        for index, stride in enumerate(strides):
            reach = (turned.codes.shape[2 + index] - 1) * dilations[index] + 1
            whole = (int(shape[1 + index] or 0) - 1) * stride + reach
            cut = whole - int(out[1 + index] or 0)
            begin = max(cut, 0) // 2 if step.options["padding"] == "same" else 0
            begins.append(begin)
            ends.append(max(cut, 0) - begin)
            more.append(max(-cut, 0))
        window = Window(tuple(strides), tuple(dilations), (*begins, *ends), 1, tuple(more))
        phases = Phases(turned.codes.shape, window)
        return phases.spread(turned, record.name), phases

    def _pad(self, source: str, result: str, pads: Sequence[tuple[int, int]]) -> None:
        constant = self._constant(f"{result}/pads", "int32", np.asarray(pads, np.int32))
        self._operator("PAD", (source, constant), result)

    # ---- what only moves codes --------------------------------------------------------------------------------------

    def _moved(self, step: Step, source: str, label: str = "") -> str:
        """Return codes moved by an operation, on the grid that they are on."""
        tensor = self.program.tensors[source]
        result = self._like(label or step.layer, tensor, self._shape(step.output))
        if step.op == "reshape":
            self._reshape(source, result)
        elif step.op == "pad":
            self._pad(source, result, step.options["pads"])
        elif step.op == "crop":
            sizes = [-1 if size is None else size for size in self._shape(step.output)]
            begins, counts = self.whole(f"{result}/begin", step.options["begins"]), self.whole(f"{result}/size", sizes)
            self._operator("SLICE", (source, begins, counts), result)
        elif step.op == "max":
            axes = self.whole(f"{result}/axes", step.options["axes"])
            self._operator("REDUCE_MAX", (source, axes), result, keepDims=bool(step.options["keepdims"]))
        elif step.op == "resize_nearest":
            size = self.whole(f"{result}/size", step.options["size"])
            self._operator("RESIZE_NEAREST_NEIGHBOR", (source, size), result)
        else:
            height, width = step.options["size"]
            options = {**_strides(step.options["strides"]), "filterHeight": height, "filterWidth": width}
            padding = step.options["padding"].upper()
            self._operator("MAX_POOL_2D", (source,), result, padding=padding, fusedActivationFunction="NONE", **options)
        return result


_PRODUCTS = frozenset({"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"})

FACTORS = 256
"""What the factor of a requantization is less than; with another one XNNPACK can't be set up, and refuses the file."""

_PLACEMENT = "activations with placement: integer give every tensor that is stored a quantizer."

_MOVES = frozenset({"crop", "max", "max_pool", "pad", "reshape", "resize_nearest"})
"""Operations whose results are values of their input, and zeros."""

_OWN_FUNCTIONS = frozenset({"conv", "depthwise_conv", "linear"})
"""Operations of layers that can be computed in float with their own activation function."""

_EMITTERS: Mapping[str, Callable[[Lowering, Step, str, str], None]] = {
    "conv": Lowering._conv,  # noqa: SLF001 - its own
    "depthwise_conv": Lowering._conv,  # noqa: SLF001 - its own
    "conv_transpose": Lowering._conv_transpose,  # noqa: SLF001 - its own
    "linear": Lowering._linear,  # noqa: SLF001 - its own
    "add": Lowering._two,  # noqa: SLF001 - its own
    "mul": Lowering._two,  # noqa: SLF001 - its own
    "cat": Lowering._cat,  # noqa: SLF001 - its own
    "mean": Lowering._mean,  # noqa: SLF001 - its own
    "average_pool": Lowering._average_pool,  # noqa: SLF001 - its own
}


def floats_reason(step: Step, shape_of: Callable[[str], Shape]) -> str:
    """Return why a step is computed in float; empty where it is not, or where that depends on what it reads."""
    if step.op in _EMITTERS:
        if step.op == "add" and len(step.inputs) > 2:  # noqa: PLR2004 - kernels take two
            return floats.SUMS
        if step.op == "average_pool" and step.options["padding"] == "same":
            sizes = shape_of(step.inputs[0])[1:3]
            return floats.BORDERS if any(_same_pads(sizes, step.options["size"], step.options["strides"])) else ""
        return ""
    return floats.EMITTERS[step.op][1] if step.op in floats.EMITTERS else ""


def _same(one: QParams, other: QParams) -> bool:
    """Return whether two grids of 8 bits are the same, wherever their codes begin."""
    zeros = [int(each.zero_point) - each.quant_min for each in (one, other)]
    return float(one.scale) == float(other.scale) and zeros[0] == zeros[1]


def _strides(strides: Sequence[int]) -> dict[str, int]:
    return {"strideH": int(strides[0]), "strideW": int(strides[1])}


def _window_options(step: Step) -> dict[str, Any]:
    """Return the options of a convolution."""
    height, width = step.options["dilations"]
    options: dict[str, Any] = {"padding": step.options["padding"].upper(), **_strides(step.options["strides"])}
    return {**options, "dilationHFactor": int(height), "dilationWFactor": int(width)}


def _same_pads(sizes: Sequence[int | None], kernel: Sequence[int], strides: Sequence[int]) -> list[int]:
    """Return how much ``same`` pads along each axis; 1 where the size is not known."""
    found = []
    for size, k, s in zip(sizes, kernel, strides, strict=True):
        found.append(1 if size is None else max((-(-size // s) - 1) * s + k - size, 0))
    return found
