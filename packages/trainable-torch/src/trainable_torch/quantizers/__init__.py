"""The built-in PyTorch quantizers: a base, and one module per training method."""

from trainable_core.registry.methods import built_in_classes
from trainable_torch.quantizers.base import BasePytorchTrainableQuantizer
from trainable_torch.quantizers.dqa import DqaActivationQuantizer, DqaWeightsQuantizer
from trainable_torch.quantizers.dynamic import DynamicActivationQuantizer
from trainable_torch.quantizers.lsq import LsqActivationQuantizer, LsqWeightsQuantizer
from trainable_torch.quantizers.ste import SteActivationQuantizer, SteWeightsQuantizer

BUILTIN: tuple[type[BasePytorchTrainableQuantizer], ...] = tuple(built_in_classes(__name__))
"""What the plugin registers: the quantizers of every built-in method that has a module here."""

__all__ = [
    "BUILTIN",
    "BasePytorchTrainableQuantizer",
    "DqaActivationQuantizer",
    "DqaWeightsQuantizer",
    "DynamicActivationQuantizer",
    "LsqActivationQuantizer",
    "LsqWeightsQuantizer",
    "SteActivationQuantizer",
    "SteWeightsQuantizer",
]
