"""A PyTorch quantizer whose module imports another framework."""

import jax  # noqa: F401 - the mistake
from mct_quantizers import QuantizationMethod, QuantizationTarget, mark_quantizer

from trainable_torch.quantizers.ste import SteQuantizer


@mark_quantizer(QuantizationTarget.Weights, [QuantizationMethod.SYMMETRIC], "STE")
class ImportsAnotherFramework(SteQuantizer):
    """Its module imports another framework for a type annotation."""
