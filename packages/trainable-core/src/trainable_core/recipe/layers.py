"""What a backend tells about a model's layers: their op kinds, and the weights and inputs that can be quantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trainable_core.errors import InvalidArgumentError, ModelError, ShapeMismatchError

OPS = (
    "conv",
    "depthwise_conv",
    "conv_transpose",
    "linear",
    "embedding",
    "attention",
    "recurrent",
    "normalization",
    "activation",
    "pooling",
    "add",
    "mul",
    "cat",
    "matmul",
    "other",
)
"""Framework-neutral kinds of layers and functional operations."""

INTEGER_OPS = frozenset(
    {"conv", "depthwise_conv", "conv_transpose", "linear", "pooling", "add", "mul", "cat", "matmul"}
)
"""Ops that integer kernels compute; the others are islands in float between quantizers."""

INTEGER_INPUT_OPS = frozenset({"embedding"})
"""Ops whose inputs are indices: nothing to quantize there."""

HOLDS = "it only holds other layers"
"""Why a module with nothing but other modules in it is not quantized itself."""


@dataclass(frozen=True)
class LayerKind:
    """How a layer type is quantized.

    Parameters
    ----------
    op : str
        Framework-neutral op kind, one of `OPS`.
    weights : mapping of str to int
        Axis of the output channels, by weight attribute.
    inputs : tuple of str
        Names of the tensor arguments that an activation quantizer may stand at, in positional order.
    unsupported : str
        Why the weights can't be quantized; empty where they can.
    bias : str
        Attribute of the bias, which is added to the layer's products; empty where there is none.
    bias_obstacle : str
        Why the bias can't be an integer on the grid of the products; empty where it can.
    """

    op: str
    weights: Mapping[str, int] = field(default_factory=dict)
    inputs: tuple[str, ...] = ("inputs",)
    unsupported: str = ""
    bias: str = ""
    bias_obstacle: str = ""


def declared_kind(op: Any, weights: Any, inputs: Any, bias: Any = None) -> LayerKind:
    """Return the kind that a user's ``register_layer`` declares.

    Raises
    ------
    InvalidArgumentError
        When the op kind is unknown, or an axis or a name is not one.

    Examples
    --------
    >>> declared_kind("linear", {"kernel": -1}, ("inputs",))
    LayerKind(op='linear', weights={'kernel': -1}, inputs=('inputs',), unsupported='', bias='', bias_obstacle='')
    """
    if op not in OPS:
        raise InvalidArgumentError("register_layer", f"op {op!r} is not one of {', '.join(OPS)}")
    axes = {} if weights is None else weights
    if not isinstance(axes, Mapping) or not all(
        isinstance(attribute, str) and isinstance(axis, int) and not isinstance(axis, bool)
        for attribute, axis in axes.items()
    ):
        raise InvalidArgumentError("register_layer", f"weights must map attribute names to axes, got {weights!r}")
    if not isinstance(inputs, tuple | list) or not all(isinstance(name, str) for name in inputs):
        raise InvalidArgumentError("register_layer", f"inputs must be a tuple of argument names, got {inputs!r}")
    if bias is not None and not isinstance(bias, str):
        raise InvalidArgumentError("register_layer", f"bias must be the name of an attribute, got {bias!r}")
    return LayerKind(op, dict(axes), tuple(inputs), bias=bias or "")


@dataclass(frozen=True)
class WeightInfo:
    """One quantizable weight of a layer: its shape and the axis of its output channels."""

    shape: tuple[int, ...]
    channels_axis: int


@dataclass(frozen=True)
class LayerInfo:
    """What a backend tells about one layer or functional operation.

    Parameters
    ----------
    name : str
        Full name in the model.
    op : str
        One of `OPS`.
    weights : mapping of str to WeightInfo
        Weights that can be quantized, by attribute name; empty for operations without.
    obstacle : str
        Why nothing of it can be quantized; empty where something can. Rules may name such a layer, to skip it.
    bias : str
        Attribute of its bias; empty where it has none.
    bias_obstacle : str
        Why the bias can't be an integer on the grid of the layer's products; empty where it can.
    clamps : bool
        Whether it is an activation function that only clamps, as ReLU does: kernels compute it on codes, together with
        the layer before it.
    """

    name: str
    op: str
    weights: Mapping[str, WeightInfo] = field(default_factory=dict)
    obstacle: str = ""
    bias: str = ""
    bias_obstacle: str = ""
    clamps: bool = False


def layer_info(
    name: str, layer: object, kind: LayerKind, shape_of: Callable[[str], tuple[int, ...] | None]
) -> LayerInfo:
    """Return what a recipe needs to know of a layer.

    Parameters
    ----------
    name : str
        The layer's full name.
    layer : layer
        The layer.
    kind : LayerKind
        How it is quantized.
    shape_of : callable
        Returns the shape of one of its weights or of its bias, or None for a name that is neither.

    Raises
    ------
    ModelError
        When it has no weight of a registered name.
    ShapeMismatchError
        When the weight has no such axis.

    Examples
    --------
    >>> layer_info("fc", None, LayerKind("linear", {"kernel": -1}), lambda attribute: (4, 3)).weights
    {'kernel': WeightInfo(shape=(4, 3), channels_axis=1)}
    """
    weights = {}
    for attribute, axis in kind.weights.items():
        shape = shape_of(attribute)
        if shape is None:
            raise ModelError(
                f"layer {name!r} has no weight {attribute!r}", f"register_layer({type(layer).__name__}, ...) names it."
            )
        if not -len(shape) <= axis < len(shape):
            raise ShapeMismatchError(f"{name}.{attribute}", f"an axis of a tensor of shape {shape}", axis)
        weights[attribute] = WeightInfo(shape, axis % len(shape))
    bias = kind.bias if weights and kind.bias and shape_of(kind.bias) is not None else ""
    return LayerInfo(name, kind.op, weights, bias=bias, bias_obstacle=kind.bias_obstacle if bias else "")
