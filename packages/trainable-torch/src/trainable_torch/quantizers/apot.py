"""Additive powers of two; defined by `trainable_core.reference.apot`."""

from __future__ import annotations

from mct_quantizers import QuantizationTarget, mark_quantizer

from trainable_core.backend.options import ApotOptions
from trainable_core.enums import TrainingMethod
from trainable_core.reference import apot
from trainable_torch.quantizers.table import METHODS, OF_ACTIVATIONS, TableQuantizer


class ApotQuantizer(ApotOptions, TableQuantizer):
    """Levels are sums of powers of two, the threshold learns; see `trainable_core.reference.apot`."""

    declaration = apot.METHOD


@mark_quantizer(QuantizationTarget.Weights, METHODS, TrainingMethod.APOT)
class ApotWeightsQuantizer(ApotQuantizer):
    """APoT for weights."""


@mark_quantizer(QuantizationTarget.Activation, OF_ACTIVATIONS, TrainingMethod.APOT)
class ApotActivationQuantizer(ApotQuantizer):
    """APoT for activations."""
