"""Laws on values: which ones there are, and which one an input gets."""

from __future__ import annotations

from typing import Any

import numpy as np

from trainable_core.conformance.case import Case, Subject, ends, grid
from trainable_core.conformance.declared import snaps_its_input, treats_elements_alike
from trainable_core.conformance.law import law, require, same_bits
from trainable_core.conformance.strategies import Kind
from trainable_core.enums import TieRule
from trainable_core.qparams import Float32, QParams
from trainable_core.reference import affine

PER_TENSOR = Kind(per_channel=False)  # mistakes between channels are left to the laws in `channels`
POWER_OF_TWO = 0.5  # a power of two's mantissa, as `frexp` gives it


def _counted(values: Float32, qparams: QParams) -> Float32:
    """Return values divided by the scale: codes counted from zero, or fractions for values off the grid."""
    return np.asarray(values / qparams.along(values.ndim).scale)


@law(
    "The deployed kernel has no values between two codes, so a model that trains with them can't be deployed.",
    kind=PER_TENSOR,
    of_grid=True,
)
def on_grid(subject: Subject, case: Case) -> None:
    """Every value is a value of the grid: a code times the scale."""
    quantizer = subject.quantizer(case)
    values, qparams = subject.values(quantizer, case.x), grid(quantizer)
    low, high = ends(qparams, values.ndim)
    codes = (
        affine.nearest_levels(values, qparams)
        if qparams.levels
        else np.clip(np.rint(_counted(values, qparams)), low, high)
    )
    expected = ((codes + np.float32(0)) * qparams.along(values.ndim).scale).astype(np.float32)
    require("every value is a grid point", values == expected, expected, values)


@law(
    "A level that is never used wastes part of the bit width.",
    kind=Kind(bits=(1, 8), moderate=True, per_channel=False),
    about=snaps_its_input,
    of_grid=True,
)
def level_count(subject: Subject, case: Case) -> None:
    """A sweep over the range gives exactly ``2**n_bits`` different values, or as many as a table has."""
    qparams = grid(subject.quantizer(case))
    low, high = (float(end) for end in ends(qparams, 0))
    sweep = (np.arange(4 * low - 8, 4 * high + 9) / 4 * float(qparams.scale)).astype(np.float32)
    quantizer = subject.quantizer(case, sweep.shape)
    levels = np.unique(subject.values(quantizer, sweep))
    count = len(qparams.levels) or 2 ** int(quantizer.selected_width)
    require("levels of the grid", levels.size == count, count, levels)


@law(
    "Weights that are stored quantized are quantized again when the model runs, and must not move.",
    kind=PER_TENSOR,
    about=snaps_its_input,
    of_grid=True,
)
def idempotence(subject: Subject, case: Case) -> None:
    """Quantizing a quantized tensor changes nothing."""
    quantizer = subject.quantizer(case)
    once = subject.values(quantizer, case.x)
    same_bits("quantized twice", subject.values(quantizer, once), once)


@law("Padding, pruned weights and the zeros of ReLU must stay zero.", kind=PER_TENSOR)
def zero(subject: Subject, case: Case) -> None:
    """Positive and negative zero both become +0.0."""
    quantizer = subject.quantizer(case)
    if quantizer.levels and 0 not in quantizer.levels:
        return  # a table without it, such as +1 and -1
    nothing = np.where(case.x < 0, np.float32(-0.0), np.float32(0.0))
    same_bits("both zeros", subject.values(quantizer, nothing), np.zeros_like(nothing))


@law(
    "The end of the range is the nearest value that an input beyond it can have; this holds for infinities too.",
    kind=Kind(moderate=True, per_channel=False),
    about=snaps_its_input,
    of_grid=True,
)
def saturation(subject: Subject, case: Case) -> None:
    """Inputs beyond an end of the range get the value of that end."""
    quantizer = subject.quantizer(case)
    qparams = grid(quantizer)
    low, high = ends(qparams, case.x.ndim)
    scale = qparams.along(case.x.ndim).scale
    beyond = np.where(case.x < 0, np.minimum(case.x, (low - 1) * scale), np.maximum(case.x, (high + 1) * scale))
    end = np.where(case.x < 0, low, high) * scale
    expected = subject.values(quantizer, end.astype(np.float32))
    same_bits("inputs beyond the ends", subject.values(quantizer, beyond.astype(np.float32)), expected)


@law(
    "Where a value falls while its input grows, gradient descent moves the weight in the wrong direction.",
    kind=PER_TENSOR,
    about=treats_elements_alike,
    of_grid=True,
)
def monotonicity(subject: Subject, case: Case) -> None:
    """A larger input never gets a smaller value."""
    qparams = grid(subject.quantizer(case))
    low, high = (end * qparams.scale for end in ends(qparams, 0))
    between = np.array([0, 0.2, 0.3, 0.7, 0.8], np.float32) * qparams.scale
    x = np.sort(
        np.clip(case.x[..., None] + between, low, high).reshape(-1)
    )  # the law `saturation` covers what lies beyond
    values = subject.values(subject.quantizer(case, x.shape), x)
    require("values of sorted inputs", values[1:] >= values[:-1], np.sort(values), values)


@law(
    "The deployed kernel follows this rule; with another one, trained and deployed codes differ by one at every tie.",
    kind=Kind(exact=True, per_channel=False),
    about=snaps_its_input,
    of_grid=True,
)
def tie_rule(subject: Subject, case: Case) -> None:
    """An input half way between two codes goes where the backend's declared rule sends it."""
    quantizer = subject.quantizer(case)
    qparams = grid(quantizer)
    if (np.frexp(qparams.scale)[0] != POWER_OF_TWO).any():
        return  # the case was made for another of the quantizer's widths
    if qparams.levels:
        _tie_in_table(subject, case, quantizer, qparams)
        return
    low, high = ends(qparams, case.x.ndim)
    down = np.clip(np.floor(affine.steps(case.x, qparams)), low, np.maximum(high - 1, low))
    scale = qparams.along(case.x.ndim).scale
    ties = np.asarray((down + np.float32(0.5)) * scale, np.float32)
    up = down + (down % 2 != 0 if subject.adapter.tie_rule is TieRule.HALF_EVEN else np.float32(1))
    expected = np.asarray((np.clip(up, low, high) + np.float32(0)) * scale, np.float32)
    got = subject.values(quantizer, ties)
    require(f"ties, {subject.adapter.tie_rule.value}", got == expected, expected, got)


def _tie_in_table(subject: Subject, case: Case, quantizer: Any, qparams: QParams) -> None:
    """Require that an input half way between two levels of a table gets the lower one, as mctq's kernel does."""
    levels = np.asarray(qparams.levels, np.float32)
    below = np.arange(case.x.size).reshape(case.x.shape) % (levels.size - 1)
    ties = ((levels[below] + levels[below + 1]) / 2 * qparams.scale).astype(np.float32)
    expected = (levels[below] * qparams.scale).astype(np.float32)
    got = subject.values(quantizer, ties)
    require("ties between the levels of a table, down", got == expected, expected, got)
