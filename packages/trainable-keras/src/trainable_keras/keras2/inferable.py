"""The deployed quantizers of Keras 2; see `trainable_keras.inferable`. Each is one of mctq's."""

from __future__ import annotations

from typing import Any

import numpy as np
from mct_quantizers.keras import quantizers as mctq
from numpy.typing import NDArray

from trainable_core.backend.inferable import by_grid
from trainable_core.enums import QuantizationMethod, QuantizationTarget
from trainable_core.qparams import QParams
from trainable_keras.inferable import KerasInferableQuantizer, classes_for
from trainable_keras.keras2.engine import Tensor, keras, unconverted, untracked
from trainable_keras.keras2.functions import FUNCTIONS
from trainable_keras.keras2.ops import OPS


class InferableQuantizer(KerasInferableQuantizer, keras.layers.Layer):  # type: ignore[misc] # TensorFlow is untyped
    """What every deployed quantizer shares; see `trainable_keras.inferable.KerasInferableQuantizer`."""

    functions, ops = FUNCTIONS, OPS

    def __init__(self, qparams: QParams | None, n_bits: int, ndim: int, name: str | None = None) -> None:
        keras.layers.Layer.__init__(self, dtype="float32", autocast=False, trainable=False, name=name)
        self.supports_masking = True
        with untracked(self):
            self.start(qparams, n_bits, ndim)
        if qparams is not None:
            along = qparams.along(ndim)
            self.grid_scale = self._number("grid_scale", along.scale)
            self.grid_zero_point = self._number("grid_zero_point", along.zero_point)
        self.built = True

    def _number(self, name: str, value: NDArray[Any]) -> Any:
        return self.add_weight(
            name=f"{self.name}/{name}",
            shape=np.shape(value),
            dtype="float32",
            initializer=keras.initializers.Constant(np.asarray(value, np.float32)),
            trainable=False,
        )

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the input snapped to the grid; see `call`."""
        return super().__call__(inputs, *args, **kwargs)

    def call(self, inputs: Tensor) -> Tensor:
        """Return the input snapped to the grid, in the input's dtype; see `snapped`."""
        return self._snapped(inputs)

    @unconverted
    def _snapped(self, inputs: Tensor) -> Tensor:
        return self.snapped(inputs)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return the input's own shape."""
        return input_shape


_NAMED = classes_for(
    InferableQuantizer, mctq, keras.saving.register_keras_serializable(package="trainable_keras.keras2")
)
globals().update(_NAMED)  # so that each is found by its name, as pickle does

_CLASSES = by_grid(*_NAMED.values())


def class_of(target: QuantizationTarget, method: QuantizationMethod) -> type[InferableQuantizer]:
    """Return the deployed class of a target and a grid."""
    return _CLASSES[target, method]
