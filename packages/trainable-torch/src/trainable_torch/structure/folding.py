"""Batch-norm folding: the statistics go into the layer before, so that what is quantized is what is deployed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from trainable_core.backend.folding import fold, fold_codes, gain_and_shift
from trainable_core.errors import ModelError
from trainable_torch.batch_norm import SimulatedBatchNorm, simulate
from trainable_torch.layers import is_computed
from trainable_torch.structure.dataflow import move_of, moved, reshaped
from trainable_torch.structure.observing import SHAPE, TRANSPOSED, WITH_OWN_OPERATION, Observed, Run, channels_of
from trainable_torch.structure.overrides import change_of, hook_of, own_class, tensors_of
from trainable_torch.structure.surroundings import reached_otherwise
from trainable_torch.structure.tracing import (
    EXAMPLE_HELPS,
    KEPT,
    called,
    ends_with_own_operation,
    rank_of,
    readers,
    tensors_read,
    traced_parts,
)

_RANKS: dict[type[nn.Module], tuple[int, ...]] = {
    nn.BatchNorm1d: (2, 3),
    nn.BatchNorm2d: (4,),
    nn.BatchNorm3d: (5,),
    nn.SyncBatchNorm: (2, 3, 4, 5),
}
"""Numbers of dimensions that each batch norm takes; it normalizes axis 1."""
_BATCH_NORMS = tuple(_RANKS)
_MOST_DIMENSIONS = 7


def fold_batch_norm(
    model: nn.Module, observed: Observed | None = None, known: Mapping[str, str] | None = None
) -> tuple[dict[str, str], dict[str, str]]:
    """Fold batch normalization into the convolution or linear layer before it, in place.

    Parameters
    ----------
    model : Module
        Changed: weights and bias take over the normalization (running statistics), which becomes an identity.
    observed : Observed, optional
        What a run of the model showed, for the parts that can't be traced.
    known : mapping of str to str, optional
        What was folded when the model was wrapped before, layer by batch norm; the same is folded again, and nothing
        is looked at.

    Returns
    -------
    folded : dict of str to str
        Layer name by the name of the batch norm folded into it.
    kept : dict of str to str
        Why, by the name of each batch norm that stayed.

    Raises
    ------
    ModelError
        When the model has no such layer and batch norm as `known` says.

    Notes
    -----
    ``w' = w * gamma / sqrt(var + eps)`` along the output channels and ``b' = (b - mean) * gamma / sqrt(var + eps) +
    beta``, computed in float64. In eval mode the model's function stays; in training mode batch statistics are no
    longer used.
    """
    structure = _Structure(model)
    folds, kept = _known(structure, known) if known is not None else _found(structure, observed)
    for fold_of in folds:
        fold_of.into(fold_of.layer, fold_of.norm)
        _become_identity(fold_of.norm)
    return {structure.names[each.norm]: structure.names[each.layer] for each in folds}, kept


def foldable_batch_norm(model: nn.Module, observed: Observed | None = None) -> tuple[dict[str, str], dict[str, str]]:
    """Return what `fold_batch_norm` would fold into the layer before it, and leave the model as it is.

    Parameters
    ----------
    model, observed
        As for `fold_batch_norm`.

    Returns
    -------
    foldable : dict of str to str
        Layer name by the name of the batch norm.
    kept : dict of str to str
        Why, by the name of each other batch norm.
    """
    structure = _Structure(model)
    folds, kept = _found(structure, observed)
    later = {each.norm: each.layer for each in folds if each.into is _fold}
    before = "it comes before the layer, and can be folded before training only"
    kept |= {structure.names[each.norm]: before for each in folds if each.norm not in later}
    return {structure.names[norm]: structure.names[layer] for norm, layer in later.items()}, kept


def simulate_batch_norm(model: nn.Module, folds: Mapping[str, str]) -> dict[str, str]:
    """Let batch norms be simulated as folded where that is known to be right, in place.

    Parameters
    ----------
    model : Module
        Changed: each such batch norm passes on what it is given, and its layer has a bias, which does not train.
    folds : mapping of str to str
        Layer name by the name of each batch norm that can be folded into the layer before it.

    Returns
    -------
    dict of str to str
        Why, by the name of each of them that stays as it is.
    """
    kept = {}
    for name, into in folds.items():
        norm, layer = model.get_submodule(name), model.get_submodule(into)
        changed = change_of(layer, own_class(layer, WITH_OWN_OPERATION) or nn.Module)
        if changed:
            kept[name] = f"what comes before it is called twice in training, and {changed}"
            continue
        try:
            simulate(norm)
        except ModelError as error:
            kept[name] = error.problem
            continue
        if layer.bias is None:
            _add_bias(layer, norm)
            layer.bias.requires_grad_(requires_grad=False)  # batch normalization takes out whatever is added
    return kept


@torch.no_grad()
def fold_quantized(layer: Any, norm: Any, quantizer: Any) -> str:
    """Let a layer with a quantized weight do the work of the batch norm behind it, with the codes that it has.

    Parameters
    ----------
    layer : Module
        The layer, in a model that is about to be deployed.
    norm : Module
        The batch norm; becomes an identity.
    quantizer : BasePytorchTrainableQuantizer or None
        That of the layer's weight; None where the weight is float.

    Returns
    -------
    str
        Why nothing was folded; empty where it was.
    """
    if quantizer is None:
        _fold(layer, norm)
        _become_identity(norm)
        return ""
    gain, shift = _gain_and_shift(norm)
    transposed = isinstance(layer, TRANSPOSED)
    if transposed and layer.groups > 1:
        return "the channels of the layer's groups are along two axes of its weight"
    config = quantizer.quantization_config
    if config.blocks is not None:
        return "the layer's weight has scales for groups along its inputs"
    found = fold_codes(
        quantizer.to_numpy(quantizer(layer.weight.float(), training=False)),
        quantizer.current_qparams(),
        config.quantization_method,
        quantizer.selected_width,
        quantizer.to_numpy(gain),
        axis=int(transposed),
    )
    if isinstance(found, str):
        return found
    values, quantizer.folded_grid = found
    _add_bias(layer, norm)
    layer.bias.copy_((layer.bias.double() * gain + shift).to(layer.bias.dtype))
    layer.weight.copy_(torch.as_tensor(values))
    _become_identity(norm)
    return ""


@dataclass(frozen=True)
class _Fold:
    """A batch norm, the layer that takes it over, and the function that does it."""

    norm: Any
    layer: Any
    into: Callable[[Any, Any], None]


class _Structure:
    """Where a model holds its modules and tensors."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names: dict[nn.Module, str] = {}
        self.places: Counter[nn.Module] = Counter()
        for name, module in model.named_modules(remove_duplicate=False):
            self.names.setdefault(module, name)
            self.places[module] += 1
        self.holders: Counter[int] = Counter()
        self.storages: Counter[int] = Counter()
        for module in self.names:
            for tensor in tensors_of(module):
                self.holders[id(tensor)] += 1
                if type(tensor) in (torch.Tensor, nn.Parameter):
                    self.storages[tensor.untyped_storage()._cdata] += 1  # noqa: SLF001 - its identity, on meta as well

    @property
    def norms(self) -> list[nn.Module]:
        return [module for module in self.names if isinstance(module, _BATCH_NORMS)]

    def shares(self, module: nn.Module) -> bool:
        """Return whether a tensor of a module is held by another module too, or has its memory in common."""
        return any(
            self.holders[id(tensor)] > 1
            or (type(tensor) in (torch.Tensor, nn.Parameter) and self.storages[tensor.untyped_storage()._cdata] > 1)  # noqa: SLF001 - as above
            for tensor in tensors_of(module)
        )


def _known(structure: _Structure, known: Mapping[str, str]) -> tuple[list[_Fold], dict[str, str]]:
    modules = {name: module for module, name in structure.names.items()}
    folds = []
    for norm, layer in known.items():
        if not isinstance(modules.get(norm), _BATCH_NORMS) or not isinstance(modules.get(layer), WITH_OWN_OPERATION):
            raise ModelError(f"this model has no batch norm {norm!r} next to a layer {layer!r}")
        folds.append(_Fold(modules[norm], modules[layer], _add_bias))
    folded = {fold_of.norm for fold_of in folds}
    kept = "it was not folded when the model was first wrapped"
    return folds, {structure.names[norm]: kept for norm in structure.norms if norm not in folded}


def _found(structure: _Structure, observed: Observed | None) -> tuple[list[_Fold], dict[str, str]]:
    """Return the batch norms that are known to be foldable, and why the others are not."""
    if not structure.norms:
        return [], {}
    folds: dict[nn.Module, _Fold] = {}
    kept: dict[nn.Module, str] = {}
    for norm, layer, reason in _traced(structure):
        if layer is None:
            kept[norm] = reason
        else:
            folds[norm] = _Fold(norm, layer, _fold)
    for norm in structure.norms:
        if norm not in folds and observed is not None:
            found = _observed(structure, norm, observed)
            if isinstance(found, _Fold):
                folds[norm] = found
            else:
                kept[norm] = found
        kept.setdefault(norm, f"the layer before it is not known: this part can't be traced; {EXAMPLE_HELPS}")
    in_order = [folds[norm] for norm in structure.norms if norm in folds]
    return in_order, {structure.names[norm]: reason for norm, reason in kept.items() if norm not in folds}


# ---- what a trace knows ---------------------------------------------------------------------------------------------


def _traced(structure: _Structure) -> Iterator[tuple[nn.Module, nn.Module | None, str]]:
    """Yield each batch norm that a trace shows with the layer before it, or with the reason why there is none."""
    for prefix, part in traced_parts(structure.model):
        calls: Counter[nn.Module] = Counter()
        nodes: dict[nn.Module, fx.Node] = {}
        for node in part.graph.nodes:
            if node.op == "call_module":
                module = part.get_submodule(str(node.target))
                calls[module] += 1
                nodes.setdefault(module, node)
        norms = [module for module in nodes if isinstance(module, _BATCH_NORMS) and module in structure.names]
        if not norms:
            continue
        root = structure.model.get_submodule(prefix[:-1])
        read, asked = tensors_read(root)
        for norm in norms:
            layer, reason = _layer_before(part, nodes[norm], norm)
            if layer is not None:
                reason = _obstacle(structure, layer, norm, ends_with_own_operation)
                if calls[layer] > 1 or calls[norm] > 1:
                    reason = reason or "it or the layer before it is called more than once"
                others = {id(tensor) for tensor in tensors_of(layer)} & read
                if others or {id(tensor) for tensor in tensors_of(norm)} & asked:
                    reason = reason or "its parameters or the layer's are read by other code"
                if prefix:
                    reason = reason or reached_otherwise(structure.model, prefix[:-1], root, (layer, norm))
            yield norm, (None if reason else layer), reason


def _layer_before(model: nn.Module, node: fx.Node, norm: nn.Module) -> tuple[nn.Module | None, str]:
    """Return the layer whose channels a batch-norm node normalizes, or why there is none."""
    moves: list[fx.Node] = []
    before = node.args[0] if node.args else node.kwargs.get("input")
    while True:
        if not isinstance(before, fx.Node) or before.op not in ("call_module", "call_method", "call_function"):
            return None, "what comes before it is no layer"
        if before.op == "call_module":
            layer = model.get_submodule(str(before.target))
            is_layer = isinstance(layer, WITH_OWN_OPERATION)
            if not is_layer and move_of(layer) is None:
                return None, f"what comes before it is {type(layer).__name__}"
        else:
            is_layer = False
            if called(before) not in _MOVES:
                return None, "what comes before it is no layer"
        if len(readers(before)) > 1 or KEPT in before.meta:
            return None, "the layer before it has other users"
        if is_layer:
            reason = _axis_problem(model, layer, before, moves, norm)
            return (None, reason) if reason else (layer, "")
        moves.insert(0, before)
        before = before.args[0] if before.args else None


_MOVES = frozenset(("flatten", "permute", "transpose", "swapaxes", "swapdims", "contiguous", "reshape", "view"))


def _axis_problem(model: nn.Module, layer: Any, node: fx.Node, moves: list[fx.Node], norm: Any) -> str:
    """Return why a batch norm may normalize something else than a layer's channels; empty when it doesn't."""
    if not isinstance(getattr(layer, "weight", None), torch.Tensor) or layer.weight.dim() < 2:  # noqa: PLR2004 - a matrix
        return "the layer before it has no weight of its own"
    channels = channels_of(layer)
    if channels != norm.num_features:
        return "its channels are not the layer's"
    linear = isinstance(layer, nn.Linear)
    rank = rank_of(model, node) if SHAPE in node.meta else None if linear else layer.weight.dim()
    if rank is None:
        rank = rank_of(model, node.args[0] if node.args else None)
    accepted = _RANKS[own_class(norm, _BATCH_NORMS) or nn.BatchNorm2d]
    ends: set[int | None] = set()
    for before in range(2, _MOST_DIMENSIONS) if rank is None else (rank,):
        axis = before - 1 if linear else before - layer.weight.dim() + 1
        end = _end_of(model, moves, before, axis, channels, node.meta.get(SHAPE))
        if end is None:
            ends.add(None)
        elif end[0] in accepted:  # a batch norm refuses the others
            ends.add(end[1])
    if ends == {1}:
        return ""
    if None in ends and rank is not None:
        return "the operations between the layer and it move its channels in a way that is not known"
    if len(ends) == 1 and rank is not None:
        return "it normalizes another axis than the layer's channels"
    return f"which axis it normalizes depends on the number of dimensions of its input; {EXAMPLE_HELPS}"


def _end_of(
    model: nn.Module, moves: list[fx.Node], rank: int, axis: int, channels: int, shape: Any
) -> tuple[int, int] | None:
    """Return number of dimensions and axis of the channels behind some operations, or None where that isn't known."""
    for move in moves:
        if move.op == "call_module":
            name, args = move_of(model.get_submodule(str(move.target))) or ("", ())
            end = moved(name, args, {}, rank, axis, channels)
        else:
            end = moved(called(move), move.args[1:], move.kwargs, rank, axis, channels)
            after = move.meta.get(SHAPE)
            if end is None and shape is not None and after is not None and called(move) in ("reshape", "view"):
                place = reshaped(shape, after, axis)
                end = None if place is None else (len(after), place)
        if end is None:
            return None
        (rank, axis), shape = end, move.meta.get(SHAPE)
    return rank, axis


# ---- what a run knows -----------------------------------------------------------------------------------------------


def _observed(structure: _Structure, norm: nn.Module, observed: Observed) -> _Fold | str:
    """Return how a batch norm can be folded as it was used in both modes, or why it can't."""
    if isinstance(observed.trained, str):
        return observed.trained
    one, other = (_observed_once(structure, norm, run) for run in (observed.evaluated, observed.trained))
    if isinstance(one, _Fold) and isinstance(other, _Fold) and one != other:
        return "another layer is next to it in train mode"
    return one if isinstance(one, str) else other


def _observed_once(structure: _Structure, norm: nn.Module, run: Run) -> _Fold | str:
    name = structure.names[norm]
    nodes = [node for node in run.graph.nodes if node.op == "call_module" and node.target == name]
    if not nodes:
        return "the example did not reach it"
    layer, reason = _layer_before(structure.model, nodes[0], norm)
    into = _fold
    if layer is None:
        layer, into = _layer_after(structure.model, nodes[0], norm), _fold_into_next
    if layer is None:
        return reason
    of_layer = structure.names[layer]
    ends = run.last.get(of_layer, [])
    reason = _obstacle(structure, layer, norm, lambda _: into is _fold and bool(ends) and all(ends))
    if run.calls[name] > 1 or run.calls[of_layer] > 1:
        reason = reason or "it or the layer next to it is called more than once"
    for module, owner, readers_of in ((layer, of_layer, run.readers), (norm, name, run.users)):
        tensors = [f"{owner}.{key}".lstrip(".") for key in (*module._parameters, *module._buffers)]  # noqa: SLF001 - own
        if any(readers_of.get(tensor, set()) - {owner} for tensor in tensors):
            reason = reason or "its parameters or the layer's are read by other code"
    return reason or _Fold(norm, layer, into)


def _layer_after(model: nn.Module, node: fx.Node, norm: Any) -> Any:
    """Return the only user of a batch norm's output when it is a layer that can take over its input's gain and shift.

    A convolution that pads with zeros can't: they are put in behind the normalization.
    """
    if len(readers(node)) != 1 or readers(node)[0].op != "call_module":
        return None
    user = readers(node)[0]
    layer: Any = model.get_submodule(str(user.target))
    if not isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) or not user.args or user.args[0] is not node:
        return None
    shape = node.meta.get(SHAPE, ())
    if isinstance(layer, nn.Linear):
        fits = len(shape) == 2 and layer.in_features == norm.num_features  # noqa: PLR2004 - a batch of vectors
    else:
        pads = layer.padding_mode == "zeros" and layer.padding != "valid" and any(_padding(layer))
        fits = len(shape) == layer.weight.dim() and layer.in_channels == norm.num_features and not pads
    return layer if fits else None


def _padding(layer: Any) -> list[int]:
    """Return how much a convolution may pad along each axis."""
    return [n - 1 for n in layer.kernel_size] if layer.padding == "same" else list(layer.padding)


# ---- what the modules themselves tell -------------------------------------------------------------------------------


def _obstacle(structure: _Structure, layer: Any, norm: Any, ends_with_own: Callable[[nn.Module], bool]) -> str:
    """Return why a batch norm can't be folded into a layer, whatever is between them; empty when it can.

    `ends_with_own` tells whether a layer's forward ends with the operation of its class on its own weight and bias.
    """
    base = own_class(layer, WITH_OWN_OPERATION)
    changed = change_of(layer, base) if base is not None else ""
    if changed and not ends_with_own(layer):
        return f"what comes before it is {type(layer).__name__}, and {changed}"
    if is_computed(layer, "weight"):
        return "the weight of the layer before it is computed by a hook or a parametrization"
    own = own_class(norm, _BATCH_NORMS)
    changed = change_of(norm, own) if own is not None else ""
    if changed:
        return changed
    for module, what in ((norm, "it"), (layer, "the layer before it")):
        hook = hook_of(module)
        if hook:
            return f"{what} has a {hook}"
    if norm.running_mean is None or norm.running_var is None:
        return "it keeps no running statistics"
    if structure.places[layer] > 1 or structure.places[norm] > 1:
        return "it or the layer before it is called more than once"
    if structure.shares(layer):
        return "the layer before it shares its weights"
    return "it shares its parameters" if structure.shares(norm) else ""


@torch.no_grad()
def _fold(layer: Any, norm: Any) -> None:
    """Let a layer do the work of the batch norm behind it."""
    gain, shift = _gain_and_shift(norm)
    weight, kernel = layer.weight, layer.weight.double()
    axes: tuple[int, ...] = (0,)
    if isinstance(layer, TRANSPOSED):
        # (in, out / groups, ...): output channel g * (out / groups) + j is row block g, column j
        kernel = kernel.reshape(layer.groups, weight.shape[0] // layer.groups, *weight.shape[1:])
        axes = (0, 2)
    scaled, bias = fold(kernel, None if layer.bias is None else layer.bias.double(), gain, shift, axes)
    weight.copy_(scaled.reshape(weight.shape).to(weight.dtype))
    _add_bias(layer, norm)
    layer.bias.copy_(bias.to(layer.bias.dtype))


@torch.no_grad()
def _fold_into_next(layer: Any, norm: Any) -> None:
    """Let a layer do the work of the batch norm before it: ``w' = w * g`` along its inputs, ``b' = b + w . h``."""
    gain, shift = _gain_and_shift(norm)
    weight, groups = layer.weight, getattr(layer, "groups", 1)
    kernel = weight.double().reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    along = (groups, 1, weight.shape[1], 1)
    _add_bias(layer, norm)
    layer.bias.copy_((layer.bias.double() + (kernel * shift.reshape(along)).sum((2, 3)).flatten()).to(layer.bias.dtype))
    weight.copy_((kernel * gain.reshape(along)).reshape(weight.shape).to(weight.dtype))


def _gain_and_shift(norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
    gamma, beta = (None if each is None else each.double() for each in (norm.weight, norm.bias))
    return gain_and_shift(norm.running_mean.double(), (norm.running_var.double() + norm.eps).rsqrt(), gamma, beta)


def _add_bias(layer: Any, _norm: Any) -> None:
    """Give a layer a bias of zeros if it has none."""
    if layer.bias is None:
        weight = layer.weight
        zeros = torch.zeros(channels_of(layer), dtype=weight.dtype, device=weight.device)
        layer.bias = nn.Parameter(zeros, requires_grad=weight.requires_grad)


def take_over(deployed: nn.Module, layers: Iterable[Any]) -> None:
    """Fold the batch norms whose folding was simulated into their layers, and let them become identities."""
    for layer in layers:
        layer.take_over()
    for norm in list(deployed.modules()):
        if isinstance(norm, SimulatedBatchNorm):
            _become_identity(norm)


def _become_identity(norm: nn.Module) -> None:
    """Let a batch norm pass on what it is given; it stays the same object, wherever the model keeps it."""
    norm._parameters.clear()  # noqa: SLF001 - the layer has taken them over
    norm._buffers.clear()  # noqa: SLF001 - as above
    norm._non_persistent_buffers_set.clear()  # noqa: SLF001 - as above
    object.__setattr__(norm, "__class__", nn.Identity)
