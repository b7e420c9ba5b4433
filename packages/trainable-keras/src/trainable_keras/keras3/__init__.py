"""Quantization-aware training for Keras 3: the way of the data is wrap, calibrate, train, finalize.

The verbs are those of every backend; the numbers come from `trainable_core`. Names load when used, so that the plugin's
entry point costs nothing while another backend is asked for. Where Keras is imported already, the layers are registered
with it at once, so that ``keras.models.load_model`` finds them.
"""

import sys
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

if hasattr(sys.modules.get("keras"), "ops"):  # Keras 2 has none; it is told so by what is used first
    import trainable_keras.keras3.wrapping  # noqa: F401 - registers wrapper, holder and deployed quantizers with Keras
