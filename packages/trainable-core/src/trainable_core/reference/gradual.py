"""Gradual quantization: while training, a share of the values stays float, and falls to none by a schedule.

References
----------
Sony's Model Compression Toolkit, gradual activation quantization of its gradient-based post-training quantization. A
network learns the quantization of its activations better when it does not meet all of it at once; see also Zhuang et
al., "Towards Effective Low-bitwidth Convolutional Neural Networks", CVPR 2018, arXiv:1711.00205.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

ELEMENT, STEP = -1640531535, 1367130551
"""Odd numbers that a position and a step are multiplied by; the first is 2**32 over the golden ratio, as int32."""


@np.errstate(over="ignore")  # whole numbers are meant to wrap
def draws(shape: tuple[int, ...], step: int) -> NDArray[np.float32]:
    """Return numbers from 0 to 1 that look random, the same ones for the same step.

    Notes
    -----
    In int32, which wraps: ``z = position * ELEMENT + step * STEP``, then ``z (2 z + 1)``, ``z + floor(z / 2**16)`` and
    ``z (2 z + 1)`` again; ``z * 2**-32 + 0.5``. The quadratic is a permutation of the whole numbers that mixes their
    high bits (that of the cipher RC6). No generator has a state, so training resumes bit for bit and a forward that is
    computed again gives the same values.
    """
    positions = np.arange(np.prod(shape, dtype=np.int64)).astype(np.int32)
    z = positions * np.int32(ELEMENT) + np.array([step]).astype(np.int32) * np.int32(STEP)
    z = z * (np.int32(2) * z + np.int32(1))
    z = z + z // np.int32(2**16)
    z = z * (np.int32(2) * z + np.int32(1))
    return np.asarray(z.astype(np.float32) * np.float32(2.0**-32) + np.float32(0.5)).reshape(shape)


def mixed(x: ArrayLike, quantized: ArrayLike, share: float, step: int) -> NDArray[np.float32]:
    """Return the values of a training step: those of `x` where `draws` are below the share, the quantized elsewhere.

    The gradient of each element goes where its value comes from.

    Examples
    --------
    >>> x, quantized = np.full(1000, 0.3, np.float32), np.full(1000, 0.5, np.float32)
    >>> [round(float((mixed(x, quantized, share, step=7) == x).mean()), 1) for share in (0.0, 0.5, 1.0)]
    [0.0, 0.5, 1.0]
    """
    x = np.asarray(x, np.float32)
    kept = (draws(x.shape, step) < np.float32(share)) | (share >= 1)
    return np.where(kept, x, np.asarray(quantized, np.float32))
