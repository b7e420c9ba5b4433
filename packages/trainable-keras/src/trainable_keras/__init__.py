"""Quantization-aware training for Keras 3 and Keras 2: wrap, calibrate, train, finalize.

The verbs are those of every backend, and each asks the model that it is given which Keras it belongs to. A class is
that of the Keras which the process has imported; where both are, take it from `trainable_keras.keras3` or
`trainable_keras.keras2`. Names load when they are used, so ``import trainable_keras`` imports no framework. Where Keras
is imported already, our layers are registered with it at once, so that its ``load_model`` finds them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from trainable_core.lazy import lazy_names
from trainable_keras import which

if TYPE_CHECKING:
    from trainable_keras import keras2 as keras2
    from trainable_keras import keras3 as keras3
    from trainable_keras.keras3 import (
        ActivationQuantizationHolder,
        BaseKerasTrainableQuantizer,
        Grid,
        KerasLinearAnnealingScheduler,
        QuantizationWrapper,
    )
    from trainable_keras.verbs import (
        advance_schedules,
        calibrate,
        describe,
        diagnose,
        distill,
        exclude_from_weight_decay,
        export,
        finalize,
        freeze_batch_norm,
        freeze_quant_params,
        load,
        parameter_groups,
        reconstruct,
        reestimate_batch_norm,
        register_layer,
        regularization,
        report,
        save,
        suggest,
        to_mctq,
        track,
        training_callback,
        verify,
        wrap,
    )

__version__ = "0.1.0"

__all__ = [
    "ActivationQuantizationHolder",
    "BaseKerasTrainableQuantizer",
    "Grid",
    "KerasLinearAnnealingScheduler",
    "QuantizationWrapper",
    "advance_schedules",
    "calibrate",
    "describe",
    "diagnose",
    "distill",
    "exclude_from_weight_decay",
    "export",
    "finalize",
    "freeze_batch_norm",
    "freeze_quant_params",
    "load",
    "parameter_groups",
    "reconstruct",
    "reestimate_batch_norm",
    "register_layer",
    "regularization",
    "report",
    "save",
    "suggest",
    "to_mctq",
    "track",
    "training_callback",
    "verify",
    "wrap",
]

_CLASSES = (
    "ActivationQuantizationHolder",
    "BaseKerasTrainableQuantizer",
    "Grid",
    "KerasLinearAnnealingScheduler",
    "QuantizationWrapper",
)
"""Names that each Keras has a class of its own for."""

_PARTS = ("keras2", "keras3")

_verb, _names = lazy_names(__name__, {"verbs": [name for name in __all__ if name not in _CLASSES]})


def __getattr__(name: str) -> Any:
    """Load a public name when it is used: a verb, or a class of the Keras that is in charge."""
    if name in _CLASSES:
        return getattr(which.part_in_charge(name), name)
    return import_module(f"{__name__}.{name}") if name in _PARTS else _verb(name)


def __dir__() -> list[str]:
    """Return the package's names, those not loaded yet included."""
    return sorted({*_names(), *_PARTS, *_CLASSES})


which.register_imported()
