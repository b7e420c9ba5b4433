"""Batch-norm folding: the statistics go into the layer before, so that what is quantized is what is deployed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from trainable_core import folding, keras_folding
from trainable_core.keras_folding import KERNELS, Folding
from trainable_core.keras_graph import Graph
from trainable_core.keras_layers import LayerKind
from trainable_tfkeras.copying import children, plain_copy
from trainable_tfkeras.engine import keras, to_numpy
from trainable_tfkeras.layers import DEPTHWISE_KERNEL, is_operation, kind_of, stock_name
from trainable_tfkeras.tracing import graph_of, is_graph, layers_within


@keras.saving.register_keras_serializable(package="trainable_tfkeras")
class FoldedBatchNormalization(keras.layers.Layer):  # type: ignore[misc] # TensorFlow is untyped
    """What stands in the place of a batch norm whose work is done by the layer before: passes everything on."""

    def __init__(self, name: str | None = None, dtype: Any = None, trainable: bool = True) -> None:  # noqa: FBT001, FBT002 - Keras's words
        super().__init__(name=name, dtype=dtype, trainable=trainable)
        self.supports_masking = True

    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:  # noqa: ARG002 - as batch norm's
        """Return the input."""
        return inputs

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return the input's own shape."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Return name, dtype and whether the layer is trainable."""
        config: dict[str, Any] = super().get_config()
        return config


class _View:
    """See `trainable_core.keras_folding.View`."""

    def __init__(self, model: Any) -> None:
        self._owners: dict[int, set[int]] = {}
        for layer in layers_within(model):
            for variable in [*layer._trainable_weights, *layer._non_trainable_weights]:  # noqa: SLF001 - its own ones
                self._owners.setdefault(id(variable), set()).add(id(layer))

    def graph(self, layer: Any) -> Graph | None:
        return graph_of(layer) if is_graph(layer) else None

    def children(self, layer: Any) -> Iterable[tuple[str, Any]]:
        return children(layer)

    def kind(self, layer: Any) -> LayerKind | None:
        return kind_of(layer)

    def is_layer(self, operation: Any) -> bool:
        return not is_operation(operation)

    def is_batch_norm(self, layer: Any) -> bool:
        return isinstance(layer, keras.layers.BatchNormalization)

    def stock(self, layer: Any) -> str:
        return stock_name(layer)

    def is_linear(self, layer: Any) -> bool:
        return getattr(layer, "activation", None) in {None, keras.activations.linear}

    def shares_variables(self, layer: Any) -> bool:
        return any(len(self._owners[id(variable)]) > 1 for variable in layer.variables)


def plan_folding(model: Any) -> Folding:
    """Return which batch norms can be folded into the convolution or dense layer before them; changes nothing.

    See `trainable_core.keras_folding.plan_folding`.
    """
    return keras_folding.plan_folding(model, _View(model))


def folded_copy(layer: Any, norm: Any, name: str) -> Any:
    """Return a copy of a layer that does its own work and a batch norm's."""
    attribute, axes = KERNELS[type(layer).__name__]
    if attribute == "kernel" and hasattr(layer, DEPTHWISE_KERNEL):
        attribute = DEPTHWISE_KERNEL
    gamma, beta = (None if each is None else to_numpy(each) for each in (norm.gamma, norm.beta))
    gain, shift = folding.gain_and_shift(
        to_numpy(norm.moving_mean), to_numpy(norm.moving_variance), norm.epsilon, gamma, beta
    )
    kernel = getattr(layer, attribute)
    bias = layer.bias if layer.use_bias else None
    folded = folding.fold(to_numpy(kernel), None if bias is None else to_numpy(bias), gain, shift, axes)
    copied = plain_copy(layer, name, use_bias=True)
    values = {id(getattr(copied, attribute)): folded[0], id(copied.bias): folded[1]}
    others = [variable for variable in copied.variables if id(variable) not in values]
    kept = [variable for variable in layer.variables if variable is not kernel and variable is not bias]
    for source, target in zip(kept, others, strict=True):
        target.assign(np.asarray(to_numpy(source)))
    for variable in copied.variables:
        if id(variable) in values:
            variable.assign(values[id(variable)].astype(variable.dtype.as_numpy_dtype))
    return copied
