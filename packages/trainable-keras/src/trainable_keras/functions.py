"""What the shared code does with a framework's tensors; each Keras fills in one `Functions`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

Tensor = Any
Function = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class Functions:
    """A framework's functions on tensors; those with a name of NumPy's do what NumPy's do.

    Parameters
    ----------
    maximum, minimum, where, isnan, isfinite, abs, floor, round, zeros_like, stack, sort, argmax, reshape : callable
        NumPy's.
    transpose : callable
        NumPy's.
    exp, log, tanh, cos : callable
        NumPy's; compilers may give other last bits.
    sum, max : callable
        NumPy's, with ``axis`` and ``keepdims``.
    largest : callable
        The largest element or zero, whichever is more, with ``axis`` and ``keepdims``; there may be no element.
    all_of, any_of : callable
        ``logical_and`` and ``logical_or``.
    bits_and : callable
        ``bitwise_and`` of int32 bits with a Python integer.
    number : callable
        Returns a Python float as a float32 tensor.
    floats : callable
        Returns NumPy values as a float32 tensor.
    float_bits, bits_float : callable
        Between float32 tensors and their bits as int32.
    cast, stop_gradient, rsqrt, sqrt, softmax : callable
        Those of Keras and TensorFlow.
    total : callable
        The sum of a list of float32 scalars; zero for an empty list.
    divide_by : callable
        ``x / number``, correctly rounded in every compiler, for `x` >= 0.
    reciprocal : callable
        ``1 / x``, correctly rounded in every compiler.
    hide_shape : callable
        Returns a tensor as it is, but one whose shape a graph's optimizer does not know; see
        `trainable_keras.grappler`. Gradients don't pass.
    show_shape : callable
        ``show_shape(x, like)`` returns `x`, whose shape is that of `like`, with the shape known again.
    steps_of : callable
        ``steps_of(x, scale, quant_min, quant_max, centered=...)`` returns ``x / scale`` for comparisons with the ends.
    positions : callable
        Numbers of the elements of a tensor, from 0, as an int32 tensor of its shape.
    size : callable
        Number of a tensor's elements: an int, or a float32 tensor where a dimension is not known yet.
    rank : callable
        Number of a tensor's dimensions; None where it is not known yet.
    dtype_of : callable
        A tensor's dtype, as `cast` takes it.
    is_tensor : callable
        Whether something is a tensor of the framework.
    to_numpy : callable
        Returns the value of a tensor or variable.
    read : callable
        Returns a variable's value as a tensor.
    replicas : callable
        Returns how many replicas of the model run at once, each on its own part of a batch.
    with_gradient : callable
        ``with_gradient(forward, backward)``: `forward` with a gradient of its own, which is ``backward(upstream,
        output, *arguments)``.
    fused : callable
        ``fused(plain, compiled)`` returns a function of the same values, in one pass over memory where it can.
    """

    maximum: Function
    minimum: Function
    where: Function
    isnan: Function
    isfinite: Function
    abs: Function
    floor: Function
    round: Function
    exp: Function
    log: Function
    tanh: Function
    cos: Function
    zeros_like: Function
    stack: Function
    sort: Function
    argmax: Function
    reshape: Function
    transpose: Function
    sum: Function
    max: Function
    largest: Function
    all_of: Function
    any_of: Function
    bits_and: Function
    number: Function
    floats: Function
    float_bits: Function
    bits_float: Function
    cast: Function
    stop_gradient: Function
    rsqrt: Function
    sqrt: Function
    softmax: Function
    total: Function
    divide_by: Function
    reciprocal: Function
    hide_shape: Function
    show_shape: Function
    steps_of: Function
    positions: Function
    size: Callable[[Tensor], Any]
    rank: Callable[[Tensor], int | None]
    dtype_of: Callable[[Tensor], Any]
    is_tensor: Callable[[Any], bool]
    to_numpy: Callable[[Any], NDArray[Any]]
    read: Function
    replicas: Callable[[], int]
    with_gradient: Callable[[Function, Function], Function]
    fused: Callable[..., Function]
