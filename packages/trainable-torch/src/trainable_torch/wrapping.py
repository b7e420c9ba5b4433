"""From a float model and a recipe to a model that trains quantized."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from trainable_core.backend.building import build_quantizer, warn_if_nothing_is_quantized
from trainable_core.errors import ModelError, QuantizerStateError, UnsupportedConfigError
from trainable_core.recipe.document import QuantizationRecipe, RecipeSource
from trainable_core.recipe.layers import HOLDS, LayerInfo, LayerKind
from trainable_core.recipe.placement import Call, behind_activations
from trainable_core.recipe.plan import LayerPlan, QuantizerPlan
from trainable_core.recipe.state import WrappedState
from trainable_torch import reading
from trainable_torch.batch_norm import take_back
from trainable_torch.bias import BiasQuantizer
from trainable_torch.copying import copied, reached_by_name
from trainable_torch.holder import ActivationQuantizationHolder
from trainable_torch.kernels import eligible
from trainable_torch.layers import is_computed, kind_of, layer_info, leave_fused_paths
from trainable_torch.quantizers.base import BasePytorchTrainableQuantizer
from trainable_torch.state import keep
from trainable_torch.state import state_of as state_of  # noqa: PLC0414 - it is known by this module's name
from trainable_torch.structure import computed
from trainable_torch.structure.aliases import read_aliases, rebind_forwards, unregistered_layers
from trainable_torch.structure.folding import fold_batch_norm, foldable_batch_norm, simulate_batch_norm
from trainable_torch.structure.observing import TRANSPOSED, Observed, observe
from trainable_torch.structure.operations import NO_ACTIVATIONS, Held, Operation, Operations, hold, install, learned
from trainable_torch.structure.origins import (
    Graphs,
    Named,
    bias_obstacle,
    clamps_module,
    clamps_node,
    float_functions,
    graphs_of,
    inputs_of_calls,
    names_in,
)
from trainable_torch.structure.routes import OWN, Routes, routes
from trainable_torch.structure.tracing import (
    Untraceable,
    function_op,
    made_out_of_place,
    quantizable_inputs,
    through_identities,
    trace,
)
from trainable_torch.structure.writes import written
from trainable_torch.wrapper import QuantizationWrapper


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
        ``folded``, ``foldable``, ``structure`` and ``origins`` of an earlier model's `WrappedState`.
    """
    known = known or {}
    root, state = _copy_of(model), WrappedState(QuantizationRecipe.of(recipe))
    state.left_out |= {**reached_by_name(model, root), **unregistered_layers(root)}
    observed = None if example is None else observe(root, example)
    kept: dict[str, str] = {}
    folds = state.recipe.folds
    if folds == "before" or known.get("folded"):
        state.folded, kept = fold_batch_norm(root, observed, known.get("folded"))
    elif folds is not None:
        found = foldable_batch_norm(root, observed) if "foldable" not in known else (dict(known["foldable"]), kept)
        state.foldable, kept = found
    without_bias = {into for into in state.foldable.values() if root.get_submodule(into).bias is None}
    if state.simulates:
        kept |= simulate_batch_norm(root, state.foldable)
        state.foldable = {norm: layer for norm, layer in state.foldable.items() if norm not in kept}
    state.left_out |= {name: f"batch norm not folded: {reason}" for name, reason in kept.items()}
    look = _look(root, state.recipe, state, observed, known.get("structure", {}))
    state.origins = dict(known.get("origins", {}))
    plans = _resolved(state, look)
    if state.recipe.quantizes_outputs:
        plans = behind_activations(state.recipe, plans, look.calls)
    if known.get("structure"):
        look.routes = Routes.from_document(known["structure"].get("routes", _NO_ROUTES))
    else:
        look.routes = _routes(look, plans, state.recipe)
    state.islands = dict(look.routes.islands)
    quantized = state.note(plans)
    as_they_are = _not_simulated(look, quantized, state, without_bias) if state.simulates else []
    _quantize(look, quantized, state, as_they_are)
    state.note_foldable(as_they_are)
    warn_if_nothing_is_quantized(type(model).__name__, plans, stacklevel=4)
    leave_fused_paths(look.root)
    reading.mark(look.root)
    keep(look.root, state)
    if scheduled_quantizers(look.root):  # else every forward would look for them
        look.root.register_forward_pre_hook(count_step)
    return look.root


def _not_simulated(
    look: _Look, plans: list[LayerPlan], state: WrappedState, without_bias: Collection[str]
) -> list[str]:
    """Let batch norms whose layers get no quantizers, and these layers, be what they were; return their names."""
    quantized = {plan.layer.name for plan in plans}
    found = [name for name, into in state.foldable.items() if into not in quantized]
    for name in found:
        take_back(look.root.get_submodule(name))
        if state.foldable[name] in without_bias:
            layer: Any = look.root.get_submodule(state.foldable[name])
            layer.bias = None
    return found


def _resolved(state: WrappedState, look: _Look) -> list[LayerPlan]:
    """Return what becomes of the layers, by the names that the recipe was written for."""
    unseen = state.left_out.get("functional operations", "")
    if not state.origins:
        return state.recipe.resolve(look.infos, unseen=unseen)
    infos = [replace(info, name=state.origins.get(info.name, info.name)) for info in look.infos]
    plans = state.recipe.resolve(infos, unseen=unseen, complete=False)
    return [replace(plan, layer=info) for plan, info in zip(plans, look.infos, strict=True)]


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


def _quantize(look: _Look, plans: list[LayerPlan], state: WrappedState, kept: list[str]) -> None:
    """Give layers and functional operations their quantizers; batch norms that stay as they are go to `kept`."""
    held: dict[str, Held] = {}
    tensors = itertools.chain(look.root.parameters(), look.root.buffers())
    quantizers = _Quantizers(next((each.device for each in tensors if not each.is_meta), None))
    for plan in plans:
        name = plan.layer.name
        inputs = _input_holders(plan, look, quantizers)
        output = plan.activation is not None and plan.placement == "outputs"
        if name in look.nodes:
            _hold_node(look.root, look.nodes[name], plan, quantizers, inputs)
        elif name in look.named:
            build_output = functools.partial(quantizers.holder, plan.activation) if output and plan.activation else None
            places = {int(place): make for place, make in inputs.items()}
            held[name] = hold(look.root, look.named[name], places, build_output)
        else:
            kept += _wrap_layer(look.root, look.kinds[name], plan, quantizers, state, inputs)
    read_aliases(look.root, state)
    rebind_forwards(look.root)
    if isinstance(look.root, fx.GraphModule):
        look.root.recompile()
    _quantize_biases(look, held, state)
    if look.operations is not None:
        state.structure = {
            "operations": look.operations.to_document(),
            "calls": [list(call) for call in look.calls],
            "clamps": sorted(look.clamps),
            "routes": look.routes.to_document(),
        }
        if held:
            install(look.root, look.operations, list(look.named.values()), held)


def count_step(module: nn.Module, _args: Any) -> None:
    """Count one training forward in every quantizer with a schedule; a forward pre-hook of the wrapped model."""
    if module.training and not eligible.is_in_backward():  # activation checkpointing calls a forward again
        advance(module)


def advance(model: nn.Module) -> None:
    """Count one training step in the quantizers with a schedule, and let modifiers look at the weights."""
    scheduled = [each for each in scheduled_quantizers(model) if each.calibrated]  # others are about to refuse
    for quantizer in scheduled:
        quantizer.advance()
    watched = {id(each) for each in scheduled if each.modifiers and each.weights_quantization()}
    for module in model.modules() if watched else ():
        for _, weight, quantizer in module.get_weights_vars() if isinstance(module, QuantizationWrapper) else ():
            if id(quantizer) in watched:
                watched.discard(id(quantizer))  # one that tied weights share looks once
                quantizer.observe(weight)


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
    graphs: Graphs = field(default_factory=list)
    clamps: set[str] = field(default_factory=set)
    routes: Routes = field(default_factory=Routes)

    def layer(self, name: str) -> Any:
        """Return the layer of a name; a model that is itself a layer is called ``model``."""
        return self.root if name == "model" and kind_of(self.root) is not None else self.root.get_submodule(name)

    @property
    def names(self) -> Named:
        """What tells the names of the graphs' nodes."""
        return names_in(self.root, self.nodes, self.named.values())


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
            look.infos.append(_layer_info(name, module, kind, recipe))
            state.left_out |= _beside(name, module, kind)
            found = computed.of_layer(module, kind.weights)
            state.left_out |= {f"{name}.{key}": computed.reason(operation) for key, operation in found.items()}
            continue
        info = _left_out(name, module, kind, state)
        if module is not model or not any(True for _ in model.children()):  # a rule can't name the whole of them
            look.infos.append(info)
    wanted = (recipe.quantizes_outputs or recipe.matches_functional(look.infos)) and "origins" not in known
    if "operations" in known:
        look.operations = Operations.from_document(known["operations"])
    elif wanted and kind_of(model) is None:
        _look_at_operations(look, state, observed)
    if look.operations is not None:
        look.named = {each.name: each for each in look.operations.named(look.kinds)}
    if "calls" in known:
        look.calls = [(name, after) for name, after in known["calls"]]
        look.clamps = set(known.get("clamps", ()))
    elif recipe.quantizes_outputs:
        look.graphs = graphs_of(look.root, observed)
        named = look.names
        look.calls = _calls(look, named)
        look.clamps = {named(part, node) for part, graph in look.graphs for node in graph.nodes if clamps_node(node)}
    for each in look.named.values():
        obstacle = "" if each.inputs else NO_ACTIVATIONS
        look.infos.append(LayerInfo(each.name, each.kind, clamps=each.name in look.clamps, obstacle=obstacle))
    return look


def _layer_info(name: str, module: nn.Module, kind: LayerKind, recipe: QuantizationRecipe) -> LayerInfo:
    info = replace(layer_info(name, module, kind), clamps=clamps_module(module))
    if info.bias and not info.bias_obstacle and recipe.quantizes_biases:
        return replace(info, bias_obstacle=bias_obstacle(module))
    return info


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
        look.infos.append(LayerInfo(name, op, clamps=clamps_node(node)))


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, LayerKind | None]]:
    """Yield every module with its kind, without what belongs to a layer of a known kind; the model as the first one."""
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inside:
            continue
        kind = kind_of(module)
        if kind is not None and kind.unsupported:
            inside.update(module.modules())
        elif kind is not None:
            inside.update(module.get_submodule(weight.rpartition(".")[0]) for weight in kind.weights)
            if parametrize.is_parametrized(module):
                inside.update(module.get_submodule("parametrizations").modules())
            writer = next((found for key in kind.weights if (found := written(model, name, module, key))), "")
            if writer:
                reason = f"{writer} writes into its weight, which would change the quantized one and be lost"
                kind = LayerKind(kind.op, {}, kind.inputs, reason)
        yield name or "model", module, kind


def _beside(name: str, module: nn.Module, kind: LayerKind) -> dict[str, str]:
    """Return the matrices that a layer has beside the weights of its kind, which stay float, with the reason."""
    if type(module).__module__.startswith("torch.nn.") or any(is_computed(module, key) for key in kind.weights):
        return {}
    cls = type(module).__name__
    return {
        f"{name}.{key}": f"{cls} has it beside the weights of its kind; see register_layer"
        for key, parameter in module._parameters.items()  # noqa: SLF001 - own ones, without children's
        if parameter is not None and parameter.dim() > 1 and key not in kind.weights
    }


def _left_out(name: str, module: nn.Module, kind: LayerKind | None, state: WrappedState) -> LayerInfo:
    """Return what is told of a module that can't be quantized; note the reason where it has parameters."""
    if kind is not None:
        state.left_out[name] = kind.unsupported
        return LayerInfo(name, kind.op, obstacle=kind.unsupported)
    into = state.folded.get(name, state.foldable.get(name) if state.simulates else None)
    if into is not None:
        return LayerInfo(name, "normalization", obstacle=f"it is folded into {into}")
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
        self._of_tensors: dict[str, list[tuple[QuantizerPlan, ActivationQuantizationHolder]]] = {}
        self._shared: dict[int, list[tuple[Any, QuantizerPlan, BasePytorchTrainableQuantizer]]] = {}

    def for_weight(self, weight: Any, plan: QuantizerPlan, subject: str) -> BasePytorchTrainableQuantizer:
        shared = self._shared.setdefault(id(weight), [])  # the weight is kept with its quantizer, so is its id
        for _, other_plan, quantizer in shared:
            if other_plan == plan:
                return quantizer
        quantizer = build(plan, subject)
        shared.append((weight, plan, quantizer))
        return quantizer

    def of_tensor(self, tensor: str, plan: QuantizerPlan, subject: str) -> ActivationQuantizationHolder:
        """Return the holder of a tensor, which everything that is given the tensor shares."""
        known = self._of_tensors.setdefault(tensor, [])
        for other_plan, holder in known:
            if other_plan == plan:
                return holder
        known.append((plan, self.holder(plan, subject)))
        return known[-1][1]

    def holder(self, plan: QuantizerPlan, subject: str) -> ActivationQuantizationHolder:
        holder = ActivationQuantizationHolder(build(plan, subject))
        return holder if self.device is None else holder.to(self.device)


_Holders = Mapping[str, Callable[[str], ActivationQuantizationHolder]]
"""What makes the quantizer of each input that gets one, by the input: it is told what the quantizer is called."""


def _input_holders(plan: LayerPlan, look: _Look, quantizers: _Quantizers) -> _Holders:
    """Return what makes the quantizers of the inputs of a layer or operation."""
    name = plan.layer.name
    if plan.activation is not None and plan.placement == "inputs":
        if name in look.nodes:
            keys = [str(index) for index in range(len(quantizable_inputs(look.nodes[name])))]
        elif name in look.named:
            keys = [str(index) for index in range(look.named[name].inputs)]
        else:
            keys = list(look.kinds[name].inputs)
        return dict.fromkeys(keys, functools.partial(quantizers.holder, plan.activation))
    if plan.float_inputs is None:
        return {}
    needed = look.routes.inputs.get(name, {})
    return {key: functools.partial(quantizers.of_tensor, tensor, plan.float_inputs) for key, tensor in needed.items()}


def _wrap_layer(
    root: nn.Module,
    kind: LayerKind,
    plan: LayerPlan,
    quantizers: _Quantizers,
    state: WrappedState,
    inputs: _Holders,
) -> list[str]:
    """Give a layer its quantizers; it stays where it is, and where it can't have them, as it is.

    Returns the name of the batch norm behind it that stays as it is then too.
    """
    name = plan.layer.name
    layer: Any = root if name == "model" and kind_of(root) is not None else root.get_submodule(name)
    weights = {}
    for attribute, weight_plan in plan.weights.items():
        weight = layer
        for part in attribute.split("."):
            weight = getattr(weight, part)
        weights[attribute] = quantizers.for_weight(weight, weight_plan, f"{name}.{attribute}")
    holders = {each: make(f"{name}: {each}") for each, make in inputs.items()}
    output = None
    if plan.activation is not None and plan.placement == "outputs":
        output = quantizers.holder(plan.activation, f"{name}: output")
    bias = plan.layer.bias if plan.bias == "int32" else ""
    norms = [norm for norm, into in state.foldable.items() if into == name] if state.simulates else []
    norm = root.get_submodule(norms[0]) if norms else None
    try:
        QuantizationWrapper(
            layer, weights, input_holders=holders, input_names=kind.inputs, output_holder=output, bias=bias, norm=norm
        )
    except ModelError as error:
        state.left_out[name] = error.problem
        for each in norms:
            take_back(root.get_submodule(each))
        return norms
    return []


def _quantize_biases(look: _Look, held: Mapping[str, Held], state: WrappedState) -> None:
    """Give the layers with int32 biases what puts these on their grids, once all holders are there."""
    for name, producer in look.routes.biases.items():
        plan, layer = state.plans[name], look.layer(name)
        if not isinstance(layer, QuantizationWrapper):
            continue  # it can't be wrapped, which its reason tells
        subject = f"{name}.{plan.layer.bias}"
        if producer == OWN:
            source: Any = layer.input_holders[look.kinds[name].inputs[0]]
        elif producer in look.nodes:
            source = look.root.get_submodule(f"{producer}_output_holder")
        elif producer in look.named:
            source = held[producer].of_output
        else:
            source = getattr(look.layer(producer), "output_holder", None)
        if source is None:
            reason = state.left_out.get(producer, "it has no quantizer")
            raise UnsupportedConfigError(subject, f"bias: int32 needs the quantizer of {producer}: {reason}")
        groups = layer.groups if isinstance(layer, TRANSPOSED) else 1
        (attribute,) = plan.weights
        layer.bias_quantizer = BiasQuantizer(source, layer.weights_quantizers, attribute, groups, subject)
        state.biases[subject] = f"{name}: input" if producer == OWN else f"{producer}: output"


def _hold_node(root: Any, node: fx.Node, plan: LayerPlan, quantizers: _Quantizers, inputs: _Holders) -> None:
    """Put activation quantizers at a functional node's inputs and behind it."""
    layer = plan.layer.name
    sources = quantizable_inputs(node)
    for place, make in inputs.items():
        name, source = f"{layer}_input_{place}_holder", sources[int(place)]
        root.add_submodule(name, make(f"{layer}: input {place}"))
        with root.graph.inserting_before(node):
            held = root.graph.call_module(name, (source,))
        node.replace_input_with(source, held)
    if plan.activation is not None and plan.placement == "outputs":
        name = f"{layer}_output_holder"
        root.add_submodule(name, quantizers.holder(plan.activation, f"{layer}: output"))
        with root.graph.inserting_after(node):
            held = root.graph.call_module(name, (node,))
        node.replace_all_uses_with(held, delete_user_cb=lambda user: user is not held)


_NO_ROUTES: dict[str, Any] = Routes().to_document()


def _routes(look: _Look, plans: list[LayerPlan], recipe: QuantizationRecipe) -> Routes:
    """Return how the model's layers and operations are fed."""
    if not recipe.quantizes_float_inputs and not recipe.quantizes_biases:
        return Routes()
    quantized = {p.layer.name for p in plans if p.activation is not None and p.placement == "outputs"}
    named = look.names
    calls = inputs_of_calls(look.graphs, named, quantized)
    kinds = {name: (look.layer(name), kind) for name, kind in look.kinds.items()}
    operands = {name: len(quantizable_inputs(node)) for name, node in look.nodes.items()}
    operands |= {name: operation.inputs for name, operation in look.named.items()}
    found = routes(plans, kinds, operands, calls)
    if recipe.quantizes_float_inputs:
        found.islands |= float_functions(look.graphs, named)
    return found


def _calls(look: _Look, named: Named) -> list[Call]:
    """Return every call of a layer or operation that is seen, with the activation that alone uses its output.

    A model that can't be traced shows those of the example, in both modes, or without one those in its traceable parts.
    """
    calls: list[Call] = []
    for part, graph in look.graphs:
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
