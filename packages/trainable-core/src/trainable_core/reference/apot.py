"""Additive powers of two: each level is a sum of powers of two, so a product is a few shifts.

References
----------
Li, Dong and Wang, "Additive Powers-of-Two Quantization: An Efficient Non-uniform Discretization for Neural Networks",
ICLR 2020, arXiv:1909.13144.
"""

from __future__ import annotations

from collections.abc import Mapping

from trainable_core.errors import UnsupportedConfigError
from trainable_core.reference.table import fake_quantize, gradients, table_method

__all__ = ["METHOD", "fake_quantize", "gradients", "levels"]

TERMS: Mapping[int, tuple[tuple[int, ...], tuple[int, ...]]] = {
    2: ((0, 64), (0,)),
    3: ((0, 64, 32, 16), (0,)),
    4: ((0, 96, 48, 12), (0, 24)),
    5: ((0, 64, 16, 4), (0, 32, 8, 2)),
}
"""The two sets of powers of two, times a common factor, whose sums are the magnitudes of a bit width."""


def levels(n_bits: int, subject: str) -> tuple[int, ...]:
    """Return the levels in 128ths of the threshold.

    Parameters
    ----------
    n_bits : int
        2 to 5, the sign included.
    subject : str
        The quantizer, for errors.

    Raises
    ------
    UnsupportedConfigError
        For other widths: an integer of 8 bits does not hold the smaller terms.

    Notes
    -----
    Equation 5 with two terms of up to two bits: for 5 bits ``{0, 1, 1/4, 1/16} + {0, 1/2, 1/8, 1/32}``, for 4 bits
    ``{0, 1, 1/2, 1/8} + {0, 1/4}``, as in the authors' code. The paper's alpha is the largest level. *Deviation:* the
    weights are not normalized before they are quantized (equation 9).

    Examples
    --------
    >>> levels(3, "q")
    (-64, -32, -16, 0, 16, 32, 64)
    """
    if n_bits not in TERMS:
        known = ", ".join(map(str, TERMS))
        raise UnsupportedConfigError(subject, f"APOT has levels for {known} bits, not for {n_bits}")
    first, second = TERMS[n_bits]
    magnitudes = {one + other for one in first for other in second}
    return tuple(sorted({sign * each for each in magnitudes for sign in (1, -1)}))


METHOD = table_method("APOT", "Additive powers of two", "Li et al., ICLR 2020, arXiv:1909.13144", __name__)
