"""Trainable quantizers for quantization-aware training: the framework-free core.

Config schema, reference quantization math, plugin registry, recipe. See `trainable_core.reference` for the
definitions that every backend is held to.
"""

from trainable_core.calibration import CalibrationMethod
from trainable_core.config import (
    TrainableQuantizerActivationConfig,
    TrainableQuantizerCandidateConfig,
    TrainableQuantizerWeightsConfig,
)
from trainable_core.enums import QuantizationMethod, QuantizationTarget, TieRule, TrainingMethod, VariableGroup
from trainable_core.errors import TrainableError
from trainable_core.hookspecs import Backend, hookimpl
from trainable_core.quantizer import BaseTrainableQuantizer
from trainable_core.recipe import QuantizationRecipe
from trainable_core.registry import get_trainable_quantizer_class, list_quantizers
from trainable_core.schedule import LinearAnnealingScheduler

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "BaseTrainableQuantizer",
    "CalibrationMethod",
    "LinearAnnealingScheduler",
    "QuantizationMethod",
    "QuantizationRecipe",
    "QuantizationTarget",
    "TieRule",
    "TrainableError",
    "TrainableQuantizerActivationConfig",
    "TrainableQuantizerCandidateConfig",
    "TrainableQuantizerWeightsConfig",
    "TrainingMethod",
    "VariableGroup",
    "get_trainable_quantizer_class",
    "hookimpl",
    "list_quantizers",
]
