"""Two well-marked quantizers; the marks are enum members that only share their names with core's, as mctq's do."""

from enum import Enum

import alpha_framework  # noqa: F401 - imported for being imported

from trainable_core.quantizer import BaseTrainableQuantizer


class ForeignTarget(Enum):
    """Looks like ``mct_quantizers.QuantizationTarget``."""

    Activation = "Activation"
    Weights = "Weights"


class ForeignMethod(Enum):
    """Looks like ``mct_quantizers.QuantizationMethod``; its values don't matter."""

    SYMMETRIC = "s"
    UNIFORM = "u"


class LsqWeightsQuantizer(BaseTrainableQuantizer):
    """Answers for weights, on two grids."""

    backend = "alpha"
    quantization_target = ForeignTarget.Weights
    quantization_method = (ForeignMethod.SYMMETRIC, ForeignMethod.UNIFORM)
    identifier = "LSQ"


class LsqActivationQuantizer(BaseTrainableQuantizer):
    """Answers for activations, on one grid."""

    backend = "alpha"
    quantization_target = ForeignTarget.Activation
    quantization_method = (ForeignMethod.SYMMETRIC,)
    identifier = "LSQ"
