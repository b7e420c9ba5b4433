"""Batch-norm folding: the statistics go into the layer before, so that what is quantized is what is deployed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trainable_core.backend import folding
from trainable_keras.batch_norm import Simulation
from trainable_keras.configs import BIASED
from trainable_keras.framework import Framework
from trainable_keras.graph import Call, Graph, children, layers_within
from trainable_keras.layers import DEPTHWISE_KERNEL, KINDS
from trainable_keras.parts import KerasWrapper

KERNELS: dict[str, tuple[str, tuple[int, ...]]] = {
    "Dense": ("kernel", (-1,)),
    **dict.fromkeys(("Conv1D", "Conv2D", "Conv3D"), ("kernel", (-1,))),
    **dict.fromkeys(("DepthwiseConv1D", "DepthwiseConv2D"), ("kernel", (-2, -1))),
    **dict.fromkeys(("SeparableConv1D", "SeparableConv2D"), ("pointwise_kernel", (-1,))),
    **dict.fromkeys(("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"), ("kernel", (-2,))),
}
"""Kernel that takes a normalization over, and its axes of output channels, by class name."""


_MAKING = frozenset({"__init__", "build", "get_config", "from_config"})
"""Methods that make a layer, and don't compute its output."""

_READ = frozenset(
    {
        "kernel", "depthwise_kernel", "pointwise_kernel", "bias", "use_bias", "activation",
        "gamma", "beta", "moving_mean", "moving_variance", "epsilon", "axis",
    }
)  # fmt: skip
"""Attributes that Keras's own `call` of these layers reads."""

_TERMS = ("_constraint", "_regularizer")
"""Ends of the names of attributes that hold a layer's weights or output within bounds, or add to the loss."""


def inherits_call(layer: Any, base: type) -> bool:
    """Return whether a layer's output is computed by a base class of it, as that class computes it.

    Parameters
    ----------
    layer : layer
        An instance of `base` or of a subclass.
    base : type
        The base class.

    Notes
    -----
    A subclass may make itself in another way, and may have methods and attributes that the base class doesn't know.
    """
    if "call" in vars(layer):
        return False
    known = {*dir(base), *vars(layer), *_READ} - _MAKING
    for cls in type(layer).__mro__[: type(layer).__mro__.index(base)]:
        own = {name for name in vars(cls) if not (name.startswith("__") and name.endswith("__")) or name == "__call__"}
        if not own.isdisjoint(known):
            return False
    return True


def terms_of(layer: Any) -> list[str]:
    """Return the names of a layer's constraints and regularizers, those of its output and of single weights included.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> terms_of(SimpleNamespace(kernel_constraint=None, bias_regularizer="l2", weights=[]))
    ['bias_regularizer']
    """
    held = {name.lstrip("_"): value for name, value in vars(layer).items() if name.endswith(_TERMS)}
    held.pop("captured_weight_regularizer", None)  # a list of Keras 2's, of what is in other attributes too
    found = [name for name, value in held.items() if value is not None]
    if not found and getattr(layer, "_callable_losses", None):  # Keras 2 keeps what `add_loss` is given there
        found.append("loss of its own")
    for weight in [] if found else layer.weights:
        names = [term.lstrip("_") for term in _TERMS if getattr(weight, term.lstrip("_"), None) is not None]
        found += [f"{name} of one of its weights" for name in names]
    return found


class View:
    """A model as folding looks at it.

    Parameters
    ----------
    framework : Framework
        The model's Keras.
    model : model
        Only looked at.
    """

    def __init__(self, framework: Framework, model: Any) -> None:
        self.graph, self.kind = framework.graph, framework.kind
        self.is_layer, self.find_weight = framework.is_layer, framework.types.find_weight
        self._keras = framework.module
        self._owners: dict[int, int] = {}
        for layer in layers_within(model):
            for variable in {id(each) for each in framework.created_variables(layer)}:
                self._owners[variable] = self._owners.get(variable, 0) + 1

    def is_batch_norm(self, layer: Any) -> bool:
        """Return whether a layer is batch normalization, or of a subclass of it."""
        return isinstance(layer, self._keras.layers.BatchNormalization)

    def computes_as(self, layer: Any) -> str:
        """Return the name of the class of Keras's own by which a layer's output is computed; else an empty string."""
        for cls in type(layer).__mro__:
            if getattr(self._keras.layers, cls.__name__, None) is cls:
                return str(cls.__name__) if inherits_call(layer, cls) else ""
        return ""

    def is_linear(self, layer: Any) -> bool:
        """Return whether nothing comes behind the layer's own bias."""
        return getattr(layer, "activation", None) in {None, self._keras.activations.linear}

    def shares_variables(self, layer: Any) -> bool:
        """Return whether another layer has one of its variables too."""
        return any(self._owners.get(id(variable), 0) > 1 for variable in layer.variables)

    def train_together(self, layer: Any, norm: Any) -> bool:
        """Return whether all weights that folding brings together are trained, or none of them is."""
        trained = {id(weight) for each in (layer, norm) for weight in each.trainable_weights}
        kernels = [self.find_weight(layer, name) for name in ("kernel", DEPTHWISE_KERNEL, "pointwise_kernel", "bias")]
        weights = [weight for weight in [*kernels, norm.gamma, norm.beta] if weight is not None]
        return len({id(weight) in trained for weight in weights}) < 2  # noqa: PLR2004 - both answers

    def can_have_a_bias(self, layer: Any) -> bool:
        """Return whether a layer has a bias, or its class makes one when it is told to."""
        if layer.use_bias:
            return True
        try:
            made = type(layer).from_config({**layer.get_config(), "use_bias": True})
        except Exception:  # noqa: BLE001 - a constructor of somebody else's may raise anything
            return False
        return bool(made.use_bias)


def unsimulated(model: Any, layer: Any, norm: Any) -> str:
    """Return why the folding of a batch norm can't be simulated in training; empty where it can.

    Parameters
    ----------
    model : model
        Theirs.
    layer, norm : layer
        The layer that it can be folded into, and the batch norm.
    """
    unlike = [name for name in ("renorm", "virtual_batch_size", "synchronized") if getattr(norm, name, None)]
    if unlike:
        return f"its statistics in training are others than a batch's: {unlike[0]}"
    masks = any(type(each).__name__ == "Masking" or getattr(each, "mask_zero", False) for each in layers_within(model))
    if masks and getattr(layer, "supports_masking", False):
        return "it may be given a mask, which its statistics in training leave out"
    return ""


def simulation_of(framework: Framework, layer: Any, key: str) -> Simulation:
    """Return what a layer needs to simulate the batch norm that can be folded into it.

    Parameters
    ----------
    framework : Framework
        The layer's Keras.
    layer : layer
        Of a class in `KERNELS`, with a bias.
    key : str
        What tells it from the others of its model.
    """
    known = next(cls.__name__ for cls in type(layer).__mro__ if cls.__name__ in KERNELS)
    attribute, axes = kernel_attribute(layer, known, framework.types.find_weight), KERNELS[known][1]
    channels_axis = 1 if getattr(layer, "data_format", "") == "channels_first" else -1
    return Simulation(key, str(attribute), axes, channels_axis, keeps_bias=not vars(layer).get(BIASED))


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
    layers : dict of int to layer
        The layers that batch norms go into, by their ``id``.
    named : dict of str to layer
        The batch norms to fold, by their names.
    """

    norms: dict[int, Any] = field(default_factory=dict)
    gone: set[int] = field(default_factory=set)
    folded: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    layers: dict[int, Any] = field(default_factory=dict)
    named: dict[str, Any] = field(default_factory=dict)

    def keep(self, key: int, reason: str) -> None:
        """Let the batch norm stay that was to go into the layer with an ``id``."""
        norm = self.norms.pop(key)
        self.gone.discard(id(norm))
        name = next(name for name, each in self.named.items() if each is norm)
        del self.folded[name]
        self.kept[name] = reason


def plan_folding(framework: Framework, model: Any) -> Folding:
    """Return which batch norms can be folded into the convolution or dense layer before them.

    Parameters
    ----------
    framework : Framework
        The model's Keras.
    model : model
        Only looked at.

    Notes
    -----
    ``w' = w * gamma / sqrt(var + eps)`` along the output channels and ``b' = (b - mean) * gamma / sqrt(var + eps) +
    beta``, computed in float64. In inference the model's function stays; in training batch statistics are no longer
    used.

    What would change the meaning of a model in training stays too: a constraint or a regularizer of the float kernel is
    not one of the folded kernel, and weights that are not trained must not become part of weights that are.
    """
    found, view = Folding(), View(framework, model)
    uses: dict[int, int] = {}
    _count(model, view, uses, set())
    _look(model, "", found, view, uses)
    return found


def _count(layer: Any, view: View, uses: dict[int, int], done: set[int]) -> None:
    """Count the places that each layer is called from, or held at where there is no graph."""
    if id(layer) in done:
        return
    done.add(id(layer))
    graph = view.graph(layer)
    if graph is not None:
        for call in graph.nodes:
            uses[id(call.operation)] = uses.get(id(call.operation), 0) + 1
        inside = [each for each in graph.operations if view.is_layer(each)]
    else:  # whoever holds a layer may call it, or read its weights
        inside = [child for _, child in children(layer)]
        for child in inside:
            uses[id(child)] = uses.get(id(child), 0) + 1
    for each in inside:
        _count(each, view, uses, done)


def _look(layer: Any, prefix: str, found: Folding, view: View, uses: dict[int, int], *, training: bool = False) -> None:
    """Plan the folding of the batch norms inside a layer; `training` when it is called with ``training=True``."""
    graph = view.graph(layer)
    if view.is_batch_norm(layer):
        found.kept.setdefault(prefix or layer.name, "the layer before it is not known: this part has no graph")
    elif graph is not None:
        for operation in graph.operations:
            name = f"{prefix}.{operation.name}" if prefix else operation.name
            trains = training or any(_is_told_to_train(call) for call in graph.calls(operation))
            if not view.is_batch_norm(operation):
                if view.is_layer(operation):
                    _look(operation, name, found, view, uses, training=trains)
                continue
            if trains:
                found.kept[name] = "it is called with training=True, so it never uses its moving statistics"
                continue
            before, reason = _layer_before(graph, operation, view, uses)
            if before is None:
                found.kept[name] = reason
                continue
            found.norms[id(before)], found.layers[id(before)], found.named[name] = operation, before, operation
            found.gone.add(id(operation))
            found.folded[name] = f"{prefix}.{before.name}" if prefix else before.name
    elif view.kind(layer) is None:
        for child_name, child in children(layer):
            _look(child, f"{prefix}.{child_name}" if prefix else child_name, found, view, uses)


def _is_told_to_train(call: Call) -> bool:
    """Return whether a call in a graph is one in training, whatever the model does."""
    given = [*call.args[1:], (call.kwargs or {}).get("training")]
    return any(value is True for value in given)


def _layer_before(graph: Graph, norm: Any, view: View, uses: dict[int, int]) -> tuple[Any | None, str]:
    """Return the layer that a batch norm can be folded into, or why there is none."""
    call: Call = graph.calls(norm)[0]
    source = graph.source(call)
    if source is None or not view.is_layer(source.operation):
        return None, "what comes before it is no layer"
    layer = source.operation
    name = view.computes_as(layer)
    if name not in KERNELS:
        own = "" if name else ", whose class may compute something of its own"
        return None, f"what comes before it is {type(layer).__name__}{own}"
    kind = view.kind(layer)
    rank = len(source.outputs[0].shape)
    axes = norm.axis if isinstance(norm.axis, list | tuple) else [norm.axis]  # Keras 2 keeps a list
    channels_axis = 1 if getattr(layer, "data_format", "") == "channels_first" else rank - 1
    terms = {"it has a": terms_of(norm), "the layer before it has a": terms_of(layer)}
    obstacles = [
        (view.computes_as(norm) != "BatchNormalization", f"{type(norm).__name__} may compute something of its own"),
        (graph.only_user(source) is not call, "the layer before it has other users"),
        (uses[id(layer)] > 1 or uses[id(norm)] > 1, "it or the layer before it is called more than once"),
        (view.shares_variables(layer), "the layer before it shares its weights"),
        (view.shares_variables(norm), "it shares its weights"),
        (not view.is_linear(layer), "the layer before it has an activation"),
        (
            kind is None or len(kind.weights) != len(KINDS[name].weights),  # Keras 2 has another name for one
            f"of the layer before it, {'' if kind is None else kind.unsupported}",
        ),
        (kernel_attribute(layer, name, view.find_weight) is None, "the layer before it computes its kernel"),
        ([axis % rank for axis in axes] != [channels_axis], "its channels are not the layer's"),
        *((bool(names), f"{whose} {', '.join(names)}") for whose, names in terms.items()),
        (not view.train_together(layer, norm), "of its weights and those of the layer before it, some don't train"),
    ]
    reason = next((reason for stands, reason in obstacles if stands), "")
    if not reason and not view.can_have_a_bias(layer):
        reason = f"{type(layer).__name__}, the layer before it, can't be made again with a bias"
    return (None, reason) if reason else (layer, "")


def kernel_attribute(layer: Any, name: str, find_weight: Callable[[Any, str], Any | None]) -> str | None:
    """Return the attribute of the kernel that takes a batch norm over; None when it is no variable.

    Parameters
    ----------
    layer : layer
        The layer.
    name : str
        The class of Keras's own that it is of; in `KERNELS`.
    find_weight : callable
        ``find_weight(layer, attribute)`` returns a variable, None when there is none.
    """
    names = (KERNELS[name][0], DEPTHWISE_KERNEL) if name.startswith("Depthwise") else (KERNELS[name][0],)
    return next((each for each in names if find_weight(layer, each) is not None), None)


def folded_copy(framework: Framework, layer: Any, norm: Any, name: str) -> Any:
    """Return a copy of a layer that does its own work and a batch norm's.

    Parameters
    ----------
    framework : Framework
        The layer's Keras.
    layer : layer
        The layer, of a class in `KERNELS`; left as it is.
    norm : layer
        The batch norm.
    name : str
        The layer's full name.
    """
    to_numpy, assign = framework.functions.to_numpy, framework.assign

    def float64(variable: Any) -> Any:
        return None if variable is None else to_numpy(variable).astype(np.float64)

    known = next(cls.__name__ for cls in type(layer).__mro__ if cls.__name__ in KERNELS)
    attribute, axes = kernel_attribute(layer, known, framework.types.find_weight), KERNELS[known][1]
    assert attribute is not None  # noqa: S101 - `plan_folding` asked
    copied = framework.remade(layer, name, use_bias=True)
    inverse_deviation = 1.0 / np.sqrt(float64(norm.moving_variance) + norm.epsilon)
    gain, shift = folding.gain_and_shift(
        float64(norm.moving_mean), inverse_deviation, float64(norm.gamma), float64(norm.beta)
    )
    kernel = getattr(layer, attribute)
    bias = layer.bias if layer.use_bias else None
    folded = folding.fold(float64(kernel), float64(bias), gain, shift, axes)
    values = {id(getattr(copied, attribute)): folded[0], id(copied.bias): folded[1]}
    others = [variable for variable in copied.variables if id(variable) not in values]
    kept = [variable for variable in layer.variables if variable is not kernel and variable is not bias]
    for source, target in zip(kept, others, strict=True):
        assign(target, to_numpy(source))
    for variable in copied.variables:
        if id(variable) in values:
            assign(variable, values[id(variable)])
    if not layer.trainable:
        copied.trainable = False
    return copied


def named_layers(framework: Framework, layer: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the layers inside a layer under the names that `plan_folding` gives them."""
    graph = framework.graph(layer)
    if graph is None:
        inside = [(name, child) for name, child in children(layer)]
    else:
        inside = [(each.name, each) for each in graph.operations if framework.is_layer(each)]
    for name, each in inside:
        full = f"{prefix}.{name}" if prefix else name
        yield full, each
        yield from named_layers(framework, each, full)


def fold_quantized(framework: Framework, layer: Any, norm: Any) -> str:
    """Let a layer, whose weights may be quantized, do the work of the batch norm behind it, with the codes it has.

    Parameters
    ----------
    framework : Framework
        The layer's Keras.
    layer : layer
        The layer, with a bias, in a model that is about to be deployed.
    norm : layer
        The batch norm; passes on what it gets from then on.

    Returns
    -------
    str
        Why nothing was folded; empty where it was.
    """
    f = framework.functions

    def float64(variable: Any) -> Any:
        return None if variable is None else f.to_numpy(variable).astype(np.float64)

    known = next(cls.__name__ for cls in type(layer).__mro__ if cls.__name__ in KERNELS)
    attribute, axes = kernel_attribute(layer, known, framework.types.find_weight), KERNELS[known][1]
    inverse_deviation = 1.0 / np.sqrt(float64(norm.moving_variance) + norm.epsilon)
    gain, shift = folding.gain_and_shift(
        float64(norm.moving_mean), inverse_deviation, float64(norm.gamma), float64(norm.beta)
    )
    quantizers = layer.weights_quantizers if isinstance(layer, KerasWrapper) else {}
    quantizer: Any = quantizers.get(str(attribute))
    kernel: Any = framework.types.find_weight(layer, str(attribute))
    if quantizer is None or not quantizer.quantization_config.enabled:
        folded, bias = folding.fold(float64(kernel), float64(layer.bias), gain, shift, axes)
    elif quantizer.deploys_itself:
        return "the quantizer converts itself"
    elif quantizer.quantization_config.blocks is not None:
        return "the layer's weight has scales for groups along its inputs"
    elif len(axes) > 1 and kernel.shape[axes[1]] != 1:
        return "the layer's channels are along two axes of its kernel"
    else:
        values = f.to_numpy(quantizer(f.cast(f.read(kernel), "float32"), training=False))
        config, width = quantizer.quantization_config, quantizer.selected_width
        grid = quantizer.current_qparams()
        axis = axes[0] % values.ndim
        found = folding.fold_codes(values, grid, config.quantization_method, width, gain, axis)
        if isinstance(found, str):
            return found
        folded, vars(quantizer)["folded_grid"] = found
        bias = float64(layer.bias) * gain + shift
    framework.assign(kernel, folded)
    framework.assign(layer.bias, bias)
    framework.kit.pass_on(norm)
    return ""


class PassingLayer:
    """What stands in the place of a batch norm whose work is done by the layer before: passes everything on.

    Each Keras's `FoldedBatchNormalization` is a layer of it that inherits this class.
    """

    def __init__(self, name: str | None = None, dtype: Any = None, trainable: bool = True) -> None:  # noqa: FBT001, FBT002 - Keras's words
        make: Any = super().__init__
        make(name=name, dtype=dtype, trainable=trainable)
        self.supports_masking = True

    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:  # noqa: ARG002 - as batch norm's
        """Return the input."""
        return inputs

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return the input's own shape."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Return name, dtype and whether the layer is trainable."""
        inherited: Any = super()
        config: dict[str, Any] = inherited.get_config()
        return config
