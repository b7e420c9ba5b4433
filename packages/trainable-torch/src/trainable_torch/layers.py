"""Which PyTorch modules and functions are which op kind, and which of their weights can be quantized."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name everyone reads

from trainable_core.errors import InvalidArgumentError, ModelError
from trainable_core.recipe import layers
from trainable_core.recipe.layers import LayerInfo, LayerKind, WeightAxes, declared_kind
from trainable_torch.kernels import eligible


def _kind(
    op: str,
    weights: Mapping[str, int] | None = None,
    inputs: tuple[str, ...] = ("input",),
    bias: str = "",
    bias_obstacle: str = "",
    input_axes: Mapping[str, int] | None = None,
) -> LayerKind:
    """Return a kind whose input has PyTorch's usual name."""
    axes = dict(input_axes or {})
    return LayerKind(op, dict(weights or {}), inputs, bias=bias, bias_obstacle=bias_obstacle, input_axes=axes)


_INSIDE = "it is added inside of the layer, to products of tensors that no quantizer makes"
"""Why the biases of layers with several steps can't be integers."""


_KINDS: dict[type[nn.Module], LayerKind] = {
    nn.Linear: _kind("linear", {"weight": 0}, bias="bias"),
    nn.Bilinear: _kind(
        "linear", {"weight": 0}, ("input1", "input2"), "bias", "it is added to products of three tensors"
    ),
    nn.Conv1d: _kind("conv", {"weight": 0}, bias="bias"),
    nn.Conv2d: _kind("conv", {"weight": 0}, bias="bias"),
    nn.Conv3d: _kind("conv", {"weight": 0}, bias="bias"),
    nn.ConvTranspose1d: _kind("conv_transpose", {"weight": 1}, bias="bias", input_axes={"weight": 0}),
    nn.ConvTranspose2d: _kind("conv_transpose", {"weight": 1}, bias="bias", input_axes={"weight": 0}),
    nn.ConvTranspose3d: _kind("conv_transpose", {"weight": 1}, bias="bias", input_axes={"weight": 0}),
    nn.Embedding: _kind("embedding", {"weight": 0}),
    nn.EmbeddingBag: _kind("embedding", {"weight": 0}),
    nn.RNNCellBase: _kind("recurrent", {"weight_ih": 0, "weight_hh": 0}, bias="bias_ih", bias_obstacle=_INSIDE),
}

_BY_OP: dict[str, tuple[type[nn.Module], ...]] = {
    "activation": (
        nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid,
        nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.Softmax,
    ),
    "normalization": (*eligible.NORMALIZATION, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
    "pooling": eligible.POOLING,
}  # fmt: skip
_KINDS |= {cls: _kind(op) for op, classes in _BY_OP.items() for cls in classes}

FUNCTIONS: dict[Any, str] = {
    **dict.fromkeys(
        (
            operator.add, operator.iadd, operator.sub, operator.isub, torch.add, torch.sub, torch.subtract, torch.rsub,
            "add", "add_", "sub", "sub_", "subtract", "__rsub__",
        ),
        "add",
    ),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "multiply"), "mul"),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate, torch.stack), "cat"),
    **dict.fromkeys(
        (
            operator.matmul, torch.matmul, torch.bmm, torch.mm, "matmul", "bmm", "mm", "__rmatmul__",
            F.scaled_dot_product_attention,
        ),
        "matmul",
    ),
    **dict.fromkeys(
        (
            F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_", F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu,
            F.mish, F.sigmoid, torch.sigmoid, "sigmoid", F.tanh, torch.tanh, "tanh", F.hardswish, F.hardsigmoid,
            F.hardtanh, F.softplus, F.softmax, torch.softmax, "softmax",
        ),
        "activation",
    ),
    **dict.fromkeys((F.layer_norm, F.group_norm, F.rms_norm), "normalization"),
    **dict.fromkeys(
        (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, torch.mean, "mean"),
        "pooling",
    ),
}  # fmt: skip
"""Op kinds of functions and tensor methods, for traced models."""


def register_layer(
    cls: type[nn.Module],
    op: str,
    weights: Mapping[str, int | WeightAxes] | None = None,
    inputs: tuple[str, ...] = ("input",),
    bias: str | None = None,
) -> None:
    """Tell how a module type of your own is quantized.

    Parameters
    ----------
    cls : type
        Module type; subclasses are meant too.
    op : str
        Its op kind, one of `trainable_core.recipe.document.OPS`.
    weights : mapping of str to int or WeightAxes, optional
        Axis of the output channels, by weight attribute. `trainable_core.recipe.layers.WeightAxes` says besides along
        which axis the inputs lie, for groups, and which one counts experts; by default groups are formed along the axis
        next to that of the output channels.
    inputs : tuple of str
        Names of its tensor arguments, in positional order.
    bias : str, optional
        Attribute of the bias, which the layer adds to the products of its first argument and its weight, and to nothing
        else; ``bias: int32`` quantizes it.

    Raises
    ------
    InvalidArgumentError
        When the op kind is unknown, `cls` is no module type, or an axis or a name is not one.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise InvalidArgumentError("register_layer", f"{cls!r} is not a subclass of torch.nn.Module")
    _KINDS[cls] = declared_kind(op, weights, inputs, bias)


def _attention(module: Any) -> LayerKind:
    fused = module.in_proj_weight is not None
    projections = ("in_proj_weight",) if fused else ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    weights = dict.fromkeys((*projections, "out_proj.weight"), 0)
    inputs = ("query", "key", "value")
    return LayerKind("attention", weights, inputs, bias="in_proj_bias", bias_obstacle=_INSIDE)


def _recurrent(module: nn.RNNBase) -> LayerKind:
    """Return the kind of a recurrent layer: its kernels of every direction and depth, and its projections."""
    names = [name for weights in module._all_weights for name in weights if name.startswith("weight")]  # noqa: SLF001 - no public list
    return _kind("recurrent", dict.fromkeys(names, 0), bias="bias_ih_l0", bias_obstacle=_INSIDE)


_BY_MODULE: dict[type[nn.Module], Callable[[Any], LayerKind]] = {
    nn.MultiheadAttention: _attention,
    nn.RNNBase: _recurrent,
}
"""Types whose modules have different weights."""


def _embedding_obstacle(module: nn.Module) -> str:
    """Return why the table of an embedding can't be quantized; empty where it can, and for other modules.

    Quantizing gives every row a gradient, which a sparse one has no place for, and optimizers for sparse gradients
    refuse dense ones. A table with `max_norm` is written into by each lookup: that would rescale the quantized rows,
    which are then on no grid, and leave the float ones as they are.
    """
    if not isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return ""
    if module.sparse:
        return "its weight has sparse gradients, and a quantized one has dense gradients: sparse=False quantizes it"
    if module.max_norm is not None:
        return "its lookups rescale the weight in place (max_norm): max_norm=None quantizes it"
    return ""


def _dtype_obstacle(module: nn.Module, kind: LayerKind) -> str:
    """Return why a layer's weights have no grid: they are no real numbers; empty where they are."""
    for attribute in kind.weights:
        weight: Any = module
        for part in attribute.split("."):
            # of a computed one nothing is asked: to compute it may change what the layer keeps
            weight = getattr(weight, "_parameters", {}).get(part, getattr(weight, "_modules", {}).get(part))
        if isinstance(weight, Tensor) and not weight.is_floating_point():
            return (
                f"its weight is of type {str(weight.dtype).removeprefix('torch.')}, and only real numbers are quantized"
            )
    return ""


def _declared_kind(module: nn.Module) -> LayerKind | None:
    """Return the kind of a module's type."""
    if isinstance(module, torch.jit.ScriptModule):
        return LayerKind("other", unsupported="it is compiled by TorchScript, and its code reads its weights itself")
    for cls in type(module).__mro__:
        if cls in _BY_MODULE:
            return _BY_MODULE[cls](module)
        kind = _KINDS.get(cls)
        if kind is not None:
            return kind
    cls = type(module)
    if cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers."):
        return LayerKind("linear", {"weight": 1}, ("x",), bias="bias")  # a linear layer stored transposed
    return _experts(module) if cls.__module__.startswith("transformers.") else None


def _experts(module: Any) -> LayerKind | None:
    """Return the kind of a module of transformers that holds the matrices of all its experts in one parameter each.

    It is known by the parameters' names and shapes. They are ``(experts, outputs, inputs)`` or, in some models,
    ``(experts, inputs, outputs)``: the first matrix makes gate and value, twice as many outputs as the second one has
    inputs. Where there is no gate, the attribute ``is_transposed`` tells.
    """
    parameters = module._parameters  # noqa: SLF001 - own ones
    first = next((name for name in ("gate_up_proj", "up_proj") if parameters.get(name) is not None), "")
    names = [name for name in (first, "down_proj") if getattr(parameters.get(name), "ndim", 0) == EXPERTS_NDIM]
    if len(names) < 2:  # noqa: PLR2004 - into the experts and out of them
        return None
    (experts, *up), (_, *down) = (parameters[name].shape for name in names)
    if parameters[names[1]].shape[0] != experts:
        return None
    factor = 2 if first == "gate_up_proj" else 1
    fits = {1: up == [factor * down[1], down[0]], 2: up == [down[1], factor * down[0]]}
    found = [outputs for outputs, fit in fits.items() if fit]
    if len(found) > 1:
        known = getattr(module, "is_transposed", None)
        found = [2 if known else 1] if isinstance(known, bool) else []
    if not found:
        return None
    (outputs,) = found
    return LayerKind(
        "linear",
        dict.fromkeys(names, outputs),
        ("hidden_states",),
        input_axes=dict.fromkeys(names, 3 - outputs),
        expert_axes=dict.fromkeys(names, 0),
    )


EXPERTS_NDIM = 3
"""Dimensions of a parameter that holds a matrix for each of several experts."""


def is_computed(module: nn.Module, attribute: str) -> bool:
    """Return whether a weight is no parameter of the layer: a hook or a parametrization computes it."""
    path, _, name = attribute.rpartition(".")
    owner: Any = module.get_submodule(path) if path else module
    return name not in owner._parameters  # noqa: SLF001 - what `register_parameter` fills


def kind_of(module: nn.Module) -> LayerKind | None:
    """Return how a module is quantized, or None when its type is unknown."""
    kind = _declared_kind(module)
    if kind is None:
        return None
    groups = getattr(module, "groups", 1)
    if kind.op == "conv" and groups != 1 and groups == getattr(module, "in_channels", None):
        kind = replace(kind, op="depthwise_conv")
    obstacle = _embedding_obstacle(module) or _dtype_obstacle(module, kind)
    return LayerKind(kind.op, {}, kind.inputs, obstacle) if obstacle else kind


def layer_info(name: str, module: nn.Module, kind: LayerKind) -> LayerInfo:
    """Return what core needs to know of a module.

    Raises
    ------
    ModelError
        When a lazy module has no shape yet, or the module has no weight of a registered name.
    ShapeMismatchError
        When a registered axis is not one of the weight's.
    """

    def shape_of(attribute: str) -> tuple[int, ...] | None:
        weight: Any = module
        for part in attribute.split("."):
            weight = getattr(weight, part, None)
        if isinstance(weight, nn.parameter.UninitializedParameter):
            raise ModelError(
                f"layer {name!r} has no weights yet", "call the model once with an example before wrapping it."
            )
        return tuple(weight.shape) if isinstance(weight, Tensor) else None

    info = layers.layer_info(name, module, kind, shape_of)
    known = (*kind.weights, kind.bias)
    other = next((each for each, p in module._parameters.items() if p is not None and each not in known), "")  # noqa: SLF001 - own ones
    if info.weights and not kind.bias and other:
        problem = f"register_layer(..., bias=...) does not say whether {other!r} is the bias"
        return replace(info, bias=other, bias_obstacle=problem)
    return info


def leave_fused_paths(model: nn.Module) -> None:
    """Make PyTorch's transformer layers call their children: fused eval kernels would read the weights past us."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.enable_nested_tensor = module.use_nested_tensor = False
