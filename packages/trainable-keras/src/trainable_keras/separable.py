"""Separable convolutions as two layers, so that integers have a quantizer between them.

Integer kernels compute a depthwise and a pointwise convolution one after the other, and store what is between them.
"""

from __future__ import annotations

from typing import Any

from trainable_keras.copying import copy_model
from trainable_keras.framework import Framework
from trainable_keras.graph import layers_within

DEPTHWISE = "_depthwise"
"""End of the name of the first of the two layers; the second has the name of the layer that was."""

_LAYERS = {"SeparableConv1D": ("DepthwiseConv1D", "Conv1D"), "SeparableConv2D": ("DepthwiseConv2D", "Conv2D")}
"""What becomes of Keras's layers, by class name."""


def split(framework: Framework, model: Any) -> Any:
    """Return a copy of a functional model with two layers for each separable convolution, or the model if it has none.

    Parameters
    ----------
    framework : Framework
        The model's Keras.
    model : model
        The float model; left as it is.

    Notes
    -----
    Its outputs are the same but for the order of sums. Layers of subclasses, and those that the code of a layer calls,
    stay as they are.
    """
    if not any(framework.types.stock(layer) in _LAYERS for layer in layers_within(model)):
        return model
    copied = copy_model(framework, model)
    made: dict[int, tuple[Any, Any]] = {}

    def call(operation: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        if framework.types.stock(operation) not in _LAYERS:
            return operation(*args, **kwargs)
        if id(operation) not in made:
            made[id(operation)] = _two(framework, operation)
        first, second = made[id(operation)]
        between = first(*args, **kwargs)
        result = second(between)
        _fill(framework, operation, first, second)
        return result

    for layer in [each for each in layers_within(copied) if _has_separable_calls(framework, each)]:
        framework.rerun(layer, call)
    return copied


def _has_separable_calls(framework: Framework, layer: Any) -> bool:
    if isinstance(layer, framework.module.Sequential):
        return False
    graph = framework.graph(layer)
    return graph is not None and any(framework.types.stock(each) in _LAYERS for each in graph.operations)


def _two(framework: Framework, layer: Any) -> tuple[Any, Any]:
    """Return the two layers, which are not built yet."""
    first, second = (getattr(framework.module.layers, name) for name in _LAYERS[framework.types.stock(layer)])
    dtype = framework.dtype_policy(layer)
    depthwise = first(
        layer.kernel_size,
        strides=layer.strides,
        padding=layer.padding,
        depth_multiplier=layer.depth_multiplier,
        data_format=layer.data_format,
        dilation_rate=layer.dilation_rate,
        use_bias=False,
        depthwise_regularizer=layer.depthwise_regularizer,
        depthwise_constraint=layer.depthwise_constraint,
        name=f"{layer.name}{DEPTHWISE}",
        dtype=dtype,
    )
    pointwise = second(
        layer.filters,
        1,
        data_format=layer.data_format,
        activation=layer.activation,
        use_bias=layer.use_bias,
        kernel_regularizer=layer.pointwise_regularizer,
        kernel_constraint=layer.pointwise_constraint,
        bias_regularizer=layer.bias_regularizer,
        bias_constraint=layer.bias_constraint,
        name=layer.name,
        dtype=dtype,
    )
    depthwise.trainable = pointwise.trainable = layer.trainable
    return depthwise, pointwise


def _fill(framework: Framework, layer: Any, depthwise: Any, pointwise: Any) -> None:
    """Give the two layers the weights of the one."""
    kernel = getattr(depthwise, "depthwise_kernel", None)
    pairs = [(depthwise.kernel if kernel is None else kernel, layer.depthwise_kernel)]
    pairs.append((pointwise.kernel, layer.pointwise_kernel))
    if layer.use_bias:
        pairs.append((pointwise.bias, layer.bias))
    for variable, value in pairs:
        framework.assign(variable, framework.functions.to_numpy(value))
