"""Trainable quantizers for quantization-aware training: the framework-free core.

Config schema, reference quantization math, plugin registry, recipe. See `trainable_core.reference` for the definitions
that every backend is held to.

The public names are loaded when first used: pydantic's models alone cost as much as NumPy, and a plugin that only marks
its hooks should not pay for them (`docs/design/0009-public-names-load-when-used.md`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_MODULES = {
    "calibration": ["CalibrationMethod"],
    "config": [
        "TrainableQuantizerActivationConfig",
        "TrainableQuantizerCandidateConfig",
        "TrainableQuantizerWeightsConfig",
    ],
    "enums": ["QuantizationMethod", "QuantizationTarget", "TieRule", "TrainingMethod", "VariableGroup"],
    "errors": ["TrainableError"],
    "hookspecs": ["Backend", "hookimpl"],
    "quantizer": ["BaseTrainableQuantizer"],
    "recipe": ["QuantizationRecipe"],
    "registry": ["get_trainable_quantizer_class", "list_quantizers"],
    "schedule": ["LinearAnnealingScheduler"],
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Load a public name from its module, once."""
    if name not in _HOME:
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the module's names, those not loaded yet included."""
    return sorted({*globals(), *_HOME})
