"""DNN quantization with attention: a softmax over bit widths, annealed until one width is left.

References
----------
Hacene, Mauch, Uhlich and Cardinaux, "DNN Quantization with Attention", 2021, arXiv:2103.13322.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainable_core.enums import TieRule
from trainable_core.qparams import Float64, QParams
from trainable_core.reference import affine, ste

MAX_BITS = 16


@dataclass(frozen=True)
class Gradients:
    """Gradients of a loss through one attention-weighted fake quantization.

    Parameters
    ----------
    x : float64 array, shape of the input
        With respect to the input.
    logits : float64 array, shape (K,)
        With respect to the attention's logits.
    """

    x: Float64
    logits: Float64


def default_widths(n_bits: int) -> list[int]:
    """Return the candidate widths when the config names none: n, 2n and 4n, at most 16 bits, without repetition.

    Examples
    --------
    >>> default_widths(2), default_widths(4), default_widths(8)
    ([2, 4, 8], [4, 8, 16], [8, 16])
    """
    return sorted({min(n_bits * factor, MAX_BITS) for factor in (1, 2, 4)})


def attention(logits: ArrayLike, temperature: float) -> Float64:
    """Return ``softmax(logits / temperature)``, or one-hot at the largest logit (the first of equals) for 0.

    Parameters
    ----------
    logits : float array, shape (K,)
        Importance of each candidate width.
    temperature : float
        >= 0; large mixes evenly, small selects.

    Returns
    -------
    float64 array, shape (K,)
        Sums to 1.

    Examples
    --------
    >>> attention([0.0, 0.0], 1.0), attention([1.0, 3.0, 3.0], 0.0)
    (array([0.5, 0.5]), array([0., 1., 0.]))
    """
    logits = np.asarray(logits, np.float64)
    if temperature == 0:
        return np.asarray(np.eye(len(logits))[int(np.argmax(logits))])
    weights = np.exp((logits - logits.max()) / temperature)
    return np.asarray(weights / weights.sum())


def fake_quantize(
    x: ArrayLike,
    candidates: Sequence[QParams],
    logits: ArrayLike,
    temperature: float,
    *,
    tie_rule: TieRule = TieRule.HALF_EVEN,
) -> NDArray[Any]:
    """Return the attention-weighted sum of the candidates' fake quantizations, in the dtype of `x`.

    With temperature 0 it is the winner's fake quantization, bit for bit.
    """
    x = np.asarray(x)
    weights = attention(logits, temperature)
    if temperature == 0:
        return affine.fake_quantize(x, candidates[int(np.argmax(weights))], tie_rule=tie_rule)
    mixed = np.zeros(x.shape)
    for weight, grid in zip(weights, candidates, strict=True):
        # in float64 before it is weighted: NumPy 1 multiplies a float64 scalar and a float32 array in float32
        mixed += weight * affine.fake_quantize(affine.to_float32(x), grid, tie_rule=tie_rule).astype(np.float64)
    with np.errstate(over="ignore"):  # a float16 result beyond its range is infinite
        return np.asarray(mixed.astype(affine.result_dtype(x)))


def gradients(
    x: ArrayLike,
    upstream: ArrayLike,
    candidates: Sequence[QParams],
    logits: ArrayLike,
    temperature: float,
    *,
    tie_rule: TieRule = TieRule.HALF_EVEN,
) -> Gradients:
    """Return the gradients of the attention-weighted fake quantization.

    Notes
    -----
    With ``a = attention(logits, T)``, ``y_k`` the candidates' values and ``y = sum_k a_k y_k``:
    ``dL/dx = sum_k a_k * upstream * inside_k`` (each candidate straight-through) and
    ``dL/dlogit_k = a_k / T * sum(upstream * (y_k - y))``, the softmax rule. With temperature 0 the attention is
    constant: the logits get 0.
    """
    x, upstream = np.asarray(x), np.asarray(upstream, np.float64)
    weights = attention(logits, temperature)
    d_x = sum(w * ste.gradients(x, upstream, grid).x for w, grid in zip(weights, candidates, strict=True))
    if temperature == 0:
        return Gradients(np.asarray(d_x), np.zeros(len(weights)))
    values = [
        affine.fake_quantize(affine.to_float32(x), grid, tie_rule=tie_rule).astype(np.float64) for grid in candidates
    ]
    mixed = sum(w * value for w, value in zip(weights, values, strict=True))
    d_logits = [
        w / temperature * float((upstream * (value - mixed)).sum()) for w, value in zip(weights, values, strict=True)
    ]
    return Gradients(np.asarray(d_x), np.asarray(d_logits))


def bit_cost(logits: ArrayLike, temperature: float, widths: Sequence[int]) -> float:
    """Return the expected bit width ``sum_k a_k * n_k``: the regularizer that draws training to the low width.

    Examples
    --------
    >>> bit_cost([0.0, 0.0], 1.0, [4, 8])
    6.0
    """
    return float(attention(logits, temperature) @ np.asarray(widths, np.float64))


def bit_cost_gradient(logits: ArrayLike, temperature: float, widths: Sequence[int]) -> Float64:
    """Return the gradient of `bit_cost` with respect to the logits: ``a_k / T * (n_k - sum_j a_j n_j)``."""
    weights = attention(logits, temperature)
    if temperature == 0:
        return np.zeros(len(weights))
    bits = np.asarray(widths, np.float64)
    return np.asarray(weights / temperature * (bits - weights @ bits))
