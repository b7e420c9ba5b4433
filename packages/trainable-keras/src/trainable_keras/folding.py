"""Batch-norm folding: the statistics go into the layer before, so that what is quantized is what is deployed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

from trainable_core import folding
from trainable_core.keras_layers import KINDS
from trainable_keras.copying import children, join, plain_copy
from trainable_keras.engine import to_numpy
from trainable_keras.layers import kind_of
from trainable_keras.tracing import Graph, is_graph

_KERNELS: dict[str, tuple[str, tuple[int, ...]]] = {
    "Dense": ("kernel", (-1,)),
    **dict.fromkeys(("Conv1D", "Conv2D", "Conv3D"), ("kernel", (-1,))),
    **dict.fromkeys(("DepthwiseConv1D", "DepthwiseConv2D"), ("kernel", (-2, -1))),
    **dict.fromkeys(("SeparableConv1D", "SeparableConv2D"), ("pointwise_kernel", (-1,))),
    **dict.fromkeys(("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"), ("kernel", (-2,))),
}
"""Kernel that takes a normalization over, and its axes of output channels, by class name."""


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


@dataclass
class Folding:
    """Which batch norms of a model go into which layers.

    Parameters
    ----------
    norms : dict of int to layer
        The batch norm to fold, by the ``id`` of the layer it goes into.
    gone : set of int
        ``id`` of each batch norm that is folded.
    folded : dict of str to str
        Layer name by the name of the batch norm folded into it.
    kept : dict of str to str
        Why, by the name of each batch norm that stays.
    """

    norms: dict[int, Any] = field(default_factory=dict)
    gone: set[int] = field(default_factory=set)
    folded: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)


def plan_folding(model: Any) -> Folding:
    """Return which batch norms can be folded into the convolution or dense layer before them.

    Parameters
    ----------
    model : keras.Model
        Only looked at.

    Notes
    -----
    ``w' = w * gamma / sqrt(var + eps)`` along the output channels and ``b' = (b - mean) * gamma / sqrt(var + eps) +
    beta``, computed in float64. In inference the model's function stays; in training batch statistics are no longer
    used.
    """
    found = Folding()
    uses: dict[int, int] = {}
    _count(model, uses)
    _look(model, "", found, uses)
    return found


def _count(layer: Any, uses: dict[int, int]) -> None:
    """Count the places that each layer is called from, or held at where there is no graph."""
    first = not uses.setdefault(-id(layer), 0)
    uses[-id(layer)] = 1
    if not first:
        return
    if is_graph(layer):
        for node in Graph(layer).nodes:
            uses[id(node.operation)] = uses.get(id(node.operation), 0) + 1
        inside = [each for each in Graph(layer).operations if isinstance(each, keras.layers.Layer)]
    elif kind_of(layer) is None:
        inside = [child for _, child in children(layer)]
        for child in inside:
            uses[id(child)] = uses.get(id(child), 0) + 1
    else:
        inside = []
    for each in inside:
        _count(each, uses)


def _look(layer: Any, prefix: str, found: Folding, uses: dict[int, int]) -> None:
    if isinstance(layer, keras.layers.BatchNormalization):
        found.kept.setdefault(prefix or layer.name, "the layer before it is not known: this part has no graph")
    elif is_graph(layer):
        graph = Graph(layer)
        for operation in graph.operations:
            name = join(prefix, operation.name)
            if not isinstance(operation, keras.layers.BatchNormalization):
                if isinstance(operation, keras.layers.Layer):
                    _look(operation, name, found, uses)
                continue
            before, reason = _layer_before(graph, operation, uses)
            if before is None:
                found.kept[name] = reason
                continue
            found.norms[id(before)] = operation
            found.gone.add(id(operation))
            found.folded[name] = join(prefix, before.name)
    elif kind_of(layer) is None:
        for name, child in children(layer):
            _look(child, join(prefix, name), found, uses)


def _layer_before(graph: Graph, norm: Any, uses: dict[int, int]) -> tuple[Any | None, str]:
    """Return the layer that a batch norm can be folded into, or why there is none."""
    node = graph.calls(norm)[0]
    source = graph.source(node)
    if source is None or not isinstance(source.operation, keras.layers.Layer):
        return None, "what comes before it is no layer"
    layer = source.operation
    if getattr(keras.layers, type(layer).__name__, None) is not type(layer) or type(layer).__name__ not in _KERNELS:
        return None, f"what comes before it is {type(layer).__name__}"
    if graph.only_user(source) is not node:
        return None, "the layer before it has other users"
    if uses[id(layer)] > 1 or uses[id(norm)] > 1:
        return None, "it or the layer before it is called more than once"
    if getattr(layer, "activation", None) is not keras.activations.linear:
        return None, "the layer before it has an activation"
    kind = kind_of(layer)
    if kind is None or set(kind.weights) != set(KINDS[type(layer).__name__].weights):
        return None, f"the layer before it: {'' if kind is None else kind.unsupported}"
    rank = len(source.outputs[0].shape)
    channels_axis = 1 if getattr(layer, "data_format", "") == "channels_first" else rank - 1
    if norm.axis % rank != channels_axis:
        return None, "its channels are not the layer's"
    return layer, ""


def folded_copy(layer: Any, norm: Any, name: str) -> Any:
    """Return a copy of a layer that does its own work and a batch norm's."""
    attribute, axes = _KERNELS[type(layer).__name__]
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
        target.assign(np.array(to_numpy(source)))
    for variable in copied.variables:
        if id(variable) in values:
            variable.assign(values[id(variable)].astype("float32"))
    return copied
