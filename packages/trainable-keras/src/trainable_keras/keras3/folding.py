"""Batch-norm folding: the statistics go into the layer before, so that what is quantized is what is deployed."""

from __future__ import annotations

from typing import Any

import keras
from numpy.typing import NDArray

from trainable_keras import folding as keras_folding
from trainable_keras.folding import KERNELS, Folding, ModelView
from trainable_keras.keras3.copying import children, own_variables, plain_copy
from trainable_keras.keras3.engine import to_numpy
from trainable_keras.keras3.layers import TYPES, is_layer, kind_of
from trainable_keras.keras3.tracing import graph_of, layers_within


@keras.saving.register_keras_serializable(package="trainable_keras")
class FoldedBatchNormalization(keras.layers.Layer):  # type: ignore[misc] # keras is untyped
    """What stands in the place of a batch norm whose work is done by the layer before: passes everything on."""

    def __init__(self, name: str | None = None, dtype: Any = None, trainable: bool = True) -> None:  # noqa: FBT001, FBT002 - Keras's words
        super().__init__(name=name, dtype=dtype, trainable=trainable)
        self.supports_masking = True

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:  # noqa: ARG002, FBT001 - as batch norm's
        """Return the input."""
        return inputs

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return the input's own shape."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Return name, dtype and whether the layer is trainable."""
        config: dict[str, Any] = super().get_config()
        return config


def passing(norm: Any) -> FoldedBatchNormalization:
    """Return the layer that stands in the place of a folded batch norm."""
    return FoldedBatchNormalization(name=norm.name, dtype=norm.dtype_policy)


def plan_folding(model: Any) -> Folding:
    """Return which batch norms can be folded into the layer before them; see core's function."""
    view = ModelView(
        keras,
        layers_within(model),
        variables_of=own_variables,
        graph=graph_of,
        children=children,
        kind=kind_of,
        is_layer=is_layer,
        stock=TYPES.stock,
    )
    return keras_folding.plan_folding(model, view)


def folded_copy(layer: Any, norm: Any, name: str) -> Any:
    """Return a copy of a layer that does its own work and a batch norm's."""
    attribute, _ = KERNELS[type(layer).__name__]
    copied = plain_copy(layer, name, use_bias=True)
    return keras_folding.folded_copy(layer, norm, copied, attribute, to_numpy=to_numpy, assign=_assign)


def _assign(variable: keras.Variable, value: NDArray[Any]) -> None:
    dtype = keras.backend.standardize_dtype(variable.dtype)
    # always a copy: JAX would share the buffer, and training gives it away
    variable.assign(value.astype("float32" if dtype in {"float16", "bfloat16"} else dtype))
