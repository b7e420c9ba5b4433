"""LSQ+: scale and offset of a range learn with the weights.

References
----------
Bhalgat, Lee, Nagel, Blankevoort and Kwak, "LSQ+: Improving low-bit quantization through learnable offsets and better
initialization", CVPR Workshops 2020, arXiv:2004.09576.
"""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from trainable_core.constants import RANGE_MAX, RANGE_MIN
from trainable_core.enums import QuantizationMethod
from trainable_core.reference import lsq, rounding
from trainable_core.reference.lsq import fake_quantize, gradient_scale, gradients
from trainable_core.reference.method import Method

__all__ = ["METHOD", "OFFSET", "SCALE", "encode_grid", "fake_quantize", "gradient_scale", "gradients"]

SCALE, OFFSET = "scale", "offset"
"""Names of the variables, the paper's s and beta."""


def encode_grid(numbers: dict[str, NDArray[Any]], n_bits: int) -> dict[str, NDArray[Any]]:
    """Return the variables that stand for a range: the width of a step, and the lower end.

    Parameters
    ----------
    numbers : dict of str to array
        ``range_min`` and ``range_max``.
    n_bits : int
        Width of the codes.

    Notes
    -----
    Equation 1 with codes from 0 to ``Q = 2**n_bits - 1``: ``y = round(clip((x - beta) / s, 0, Q)) * s + beta``, whose
    range is from beta to ``beta + Q * s``. *Deviation:* a deployed zero point is a whole number, so beta is rounded to
    a multiple of s, and a range is widened to hold zero. Both are straight-through.

    The gradients are those of `trainable_core.reference.lsq`, in terms of these variables (equations 4 and 5, each
    times ``g = 1 / sqrt(N * Q)``):

    ============  ==============  ========
    where         dy/ds           dy/dbeta
    ============  ==============  ========
    x below       0               1
    x inside      round(v) - v    0
    x above       Q               1
    ============  ==============  ========

    So plain SGD moves s and beta as it does in the paper, where it moves the ends of LSQ's range more slowly.

    Examples
    --------
    >>> import numpy as np
    >>> encode_grid({"range_min": np.array([-1.0]), "range_max": np.array([2.0])}, n_bits=2)
    {'scale': array([1.]), 'offset': array([-1.])}
    """
    low, high = numbers[RANGE_MIN], numbers[RANGE_MAX]
    return {SCALE: (high - low) / (2**n_bits - 1), OFFSET: low + 0.0}


METHOD = Method(
    name="LSQ_PLUS",
    title="LSQ with learned offsets",
    reference="Bhalgat et al., CVPR Workshops 2020, arXiv:2004.09576",
    module=__name__,
    learns_grid=True,
    grid_parameters=(SCALE, OFFSET),
    grids=(QuantizationMethod.UNIFORM,),
    options=rounding.OPTIONS,
    conformance_arguments=rounding.CONFORMANCE_ARGUMENTS,
    oracle=lsq.METHOD.oracle,
)
