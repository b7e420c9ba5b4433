"""LSQ+; defined by `trainable_core.reference.lsq_plus`."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from trainable_core.constants import RANGE_MAX, RANGE_MIN
from trainable_core.reference import lsq_plus
from trainable_keras.quantizers.lsq import LsqQuantizer


class LsqPlusQuantizer(LsqQuantizer):
    """Scale and offset of a range learn with the weights; see `trainable_core.reference.lsq_plus`."""

    declaration = lsq_plus.METHOD

    def encode_grid(self, numbers: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return scale and offset of a range."""
        return lsq_plus.encode_grid(numbers, self.quantization_config.n_bits)

    def decode_grid(self, variables: dict[str, Any]) -> dict[str, Any]:
        """Return the range."""
        last = 2.0**self.quantization_config.n_bits - 1.0
        scale, offset = variables[lsq_plus.SCALE], variables[lsq_plus.OFFSET]
        return {RANGE_MIN: offset, RANGE_MAX: offset + scale * last}
