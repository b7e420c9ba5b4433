"""The deployed quantizers of Keras 2 that mctq lacks; see `trainable_keras.granularity`."""

from __future__ import annotations

from typing import Any

from trainable_core.backend.inferable import target_and_method
from trainable_core.enums import QuantizationMethod, QuantizationTarget
from trainable_keras.granularity import native_classes_for
from trainable_keras.keras2 import inferable
from trainable_keras.keras2.engine import keras
from trainable_keras.keras2.grid import GRIDS
from trainable_keras.keras2.inferable import InferableQuantizer

_NAMED = native_classes_for(
    InferableQuantizer, GRIDS, __name__, keras.saving.register_keras_serializable(package="trainable_keras.keras2")
)
globals().update(_NAMED)  # so that each is found by its name, as pickle does

_CLASSES = {(*target_and_method(cls), cls.native): cls for cls in _NAMED.values()}


def class_of(target: QuantizationTarget, method: QuantizationMethod, kind: str = "") -> type[Any]:
    """Return the deployed class of a target and a grid: mctq's, or that of a kind that mctq lacks."""
    return _CLASSES[target, method, kind] if kind else inferable.class_of(target, method)
