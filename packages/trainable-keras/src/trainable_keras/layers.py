"""What Keras layers are, by class name: op kind, quantizable weights with their channel axes, tensor arguments.

Keras 2 and Keras 3 are two frameworks with one vocabulary; both read this table.
Keras keeps output channels last: ``HWIO`` where PyTorch has ``OIHW``. Dots in a weight's name lead into sublayers,
negative axes count from the end, and an input whose name ends with `LIST` is a list of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from trainable_core.errors import InvalidArgumentError, ModelError, UnsupportedConfigError
from trainable_core.recipe import layers
from trainable_core.recipe.layers import LayerInfo, LayerKind, WeightAxes, declared_kind

LIST = "[]"
"""Mark of an input that is a list of tensors, such as that of Add."""

DEPTHWISE_KERNEL = "depthwise_kernel"
"""What Keras 2 calls the kernel of a depthwise convolution, which is ``kernel`` in Keras 3."""


_INSIDE = "it is added inside of the layer, to products of tensors that no quantizer makes"
"""Why the biases of layers with several steps can't be integers."""


def _attention(inputs: tuple[str, ...]) -> LayerKind:
    # (features, heads, size) and for the output (heads, size, features): the last axis is one of the outputs
    kernels = [f"{part}_dense.kernel" for part in ("query", "key", "value", "output")]
    sums = {kernel: 1 if kernel.startswith("output") else 0 for kernel in kernels}
    return LayerKind(
        "attention",
        dict.fromkeys(kernels, -1),
        inputs,
        input_axes=sums,
        bias="output_dense.bias",
        bias_obstacle=_INSIDE,
    )


_MERGING = (f"inputs{LIST}",)
_OF_A_CELL = {"kernel": -1, "recurrent_kernel": -1}
_RECURRENT = LayerKind(
    "recurrent",
    {f"cell.{name}": axis for name, axis in _OF_A_CELL.items()},
    ("sequences",),
    bias="cell.bias",
    bias_obstacle=_INSIDE,
)

KINDS: dict[str, LayerKind] = {
    "Dense": LayerKind("linear", {"kernel": -1}, bias="bias"),
    "EinsumDense": LayerKind(
        "linear", {"kernel": -1}, bias="bias", bias_obstacle="it may lie along other axes than the scales of the kernel"
    ),  # the axis depends on the equation: `einsum_channels_axis`
    **dict.fromkeys(("Conv1D", "Conv2D", "Conv3D"), LayerKind("conv", {"kernel": -1}, bias="bias")),
    **dict.fromkeys(
        ("DepthwiseConv1D", "DepthwiseConv2D"), LayerKind("depthwise_conv", {"kernel": -2}, bias="bias")
    ),
    **dict.fromkeys(
        ("SeparableConv1D", "SeparableConv2D"),
        LayerKind("conv", {"depthwise_kernel": -2, "pointwise_kernel": -1}, bias="bias"),
    ),
    **dict.fromkeys(
        ("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"),
        LayerKind("conv_transpose", {"kernel": -2}, input_axes={"kernel": -1}, bias="bias"),
    ),
    "Embedding": LayerKind("embedding", {"embeddings": 0}),
    "MultiHeadAttention": _attention(("query", "value", "key")),
    **dict.fromkeys(("LSTM", "GRU", "SimpleRNN", "ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D"), _RECURRENT),
    **dict.fromkeys(
        ("LSTMCell", "GRUCell", "SimpleRNNCell"),
        LayerKind("recurrent", _OF_A_CELL, bias="bias", bias_obstacle=_INSIDE),
    ),
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


def einsum_input_axes(equation: str) -> dict[str, int]:
    """Return the axis of the kernel's inputs, the last one that is summed over; nothing where there is none.

    Examples
    --------
    >>> einsum_input_axes("ab,bc->ac"), einsum_input_axes("abc,cde->abde"), einsum_input_axes("abde,dec->abc")
    ({'kernel': 0}, {'kernel': 0}, {'kernel': 1})
    """
    operands, _, output = equation.replace(" ", "").partition("->")
    kernel = operands.partition(",")[2]
    axes = [axis for axis, letter in enumerate(kernel) if letter not in output and letter != "."]
    return {"kernel": axes[-1]} if axes else {}


class LayerTypes:
    """Which layer types of one Keras are quantized how: its own by the table, users' by what they registered.

    Parameters
    ----------
    layers : module
        Its ``keras.layers``.
    variable : type
        Class of its variables.
    """

    def __init__(self, layers: Any, variable: type) -> None:
        self._layers, self._variable = layers, variable
        self._registered: dict[type, LayerKind] = {}

    def register(
        self, cls: Any, op: str, weights: Mapping[str, int | WeightAxes] | None, inputs: tuple[str, ...]
    ) -> None:
        """Note how a user's layer type is quantized; see the backend's ``register_layer``.

        Raises
        ------
        InvalidArgumentError
            When `cls` is not a layer type, the op kind is unknown, or an axis or a name is not one.
        """
        if not (isinstance(cls, type) and issubclass(cls, self._layers.Layer)):
            raise InvalidArgumentError("register_layer", f"{cls!r} is not a subclass of keras.layers.Layer")
        self._registered[cls] = declared_kind(op, weights, inputs)

    def stock(self, layer: Any) -> str:
        """Return the class name of a layer of Keras's own, an empty string for a subclass."""
        name = type(layer).__name__
        return name if getattr(self._layers, name, None) is type(layer) else ""

    def kind_of(self, layer: Any) -> LayerKind | None:
        """Return how a layer is quantized, or None when its type is unknown."""
        for cls in type(layer).__mro__:
            kind = self._registered.get(cls)
            if kind is None and getattr(self._layers, cls.__name__, None) is cls:
                kind = KINDS.get(cls.__name__)
            if kind is not None:
                break
        else:
            return self._of_cells(layer) if isinstance(layer, self._layers.RNN) else None
        if isinstance(layer, self._layers.EinsumDense):
            try:
                axis = einsum_channels_axis(layer.equation)
            except UnsupportedConfigError as error:
                return replace(kind, weights={}, unsupported=error.problem)
            return replace(kind, weights={"kernel": axis}, input_axes=einsum_input_axes(layer.equation))
        if kind.inputs and kind.inputs[0].endswith(LIST):
            shapes = (layer.get_build_config() or {}).get("input_shape") or ()
            name = kind.inputs[0].removesuffix(LIST)
            return replace(kind, inputs=tuple(f"{name}.{index}" for index in range(len(shapes))))
        return kind

    def _of_cells(self, layer: Any) -> LayerKind | None:
        """Return how a recurrent layer with cells that were given to it is quantized: by all its cells' kinds."""
        stacked = isinstance(layer.cell, self._layers.StackedRNNCells)
        cells = (
            {f"cell.cells.{i}": cell for i, cell in enumerate(layer.cell.cells)} if stacked else {"cell": layer.cell}
        )
        weights: dict[str, int] = {}
        for place, cell in cells.items():
            kind = self.kind_of(cell)
            if kind is None or not kind.weights:
                return None
            weights |= {f"{place}.{attribute}": axis for attribute, axis in kind.weights.items()}
        return replace(_RECURRENT, weights=weights)

    def find_weight(self, layer: Any, attribute: str) -> Any | None:
        """Return the variable that an attribute path of a layer leads to, None when it leads to none."""
        owner, name = weight_path(layer, attribute)[-1]
        found = getattr(owner, name, None)
        return found if isinstance(found, self._variable) else None


def weight_path(layer: Any, attribute: str) -> list[tuple[Any, str]]:
    """Return (owner, attribute) for each step of an attribute path: the last is the weight's owner and its name.

    A sublayer that Keras keeps in a private attribute is found by its public name, one in a list by its index.
    """
    steps: list[tuple[Any, str]] = []
    owner = layer
    for part in attribute.split("."):
        if isinstance(owner, list | tuple):
            steps.append((owner, part))
            owner = owner[int(part)] if part.isdigit() and int(part) < len(owner) else None
            continue
        name = part if hasattr(owner, part) else f"_{part}"
        steps.append((owner, name))
        owner = getattr(owner, name, None)
    return steps


def layer_info(name: str, layer: Any, kind: LayerKind, find: Callable[[Any, str], Any | None]) -> LayerInfo:
    """Return what a recipe needs to know of a layer.

    Parameters
    ----------
    name : str
        The layer's full name.
    layer : layer
        The layer.
    kind : LayerKind
        How it is quantized.
    find : callable
        ``find(layer, attribute)`` returns the variable, None when there is none.

    Raises
    ------
    ModelError
        When the layer is not built, or has no weight of a registered name.
    ShapeMismatchError
        When a registered axis is not one of the weight's.
    """
    if kind.weights and not layer.built:
        raise ModelError(f"layer {name!r} has no weights yet", "build the model, or call it once with an example.")

    def shape_of(attribute: str) -> tuple[int, ...] | None:
        weight = find(layer, attribute)
        return None if weight is None else tuple(weight.shape)

    return layers.layer_info(name, layer, kind, shape_of)
