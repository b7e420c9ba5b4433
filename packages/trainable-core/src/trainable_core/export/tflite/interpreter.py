"""NumPy on the integers of a written file: every code that a runtime must give, by the kernels that it chose."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from math import prod
from typing import Any

import numpy as np

from trainable_core.errors import InvalidArgumentError
from trainable_core.export.graph import Array
from trainable_core.export.tflite.program import RANGES, Program, TfliteOperator
from trainable_core.integer import certificate, lite, pooling, products
from trainable_core.integer.certificate import Certificate
from trainable_core.integer.products import Window
from trainable_core.integer.tensor import Quantized
from trainable_core.qparams import QParams

Arrays = dict[str, Array]

_IN, _OUT = (0, 3, 1, 2), (0, 2, 3, 1)
"""Axes of an image, from channels last to channels first and back."""


class Interpreter:
    """Computes a file's tensors.

    Parameters
    ----------
    program : Program
        Of the file.
    kernels : mapping of str to str
        By the name of a tensor: the family of kernels that makes it; `lite.XNNPACK` where nothing is said.
    ties : Ties
        How XNNPACK rounds means and products.
    """

    def __init__(
        self, program: Program, kernels: Mapping[str, str] | None = None, ties: lite.Ties = lite.Ties.EVEN_CODE
    ) -> None:
        self.kernel_ties = ties
        self.program, self.kernels = program, dict(kernels or {})
        self.makers = program.makers()

    def run(self, feeds: Mapping[str, Array], wanted: Collection[str], given: Mapping[str, Array]) -> Arrays:
        """Return the codes of the tensors that are wanted.

        Parameters
        ----------
        feeds : mapping of str to array
            The file's inputs: codes.
        wanted : collection of str
            Names of tensors.
        given : mapping of str to array
            Tensors that are not to be computed, because a runtime's are to be taken.
        """
        known: Arrays = {**{name: np.asarray(each.data) for name, each in self.program.constants().items()}}
        known |= {**feeds, **given}
        needed = self._needed(wanted, known)
        for operator in self.program.operators:
            (name,) = operator.outputs
            if name in needed and name not in known:
                known[name] = self._computed(operator, known)
        return {name: known[name] for name in wanted}

    def _needed(self, wanted: Collection[str], known: Mapping[str, Array]) -> set[str]:
        found: set[str] = set()
        waiting = list(wanted)
        while waiting:
            name = waiting.pop()
            if name in known or name in found:
                continue
            if name not in self.makers:
                raise InvalidArgumentError("the file", f"it has no tensor {name!r}")
            found.add(name)
            waiting += self.makers[name].inputs
        return found

    def grid_of(self, name: str) -> QParams:
        """Return the grid of a tensor's codes."""
        return self.program.tensors[name].grid

    def _computed(self, operator: TfliteOperator, known: Arrays) -> Array:
        if operator.code not in {*_KERNELS, *_TIES}:
            raise InvalidArgumentError("the file", f"what {operator.code} gives is not predicted; it must be given")
        (name,) = operator.outputs
        tensor = self.program.tensors[name]
        operands = [
            Quantized(known[each].astype(np.int32), self.grid_of(each))
            if self.program.tensors[each].is_quantized
            else known[each]
            for each in operator.inputs
        ]
        family = self.kernels.get(name, lite.XNNPACK)
        if operator.code in _TIES:
            result = _TIES[operator.code](operator, operands, tensor.grid, family, self.kernel_ties)
        else:
            result = _KERNELS[operator.code](operator, operands, tensor.grid, family)
        clamp = lite.clamp_of(str(operator.options.get("fusedActivationFunction", "NONE")), tensor.grid)
        low, high = RANGES[tensor.kind]
        return np.clip(clamp(result).codes, low, high).astype(np.int8)

    # ---- certificates -----------------------------------------------------------------------------------------------

    def certificate(self, name: str) -> Certificate | None:
        """Return the certificate of what an operator makes; None where there is none for it."""
        operator = self.makers.get(name)
        if operator is None or not self.program.tensors[name].is_quantized or operator.code == "QUANTIZE":
            return None
        grids = [self.grid_of(each) for each in operator.inputs if self.program.tensors[each].is_quantized]
        output = self.grid_of(name)
        if operator.code in _CERTIFIED:
            return _CERTIFIED[operator.code](self, operator, grids, output)
        if operator.code not in ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"):
            return None
        constants = self.program.constants()
        weight, bias = (constants.get(each) for each in operator.inputs[1:3])
        if weight is None or weight.data is None:
            return None
        codes = Quantized(weight.data.astype(np.int32), grids[1])
        axis = 3 if operator.code == "DEPTHWISE_CONV_2D" else 0
        return certificate.of_products(grids[0], codes, None if bias is None else bias.data, output, axis)

    def ties(self, name: str) -> bool:
        """Return whether a certified result can lie half way between two codes, so that the rule for ties matters.

        With powers of two, a sum times ``M >= 1`` is a whole number.
        """
        operator = self.makers[name]
        output = float(self.grid_of(name).scale)
        grids = [self.grid_of(each) for each in operator.inputs[:2] if self.program.tensors[each].is_quantized]
        scales = [np.asarray(each.scale, np.float64) for each in grids]
        if operator.code == "MEAN":
            scales.append(np.asarray(1.0 / self._number(operator)))
        unit = np.minimum(*scales) if operator.code == "ADD" else scales[0] * scales[1]
        return bool(np.min(unit) < output)

    def _number(self, operator: TfliteOperator) -> int:
        """Return how many values a MEAN is of; 0 where it is not known."""
        shape = self.program.tensors[operator.inputs[0]].shape
        axes = self.program.tensors[operator.inputs[1]].data
        assert axes is not None  # noqa: S101 - a constant
        return prod(shape[int(axis)] or 0 for axis in np.reshape(axes, -1))

    def _mean(self, operator: TfliteOperator, grids: list[QParams], output: QParams) -> Certificate | None:
        number = self._number(operator)
        return certificate.of_mean(grids[0], number, output) if number else None


def _image(x: Quantized) -> Quantized:
    return x.moved(lambda codes: codes.transpose(_IN))


def _window(operator: TfliteOperator, sizes: tuple[int, ...], kernel: tuple[int, ...], groups: int = 1) -> Window:
    """Return how an operator's kernel moves over an image of some size."""
    options = operator.options
    strides = (int(options["strideH"]), int(options["strideW"]))
    dilations = (int(options.get("dilationHFactor", 1)), int(options.get("dilationWFactor", 1)))
    pads: tuple[int, ...] = (0, 0, 0, 0)
    if options["padding"] == "SAME":
        reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
        total = [max((-(-n // s) - 1) * s + r - n, 0) for n, s, r in zip(sizes, strides, reach, strict=True)]
        begins = [each // 2 for each in total]
        pads = (*begins, *(each - begin for each, begin in zip(total, begins, strict=True)))
    return Window(strides, dilations, pads, groups)


def _conv(operator: TfliteOperator, operands: list[Any], output: QParams, family: str) -> Quantized:
    x, weight, bias = operands
    kernel = weight.codes.shape[1:3]
    groups = x.codes.shape[-1] // weight.codes.shape[-1]
    window = _window(operator, x.codes.shape[1:3], kernel, groups)
    turned = Quantized(weight.codes.transpose(_IN), _axis(weight.grid, 0))
    made = products.convolution(_image(x), turned, bias.codes, output, window, lite.requantizer(family))
    return made.moved(lambda codes: codes.transpose(_OUT))


def _depthwise(operator: TfliteOperator, operands: list[Any], output: QParams, family: str) -> Quantized:
    x, weight, bias = operands
    kernel = weight.codes.shape[1:3]
    channels = x.codes.shape[-1]
    window = _window(operator, x.codes.shape[1:3], kernel, channels)
    turned = Quantized(weight.codes.transpose(3, 0, 1, 2), _axis(weight.grid, 0))  # (C * M, 1, H, W)
    made = products.convolution(_image(x), turned, bias.codes, output, window, lite.requantizer(family))
    return made.moved(lambda codes: codes.transpose(_OUT))


def _linear(operator: TfliteOperator, operands: list[Any], output: QParams, family: str) -> Quantized:  # noqa: ARG001 - as all
    x, weight, bias = operands
    return products.linear(x, weight, bias.codes, output, lite.requantizer(family, linear=True))


def _axis(grid: QParams, axis: int) -> QParams:
    """Return a grid with its channels along another axis."""
    axis_now = None if grid.channels_axis is None else axis
    return QParams(grid.scale, grid.zero_point, grid.quant_min, grid.quant_max, axis_now)


def _mean(operator: TfliteOperator, operands: list[Any], output: QParams, family: str, ties: lite.Ties) -> Quantized:
    x, axes = operands
    places = [int(each) % x.codes.ndim for each in np.reshape(axes, -1)]
    made = lite.mean(x, places, output, family, ties)
    return made if operator.options.get("keepDims") else made.moved(lambda codes: codes.squeeze(tuple(places)))


def _max_pool(operator: TfliteOperator, operands: list[Any], output: QParams, family: str) -> Quantized:  # noqa: ARG001 - as all
    (x,) = operands
    kernel = (int(operator.options["filterHeight"]), int(operator.options["filterWidth"]))
    window = _window(operator, x.codes.shape[1:3], kernel)
    return pooling.max_pool(_image(x), kernel, window).moved(lambda codes: codes.transpose(_OUT))


def _reduce_max(operator: TfliteOperator, operands: list[Any], output: QParams, family: str) -> Quantized:  # noqa: ARG001 - as all
    x, axes = operands
    places, keeps = tuple(int(each) for each in np.reshape(axes, -1)), bool(operator.options.get("keepDims"))
    return x.moved(lambda codes: codes.max(axis=places, keepdims=keeps))  # type: ignore[no-any-return] # an array


def _resize_nearest(operator: TfliteOperator, operands: list[Any], output: QParams, family: str) -> Quantized:  # noqa: ARG001 - as all
    x, size = operands
    rows, columns = (np.arange(int(n)) * old // int(n) for n, old in zip(size, x.codes.shape[1:3], strict=True))
    return x.moved(lambda codes: codes[:, rows][:, :, columns])  # type: ignore[no-any-return] # an array


def _concatenate(operator: TfliteOperator, operands: list[Any], output: QParams, family: str) -> Quantized:  # noqa: ARG001 - as all
    axis = int(operator.options["axis"])
    return Quantized(np.concatenate([each.codes for each in operands], axis), output)


def _pad(operator: TfliteOperator, operands: list[Any], output: QParams, family: str) -> Quantized:  # noqa: ARG001 - as all
    x, pads = operands
    return pooling.pad(x, [(int(a), int(b)) for a, b in pads])


def _reshape(operator: TfliteOperator, operands: list[Any], output: QParams, family: str) -> Quantized:  # noqa: ARG001 - as all
    x, shape = operands
    return Quantized(x.codes.reshape([int(each) for each in shape]), x.grid)


def _slice(operator: TfliteOperator, operands: list[Any], output: QParams, family: str) -> Quantized:  # noqa: ARG001 - as all
    x, begins, sizes = operands
    places = tuple(slice(int(b), None if int(n) < 0 else int(b) + int(n)) for b, n in zip(begins, sizes, strict=True))
    return x.moved(lambda codes: codes[places])  # type: ignore[no-any-return] # an array


def _depth_to_space(operator: TfliteOperator, operands: list[Any], output: QParams, family: str) -> Quantized:  # noqa: ARG001 - as all
    (x,) = operands
    block = int(operator.options["blockSize"])
    rows, height, width, depth = x.codes.shape
    split = x.codes.reshape(rows, height, width, block, block, depth // block**2)
    return Quantized(
        split.transpose(0, 1, 3, 2, 4, 5).reshape(rows, height * block, width * block, depth // block**2), x.grid
    )


_CERTIFIED: dict[str, Callable[[Interpreter, TfliteOperator, list[QParams], QParams], Certificate | None]] = {
    "ADD": lambda _, __, grids, output: certificate.of_sum(grids, output),
    "MEAN": Interpreter._mean,  # noqa: SLF001 - its own
    "MUL": lambda _, __, grids, output: certificate.of_product(grids[0], grids[1], output),
}
"""Operators without weights that there is a certificate for."""

_KERNELS: dict[str, Callable[[TfliteOperator, list[Any], QParams, str], Quantized]] = {
    "ADD": lambda _, operands, output, family: lite.add(operands[0], operands[1], output, family),
    "CONCATENATION": _concatenate,
    "CONV_2D": _conv,
    "DEPTH_TO_SPACE": _depth_to_space,
    "DEPTHWISE_CONV_2D": _depthwise,
    "FULLY_CONNECTED": _linear,
    "MAX_POOL_2D": _max_pool,
    "PAD": _pad,
    "REDUCE_MAX": _reduce_max,
    "RESHAPE": _reshape,
    "RESIZE_NEAREST_NEIGHBOR": _resize_nearest,
    "SLICE": _slice,
}
"""What each operator on codes computes: of the operator, its operands, the grid of its result and the family."""

_TIES: dict[str, Callable[[TfliteOperator, list[Any], QParams, str, lite.Ties], Quantized]] = {
    "MEAN": _mean,
    "MUL": lambda _, operands, output, family, ties: lite.multiply(operands[0], operands[1], output, family, ties),
}
"""Those whose ties the versions of XNNPACK round in different ways."""
