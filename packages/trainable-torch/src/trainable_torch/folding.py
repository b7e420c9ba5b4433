"""Batch-norm folding: the statistics go into the layer before, so that what is quantized is what is deployed."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from trainable_core.backend.folding import fold, gain_and_shift
from trainable_torch.layers import is_computed
from trainable_torch.tracing import traced_parts

_FOLDABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def fold_batch_norm(model: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """Fold batch normalization into the convolution or linear layer before it, in place.

    Parameters
    ----------
    model : Module
        Changed: weights and bias take over the normalization (running statistics), which becomes an identity.

    Returns
    -------
    folded : dict of str to str
        Layer name by the name of the batch norm folded into it.
    kept : dict of str to str
        Why, by the name of each batch norm that stayed.

    Notes
    -----
    ``w' = w * gamma / sqrt(var + eps)`` along the output channels and ``b' = (b - mean) * gamma / sqrt(var + eps) +
    beta``, computed in float64. In eval mode the model's function stays; in training mode batch statistics are no
    longer used.
    """
    names: dict[nn.Module, str] = {}
    uses: dict[nn.Module, int] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, name)
        uses[module] = uses.get(module, 0) + 1
    kept = {
        name: "the layer before it is not known: this part can't be traced"
        for m, name in names.items()
        if isinstance(m, _BATCH_NORMS)
    }
    folded: dict[str, str] = {}
    parameter_uses: dict[int, int] = {}
    for module in names:
        for parameter in module._parameters.values():  # noqa: SLF001 - own parameters, without children's
            if parameter is not None:
                parameter_uses[id(parameter)] = parameter_uses.get(id(parameter), 0) + 1
    for _, part in traced_parts(model):
        calls: dict[nn.Module, int] = {}
        for node in part.graph.nodes:
            if node.op == "call_module":
                called = part.get_submodule(str(node.target))
                calls[called] = calls.get(called, 0) + 1
        for node in part.graph.nodes:
            if node.op != "call_module":
                continue
            norm = part.get_submodule(str(node.target))
            if not isinstance(norm, _BATCH_NORMS) or names.get(norm) not in kept:
                continue
            layer, reason = _layer_before(part, node, calls, uses, parameter_uses)
            if layer is None:
                kept[names[norm]] = reason
                continue
            _fold(layer, norm)
            _replace(model, norm, nn.Identity())
            folded[names[norm]] = names[layer]
            del kept[names[norm]]
    return folded, kept


def _layer_before(
    part: fx.GraphModule,
    node: fx.Node,
    calls: dict[nn.Module, int],
    uses: dict[nn.Module, int],
    parameter_uses: dict[int, int],
) -> tuple[nn.Module | None, str]:
    """Return the layer that a batch-norm node can be folded into, or why there is none."""
    norm: Any = part.get_submodule(str(node.target))
    before = node.args[0] if node.args else None
    if not isinstance(before, fx.Node) or before.op != "call_module":
        return None, "what comes before it is no layer"
    layer: Any = part.get_submodule(str(before.target))
    if type(layer) not in _FOLDABLE:
        return None, f"what comes before it is {type(layer).__name__}"
    weight = layer.weight
    channels = weight.shape[1] * layer.groups if isinstance(layer, _TRANSPOSED) else weight.shape[0]
    obstacles = [
        (is_computed(layer, "weight"), "the weight of the layer before it is computed by a hook or a parametrization"),
        (norm.running_mean is None, "it keeps no running statistics"),
        (len(before.users) > 1, "the layer before it has other users"),
        (any(calls[m] > 1 or uses[m] > 1 for m in (layer, norm)), "it or the layer before it is called more than once"),
        (any(parameter_uses[id(p)] > 1 for p in layer.parameters()), "the layer before it shares its weights"),
        (channels != norm.num_features, "its channels are not the layer's"),
    ]
    reason = next((reason for stands, reason in obstacles if stands), "")
    return (None, reason) if reason else (layer, "")


@torch.no_grad()
def _fold(layer: Any, norm: Any) -> None:
    gamma, beta = (norm.weight.double(), norm.bias.double()) if norm.affine else (None, None)
    inverse_deviation = (norm.running_var.double() + norm.eps).rsqrt()
    gain, shift = gain_and_shift(norm.running_mean.double(), inverse_deviation, gamma, beta)
    weight, kernel = layer.weight, layer.weight.double()
    axes: tuple[int, ...] = (0,)
    if isinstance(layer, _TRANSPOSED):
        # (in, out / groups, ...): output channel g * (out / groups) + j is row block g, column j
        kernel = kernel.reshape(layer.groups, weight.shape[0] // layer.groups, *weight.shape[1:])
        axes = (0, 2)
    scaled, bias = fold(kernel, None if layer.bias is None else layer.bias.double(), gain, shift, axes)
    weight.copy_(scaled.reshape(weight.shape).to(weight.dtype))
    if layer.bias is None:
        layer.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=weight.requires_grad)
    else:
        layer.bias.copy_(bias.to(layer.bias.dtype))


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):  # noqa: SLF001 - every place that holds it
            if child is old:
                setattr(module, name, new)
