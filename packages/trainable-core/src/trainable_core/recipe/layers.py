"""What a backend tells about a model's layers: their op kinds, and the weights and inputs that can be quantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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
    input_axes : mapping of str to int
        Axis of the inputs, which groups are formed along, by weight attribute; where it is missing, the axis next to
        that of the output channels, if these are on the first or the last one.
    expert_axes : mapping of str to int
        Axis of the experts, by the attribute of a weight that holds a matrix for each of several.
    """

    op: str
    weights: Mapping[str, int] = field(default_factory=dict)
    inputs: tuple[str, ...] = ("inputs",)
    unsupported: str = ""
    bias: str = ""
    bias_obstacle: str = ""
    input_axes: Mapping[str, int] = field(default_factory=dict)
    expert_axes: Mapping[str, int] = field(default_factory=dict)


class WeightAxes(NamedTuple):
    """Where the axes of a weight are; a plain number stands for the first of them.

    Parameters
    ----------
    outputs : int
        Axis of the output channels.
    inputs : int, optional
        Axis of the inputs, which groups are formed along.
    experts : int, optional
        Axis of the experts, where the weight holds a matrix for each of several.
    """

    outputs: int
    inputs: int | None = None
    experts: int | None = None


def declared_kind(op: Any, weights: Any, inputs: Any, bias: Any = None) -> LayerKind:
    """Return the kind that a user's ``register_layer`` declares.

    Raises
    ------
    InvalidArgumentError
        When the op kind is unknown, or an axis or a name is not one.

    Examples
    --------
    >>> kind = declared_kind("linear", {"kernel": -1}, ("inputs",))
    >>> kind.op, kind.weights, kind.inputs
    ('linear', {'kernel': -1}, ('inputs',))
    >>> declared_kind("linear", {"kernels": WeightAxes(1, inputs=2, experts=0)}, ("inputs",)).expert_axes
    {'kernels': 0}
    """
    if op not in OPS:
        raise InvalidArgumentError("register_layer", f"op {op!r} is not one of {', '.join(OPS)}")
    axes = {} if weights is None else weights
    if not isinstance(axes, Mapping) or not all(
        isinstance(attribute, str) and _is_axes(given) for attribute, given in axes.items()
    ):
        raise InvalidArgumentError("register_layer", f"weights must map attribute names to axes, got {weights!r}")
    places = {name: each if isinstance(each, WeightAxes) else WeightAxes(each) for name, each in axes.items()}
    if not isinstance(inputs, tuple | list) or not all(isinstance(name, str) for name in inputs):
        raise InvalidArgumentError("register_layer", f"inputs must be a tuple of argument names, got {inputs!r}")
    if bias is not None and not isinstance(bias, str):
        raise InvalidArgumentError("register_layer", f"bias must be the name of an attribute, got {bias!r}")
    return LayerKind(
        op,
        {name: each.outputs for name, each in places.items()},
        tuple(inputs),
        bias=bias or "",
        input_axes={name: each.inputs for name, each in places.items() if each.inputs is not None},
        expert_axes={name: each.experts for name, each in places.items() if each.experts is not None},
    )


def _is_axes(given: Any) -> bool:
    """Return whether something is an axis, or the axes of a weight."""
    several = given if isinstance(given, WeightAxes) else (given,)
    numbers = [axis for index, axis in enumerate(several) if index == 0 or axis is not None]
    return all(isinstance(axis, int) and not isinstance(axis, bool) for axis in numbers)


@dataclass(frozen=True)
class WeightInfo:
    """One quantizable weight of a layer.

    Parameters
    ----------
    shape : tuple of int
        Its shape.
    channels_axis : int
        Axis of its output channels.
    inputs_axis : int or None
        Axis of its inputs, which groups are formed along; None where that is not known, or there is none.
    experts_axis : int or None
        Axis of the experts, where it holds a matrix for each of several.
    """

    shape: tuple[int, ...]
    channels_axis: int
    inputs_axis: int | None = None
    experts_axis: int | None = None


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
    {'kernel': WeightInfo(shape=(4, 3), channels_axis=1, inputs_axis=0, experts_axis=None)}
    """
    weights = {}
    for attribute, axis in kind.weights.items():
        shape = shape_of(attribute)
        if shape is None:
            raise ModelError(
                f"layer {name!r} has no weight {attribute!r}", f"register_layer({type(layer).__name__}, ...) names it."
            )
        inputs, experts = kind.input_axes.get(attribute), kind.expert_axes.get(attribute)
        for each in (axis, inputs, experts):
            if each is not None and not -len(shape) <= each < len(shape):
                raise ShapeMismatchError(f"{name}.{attribute}", f"an axis of a tensor of shape {shape}", each)
        inputs = _beside(axis % len(shape), len(shape)) if inputs is None else inputs % len(shape)
        experts = None if experts is None else experts % len(shape)
        weights[attribute] = WeightInfo(shape, axis % len(shape), inputs, experts)
    bias = kind.bias if weights and kind.bias and shape_of(kind.bias) is not None else ""
    return LayerInfo(name, kind.op, weights, bias=bias, bias_obstacle=kind.bias_obstacle if bias else "")


def _beside(outputs: int, ndim: int) -> int | None:
    """Return the axis of the inputs next to that of the outputs: after the first one, before the last one."""
    if ndim < 2 or outputs not in {0, ndim - 1}:  # noqa: PLR2004 - a matrix
        return None
    return 1 if outputs == 0 else ndim - 2
