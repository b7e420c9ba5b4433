"""The numbers of a grid: from a quantizer's variables to scale, zero point and grid ends, and gradients back.

A quantizer's *variables* are what it may learn, one value per tensor or per channel, in real units:

- SYMMETRIC and POWER_OF_TWO: ``threshold`` t;
- UNIFORM: ``range_min`` a and ``range_max`` b.

The *grid* is what the forward pass needs. Every step below is single IEEE 754 float32 operations in a fixed order, so a
backend that carries them out on its own tensors gets the very same bits as this module.

- SYMMETRIC: ``scale = t / 2**(n_bits - signed)``, zero point 0.
- POWER_OF_TWO: the same after ``t`` was rounded up to a power of two; a power of two stays.
- LUT_SYM_QUANTIZER and LUT_POT_QUANTIZER: the threshold, or the power of two above it, stands for 128 steps, and the
  codes are the levels of a table, whole numbers from -128 to 127. Of a table that is not signed, which activations may
  have, it stands for 256 steps, and the levels are from 0 to 255.
- UNIFORM: the range is widened to hold zero, ``scale = (b - a) / (2**n_bits - 1)`` is rounded up to ``24 - n_bits``
  significant bits, and ``zero_point = rint(-a / scale)``. A scale so short makes every product ``code * scale`` exact
  in float32: zero is on the grid, a nudged range nudges to itself, and any deployed kernel that derives scale and zero
  point again from the nudged range finds the same two numbers.

Bounds hold whatever an optimizer did: thresholds stay in ``[max(min_threshold, 2**-100), 2**100]``, and so does a
range's width; NaN counts as the lower bound.

This is the one statement for NumPy: calibration, inferable quantizers, documents and the conformance kit all come here.
A backend's `grid` module writes the same float32 operations once more for its tensors, on purpose: gradients have to
pass through them on the tensors' own device, and two statements that must agree bit for bit check each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainable_core.config import TrainableQuantizerConfig
from trainable_core.constants import LUT_VALUES, RANGE_MAX, RANGE_MIN, SIGNED, THRESHOLD
from trainable_core.enums import LUT_METHODS, QuantizationMethod
from trainable_core.errors import ShapeMismatchError, UnsupportedConfigError
from trainable_core.validation import MAX_THRESHOLD, TABLE_ENDS, check_params, flat

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

SMALLEST_THRESHOLD = 2.0**-100
"""Lower bound when `min_threshold` is smaller: a 16-bit grid's scale and its inverse stay normal float32 numbers."""


TABLE_STEPS = 128
"""Steps of a signed table's codes from zero to the threshold: mctq's tables hold integers of 8 bits."""


def table_steps(*, signed: bool) -> int:
    """Return how many steps of a table's codes the threshold stands for.

    Examples
    --------
    >>> table_steps(signed=True), table_steps(signed=False)
    (128, 256)
    """
    return TABLE_STEPS if signed else 2 * TABLE_STEPS


def table_ends(*, signed: bool) -> tuple[int, int]:
    """Return the first and the last code that a table may have.

    Examples
    --------
    >>> table_ends(signed=True), table_ends(signed=False)
    ((-128, 127), (0, 255))
    """
    return TABLE_ENDS[signed]


@dataclass(frozen=True)
class QParams:
    """Scale, zero point and grid ends together.

    Parameters
    ----------
    scale : float32 array, shape () or (C,)
        Step between neighbouring grid points, in the units of the tensor; > 0.
    zero_point : int32 array, shape of `scale`
        Code of real 0.0; within the grid.
    quant_min, quant_max : int
        First and last code.
    channels_axis : int or None
        Axis of the tensor that the C scales go along; None for one scale.
    levels : tuple of int
        The only codes there are, ascending; empty where every one from `quant_min` to `quant_max` is.
    """

    scale: Float32
    zero_point: NDArray[np.int32]
    quant_min: int
    quant_max: int
    channels_axis: int | None = None
    levels: tuple[int, ...] = ()

    def along(self, ndim: int) -> QParams:
        """Return the same numbers shaped to broadcast against a tensor of `ndim` dimensions."""
        if self.channels_axis is None:
            return self
        shape = [1] * ndim
        shape[self.channels_axis] = -1
        return replace(self, scale=self.scale.reshape(shape), zero_point=self.zero_point.reshape(shape))

    def reduce(self, values: NDArray[Any]) -> Float64:
        """Sum `values`, shaped like the tensor, over the elements that share one scale, in float64."""
        if self.channels_axis is None:
            return np.asarray(values.sum(dtype=np.float64))
        axis = self.channels_axis % values.ndim
        others = tuple(i for i in range(values.ndim) if i != axis)
        return np.asarray(values.sum(axis=others, dtype=np.float64))

    @property
    def signed(self) -> bool:
        """Whether a symmetric grid, or a table, has codes below zero."""
        return self.quant_min < 0

    @property
    def threshold_steps(self) -> int:
        """How many steps the threshold of a symmetric grid, or of a table, stands for."""
        return -self.quant_min if self.signed else self.quant_max + 1

    def sharing(self, size: int) -> int:
        """Return how many of a tensor's `size` elements share one scale."""
        return size // max(self.scale.size, 1)


def code_range(method: QuantizationMethod, n_bits: int, *, signed: bool) -> tuple[int, int]:
    """Return the first and the last code of a grid.

    Examples
    --------
    >>> code_range(QuantizationMethod.SYMMETRIC, 4, signed=True), code_range(QuantizationMethod.UNIFORM, 4, signed=True)
    ((-8, 7), (0, 15))
    """
    if method is QuantizationMethod.UNIFORM or not signed:
        return 0, 2**n_bits - 1
    return -(2 ** (n_bits - 1)), 2 ** (n_bits - 1) - 1


def lower_bound(min_threshold: float) -> np.float32:
    """Return the smallest float32 that is at least `min_threshold` and at least `SMALLEST_THRESHOLD`."""
    wanted = max(min_threshold, SMALLEST_THRESHOLD)
    bound = np.float32(wanted)
    return bound if float(bound) >= wanted else np.nextafter(bound, np.float32(np.inf))


@np.errstate(over="ignore")  # a number beyond float32 becomes infinite, and is bounded as such
def bound_threshold(threshold: ArrayLike, min_threshold: float) -> Float32:
    """Return thresholds clipped to ``[lower_bound(min_threshold), 2**100]``; NaN counts as the lower bound."""
    threshold = np.asarray(threshold, np.float32)
    low = lower_bound(min_threshold)
    return np.clip(np.where(np.isnan(threshold), low, threshold), low, np.float32(MAX_THRESHOLD))


def power_of_two_ceil(threshold: ArrayLike) -> Float32:
    """Return the smallest powers of two that are not less than the thresholds (normal, positive float32 numbers).

    Exact: adds the mantissa's mask to the bits and clears the mantissa. ``2**ceil(log2(t))`` is not, because ``log2``
    of a number just above a power of two rounds down to an integer.

    Examples
    --------
    >>> power_of_two_ceil([0.25, 0.26, 3.0, 8.000001])
    array([ 0.25,  0.5 ,  4.  , 16.  ], dtype=float32)
    """
    bits = np.asarray(threshold, np.float32).view(np.int32)
    return ((bits + np.int32(0x007FFFFF)) & np.int32(0x7F800000)).view(np.float32)


def shorten_scale(scale: ArrayLike, n_bits: int) -> Float32:
    """Return scales rounded up to ``24 - n_bits`` significant bits, so that ``code * scale`` is exact in float32."""
    mask = np.int32(2**n_bits - 1)
    bits = np.asarray(scale, np.float32).view(np.int32)
    return ((bits + mask) & ~mask).view(np.float32)


def from_variables(
    variables: Mapping[str, ArrayLike],
    method: QuantizationMethod,
    n_bits: int,
    *,
    signed: bool = True,
    min_threshold: float = 0.0,
    channels_axis: int | None = None,
    levels: tuple[int, ...] = (),
) -> QParams:
    """Return the grid that a quantizer's variables stand for.

    Parameters
    ----------
    variables : mapping of float arrays, each shape () or (C,)
        ``threshold``, or ``range_min`` and ``range_max``; any float32 value, NaN and infinities included.
    method : QuantizationMethod
        POWER_OF_TWO, SYMMETRIC or UNIFORM.
    n_bits : int
        Width of the codes, 1 to 16.
    signed : bool
        Whether a symmetric grid, or a table, reaches below zero; UNIFORM ignores it.
    min_threshold : float
        Lower bound of the threshold, or of the range's width.
    channels_axis : int or None
        Kept in the result.
    levels : tuple of int
        The table of a look-up-table method, whole numbers from -128 to 127, or from 0 to 255 where it is not signed.

    Returns
    -------
    QParams
        With `scale` and `zero_point` shaped like the variables.

    Raises
    ------
    UnsupportedConfigError
        For a look-up-table method without a table.
    """
    quant_min, quant_max = code_range(method, n_bits, signed=signed)
    if method in LUT_METHODS:
        if not levels:
            raise UnsupportedConfigError("from_variables", f"{method} is a look-up table, and there is none")
        threshold = bound_threshold(variables[THRESHOLD], min_threshold)
        if method is QuantizationMethod.LUT_POT_QUANTIZER:
            threshold = power_of_two_ceil(threshold)
        scale = np.asarray(threshold / np.float32(table_steps(signed=signed)))
        zeros = np.zeros(scale.shape, np.int32)
        return QParams(scale, zeros, *table_ends(signed=signed), channels_axis, tuple(sorted(levels)))
    if method is QuantizationMethod.UNIFORM:
        low, high = hold_zero(variables[RANGE_MIN], variables[RANGE_MAX])
        width = bound_threshold(high - low, min_threshold)
        scale = shorten_scale(width / np.float32(quant_max), n_bits)
        zero_point = np.clip(np.rint(-low / scale), 0, quant_max).astype(np.int32)
    else:
        threshold = bound_threshold(variables[THRESHOLD], min_threshold)
        if method is QuantizationMethod.POWER_OF_TWO:
            threshold = power_of_two_ceil(threshold)
        scale = threshold * np.float32(2.0 ** -(n_bits - int(signed)))
        zero_point = np.zeros(scale.shape, np.int32)
    return QParams(np.asarray(scale), np.asarray(zero_point), quant_min, quant_max, channels_axis)


@np.errstate(over="ignore")  # a number beyond float32 becomes infinite, and is bounded as such
def hold_zero(range_min: ArrayLike, range_max: ArrayLike) -> tuple[Float32, Float32]:
    """Return finite range ends with ``low <= 0 <= high``; NaN counts as zero."""
    low, high = np.asarray(range_min, np.float32), np.asarray(range_max, np.float32)
    limit = np.float32(MAX_THRESHOLD / 2)  # the width of [-limit, limit] is MAX_THRESHOLD
    low = np.clip(np.where(np.isnan(low), np.float32(0), low), -limit, np.float32(0))
    high = np.clip(np.where(np.isnan(high), np.float32(0), high), np.float32(0), limit)
    return low, high


@np.errstate(over="ignore", invalid="ignore")  # a gradient that is not finite counts as zero
def variable_gradients(
    variables: Mapping[str, ArrayLike],
    method: QuantizationMethod,
    n_bits: int,
    scale_gradient: ArrayLike,
    zero_point_gradient: ArrayLike = 0.0,
    *,
    signed: bool = True,
    min_threshold: float = 0.0,
) -> dict[str, Float64]:
    """Return the gradients of a quantizer's variables, given those of scale and zero point.

    Rounding (to a power of two, of the scale, of the zero point) is straight-through. Where a bound holds a variable,
    the gradient passes only if a descent step leads back inside; so no optimizer pushes it further out. A gradient that
    is not finite counts as zero.

    Parameters
    ----------
    variables, method, n_bits
        As for `from_variables`.
    scale_gradient, zero_point_gradient : float array, shape of the variables
        Gradients of the loss with respect to scale and (real-valued) zero point.
    signed, min_threshold
        As for `from_variables`.

    Returns
    -------
    dict of float64 arrays, shaped like the variables

    Notes
    -----
    - SYMMETRIC: ``dL/dt = dL/ds / 2**(n_bits - signed)``; of a table, with 8 in the place of ``n_bits``.
    - POWER_OF_TWO: with ``p`` the rounded-up threshold, ``dL/dt = dL/ds / 2**(n_bits - signed) * p / t``: the chain
      rule through ``p = 2**ceil(log2(t))`` with the ceiling straight-through (Jain et al., 2020, section 3.2).
    - UNIFORM, where the two roundings nudge the range and the nudged ends move with the ends: with
      ``Q = 2**n_bits - 1`` and ``G = dL/ds - dL/dz * z / s``: ``dL/db = G / Q`` and
      ``dL/da = -G / Q - (dL/dz) / s``. For a value above the range this gives ``dy/db = 1, dy/da = 0``, below it the
      reverse (Bhalgat et al., 2020, equation 4 in terms of the range's ends).
    """
    levels = (0,) if method in LUT_METHODS else ()  # any: the gradients of scale and threshold are given
    qparams = from_variables(variables, method, n_bits, signed=signed, min_threshold=min_threshold, levels=levels)
    d_scale, d_zero = np.asarray(scale_gradient, np.float64), np.asarray(zero_point_gradient, np.float64)
    scale, zero_point = qparams.scale.astype(np.float64), qparams.zero_point.astype(np.float64)
    if method is QuantizationMethod.UNIFORM:
        range_min, range_max = (np.asarray(variables[key], np.float32) for key in (RANGE_MIN, RANGE_MAX))
        low, high = hold_zero(range_min, range_max)
        through_width = (d_scale - d_zero * zero_point / scale) / qparams.quant_max
        through_width = _held(high - low, through_width, lower_bound(min_threshold), MAX_THRESHOLD)
        limit = MAX_THRESHOLD / 2
        return {
            RANGE_MIN: _held(range_min, -through_width - d_zero / scale, -limit, 0.0),
            RANGE_MAX: _held(range_max, through_width, 0.0, limit),
        }
    threshold = np.asarray(variables[THRESHOLD], np.float32)
    gradient = d_scale / qparams.threshold_steps
    if method in {QuantizationMethod.POWER_OF_TWO, QuantizationMethod.LUT_POT_QUANTIZER}:
        bounded = bound_threshold(threshold, min_threshold)
        gradient = gradient * (power_of_two_ceil(bounded).astype(np.float64) / bounded)
    return {THRESHOLD: _held(threshold, gradient, lower_bound(min_threshold), MAX_THRESHOLD)}


def _held(variable: Float32, gradient: Float64, low: float | np.float32, high: float) -> Float64:
    """Return the gradient where the variable is inside its bounds or a descent step leads back in; zero elsewhere."""
    inside = (variable >= low) & (variable <= high)
    back_in = ((variable < low) & (gradient < 0)) | ((variable > high) & (gradient > 0))
    return np.where((inside | back_in) & np.isfinite(gradient), gradient, 0.0)


def variables_from_params(params: Mapping[str, Any], method: QuantizationMethod) -> dict[str, Float32]:
    """Return a quantizer's variables, float32, from the quantization params of a config; empty for empty params.

    UNIFORM's ``{THRESHOLD: t}`` becomes the range ``[-t, t]``, or ``[0, t]`` with ``SIGNED: False``.
    """
    if not set(params) - {SIGNED}:
        return {}
    values = {
        key: np.asarray(flat(value), np.float32) for key, value in params.items() if key not in {SIGNED, LUT_VALUES}
    }
    if method is QuantizationMethod.UNIFORM and THRESHOLD in values:
        high = values[THRESHOLD]
        return {RANGE_MIN: -high if params.get(SIGNED, True) else np.zeros_like(high), RANGE_MAX: high}
    return values


def variable_names(method: QuantizationMethod) -> tuple[str, ...]:
    """Return the names of the variables a grid of `method` is made from."""
    return (RANGE_MIN, RANGE_MAX) if method is QuantizationMethod.UNIFORM else (THRESHOLD,)


def variable_shape(
    config: TrainableQuantizerConfig, tensor_shape: tuple[int, ...] | None, subject: str
) -> tuple[int, ...]:
    """Return the shape of a quantizer's variables: () per tensor, (C,) per channel or with C blocks.

    Raises
    ------
    ShapeMismatchError
        When an axis is outside the tensor, a group size does not divide its axis, or the config's params have another
        number of channels.
    """
    axis = config.channels_axis
    if axis is None:
        return ()
    if config.blocks is not None:
        if tensor_shape is None:
            raise ShapeMismatchError(subject, "the shape of a tensor", tensor_shape)
        channels = math.prod(config.blocks.counts(tensor_shape, subject))
        what = f"{config.blocks} of {tensor_shape}"
    else:
        if tensor_shape is None or not -len(tensor_shape) <= axis < len(tensor_shape):
            raise ShapeMismatchError(f"{subject}: weights_channels_axis", f"an axis of shape {tensor_shape}", axis)
        channels = tensor_shape[axis]
        what = f"axis {axis} of {tensor_shape}"
    for params in [config.quantization_params, *(c.quantization_params for c in config.candidates or [])]:
        given = check_params(params, config.quantization_method, config.n_bits, config.target)
        if given is not None and given not in (1, channels):
            key = variable_names(config.quantization_method)[0]
            raise ShapeMismatchError(f"{subject}: {key}", f"1 or {channels} values ({what})", given)
    return (channels,)


def shape_with(config: TrainableQuantizerConfig, ndim: int, variable: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape of `ndim` dimensions for which `variable_shape` returns `variable`."""
    if config.blocks is not None:
        return config.blocks.shape_with(ndim, variable[0])
    shape, axis = [1] * ndim, config.channels_axis
    if axis is not None and -ndim <= axis < ndim:
        shape[axis] = variable[0] if variable else 1
    return tuple(shape)


def from_params(
    method: QuantizationMethod,
    n_bits: int,
    signed: bool,  # noqa: FBT001 - the grid's third number, always spelled where it is called
    params: Mapping[str, Any],
    min_threshold: float = 0.0,
    channels_axis: int | None = None,
) -> QParams:
    """Return the grid of quantization params as a config holds them; see `from_variables`."""
    variables = variables_from_params(params, method)
    levels = tuple(int(each) for each in params.get(LUT_VALUES, ()))
    fixed: dict[str, Any] = {"signed": signed, "min_threshold": min_threshold, "channels_axis": channels_axis}
    return from_variables(variables, method, n_bits, **fixed, levels=levels)


def inferable_params(qparams: QParams, method: QuantizationMethod) -> dict[str, Any]:
    """Return the params an inferable quantizer is built from: exactly the grid's threshold, or its nudged range.

    Every number is a float32 held in a Python float; plain numbers per tensor, lists per channel; a table as it is.
    """
    scale = qparams.scale.astype(np.float64)
    if method is QuantizationMethod.UNIFORM:
        zero_point = qparams.zero_point.astype(np.float64)
        low, high = (qparams.quant_min - zero_point) * scale, (qparams.quant_max - zero_point) * scale
        return {RANGE_MIN: (low + 0.0).tolist(), RANGE_MAX: high.tolist()}  # + 0.0 turns -0.0 into 0.0
    table = {LUT_VALUES: list(qparams.levels)} if qparams.levels else {}
    return {THRESHOLD: (scale * qparams.threshold_steps).tolist(), SIGNED: qparams.signed, **table}
