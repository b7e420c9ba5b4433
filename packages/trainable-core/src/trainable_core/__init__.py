"""Trainable quantizers for quantization-aware training: the framework-free core.

Config schema, reference quantization math, plugin registry, recipe. See `trainable_core.reference` for the definitions
that every backend is held to.

The public names are loaded when first used: pydantic's models alone cost as much as NumPy, and a plugin that only marks
its hooks should not pay for them (`docs/design/0009-public-names-load-when-used.md`).
"""

from typing import TYPE_CHECKING

from trainable_core.lazy import lazy_names

if TYPE_CHECKING:
    from trainable_core.config import (
        TrainableQuantizerActivationConfig,
        TrainableQuantizerCandidateConfig,
        TrainableQuantizerWeightsConfig,
    )
    from trainable_core.enums import (
        CalibrationMethod,
        QuantizationMethod,
        QuantizationTarget,
        TieRule,
        TrainingMethod,
        VariableGroup,
    )
    from trainable_core.errors import TrainableError
    from trainable_core.hookspecs import Backend, hookimpl
    from trainable_core.quantizer import BaseTrainableQuantizer
    from trainable_core.recipe.document import QuantizationRecipe
    from trainable_core.registry.process import get_trainable_quantizer_class, list_quantizers
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

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "config": [
            "TrainableQuantizerActivationConfig",
            "TrainableQuantizerCandidateConfig",
            "TrainableQuantizerWeightsConfig",
        ],
        "enums": [
            "CalibrationMethod",
            "QuantizationMethod",
            "QuantizationTarget",
            "TieRule",
            "TrainingMethod",
            "VariableGroup",
        ],
        "errors": ["TrainableError"],
        "hookspecs": ["Backend", "hookimpl"],
        "quantizer": ["BaseTrainableQuantizer"],
        "recipe.document": ["QuantizationRecipe"],
        "registry.process": ["get_trainable_quantizer_class", "list_quantizers"],
        "schedule": ["LinearAnnealingScheduler"],
    },
)
