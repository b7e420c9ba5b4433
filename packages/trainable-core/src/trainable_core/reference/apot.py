"""Additive powers of two: each level is a sum of powers of two, so a product is a few shifts.

References
----------
Li, Dong and Wang, "Additive Powers-of-Two Quantization: An Efficient Non-uniform Discretization for Neural Networks",
ICLR 2020, arXiv:1909.13144.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping

from trainable_core.enums import QuantizationTarget
from trainable_core.errors import UnsupportedConfigError
from trainable_core.reference.table import fake_quantize, gradients, table_method

__all__ = ["METHOD", "WIDTHS", "check_width", "fake_quantize", "gradients", "levels"]

TERMS: Mapping[int, tuple[tuple[int, ...], ...]] = {
    1: ((0, 64),),
    2: ((0, 64, 32, 16),),
    3: ((0, 96, 48, 12), (0, 24)),
    4: ((0, 64, 16, 4), (0, 32, 8, 2)),
    5: ((0, 64, 16, 2), (0, 32, 8, 1), (0, 4)),
}
"""The sets of powers of two, times a common factor, whose sums are the magnitudes of so many bits, in 128ths."""

WIDTHS: Mapping[QuantizationTarget, tuple[int, ...]] = {
    QuantizationTarget.Weights: tuple(width + 1 for width in TERMS),
    QuantizationTarget.Activation: tuple(width for width in TERMS if width - 1 in TERMS),
}
"""The widths that there are levels for: of activations those that have levels with a sign and without."""


def check_width(n_bits: int, target: QuantizationTarget, subject: str) -> None:
    """Require a width that there are levels for, whatever the sign that calibration finds.

    Raises
    ------
    UnsupportedConfigError
        For other widths.
    """
    if n_bits not in WIDTHS[target]:
        raise _refused(
            n_bits, WIDTHS[target], subject, f" of {'weights' if target.name == 'Weights' else 'activations'}"
        )


def _refused(n_bits: int, widths: Iterable[int], subject: str, of: str = "") -> UnsupportedConfigError:
    known = ", ".join(map(str, widths))
    problem = f"APOT has levels{of} for {known} bits, not for {n_bits}"
    return UnsupportedConfigError(subject, problem, "LSQ takes every width, in equal steps.")


def levels(n_bits: int, subject: str, *, signed: bool = True) -> tuple[int, ...]:
    """Return the levels in 128ths of the threshold; without a sign, in 256ths of it.

    Parameters
    ----------
    n_bits : int
        2 to 6, the sign included; without a sign 1 to 5.
    subject : str
        The quantizer, for errors.
    signed : bool
        Whether there are negative levels; of weights there always are.

    Raises
    ------
    UnsupportedConfigError
        For other widths: an integer of 8 bits does not hold the smaller terms.

    Notes
    -----
    Equation 5 with terms of two bits, and one of one bit where the magnitudes have an odd number: for 4 bits of
    magnitude ``{0, 1, 1/4, 1/16} + {0, 1/2, 1/8, 1/32}``, for 3 bits ``{0, 1, 1/2, 1/8} + {0, 1/4}``, as in the
    authors' code. The paper's alpha is the largest level. Levels without a sign are those of the next width with one,
    its negative levels left out; as codes they are twice as large, because a threshold stands for twice as many.
    *Deviations:* weights are not normalized before they are quantized (equation 9); alpha begins where calibration puts
    it, and not at 3 for weights and 8 for activations.

    Examples
    --------
    >>> levels(3, "q")
    (-64, -32, -16, 0, 16, 32, 64)
    >>> levels(2, "q", signed=False)
    (0, 32, 64, 128)
    """
    if n_bits - int(signed) not in TERMS:
        raise _refused(n_bits, (width + int(signed) for width in TERMS), subject)
    magnitudes = {sum(terms) for terms in itertools.product(*TERMS[n_bits - int(signed)])}
    return tuple(sorted({sign * each for each in magnitudes for sign in ((1, -1) if signed else (2,))}))


METHOD = table_method(
    "APOT",
    "Additive powers of two",
    "Li et al., ICLR 2020, arXiv:1909.13144",
    __name__,
    targets=(QuantizationTarget.Weights, QuantizationTarget.Activation),
)
