"""From a float model and a recipe to a model that trains quantized."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
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
from trainable_torch.observing import observe
from trainable_torch.quantizers.base import BasePytorchTrainableQuantizer
from trainable_torch.tracing import (
    Untraceable,
    function_op,
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
    model: nn.Module, recipe: RecipeSource, *, example: Any = None, folded: Mapping[str, str] | None = None
) -> nn.Module:
    """Return what `wrap` returns; `folded` says which batch norms an earlier `wrap` folded, so that nothing is guessed.

    Parameters
    ----------
    model, recipe, example
        As for `wrap`.
    folded : mapping of str to str, optional
        Layer by batch norm.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"wrap needs a torch.nn.Module, got {type(model).__module__}.{type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            f"{type(model).__name__} is compiled by TorchScript, and its code reads the weights itself",
            "wrap the model that was scripted or traced; torch.jit.trace takes a finalized one.",
        )
    if any(isinstance(m, QuantizationWrapper | ActivationQuantizationHolder) for m in model.modules()):
        raise QuantizerStateError(type(model).__name__, "it is wrapped already", "wrap the float model.")
    recipe = QuantizationRecipe.of(recipe)
    _check_lazy(model)
    try:
        root = copied(model)
    except Exception as error:
        raise ModelError(f"{type(model).__name__} can't be copied: {error}") from error
    state = WrappedState(recipe)
    observed = None if example is None else observe(root, example)
    if recipe.fold_batch_norm:
        state.folded, kept = fold_batch_norm(root, observed, folded)
        state.left_out |= {name: f"batch norm not folded: {reason}" for name, reason in kept.items()}
    root, kinds, infos, nodes = _look(root, recipe, state)
    plans = recipe.resolve(infos, unseen=state.left_out.get("functional operations", ""))
    if recipe.quantizes_outputs:
        plans = behind_activations(recipe, plans, _calls(root, nodes))
    tensors = itertools.chain(root.parameters(), root.buffers())
    quantizers = _Quantizers(next((each.device for each in tensors if not each.is_meta), None))
    for plan in state.note(plans):
        name = plan.layer.name
        if name in nodes:
            _hold_node(root, nodes[name], plan, quantizers)
        else:
            _wrap_layer(root, kinds[name], plan, quantizers, state)
    warn_if_nothing_is_quantized(type(model).__name__, plans, stacklevel=4)
    if isinstance(root, fx.GraphModule):
        root.recompile()
    leave_fused_paths(root)
    reading.mark(root)
    setattr(root, STATE, state)
    if scheduled_quantizers(root):  # else every forward would look for them
        root.register_forward_pre_hook(count_step)
    return root


def count_step(module: nn.Module, _args: Any) -> None:
    """Count one training forward in every quantizer with a schedule; a forward pre-hook of the wrapped model."""
    if module.training and not eligible.is_in_backward():  # activation checkpointing calls a forward again
        for quantizer in scheduled_quantizers(module):
            if quantizer.calibrated:  # else this forward is about to be refused
                quantizer.advance()


def scheduled_quantizers(model: nn.Module) -> list[BasePytorchTrainableQuantizer]:
    """Return the quantizers whose method counts steps."""
    default = BasePytorchTrainableQuantizer.advance
    return [
        m for m in model.modules() if isinstance(m, BasePytorchTrainableQuantizer) and type(m).advance is not default
    ]


def _check_lazy(model: nn.Module) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(tensor, (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)):
            raise ModelError(f"{name!r} has no shape yet", "call the model once with an example before wrapping it.")


def _look(
    model: nn.Module, recipe: QuantizationRecipe, state: WrappedState
) -> tuple[nn.Module, dict[str, LayerKind], list[LayerInfo], dict[str, fx.Node]]:
    """Return the model (as a graph where functional operations matter), its layers, and its functional nodes."""
    kinds: dict[str, LayerKind] = {}
    infos: list[LayerInfo] = []
    for name, module, kind in _layers(model):
        if kind is not None and not kind.unsupported:
            kinds[name] = kind
            infos.append(layer_info(name, module, kind))
            continue
        info = _left_out(name, module, kind, state)
        if module is not model or not any(True for _ in model.children()):  # a rule can't name the whole of them
            infos.append(info)
    nodes: dict[str, fx.Node] = {}
    if (recipe.quantizes_outputs or recipe.matches_functional(infos)) and kind_of(model) is None:
        traced = trace(model)
        if isinstance(traced, Untraceable):
            state.left_out["functional operations"] = traced.reason
        else:
            model = traced
            for node in traced.graph.nodes:
                op = function_op(node)
                if op is not None:
                    name = node.name
                    while name in kinds or name in nodes:  # a module, called elsewhere, may have the same name
                        name += "_function"
                    nodes[name] = node
                    infos.append(LayerInfo(name, op))
    return model, kinds, infos, nodes


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


def _calls(model: nn.Module, nodes: dict[str, fx.Node]) -> list[Call]:
    """Return every call of a layer or functional node that is seen, with the activation that alone uses its output."""
    parts = [("", model)] if isinstance(model, fx.GraphModule) else traced_parts(model)
    modules: dict[nn.Module, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        modules.setdefault(module, name)
    functions = {node: name for name, node in nodes.items()}

    def named(part: fx.GraphModule, node: fx.Node) -> str:
        if node.op == "call_module":
            return modules.get(part.get_submodule(str(node.target)), "")
        return functions.get(node, "")

    calls: list[Call] = []
    for _, part in parts:
        for node in part.graph.nodes:
            name = named(part, node)
            if name:
                user = through_identities(part, node)
                activates = user is not None and _op(part, user) == "activation"
                calls.append((name, named(part, user) if activates and user is not None else None))
    return calls


def _op(part: fx.GraphModule, node: fx.Node) -> str | None:
    if node.op == "call_module":
        kind = kind_of(part.get_submodule(str(node.target)))
        return kind.op if kind else None
    return function_op(node)
