"""DNN quantization with attention: a softmax over bit widths, annealed until one width is left.

References
----------
Hacene, Mauch, Uhlich and Cardinaux, "DNN Quantization with Attention", 2021, arXiv:2103.13322.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainable_core.config import TrainableQuantizerConfig
from trainable_core.enums import TieRule
from trainable_core.errors import InvalidArgumentError
from trainable_core.qparams import Float32, Float64, QParams
from trainable_core.reference import affine, ste
from trainable_core.reference.method import Method, Option
from trainable_core.reference.oracle import EPSILON, ExpectedGradients, ExpectedValues, Oracle, State, near_tie
from trainable_core.schedule import LinearAnnealingScheduler

S = TypeVar("S", bound=LinearAnnealingScheduler)

MAX_BITS = 16

TEMPERATURE = {"t_start": 0, "t_end": 1000, "initial_val": 1.0, "target_val": 0.02}
"""Default schedule: from an even mixture to a clear choice within 1000 training steps."""

F32_MAX = float(np.finfo(np.float32).max)


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


# ---- options of the quantizers --------------------------------------------------------------------------------------


def candidate_widths(config: TrainableQuantizerConfig) -> tuple[int, ...]:
    """Return the candidate widths, ascending: the config's, or `default_widths` when it names none."""
    if config.candidates is None:
        return tuple(default_widths(config.n_bits))
    return tuple(sorted({candidate.n_bits for candidate in config.candidates}))


def temperature_schedule(scheduler: type[S], temperature: object, subject: str) -> S:
    """Return the schedule of the attention's temperature.

    Parameters
    ----------
    scheduler : type
        The backend's `LinearAnnealingScheduler`.
    temperature : mapping or None
        Its arguments; None takes `TEMPERATURE`.
    subject : str
        The quantizer, for errors.

    Raises
    ------
    InvalidArgumentError
        When it is no such mapping, or a value is not positive.
    """
    subject = f"{subject}: temperature"
    given = TEMPERATURE if temperature is None else temperature
    if not isinstance(given, Mapping):
        raise InvalidArgumentError(subject, f"must be a mapping, got {given!r}", f"give {', '.join(TEMPERATURE)}.")
    try:
        schedule: Any = scheduler.from_dict(given)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(subject, error.problem) from error
    if not (schedule.initial_val > 0 and schedule.target_val > 0):
        raise InvalidArgumentError(subject, "initial_val and target_val must be positive")
    made: S = schedule
    return made


def checked_bit_cost_weight(bit_cost_weight: Any, subject: str) -> float:
    """Return the factor of `bit_cost` in the loss; InvalidArgumentError unless it is from 0 to float32's largest."""
    number = isinstance(bit_cost_weight, Real) and not isinstance(bit_cost_weight, bool)
    if not number or not 0 <= bit_cost_weight <= F32_MAX:
        raise InvalidArgumentError(
            f"{subject}: bit_cost_weight", f"must be a number from 0 to {F32_MAX:.3g}, got {bit_cost_weight!r}"
        )
    return float(bit_cost_weight)


def selecting_logits(widths: Sequence[int], width: int) -> Float32:
    """Return logits of which that of `width` is the largest.

    Examples
    --------
    >>> selecting_logits((2, 4, 8), 4)
    array([0., 1., 0.], dtype=float32)
    """
    return np.asarray([float(each == width) for each in widths], np.float32)


# ---- declaration ----------------------------------------------------------------------------------------------------


def schedule_end(schedule: LinearAnnealingScheduler) -> int:
    """Return the number of counted training steps from which on training values are the deployed ones.

    The first ``floor(t_end)`` training steps are soft, and every later one is not. A forward's own step is counted
    before its values are computed, so the first deployed values come when ``floor(t_end) + 1`` steps are counted.

    Examples
    --------
    >>> schedule_end(LinearAnnealingScheduler(t_start=0, t_end=3, initial_val=1.0, target_val=0.1))
    4
    """
    return math.floor(schedule.t_end) + 1


def _schedule_of(arguments: Mapping[str, Any]) -> LinearAnnealingScheduler:
    return LinearAnnealingScheduler.from_dict(arguments["temperature"])


def _mixture(state: State) -> tuple[list[QParams], NDArray[Any], float]:
    """Return the grids, the logits, and the temperature of a training forward: 0 once the schedule has ended."""
    schedule = _schedule_of(state.arguments)
    ended = state.steps >= schedule_end(schedule)
    temperature = 0.0 if ended else float(schedule(max(state.steps - 1, 0)))  # the first training step is step 0
    return list(state.grids.values()), state.variables["logits"], temperature


def _expected_values(x: Float32, state: State, training: bool) -> ExpectedValues:  # noqa: FBT001 - the signature of `Oracle.values`
    grids, logits, temperature = _mixture(state)
    expected = fake_quantize(x, grids, logits, temperature if training else 0.0, tie_rule=state.tie_rule)
    allowed = np.zeros(x.shape)
    for grid in grids:
        scale = grid.along(x.ndim).scale.astype(np.float64)
        allowed = allowed + np.where(near_tie(x, grid), scale * (1 + EPSILON), 0.0)
        if training and temperature:
            # Weight and sum of each term are rounded. A softmax's argument a has an error of a * EPSILON / 2,
            # which is that of the weight's logarithm; below -104 the weight is zero in float32.
            reach = np.maximum(*np.abs(affine.ends(grid, x.ndim))) * scale
            allowed = allowed + np.broadcast_to(reach * 108 * EPSILON, x.shape)
    return ExpectedValues(expected, allowed)


def _expected_gradients(x: Float32, upstream: Float32, state: State) -> ExpectedGradients:
    grids, logits, temperature = _mixture(state)
    found = gradients(x, upstream, grids, logits, temperature, tie_rule=state.tie_rule)
    if not temperature:
        return ExpectedGradients(
            found.x, np.zeros(found.x.shape), {"logits": found.logits}, {"logits": 0 * found.logits}
        )
    reach = sum(
        float((np.abs(upstream) * (np.maximum(*np.abs(affine.ends(grid, x.ndim))) * grid.along(x.ndim).scale)).sum())
        for grid in grids
    )
    # As in `_expected_values`; the sum over the elements adds a rounding for each of them.
    operations = 108 + x.size + len(grids)
    x_allowed = np.abs(upstream).astype(np.float64) * operations * EPSILON
    logits_allowed = np.full(len(logits), 2 * reach / temperature * operations * EPSILON)
    return ExpectedGradients(found.x, x_allowed, {"logits": found.logits}, {"logits": logits_allowed})


def _expected_regularization(state: State) -> tuple[float, float]:
    schedule, widths = _schedule_of(state.arguments), list(state.grids)
    temperature = float(schedule(max(state.steps - 1, 0)))
    term = float(state.arguments["bit_cost_weight"]) * bit_cost(state.variables["logits"], temperature, widths)
    # As in `_expected_values`: a weight has 108 roundings, and the sum one for each width.
    return term, abs(term) * (108 + len(widths)) * EPSILON


METHOD = Method(
    name="DQA",
    title="DNN quantization with attention",
    reference="Hacene et al., 2021, arXiv:2103.13322",
    module=__name__,
    own_variables=("logits",),
    options=(
        Option("temperature", None, "arguments of `LinearAnnealingScheduler`, all positive: the softmax's temperature"),
        Option("bit_cost_weight", 0.0, "factor of the expected bit width in `regularization`"),
    ),
    training_forward="soft",
    schedule_end=lambda arguments: schedule_end(_schedule_of(arguments)),
    counts_steps=True,
    conformance_arguments=(
        {
            "temperature": {"t_start": 0, "t_end": 3, "initial_val": 2.0, "target_val": 0.1},
            "bit_cost_weight": 0.25,
        },
    ),
    oracle=Oracle(_expected_gradients, _expected_values, _expected_regularization),
)
