"""The built-in training methods, written once for both Kerases: a base, and one module per method."""

from __future__ import annotations

from typing import Any, TypeVar

from mct_quantizers import QuantizationMethod, QuantizationTarget, mark_quantizer

from trainable_core.enums import TrainingMethod
from trainable_keras.quantizers.base import KerasQuantizer
from trainable_keras.quantizers.dqa import DqaQuantizer
from trainable_keras.quantizers.lsq import LsqQuantizer
from trainable_keras.quantizers.ste import SteQuantizer

__all__ = ["BUILTIN", "GRIDS", "DqaQuantizer", "KerasQuantizer", "LsqQuantizer", "SteQuantizer", "classes_for"]

GRIDS = [QuantizationMethod.SYMMETRIC, QuantizationMethod.POWER_OF_TWO, QuantizationMethod.UNIFORM]
"""The quantization methods that every built-in serves."""

BUILTIN: dict[TrainingMethod, type[KerasQuantizer]] = {
    TrainingMethod.STE: SteQuantizer,
    TrainingMethod.LSQ: LsqQuantizer,
    TrainingMethod.DQA: DqaQuantizer,
}

B = TypeVar("B", bound=KerasQuantizer)


def classes_for(base: type[B]) -> dict[str, type[B]]:
    """Return the built-in quantizer classes of one Keras by their names, such as ``LsqWeightsQuantizer``.

    A class is a training method joined with the layer of that Keras, and marked, as mctq asks, for one target.

    Parameters
    ----------
    base : type
        `BaseKerasTrainableQuantizer` of that Keras.
    """
    classes: dict[str, type[B]] = {}
    for identifier, method in BUILTIN.items():
        for target in (QuantizationTarget.Weights, QuantizationTarget.Activation):
            name = method.__name__.replace("Quantizer", f"{target.name}Quantizer")
            text = f"{identifier.name} for {'weights' if target is QuantizationTarget.Weights else 'activations'}."
            cls: Any = type(name, (method, base), {"__doc__": text, "__module__": base.__module__})
            classes[name] = mark_quantizer(target, GRIDS, identifier)(cls)
    return classes
