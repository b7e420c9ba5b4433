"""ParetoQ's levels of 1 and 2 bits; defined by `trainable_core.reference.paretoq`."""

from __future__ import annotations

from mct_quantizers import QuantizationTarget, mark_quantizer

from trainable_core.backend.options import ParetoqOptions
from trainable_core.enums import TrainingMethod
from trainable_core.reference import paretoq
from trainable_torch.quantizers.table import METHODS, TableQuantizer


class ParetoqQuantizer(ParetoqOptions, TableQuantizer):
    """Binary, ternary or stretched levels, the threshold learns; see `trainable_core.reference.paretoq`.

    Its arguments are those of `trainable_core.backend.options.ParetoqOptions`.
    """

    declaration = paretoq.METHOD


@mark_quantizer(QuantizationTarget.Weights, METHODS, TrainingMethod.PARETOQ)
class ParetoqWeightsQuantizer(ParetoqQuantizer):
    """ParetoQ for weights."""
