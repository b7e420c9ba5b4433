"""The built-in Keras quantizers: a base, and one module per training method."""

from trainable_core.registry.methods import built_in_classes
from trainable_keras.keras3.quantizers.base import BaseKerasTrainableQuantizer
from trainable_keras.keras3.quantizers.dqa import DqaActivationQuantizer, DqaWeightsQuantizer
from trainable_keras.keras3.quantizers.lsq import LsqActivationQuantizer, LsqWeightsQuantizer
from trainable_keras.keras3.quantizers.ste import SteActivationQuantizer, SteWeightsQuantizer

BUILTIN: tuple[type[BaseKerasTrainableQuantizer], ...] = tuple(built_in_classes(__name__))
"""What the plugin registers: the quantizers of every built-in method that has a module here."""

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
