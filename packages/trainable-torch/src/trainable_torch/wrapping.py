"""From a float model and a recipe to a model that trains quantized."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from trainable_core.backend.building import build_quantizer, warn_if_nothing_is_quantized
from trainable_core.errors import ModelError, QuantizerStateError
from trainable_core.recipe.document import QuantizationRecipe, RecipeSource
from trainable_core.recipe.layers import HOLDS, LayerInfo, LayerKind
from trainable_core.recipe.placement import Call, behind_activations
from trainable_core.recipe.plan import LayerPlan, QuantizerPlan
from trainable_core.recipe.state import WrappedState
from trainable_torch import reading
from trainable_torch.copying import copied
from trainable_torch.folding import fold_batch_norm
from trainable_torch.holder import ActivationQuantizationHolder
from trainable_torch.kernels import eligible
from trainable_torch.layers import kind_of, layer_info, leave_fused_paths
from trainable_torch.observing import OPERATION, Observed, observe
from trainable_torch.operations import Held, Operation, Operations, hold, install, learned
from trainable_torch.quantizers.base import BasePytorchTrainableQuantizer
from trainable_torch.tracing import (
    Untraceable,
    function_op,
    made_out_of_place,
    quantizable_inputs,
    through_identities,
    trace,
    traced_parts,
)
from trainable_torch.wrapper import QuantizationWrapper

STATE = "trainable_state"
"""Attribute of a wrapped model that holds its `WrappedState`."""


def state_of(model: nn.Module) -> WrappedState:
    """Return what `wrap` noted on a model.

    Raises
    ------
    ModelError
        When the model was not made by `wrap`.
    """
    state = getattr(model, STATE, None) if isinstance(model, nn.Module) else None
    if not isinstance(state, WrappedState):
        raise ModelError(
            f"{type(model).__name__} was not made by trainable_torch.wrap",
            "qmodel = trainable_torch.wrap(model, recipe).",
        )
    return state


def wrap(model: nn.Module, recipe: RecipeSource, example: Any = None) -> nn.Module:
    """Return a new model whose weights and activations are quantized while it trains.

    Parameters
    ----------
    model : Module
        The float model; left untouched.
    recipe : QuantizationRecipe, mapping, or path
        Which tensors, on which grid, trained how.
    example : batch or callable, optional
        What the model can be called with: a mapping is its keyword arguments, of a tuple or list only the first item
        counts, as in `calibrate`; or a function that is given the model and calls it. A copy of the model is run with
        it once in eval mode and once in train mode, and shows what symbolic tracing can't see.

    Returns
    -------
    Module
        A copy of the model in which layers sit in quantization wrappers and activation quantizers in holders. It needs
        `calibrate` before its first forward. It is the model's own class, or a `torch.fx.GraphModule` when functional
        operations are quantized.

    Raises
    ------
    ModelError
        When `model` is no module or a ScriptModule, can't be copied, has weights without a shape yet, or can't be
        called with `example`.
    QuantizerStateError
        When it is wrapped already.
    TrainableError, pydantic.ValidationError
        When the recipe doesn't fit; the message names field or layer.
    """
    return wrapped(model, recipe, example=example)


def wrapped(
    model: nn.Module, recipe: RecipeSource, *, example: Any = None, known: Mapping[str, Any] | None = None
) -> nn.Module:
    """Return what `wrap` returns; with `known`, structure is what an earlier `wrap` found, and nothing is looked at.

    Parameters
    ----------
    model, recipe, example
        As for `wrap`.
    known : mapping, optional
        ``folded`` and ``structure`` of an earlier model's `WrappedState`.
    """
    known = known or {}
    root, state = _copy_of(model), WrappedState(QuantizationRecipe.of(recipe))
    observed = None if example is None else observe(root, example)
    if state.recipe.fold_batch_norm:
        state.folded, kept = fold_batch_norm(root, observed, known.get("folded"))
        state.left_out |= {name: f"batch norm not folded: {reason}" for name, reason in kept.items()}
    look = _look(root, state.recipe, state, observed, known.get("structure", {}))
    plans = state.recipe.resolve(look.infos, unseen=state.left_out.get("functional operations", ""))
    if state.recipe.quantizes_outputs:
        plans = behind_activations(state.recipe, plans, look.calls)
    _quantize(look, state.note(plans), state)
    warn_if_nothing_is_quantized(type(model).__name__, plans, stacklevel=4)
    leave_fused_paths(look.root)
    reading.mark(look.root)
    setattr(look.root, STATE, state)
    if scheduled_quantizers(look.root):  # else every forward would look for them
        look.root.register_forward_pre_hook(count_step)
    return look.root


def _copy_of(model: nn.Module) -> nn.Module:
    """Return a copy of a model that can be wrapped."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"wrap needs a torch.nn.Module, got {type(model).__module__}.{type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            f"{type(model).__name__} is compiled by TorchScript, and its code reads the weights itself",
            "wrap the model that was scripted or traced; torch.jit.trace takes a finalized one.",
        )
    if any(isinstance(m, QuantizationWrapper | ActivationQuantizationHolder) for m in model.modules()):
        raise QuantizerStateError(type(model).__name__, "it is wrapped already", "wrap the float model.")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(tensor, (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)):
            raise ModelError(f"{name!r} has no shape yet", "call the model once with an example before wrapping it.")
    try:
        return copied(model)
    except Exception as error:
        raise ModelError(f"{type(model).__name__} can't be copied: {error}") from error


def _quantize(look: _Look, plans: list[LayerPlan], state: WrappedState) -> None:
    """Give layers and functional operations their quantizers."""
    held: dict[str, Held] = {}
    tensors = itertools.chain(look.root.parameters(), look.root.buffers())
    quantizers = _Quantizers(next((each.device for each in tensors if not each.is_meta), None))
    for plan in plans:
        name = plan.layer.name
        if name in look.nodes:
            _hold_node(look.root, look.nodes[name], plan, quantizers)
        elif name in look.named:
            assert plan.activation is not None  # noqa: S101 - an operation has no weights
            build_holder = functools.partial(quantizers.holder, plan.activation)
            held[name] = hold(look.root, look.named[name], plan.placement, build_holder)
        else:
            _wrap_layer(look.root, look.kinds[name], plan, quantizers, state)
    if isinstance(look.root, fx.GraphModule):
        look.root.recompile()
    if look.operations is not None:
        state.structure = {"operations": look.operations.to_document(), "calls": [list(call) for call in look.calls]}
        if held:
            install(look.root, look.operations, list(look.named.values()), held)


def count_step(module: nn.Module, _args: Any) -> None:
    """Count one training forward in every quantizer with a schedule; a forward pre-hook of the wrapped model."""
    if module.training and not eligible.is_in_backward():  # activation checkpointing calls a forward again
        for quantizer in scheduled_quantizers(module):
            if quantizer.calibrated:  # else this forward is about to be refused
                quantizer.advance()


def scheduled_quantizers(model: nn.Module) -> list[BasePytorchTrainableQuantizer]:
    """Return the quantizers whose method counts steps."""
    return [m for m in model.modules() if isinstance(m, BasePytorchTrainableQuantizer) and m.has_schedule]


@dataclass
class _Look:
    """What a model consists of: its layers and functional operations, and the calls of both.

    Functional operations are nodes, and `root` is a graph; or they are `operations`, `named` by their names, where the
    model can't be traced and an example was given. Calls matter where quantizers may stand at outputs.
    """

    root: nn.Module
    infos: list[LayerInfo] = field(default_factory=list)
    kinds: dict[str, LayerKind] = field(default_factory=dict)
    nodes: dict[str, fx.Node] = field(default_factory=dict)
    operations: Operations | None = None
    named: dict[str, Operation] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)


def _look(
    model: nn.Module,
    recipe: QuantizationRecipe,
    state: WrappedState,
    observed: Observed | None,
    known: Mapping[str, Any],
) -> _Look:
    """Return the model's layers, and its functional operations where they matter."""
    look = _Look(model)
    for name, module, kind in _layers(model):
        if kind is not None and not kind.unsupported:
            look.kinds[name] = kind
            look.infos.append(layer_info(name, module, kind))
            continue
        info = _left_out(name, module, kind, state)
        if module is not model or not any(True for _ in model.children()):  # a rule can't name the whole of them
            look.infos.append(info)
    wanted = recipe.quantizes_outputs or recipe.matches_functional(look.infos)
    if "operations" in known:
        look.operations = Operations.from_document(known["operations"])
    elif wanted and kind_of(model) is None:
        _look_at_operations(look, state, observed)
    if look.operations is not None:
        look.named = {each.name: each for each in look.operations.named(look.kinds)}
        look.infos += [LayerInfo(each.name, each.kind) for each in look.named.values()]
    if "calls" in known:
        look.calls = [(name, after) for name, after in known["calls"]]
    elif recipe.quantizes_outputs:
        look.calls = _calls(look, observed)
    return look


def _look_at_operations(look: _Look, state: WrappedState, observed: Observed | None) -> None:
    """Add the model's functional operations to what is known of it, or the reason why they can't be known."""
    traced = trace(look.root)
    if isinstance(traced, Untraceable):
        found = traced.reason if observed is None else learned(look.root, observed)
        if isinstance(found, str):
            state.left_out["functional operations"] = found
            return
        state.left_out |= {f"operations of {name or 'model'}": reason for name, reason in found.left_out.items()}
        look.operations = found
        return
    look.root = traced
    for node in traced.graph.nodes:
        op = function_op(node)
        if op is None:
            continue
        name = node.name
        while name in look.kinds or name in look.nodes:  # a module, called elsewhere, may have the same name
            name += "_function"
        if not made_out_of_place(node):
            state.left_out[name] = "it changes a tensor in place that is used elsewhere as well"
            continue
        look.nodes[name] = node
        look.infos.append(LayerInfo(name, op))


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, LayerKind | None]]:
    """Yield every module with its kind, not looking inside one of a known kind; the model only where it is a layer."""
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inside:
            continue
        kind = kind_of(module)
        if kind is not None:
            inside.update(module.modules())
        yield name or "model", module, kind


def _left_out(name: str, module: nn.Module, kind: LayerKind | None, state: WrappedState) -> LayerInfo:
    """Return what is told of a module that can't be quantized; note the reason where it has parameters."""
    if kind is not None:
        state.left_out[name] = kind.unsupported
        return LayerInfo(name, kind.op, obstacle=kind.unsupported)
    if name in state.folded:
        return LayerInfo(name, "normalization", obstacle=f"it is folded into {state.folded[name]}")
    if any(p is not None for p in module._parameters.values()):  # noqa: SLF001 - own ones, without children's
        reason = state.left_out[name] = f"{type(module).__name__} is of no known kind; see register_layer"
        return LayerInfo(name, "other", obstacle=reason)
    if any(True for _ in module.children()):
        return LayerInfo(name, "other", obstacle=HOLDS)
    return LayerInfo(name, "other", obstacle=f"{type(module).__name__} has no weights and is of no known kind")


def build(plan: QuantizerPlan, subject: str) -> BasePytorchTrainableQuantizer:
    """Return the PyTorch quantizer of a plan."""
    quantizer: BasePytorchTrainableQuantizer = build_quantizer(plan, "torch", BasePytorchTrainableQuantizer, subject)
    return quantizer


class _Quantizers:
    """Builds quantizers; tied weights with equal plans share one.

    Activation quantizers are made on `device`; a layer with parameters takes its own to where these are.
    """

    def __init__(self, device: torch.device | None) -> None:
        self.device = device
        self._shared: dict[int, list[tuple[Any, QuantizerPlan, BasePytorchTrainableQuantizer]]] = {}

    def for_weight(self, weight: Any, plan: QuantizerPlan, subject: str) -> BasePytorchTrainableQuantizer:
        shared = self._shared.setdefault(id(weight), [])  # the weight is kept with its quantizer, so is its id
        for _, other_plan, quantizer in shared:
            if other_plan == plan:
                return quantizer
        quantizer = build(plan, subject)
        shared.append((weight, plan, quantizer))
        return quantizer

    def holder(self, plan: QuantizerPlan, subject: str) -> ActivationQuantizationHolder:
        holder = ActivationQuantizationHolder(build(plan, subject))
        return holder if self.device is None else holder.to(self.device)


def _wrap_layer(
    root: nn.Module, kind: LayerKind, plan: LayerPlan, quantizers: _Quantizers, state: WrappedState
) -> None:
    """Give a layer its quantizers; it stays where it is, and where it can't have them, as it is."""
    name = plan.layer.name
    layer: Any = root if name == "model" and kind_of(root) is not None else root.get_submodule(name)
    weights = {}
    for attribute, weight_plan in plan.weights.items():
        weight = layer
        for part in attribute.split("."):
            weight = getattr(weight, part)
        weights[attribute] = quantizers.for_weight(weight, weight_plan, f"{name}.{attribute}")
    inputs, output = {}, None
    if plan.activation is not None and plan.placement == "inputs":
        inputs = {each: quantizers.holder(plan.activation, f"{name}: {each}") for each in kind.inputs}
    elif plan.activation is not None:
        output = quantizers.holder(plan.activation, f"{name}: output")
    try:
        QuantizationWrapper(layer, weights, input_holders=inputs, input_names=kind.inputs, output_holder=output)
    except ModelError as error:
        state.left_out[name] = error.problem


def _hold_node(root: Any, node: fx.Node, plan: LayerPlan, quantizers: _Quantizers) -> None:
    """Put activation quantizers at a functional node's inputs or behind it."""
    assert plan.activation is not None  # noqa: S101 - a functional node has no weights, and empty plans don't come here
    layer = plan.layer.name
    if plan.placement == "outputs":
        name = f"{layer}_output_holder"
        root.add_submodule(name, quantizers.holder(plan.activation, f"{layer}: output"))
        with root.graph.inserting_after(node):
            held = root.graph.call_module(name, (node,))
        node.replace_all_uses_with(held, delete_user_cb=lambda user: user is not held)
        return
    for index, source in enumerate(quantizable_inputs(node)):
        name = f"{layer}_input_{index}_holder"
        root.add_submodule(name, quantizers.holder(plan.activation, f"{layer}: input {index}"))
        with root.graph.inserting_before(node):
            held = root.graph.call_module(name, (source,))
        node.replace_input_with(source, held)


def _calls(look: _Look, observed: Observed | None) -> list[Call]:
    """Return every call of a layer or operation that is seen, with the activation that alone uses its output.

    A model that can't be traced shows those of the example, in both modes, or without one those in its traceable parts.
    """
    modules: dict[nn.Module, str] = {}
    for name, module in look.root.named_modules(remove_duplicate=False):
        modules.setdefault(module, name)
    functions = {node: name for name, node in look.nodes.items()}
    operations = {(each.module, each.kind, each.ordinal): each.name for each in look.named.values()}

    def named(part: nn.Module, node: fx.Node) -> str:
        if node.op == "call_module":
            return modules.get(part.get_submodule(str(node.target)), "")
        return functions.get(node, "") or operations.get(node.meta.get(OPERATION, ()), "")

    parts: list[tuple[nn.Module, fx.Graph]]
    if isinstance(look.root, fx.GraphModule):
        parts = [(look.root, look.root.graph)]
    elif observed is not None and not isinstance(observed.trained, str):
        parts = [(look.root, observed.evaluated.graph), (look.root, observed.trained.graph)]
    else:
        parts = [(part, part.graph) for _, part in traced_parts(look.root)]
    calls: list[Call] = []
    for part, graph in parts:
        for node in graph.nodes:
            name = named(part, node)
            if name:
                user = through_identities(part, node)
                activates = user is not None and _op(part, user) == "activation"
                calls.append((name, named(part, user) if activates and user is not None else None))
    return calls


def _op(part: nn.Module, node: fx.Node) -> str | None:
    if node.op == "call_module":
        kind = kind_of(part.get_submodule(str(node.target)))
        return kind.op if kind else None
    return function_op(node)
