"""The built-in Keras 2 quantizers: a base, and one module per training method."""

from trainable_tfkeras.quantizers.base import BaseKerasTrainableQuantizer
from trainable_tfkeras.quantizers.dqa import DqaActivationQuantizer, DqaWeightsQuantizer
from trainable_tfkeras.quantizers.lsq import LsqActivationQuantizer, LsqWeightsQuantizer
from trainable_tfkeras.quantizers.ste import SteActivationQuantizer, SteWeightsQuantizer

BUILTIN: tuple[type[BaseKerasTrainableQuantizer], ...] = (
    SteWeightsQuantizer,
    SteActivationQuantizer,
    LsqWeightsQuantizer,
    LsqActivationQuantizer,
    DqaWeightsQuantizer,
    DqaActivationQuantizer,
)
"""What the plugin registers."""

__all__ = [
    "BUILTIN",
    "BaseKerasTrainableQuantizer",
    "DqaActivationQuantizer",
    "DqaWeightsQuantizer",
    "LsqActivationQuantizer",
    "LsqWeightsQuantizer",
    "SteActivationQuantizer",
    "SteWeightsQuantizer",
]
