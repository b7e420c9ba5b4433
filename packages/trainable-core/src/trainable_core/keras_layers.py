"""What Keras layers are, by class name: op kind, quantizable weights with their channel axes, tensor arguments.

Keras 2 and Keras 3 are two frameworks with one vocabulary; both backends read this table, and neither is imported here.
Keras keeps output channels last: ``HWIO`` where PyTorch has ``OIHW``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from trainable_core.errors import UnsupportedConfigError

LIST = "[]"
"""Mark of an input that is a list of tensors, such as that of Add."""


@dataclass(frozen=True)
class LayerKind:
    """How a layer type is quantized.

    Parameters
    ----------
    op : str
        Framework-neutral op kind, one of `trainable_core.plan.OPS`.
    weights : mapping of str to int
        Axis of the output channels, by weight attribute; dots lead into sublayers, negative axes count from the end.
    inputs : tuple of str
        Names of the tensor arguments that an activation quantizer may stand at, in positional order; a name that ends
        with `LIST` is a list of tensors.
    unsupported : str
        Why the weights can't be quantized; empty where they can.
    """

    op: str
    weights: Mapping[str, int] = field(default_factory=dict)
    inputs: tuple[str, ...] = ("inputs",)
    unsupported: str = ""


def _attention(inputs: tuple[str, ...]) -> LayerKind:
    # (features, heads, size) and for the output (heads, size, features): the last axis is one of the outputs
    kernels = [f"{part}_dense.kernel" for part in ("query", "key", "value", "output")]
    return LayerKind("attention", dict.fromkeys(kernels, -1), inputs)


_MERGING = (f"inputs{LIST}",)
_RECURRENT = LayerKind("recurrent", {"cell.kernel": -1, "cell.recurrent_kernel": -1}, ("sequences",))

KINDS: dict[str, LayerKind] = {
    "Dense": LayerKind("linear", {"kernel": -1}),
    "EinsumDense": LayerKind("linear", {"kernel": -1}),  # the axis depends on the equation: `einsum_channels_axis`
    **dict.fromkeys(("Conv1D", "Conv2D", "Conv3D"), LayerKind("conv", {"kernel": -1})),
    **dict.fromkeys(("DepthwiseConv1D", "DepthwiseConv2D"), LayerKind("depthwise_conv", {"kernel": -2})),
    **dict.fromkeys(
        ("SeparableConv1D", "SeparableConv2D"),
        LayerKind("conv", {"depthwise_kernel": -2, "pointwise_kernel": -1}),
    ),
    **dict.fromkeys(
        ("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"), LayerKind("conv_transpose", {"kernel": -2})
    ),
    "Embedding": LayerKind("embedding", {"embeddings": 0}),
    "MultiHeadAttention": _attention(("query", "value", "key")),
    **dict.fromkeys(("LSTM", "GRU", "SimpleRNN"), _RECURRENT),
    **dict.fromkeys(
        (
            "BatchNormalization", "LayerNormalization", "GroupNormalization", "UnitNormalization",
            "RMSNormalization", "SpectralNormalization",
        ),
        LayerKind("normalization"),
    ),
    **dict.fromkeys(
        ("Activation", "ReLU", "LeakyReLU", "PReLU", "ELU", "Softmax", "ThresholdedReLU"), LayerKind("activation")
    ),
    **dict.fromkeys(
        (
            "AveragePooling1D", "AveragePooling2D", "AveragePooling3D", "GlobalAveragePooling1D",
            "GlobalAveragePooling2D", "GlobalAveragePooling3D",
        ),
        LayerKind("pooling"),
    ),
    **dict.fromkeys(("Add", "Subtract", "Average"), LayerKind("add", inputs=_MERGING)),
    "Multiply": LayerKind("mul", inputs=_MERGING),
    "Concatenate": LayerKind("cat", inputs=_MERGING),
    "Dot": LayerKind("matmul", inputs=_MERGING),
}  # fmt: skip
"""Kinds of Keras's own layers."""

FUNCTIONS: dict[str, str] = {
    **dict.fromkeys(("Add", "Subtract"), "add"),
    "Multiply": "mul",
    **dict.fromkeys(("Concatenate", "Stack"), "cat"),
    **dict.fromkeys(("Matmul", "Einsum", "Dot", "Tensordot"), "matmul"),
    **dict.fromkeys(
        (
            "Relu", "Relu6", "LeakyRelu", "Elu", "Gelu", "Silu", "Sigmoid", "Tanh", "HardSwish", "HardSilu",
            "HardSigmoid", "HardTanh", "Softplus", "Softmax",
        ),
        "activation",
    ),
    **dict.fromkeys(("Mean", "AveragePool", "AdaptiveAveragePool"), "pooling"),
}  # fmt: skip
"""Op kinds of Keras 3's functional operations, by class name."""


FUNCTIONS_OF_TENSORFLOW: dict[str, str] = {
    **dict.fromkeys(("math.add", "math.subtract", "__operators__.add", "add_n"), "add"),
    **dict.fromkeys(("math.multiply",), "mul"),
    **dict.fromkeys(("concat", "stack"), "cat"),
    **dict.fromkeys(("linalg.matmul", "einsum", "tensordot", "keras.backend.dot", "keras.backend.batch_dot"), "matmul"),
    **dict.fromkeys(
        (
            "nn.relu", "nn.relu6", "nn.leaky_relu", "nn.elu", "nn.gelu", "nn.silu", "nn.swish", "nn.softmax",
            "math.sigmoid", "math.tanh", "math.softplus", "nn.softplus", "nn.selu",
        ),
        "activation",
    ),
    **dict.fromkeys(("math.reduce_mean", "nn.avg_pool", "nn.avg_pool2d", "compat.v1.nn.avg_pool"), "pooling"),
}  # fmt: skip
"""Op kinds of TensorFlow's functions in a Keras 2 graph, by their exported name."""


def einsum_channels_axis(equation: str) -> int:
    """Return the kernel's axis of an einsum layer's output channels: the last kernel axis that is in the output.

    Raises
    ------
    UnsupportedConfigError
        When the equation has not two operands, or no axis of the kernel is in the output.

    Examples
    --------
    >>> einsum_channels_axis("ab,bc->ac"), einsum_channels_axis("abc,cde->abde"), einsum_channels_axis("...x,yx->...y")
    (1, 2, 0)
    """
    operands, _, output = equation.replace(" ", "").partition("->")
    _, comma, kernel = operands.partition(",")
    axes = [axis for axis, letter in enumerate(kernel) if letter in output and letter != "."]
    if not comma or not axes:
        raise UnsupportedConfigError(f"einsum {equation!r}", "no axis of its kernel is an axis of the output")
    return axes[-1]
