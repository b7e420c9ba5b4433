"""Operations on single codes: quantize, add, multiply, concatenate, clip and ReLU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from trainable_core.integer.tensor import Quantized, clipped
from trainable_core.qparams import Float32, QParams


def quantize(x: ArrayLike, grid: QParams) -> Quantized:
    """Return the codes of real values: ``clip(rint(x / scale) + zero_point)``, ties to even.

    Notes
    -----
    ONNX QuantizeLinear, ONNX Runtime's ``MlasQuantizeLinear``: the value is divided by the scale. A framework may
    multiply by the inverse instead (`trainable_core.reference.affine.steps`); where the scale is no power of two,
    values next to a tie may then differ by one code.
    """
    values = np.asarray(x, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        steps = values / grid.along(values.ndim).scale
    return clipped(np.rint(np.clip(np.nan_to_num(steps, nan=0.0), -(2.0**31), 2.0**31)).astype(np.int64), grid)


def dequantize(x: Quantized) -> Float32:
    """Return the real values, float32: ``(code - zero_point) * scale``."""
    return x.values


def add(x: Quantized, y: Quantized, output: QParams) -> Quantized:
    """Return the codes of a sum.

    Notes
    -----
    ONNX Runtime's QLinearAdd (``MlasQLinearAdd``), in float32 with fused multiplication and addition, as on x86 with
    AVX2: ``rint(a * r_a + (b * r_b + f))`` with codes ``a, b`` as they are, ``r_a = s_a / s_y``, ``r_b = s_b / s_y``
    and ``f = z_y - (r_a * z_a + r_b * z_b)``, where the product with ``z_a`` is fused with the sum. Compared with the
    kernel on all pairs of codes for 120 sets of scales.
    """
    ratio_x, ratio_y = (each.grid.scale / output.scale for each in (x, y))
    zeros = fused_multiply_add(x.grid.zero_point, ratio_x, np.float32(ratio_y * np.float32(y.grid.zero_point)))
    fixed = np.float32(np.float32(output.zero_point) - zeros)
    total = fused_multiply_add(x.codes, ratio_x, fused_multiply_add(y.codes, ratio_y, fixed))
    return _rounded(total, output)


def fused_multiply_add(x: ArrayLike, factor: ArrayLike, term: ArrayLike) -> Float32:
    """Return ``x * factor + term``, rounded once to float32.

    Codes have at most 16 bits and the factor 24, so float64 holds the product exactly, and the sum to 53 bits.
    """
    product = np.asarray(x, np.float64) * np.asarray(factor, np.float64)
    return np.asarray((product + np.asarray(term, np.float64)).astype(np.float32))


def _rounded(values: Float32, output: QParams) -> Quantized:
    """Return codes from real numbers that count from code 0."""
    codes = np.rint(np.clip(values, output.quant_min, output.quant_max))
    return Quantized(codes.astype(np.int32), output)


def multiply(x: Quantized, y: Quantized, output: QParams) -> Quantized:
    """Return the codes of a product.

    Notes
    -----
    ONNX Runtime's QLinearMul (``MlasQLinearMul``): ``rint(a * b * r + z_y)`` in float32, with codes counted from zero
    and
    ``r = s_a * s_b / s_y``.
    """
    ratio = np.float32(np.float32(x.grid.scale * y.grid.scale) / output.scale)
    product = (x.counted * y.counted).astype(np.float32)
    return _rounded(fused_multiply_add(product, ratio, np.float32(output.zero_point)), output)


def concatenate(parts: Sequence[Quantized], output: QParams, axis: int) -> Quantized:
    """Return the codes of a concatenation; each part is requantized to the output's grid.

    Notes
    -----
    ONNX Runtime's QLinearConcat: a part on the output's own grid is copied, any other is dequantized and quantized,
    ``rint((a - z_a) * s_a / s_y) + z_y``.
    """
    codes = [requantize(part, output).codes for part in parts]
    return Quantized(np.concatenate(codes, axis), output)


def requantize(x: Quantized, output: QParams) -> Quantized:
    """Return the codes of a quantized tensor on another grid: dequantized and quantized."""
    same = np.array_equal(x.grid.scale, output.scale) and np.array_equal(x.grid.zero_point, output.zero_point)
    return clipped(x.counted, output) if same else quantize(x.values, output)


def clip(x: Quantized, low: int, high: int) -> Quantized:
    """Return codes clipped to ``[low, high]``, on the same grid."""
    return Quantized(np.clip(x.codes, low, high).astype(np.int32), x.grid)


def relu(x: Quantized) -> Quantized:
    """Return the codes of ``max(x, 0)``: clipped from the zero point on.

    Rounding is monotone and zero is on the grid, so ReLU before quantizing and this after it give the same codes.
    """
    return clip(x, int(x.grid.zero_point), x.grid.quant_max)
