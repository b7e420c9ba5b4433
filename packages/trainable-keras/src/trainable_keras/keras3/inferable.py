"""The deployed quantizers of Keras 3; see `trainable_keras.inferable`. On TensorFlow each is one of mctq's."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from trainable_core.backend.inferable import by_grid
from trainable_core.enums import QuantizationMethod, QuantizationTarget
from trainable_core.qparams import QParams
from trainable_keras.inferable import KerasInferableQuantizer, classes_for
from trainable_keras.keras3.engine import ENGINE, Tensor, float_tensor
from trainable_keras.keras3.functions import FUNCTIONS
from trainable_keras.keras3.ops import OPS

if ENGINE == "tensorflow":
    from mct_quantizers.keras import quantizers as _mctq_module

    mctq: Any = _mctq_module
else:
    mctq = None


class InferableQuantizer(KerasInferableQuantizer, keras.layers.Layer):  # type: ignore[misc] # keras is untyped
    """What every deployed quantizer shares; see `trainable_keras.inferable.KerasInferableQuantizer`."""

    functions, ops = FUNCTIONS, OPS

    def __init__(self, qparams: QParams | None, n_bits: int, ndim: int, name: str | None = None) -> None:
        keras.layers.Layer.__init__(self, dtype="float32", autocast=False, trainable=False, name=name)
        self.supports_masking = True
        self.start(qparams, n_bits, ndim)
        if qparams is not None:
            along = qparams.along(ndim)
            self.grid_scale = self._number("grid_scale", along.scale)
            self.grid_zero_point = self._number("grid_zero_point", along.zero_point)
        self.built = True

    def _number(self, name: str, value: Any) -> keras.Variable:
        return self.add_weight(
            name=name,
            shape=np.shape(value),
            dtype="float32",
            initializer=lambda shape, dtype=None: float_tensor(value),  # noqa: ARG005 - Keras's signature
            trainable=False,
            autocast=False,
        )

    def call(self, inputs: Tensor) -> Tensor:
        """Return the input snapped to the grid, in the input's dtype; see `snapped`."""
        return self.snapped(inputs)

    def compute_output_spec(self, inputs: Any) -> Any:
        """Return the input's own shape and dtype."""
        return keras.KerasTensor(inputs.shape, dtype=inputs.dtype)

    def build(self, input_shape: Any = None) -> None:
        """Do nothing: the numbers are there from the start."""

    def get_config(self) -> dict[str, Any]:
        """Return mctq's arguments, the name, and whether a symmetric grid is signed: JSON-clean and lossless."""
        return {**super().get_config(), "name": self.name}


_NAMED = classes_for(InferableQuantizer, mctq, keras.saving.register_keras_serializable(package="trainable_keras"))
globals().update(_NAMED)  # so that each is found by its name, as pickle does

_CLASSES = by_grid(*_NAMED.values())


def class_of(target: QuantizationTarget, method: QuantizationMethod) -> type[InferableQuantizer]:
    """Return the deployed class of a target and a grid."""
    return _CLASSES[target, method]
