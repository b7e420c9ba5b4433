"""The part of trainable_keras that belongs to Keras 3; its classes load when they are used."""

from typing import TYPE_CHECKING

from trainable_core.lazy import lazy_names

if TYPE_CHECKING:
    from trainable_keras.keras3.annealing import KerasLinearAnnealingScheduler
    from trainable_keras.keras3.calibration import calibrate
    from trainable_keras.keras3.description import describe
    from trainable_keras.keras3.finalized import finalize
    from trainable_keras.keras3.grid import Grid
    from trainable_keras.keras3.holder import ActivationQuantizationHolder
    from trainable_keras.keras3.layers import register_layer
    from trainable_keras.keras3.quantizers import BaseKerasTrainableQuantizer
    from trainable_keras.keras3.serialization import load, save
    from trainable_keras.keras3.training import advance_schedules, freeze_quant_params, parameter_groups, regularization
    from trainable_keras.keras3.wrapper import QuantizationWrapper
    from trainable_keras.keras3.wrapping import wrap

__all__ = [
    "ActivationQuantizationHolder",
    "BaseKerasTrainableQuantizer",
    "Grid",
    "KerasLinearAnnealingScheduler",
    "QuantizationWrapper",
    "advance_schedules",
    "calibrate",
    "describe",
    "finalize",
    "freeze_quant_params",
    "load",
    "parameter_groups",
    "register_layer",
    "regularization",
    "save",
    "wrap",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "annealing": ["KerasLinearAnnealingScheduler"],
        "calibration": ["calibrate"],
        "description": ["describe"],
        "finalized": ["finalize"],
        "grid": ["Grid"],
        "holder": ["ActivationQuantizationHolder"],
        "layers": ["register_layer"],
        "quantizers": ["BaseKerasTrainableQuantizer"],
        "serialization": ["load", "save"],
        "training": ["advance_schedules", "freeze_quant_params", "parameter_groups", "regularization"],
        "wrapper": ["QuantizationWrapper"],
        "wrapping": ["wrap"],
    },
)
