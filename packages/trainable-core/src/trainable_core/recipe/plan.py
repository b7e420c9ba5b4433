"""What a backend tells of a model's layers, what becomes of each, and building the quantizers that say so.

A backend lists layers as `LayerInfo`; `QuantizationRecipe.resolve` answers with a `LayerPlan` for each;
`build_quantizer` makes the quantizer of a plan. A wrapped model keeps all that in a `WrappedState`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from trainable_core.config import TrainableQuantizerConfig
from trainable_core.enums import LUT_METHODS, QuantizationMethod, QuantizationTarget
from trainable_core.errors import (
    InvalidArgumentError,
    ModelError,
    QuantizerDefinitionError,
    QuantizerStateError,
    ShapeMismatchError,
    UnsupportedConfigError,
    nearest,
)
from trainable_core.quantizer import BaseTrainableQuantizer
from trainable_core.registry.registry import get_trainable_quantizer_class

if TYPE_CHECKING:
    from trainable_core.recipe.document import QuantizationRecipe

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

INTEGER_INPUT_OPS = frozenset({"embedding"})
"""Ops whose inputs are indices: nothing to quantize there."""


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
    """

    op: str
    weights: Mapping[str, int] = field(default_factory=dict)
    inputs: tuple[str, ...] = ("inputs",)
    unsupported: str = ""


def declared_kind(op: Any, weights: Any, inputs: Any) -> LayerKind:
    """Return the kind that a user's ``register_layer`` declares.

    Raises
    ------
    InvalidArgumentError
        When the op kind is unknown, or an axis or a name is not one.

    Examples
    --------
    >>> declared_kind("linear", {"kernel": -1}, ("inputs",))
    LayerKind(op='linear', weights={'kernel': -1}, inputs=('inputs',), unsupported='')
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
    return LayerKind(op, dict(axes), tuple(inputs))


@dataclass(frozen=True)
class WeightInfo:
    """One quantizable weight of a layer: its shape and the axis of its output channels."""

    shape: tuple[int, ...]
    channels_axis: int


@dataclass(frozen=True)
class LayerInfo:
    """What a backend tells of one layer or functional operation.

    Parameters
    ----------
    name : str
        Full name in the model.
    op : str
        One of `OPS`.
    weights : mapping of str to WeightInfo
        Weights that can be quantized, by attribute name; empty for operations without.
    """

    name: str
    op: str
    weights: Mapping[str, WeightInfo] = field(default_factory=dict)


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
        The shape of one of its weights, None of what is no weight.

    Raises
    ------
    ModelError
        When it has no weight of a registered name.
    ShapeMismatchError
        When a registered axis is not one of the weight's.

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
    return LayerInfo(name, kind.op, weights)


@dataclass(frozen=True)
class QuantizerPlan:
    """Which quantizer to build: its config, its training method and its further arguments."""

    config: TrainableQuantizerConfig
    training_method: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer.

    Parameters
    ----------
    layer : LayerInfo
        The layer.
    weights : mapping of str to QuantizerPlan
        By weight attribute; empty where weights stay float.
    activation : QuantizerPlan or None
        The quantizer of its inputs or of its output.
    placement : {"inputs", "outputs"}
        Where the activation quantizer stands.
    reason : str
        Why nothing is quantized; empty where something is.
    """

    layer: LayerInfo
    weights: Mapping[str, QuantizerPlan]
    activation: QuantizerPlan | None
    placement: Literal["inputs", "outputs"]
    reason: str = ""


@dataclass
class WrappedState:
    """What a wrapped model knows of itself.

    Parameters
    ----------
    recipe : QuantizationRecipe
        What it was wrapped with.
    plans : dict of str to LayerPlan
        What became of each layer, by name.
    left_out : dict of str to str
        Why, by the name of each thing that is not quantized.
    folded : dict of str to str
        Layer by the batch norm folded into it.
    finalized : bool
        Whether its quantizers are inferable.
    """

    recipe: QuantizationRecipe
    plans: dict[str, LayerPlan] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    folded: dict[str, str] = field(default_factory=dict)
    finalized: bool = False


def build_quantizer(plan: QuantizerPlan, backend: str, base: type[BaseTrainableQuantizer], subject: str) -> Any:
    """Return the quantizer of a plan.

    Parameters
    ----------
    plan : QuantizerPlan
        Config, training method and arguments.
    backend : str
        Which backend's class.
    base : type
        The backend's base class, which the quantizer must have.
    subject : str
        What the quantizer is called in errors, such as ``"fc.weight"``.

    Raises
    ------
    UnknownQuantizerError, DuplicateQuantizerError, UnknownBackendError
        When not exactly one class is registered.
    QuantizerDefinitionError
        When the class is not of this backend.
    InvalidArgumentError
        When the class doesn't take an argument of the plan.
    """
    config = plan.config
    cls: Any = get_trainable_quantizer_class(
        config.target, plan.training_method, config.quantization_method, backend=backend
    )
    if not issubclass(cls, base):
        raise QuantizerDefinitionError(cls, f"it is no {base.__name__}")
    parameters = inspect.signature(cls).parameters
    accepted = [name for name in list(parameters)[1:] if parameters[name].kind is not inspect.Parameter.VAR_KEYWORD]
    for argument in plan.arguments:
        if argument not in accepted:
            raise InvalidArgumentError(
                f"{subject}: arguments.{argument}",
                f"{cls.__name__} takes {', '.join(accepted) or 'no arguments'}" + nearest(argument, accepted),
            )
    quantizer = cls(config, **plan.arguments)
    quantizer.subject = subject
    return quantizer


def require_quantizer(quantizer: object, target: QuantizationTarget, subject: str) -> None:
    """Raise InvalidArgumentError unless this is a trainable or an inferable quantizer for the target."""
    if not callable(getattr(quantizer, "initialize_quantization", None)):
        raise InvalidArgumentError(subject, f"it needs a quantizer, got {type(quantizer).__name__}")
    found = getattr(getattr(quantizer, "quantization_target", None), "name", target.name)
    if found != target.name:
        raise InvalidArgumentError(subject, f"it quantizes {target}, {type(quantizer).__name__} is for {found}")


def require_calibrated(quantizers: Iterable[BaseTrainableQuantizer], model: str, backend: str) -> None:
    """Raise QuantizerStateError, with the names of their tensors, when quantizers have no numbers yet."""
    missing = sorted(q.subject for q in quantizers if q.quantization_config.enabled and not q.calibrated)
    if missing:
        raise QuantizerStateError(
            model, f"not calibrated: {', '.join(missing)}", f"{backend}.calibrate(qmodel, batches)."
        )


def check_target(target: str, subject: str, method: QuantizationMethod, n_bits: int, kind: QuantizationTarget) -> None:
    """Refuse a grid that the deployment target has no inferable quantizer for.

    Raises
    ------
    UnsupportedConfigError
        Names the layer. mctq's look-up tables hold 8-bit codes, and activations have no LUT_SYM_QUANTIZER.
    """
    if method not in LUT_METHODS:
        return
    if n_bits > 8:  # noqa: PLR2004 - mctq's LUT_VALUES_BITWIDTH
        raise UnsupportedConfigError(
            subject, f"{target} can't express {method} with {n_bits} bits", "use at most 8 bits."
        )
    if kind is QuantizationTarget.Activation and method is QuantizationMethod.LUT_SYM_QUANTIZER:
        raise UnsupportedConfigError(subject, f"{target} has no {method} for activations", "use LUT_POT_QUANTIZER.")
