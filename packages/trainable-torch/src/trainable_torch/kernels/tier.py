"""Which tier of kernels is used, and the switch for it: the environment variable ``TRAINABLE_TORCH_KERNELS``.

``plain``
    Every fast path is off: tensors are fake-quantized by the formula of `trainable_torch.kernels.plain`, layers and
    their quantizers are separate autograd nodes, nothing is computed again in the backward pass, and in evaluation
    weights are quantized at every forward.
``passes``
    PyTorch's own operations in place, the gradients masked without a selection; a layer and its quantizers are one
    node.
``native``
    Loops that numba compiles; needs the extra ``trainable-torch[speed]``.

Without the variable it is ``native`` where numba works, else ``passes``. The variable is read when the first tensor is
quantized.
"""

from __future__ import annotations

import functools
import os

from trainable_core.errors import InvalidArgumentError

VARIABLE = "TRAINABLE_TORCH_KERNELS"
PLAIN, PASSES, NATIVE = "plain", "passes", "native"
TIERS = PLAIN, PASSES, NATIVE


@functools.cache
def wanted() -> str | None:
    """Return the tier that the environment asks for, or None.

    Raises
    ------
    InvalidArgumentError
        When the variable names no tier.
    """
    value = os.environ.get(VARIABLE, "").strip()
    if value and value not in TIERS:
        raise InvalidArgumentError(VARIABLE, f"{value!r} is not one of: {', '.join(TIERS)}")
    return value or None
