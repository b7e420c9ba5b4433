"""The built-in PyTorch quantizers: a base, and one module per training method."""

from trainable_torch.quantizers.base import BasePytorchTrainableQuantizer
from trainable_torch.quantizers.dqa import DqaActivationQuantizer, DqaWeightsQuantizer
from trainable_torch.quantizers.lsq import LsqActivationQuantizer, LsqWeightsQuantizer
from trainable_torch.quantizers.ste import SteActivationQuantizer, SteWeightsQuantizer

BUILTIN: tuple[type[BasePytorchTrainableQuantizer], ...] = (
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
    "BasePytorchTrainableQuantizer",
    "DqaActivationQuantizer",
    "DqaWeightsQuantizer",
    "LsqActivationQuantizer",
    "LsqWeightsQuantizer",
    "SteActivationQuantizer",
    "SteWeightsQuantizer",
]
