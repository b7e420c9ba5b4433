"""LSQ+; defined by `trainable_core.reference.lsq_plus`."""

from __future__ import annotations

from typing import Any

from mct_quantizers import QuantizationMethod, QuantizationTarget, mark_quantizer
from numpy.typing import NDArray
from torch import Tensor

from trainable_core.constants import RANGE_MAX, RANGE_MIN
from trainable_core.enums import TrainingMethod
from trainable_core.reference import lsq_plus
from trainable_torch.quantizers.lsq import LsqQuantizer

METHODS = [QuantizationMethod.UNIFORM]


class LsqPlusQuantizer(LsqQuantizer):
    """Scale and offset of a range learn with the weights; see `trainable_core.reference.lsq_plus`."""

    declaration = lsq_plus.METHOD

    def encode_grid(self, numbers: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return scale and offset of a range."""
        return lsq_plus.encode_grid(numbers, self.quantization_config.n_bits)

    def decode_grid(self, variables: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the range."""
        last = 2**self.quantization_config.n_bits - 1
        scale, offset = variables[lsq_plus.SCALE], variables[lsq_plus.OFFSET]
        # in float64 the product is exact: a compiler may contract it with the sum, and the end stays the same
        return {RANGE_MIN: offset, RANGE_MAX: (offset.double() + scale.double() * last).float()}


@mark_quantizer(QuantizationTarget.Weights, METHODS, TrainingMethod.LSQ_PLUS)
class LsqPlusWeightsQuantizer(LsqPlusQuantizer):
    """LSQ+ for weights."""


@mark_quantizer(QuantizationTarget.Activation, METHODS, TrainingMethod.LSQ_PLUS)
class LsqPlusActivationQuantizer(LsqPlusQuantizer):
    """LSQ+ for activations."""
