"""One quantizer marked with core's own enums."""

import beta_framework  # noqa: F401 - imported for being imported

from trainable_core.enums import QuantizationMethod, QuantizationTarget, TrainingMethod
from trainable_core.quantizer import BaseTrainableQuantizer


class SteQuantizer(BaseTrainableQuantizer):
    """Answers for weights."""

    backend = "beta"
    quantization_target = QuantizationTarget.Weights
    quantization_method = (QuantizationMethod.POWER_OF_TWO,)
    identifier = TrainingMethod.STE
