"""The built-in training methods, written once for Keras 3 and Keras 2: a base, and one module per method."""

from __future__ import annotations

from typing import Any, TypeVar

from mct_quantizers import QuantizationMethod, QuantizationTarget, mark_quantizer

from trainable_core.registry.methods import built_in_methods, declaring_classes
from trainable_keras.quantizers.base import KerasQuantizer

__all__ = ["KerasQuantizer", "classes_for"]

B = TypeVar("B", bound=KerasQuantizer)


def classes_for(base: type[B]) -> dict[str, type[B]]:
    """Return the built-in quantizer classes of one Keras by their names, such as ``LsqWeightsQuantizer``.

    A class is a training method joined with the layer of that Keras, and marked, as mctq asks, for one target. Its
    targets and grids are those that the method declares.

    Parameters
    ----------
    base : type
        `BaseKerasTrainableQuantizer` of that Keras.
    """
    classes: dict[str, type[B]] = {}
    for method, declaring in declaring_classes(__name__).items():
        declared = built_in_methods()[method]
        for of in declared.targets:
            target, grids = (
                QuantizationTarget[of.name],
                [QuantizationMethod[each.name] for each in declared.grids_of(of)],
            )
            name = declaring.__name__.replace("Quantizer", f"{target.name}Quantizer")
            text = f"{method} for {'weights' if target is QuantizationTarget.Weights else 'activations'}."
            cls: Any = type(name, (declaring, base), {"__doc__": text, "__module__": base.__module__})
            classes[name] = mark_quantizer(target, grids, method)(cls)
    return classes
