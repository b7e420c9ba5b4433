"""Dynamic activations: the grid is computed from the tensor itself at every call, so there is nothing to calibrate.

References
----------
Yao et al., "ZeroQuant: Efficient and Affordable Post-Training Quantization for Large-Scale Transformers", NeurIPS 2022,
arXiv:2206.01861, section 4.1 (token-wise scales); Dettmers et al., "LLM.int8()", NeurIPS 2022, arXiv:2208.07339,
section 2.1 (``scale = max|x| / 127``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainable_core.config import TrainableQuantizerConfig
from trainable_core.constants import RANGE_MAX, RANGE_MIN, THRESHOLD
from trainable_core.enums import QuantizationMethod, QuantizationTarget, TieRule
from trainable_core.errors import InvalidArgumentError, nearest
from trainable_core.qparams import Float32, Float64, QParams, code_range, from_variables
from trainable_core.reference import affine
from trainable_core.reference.method import Method, Option
from trainable_core.reference.oracle import ExpectedGradients, Oracle, State

TOKEN: Final = "token"  # noqa: S105 - a vector of a sequence
"""One scale for each vector along the last axis."""

TENSOR: Final = "tensor"
"""One scale for the whole tensor."""

GRANULARITIES: Final = (TOKEN, TENSOR)


def checked_granularity(granularity: object, subject: str) -> str:
    """Return what has a scale of its own; InvalidArgumentError unless it is one of `GRANULARITIES`."""
    if not isinstance(granularity, str) or granularity not in GRANULARITIES:
        problem = f"must be one of {', '.join(GRANULARITIES)}, got {granularity!r}"
        raise InvalidArgumentError(f"{subject}: granularity", problem + nearest(granularity, GRANULARITIES))
    return granularity


def headroom(quant_min: int, quant_max: int) -> float:
    """Return the factor from the largest magnitude to the threshold for which that magnitude is the last code.

    A threshold t has the scale ``t / 2**(n_bits - signed)``, one step more than the last code. The result is a float32
    number. A signed 1-bit grid has no code above zero; its threshold is the largest magnitude.

    Examples
    --------
    >>> headroom(-8, 7), headroom(0, 15), headroom(-1, 0)
    (1.1428571939468384, 1.0666667222976685, 1.0)
    """
    steps = -quant_min if quant_min < 0 else quant_max + 1
    return float(np.float32(steps / max(quant_max, 1)))


def grid_of(
    x: ArrayLike,
    method: QuantizationMethod,
    n_bits: int,
    *,
    signed: bool = True,
    min_threshold: float = 0.0,
    granularity: str = TOKEN,
) -> QParams:
    """Return the grid that a tensor has for itself.

    Parameters
    ----------
    x : float array, any shape but empty
        What is to be quantized.
    method : QuantizationMethod
        POWER_OF_TWO, SYMMETRIC or UNIFORM.
    n_bits : int
        Width of the codes.
    signed : bool
        Whether a symmetric grid reaches below zero; negative values of an unsigned one become zero.
    min_threshold : float
        Lower bound of the threshold, or of the range's width.
    granularity : {"token", "tensor"}
        What has a scale of its own.

    Returns
    -------
    QParams
        Scale and zero point broadcast against `x`: shape ``(*x.shape[:-1], 1)`` per token, ``()`` per tensor.

    Notes
    -----
    - SYMMETRIC: ``scale = max|x| / quant_max``, so that no value is clipped and the largest one is a code.
    - POWER_OF_TWO: the threshold for this scale, rounded up to a power of two.
    - UNIFORM: the range from ``min(x, 0)`` to ``max(x, 0)``, nudged as every range is: values next to its ends may move
      by half a step more than they would by rounding.

    NaN is not looked at, and stays NaN. With an infinity, the scale is as large as it can be.

    Examples
    --------
    >>> x = np.array([[1.0, -3.5], [0.875, 0.05]])
    >>> grid_of(x, QuantizationMethod.SYMMETRIC, 4).scale.tolist()
    [[0.5], [0.125]]
    """
    x = affine.to_float32(x)
    x = np.where(np.isnan(x), np.float32(0), x)
    per_token = granularity == TOKEN
    axis: Any = -1 if per_token and x.ndim else None
    keep = per_token and x.ndim > 0
    quant_min, quant_max = code_range(method, n_bits, signed=signed)
    if method is QuantizationMethod.UNIFORM:
        numbers = {RANGE_MIN: x.min(axis, keepdims=keep), RANGE_MAX: x.max(axis, keepdims=keep)}
    else:
        magnitude = np.abs(x) if quant_min < 0 else np.maximum(x, np.float32(0))
        with np.errstate(over="ignore"):  # beyond the bound of thresholds, which is applied next
            largest = magnitude.max(axis, keepdims=keep) * np.float32(headroom(quant_min, quant_max))
        numbers = {THRESHOLD: largest}
    return from_variables(numbers, method, n_bits, signed=signed, min_threshold=min_threshold)


def fake_quantize(x: ArrayLike, grid: QParams, *, tie_rule: TieRule = TieRule.HALF_EVEN) -> NDArray[Any]:
    """Return real values snapped to the grid that `grid_of` made of them."""
    return affine.fake_quantize(x, grid, tie_rule=tie_rule)


def gradients(x: ArrayLike, upstream: ArrayLike) -> Float64:
    """Return the gradient of the input: the upstream gradient as it is, everywhere.

    Notes
    -----
    The quantization is straight-through, and nothing is clipped, so there is no outside. The scale is a function of the
    input too, ``s = max|x| / quant_max``. Its part of the gradient is left out, by convention, as torchao, LLM-QAT
    (arXiv:2305.17888) and AQT leave it out: it would give the one largest element of a token the sum of all rounding
    errors, ``sum(upstream * (round(v) - v))``. That sum is noise of mean zero, which does not vanish as the model
    converges, and moves a single element of each token.
    """
    return np.broadcast_to(np.asarray(upstream, np.float64), np.shape(x)).copy()


def _expected(x: Float32, upstream: Float32, state: State) -> ExpectedGradients:  # noqa: ARG001 - the signature of `Oracle.gradients`
    found = gradients(x, upstream)
    return ExpectedGradients(found, np.zeros(found.shape))


def _grid_of_input(x: Float32, config: TrainableQuantizerConfig, arguments: Mapping[str, Any]) -> QParams:
    return grid_of(
        x,
        config.quantization_method,
        config.n_bits,
        signed=config.signed,
        min_threshold=config.min_threshold,
        granularity=arguments["granularity"],
    )


METHOD = Method(
    name="DYNAMIC",
    title="Dynamic activations",
    reference="Yao et al., NeurIPS 2022, arXiv:2206.01861",
    module=__name__,
    targets=(QuantizationTarget.Activation,),
    options=(
        Option("granularity", TOKEN, "`token`: a scale for each vector along the last axis; `tensor`: one for all"),
    ),
    depends_on="tensor",
    computes_grid=True,
    conformance_arguments=({"granularity": TENSOR},),
    oracle=Oracle(_expected, grid=_grid_of_input),
)
