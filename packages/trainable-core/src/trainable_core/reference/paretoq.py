"""ParetoQ's levels for weights of 1 and 2 bits: binary, ternary, and four that are stretched around zero.

References
----------
Liu et al., "ParetoQ: Scaling Laws in Extremely Low-bit LLM Quantization", 2025, arXiv:2502.02631, section 3.
"""

from __future__ import annotations

from trainable_core.errors import InvalidArgumentError, UnsupportedConfigError
from trainable_core.reference.method import Option
from trainable_core.reference.table import fake_quantize, gradients, table_method

__all__ = ["METHOD", "fake_quantize", "gradients", "levels"]

BINARY, TERNARY, STRETCHED = (-64, 64), (-64, 0, 64), (-96, -32, 32, 96)


def levels(n_bits: int, subject: str, *, ternary: bool = False) -> tuple[int, ...]:
    """Return the levels in 128ths of the threshold.

    Parameters
    ----------
    n_bits : int
        1 or 2.
    subject : str
        The quantizer, for errors.
    ternary : bool
        With 2 bits: whether there are three levels, one of them zero, instead of four without it.

    Raises
    ------
    UnsupportedConfigError
        For other widths: there the paper uses LSQ.
    InvalidArgumentError
        When `ternary` is not true or false, or is true with 1 bit.

    Notes
    -----
    With the paper's alpha: 1 bit is ``+-alpha``, with ``threshold = 2 alpha``. Ternary is 0 and ``+-2/3 alpha``, and 2
    bits are ``+-1/4`` and ``+-3/4`` alpha ("stretched elastic quantization"), both with ``threshold = 4/3 alpha``.

    Examples
    --------
    >>> levels(1, "q"), levels(2, "q", ternary=True), levels(2, "q")
    ((-64, 64), (-64, 0, 64), (-96, -32, 32, 96))
    """
    if not isinstance(ternary, bool):
        raise InvalidArgumentError(f"{subject}: ternary", f"must be true or false, got {ternary!r}")
    if ternary and n_bits == 1:
        raise InvalidArgumentError(f"{subject}: ternary", "three levels need 2 bits")
    if n_bits not in {1, 2}:
        problem = f"PARETOQ has levels for 1 and 2 bits, not for {n_bits}"
        raise UnsupportedConfigError(subject, problem, "the paper uses LSQ there, on a SYMMETRIC grid.")
    if n_bits == 1:
        return BINARY
    return TERNARY if ternary else STRETCHED


METHOD = table_method(
    "PARETOQ",
    "Binary, ternary and stretched levels",
    "Liu et al., 2025, arXiv:2502.02631",
    __name__,
    (Option("ternary", default=False, summary="three levels instead of four, with 2 bits"),),
    ({"ternary": True},),
)
