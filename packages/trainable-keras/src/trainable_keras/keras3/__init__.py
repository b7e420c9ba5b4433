"""The part of trainable_keras that belongs to Keras 3; its classes load when they are used."""

from typing import TYPE_CHECKING

from trainable_core.lazy import lazy_names

if TYPE_CHECKING:
    from trainable_keras.keras3.annealing import KerasLinearAnnealingScheduler
    from trainable_keras.keras3.grid import Grid
    from trainable_keras.keras3.holder import ActivationQuantizationHolder
    from trainable_keras.keras3.quantizers import BaseKerasTrainableQuantizer
    from trainable_keras.keras3.wrapper import QuantizationWrapper

__all__ = [
    "ActivationQuantizationHolder",
    "BaseKerasTrainableQuantizer",
    "Grid",
    "KerasLinearAnnealingScheduler",
    "QuantizationWrapper",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "annealing": ["KerasLinearAnnealingScheduler"],
        "grid": ["Grid"],
        "holder": ["ActivationQuantizationHolder"],
        "quantizers": ["BaseKerasTrainableQuantizer"],
        "wrapper": ["QuantizationWrapper"],
    },
)
