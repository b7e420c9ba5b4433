"""From a float Keras model and a recipe to a wrapped one: what is seen, planned and put in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainable_core.backend.building import build_quantizer, warn_if_nothing_is_quantized
from trainable_core.documents.plan import state_document, state_from_document
from trainable_core.errors import ModelError, QuantizerStateError, UnsupportedConfigError
from trainable_core.quantizer import BaseTrainableQuantizer
from trainable_core.recipe.document import QuantizationRecipe, RecipeSource
from trainable_core.recipe.layers import HOLDS, LayerInfo, LayerKind
from trainable_core.recipe.placement import Call, behind_activations
from trainable_core.recipe.plan import LayerPlan, QuantizerPlan
from trainable_core.recipe.state import WrappedState
from trainable_keras.copying import copy_model, join
from trainable_keras.folding import Folding, folded_copy, plan_folding
from trainable_keras.framework import Framework
from trainable_keras.graph import Graph, children, layers_within
from trainable_keras.parts import parts_among

STATE = "trainable_state"
"""Attribute of a wrapped model that holds its `WrappedState`."""


def wrap(framework: Framework, model: Any, recipe: RecipeSource) -> Any:
    """Return a new model whose weights and activations are quantized while it trains; see `trainable_keras.wrap`."""
    if parts_of(model):
        raise QuantizerStateError(type(model).__name__, "it is wrapped already", "wrap the float model.")
    recipe = QuantizationRecipe.of(recipe)
    _check_fields(framework, recipe)
    if not model.built:
        raise ModelError(
            f"{type(model).__name__} is not built: it has no weights yet",
            "call model.build(input_shape), or the model once with an example, before wrapping it.",
        )
    framework.check_layers(model)
    state = WrappedState(recipe)
    folding = plan_folding(framework, model) if recipe.fold_batch_norm else Folding()
    state.folded = folding.folded
    state.left_out |= {name: f"batch norm not folded: {reason}" for name, reason in folding.kept.items()}
    seen = Seen(model, framework, folding, state)
    seen.plan(recipe, state)
    wrapping = Wrapping(framework, state, seen.kinds, folding)
    wrapped = copy_model(framework, model, wrapping.replace, wrapping.call_operation)
    note(framework, wrapped, state)
    return wrapped


def _check_fields(framework: Framework, recipe: QuantizationRecipe) -> None:
    """Refuse what a recipe may say but Keras layers can't do yet."""
    hint = "train the model with trainable-torch, or leave the field out."
    if recipe.quantizes_biases:
        problem = f"the backend {framework.backend} can't train biases as integers yet"
        raise UnsupportedConfigError("bias: int32", problem, hint)
    if recipe.quantizes_float_inputs:
        problem = f"the backend {framework.backend} can't place quantizers for integer models yet"
        raise UnsupportedConfigError("placement: integer", problem, hint)


def parts_of(model: Any) -> list[Any]:
    """Return a model's wrappers and the holders that stand by themselves, in the model's order."""
    return parts_among(layers_within(model))


def trainable_quantizers(model: Any) -> list[Any]:
    """Return a model's trainable quantizers, each once."""
    return [layer for layer in layers_within(model) if isinstance(layer, BaseTrainableQuantizer)]


def state_of(framework: Framework, model: Any) -> WrappedState:
    """Return what `wrap` noted on a model; one that Keras loaded from a file has it too.

    Raises
    ------
    ModelError
        When the model was not made by `wrap`.
    """
    state = getattr(model, STATE, None)
    if isinstance(state, WrappedState):
        return state
    for part in parts_of(model):
        if part.notes is not None:
            state = state_from_document(part.notes)
            framework.keep(model, STATE, state)
            return state
    raise ModelError(
        f"{type(model).__name__} was not made by trainable_keras.wrap",
        "qmodel = trainable_keras.wrap(model, recipe).",
    )


def note(framework: Framework, model: Any, state: WrappedState) -> None:
    """Keep what is known of a wrapped model: on it, and in the config of its first part, which Keras saves."""
    framework.keep(model, STATE, state)
    for part in parts_of(model)[:1]:
        part.keep(notes=state_document(state))


class Seen:
    """What a model consists of.

    Parameters
    ----------
    model : model
        The float model.
    framework : Framework
        Its Keras.
    folding : Folding
        Batch norms that are folded are left out.
    state : WrappedState
        Told of layers of no known kind.
    """

    def __init__(self, model: Any, framework: Framework, folding: Folding, state: WrappedState) -> None:
        self.kinds: dict[str, LayerKind] = {}
        self.operations: dict[str, Any] = {}
        self.in_order: list[LayerInfo] = []
        self.calls: list[Call] = []
        self._names: dict[int, str] = {}
        self._model_name = type(model).__name__
        self._is_graph = framework.graph(model) is not None
        self._framework = framework
        self._gone = frozenset(folding.gone)
        self._done: set[int] = set(folding.gone)
        self._state = state
        self._look(model, "")

    @property
    def infos(self) -> list[LayerInfo]:
        """What core needs to know of the layers; functional operations left out."""
        return [info for info in self.in_order if info.name not in self.operations]

    def plan(self, recipe: QuantizationRecipe, state: WrappedState) -> None:
        """Note the plan of each layer and functional operation, and why what is not quantized is not."""
        operations: dict[str, Any] = {}
        if recipe.quantizes_outputs or recipe.matches_functional(self.infos):
            operations = self.operations
            if not self._is_graph:
                state.left_out["functional operations"] = "only functional and Sequential models have a graph"
        infos = [info for info in self.in_order if info.name not in self.operations or info.name in operations]
        plans = recipe.resolve(infos, unseen=state.left_out.get("functional operations", ""))
        if recipe.quantizes_outputs:
            plans = behind_activations(recipe, plans, self.calls)
        state.note(plans)
        warn_if_nothing_is_quantized(self._model_name, plans, stacklevel=5)

    def _look(self, layer: Any, name: str) -> None:
        if id(layer) in self._done:
            if id(layer) in self._gone and name:
                self._leave_out(name, "it is folded into the layer before it", "normalization")
            return
        self._done.add(id(layer))
        kind = self._framework.kind(layer)
        if kind is not None:
            self._note(layer, name or "model", kind)
        elif (graph := self._framework.graph(layer)) is not None:
            self._leave_out(name, HOLDS)
            self._look_into_graph(graph, name)
        else:
            inside = list(children(layer))
            held = {id(variable) for _, child in inside for variable in child.variables}
            if any(id(variable) not in held for variable in layer.trainable_variables):
                reason = f"{type(layer).__name__} is of no known kind; see register_layer"
                self._state.left_out[name or "model"] = reason
                self._leave_out(name or ("" if inside else "model"), reason)
            else:
                nothing = f"{type(layer).__name__} has no weights and is of no known kind"
                self._leave_out(name, HOLDS if inside else nothing)
            for child_name, child in inside:
                self._look(child, join(name, child_name))

    def _leave_out(self, name: str, obstacle: str, op: str = "other") -> None:
        """Note a layer that can't be quantized, so that rules may name it; not the model, of which they can't."""
        if name:
            self.in_order.append(LayerInfo(name, op, obstacle=obstacle))

    def _note(self, layer: Any, name: str, kind: LayerKind) -> None:
        if kind.unsupported:
            self._state.left_out[name] = kind.unsupported
            self._leave_out(name, kind.unsupported, kind.op)
            return
        self.kinds[name] = kind
        self.in_order.append(self._framework.info(name, layer, kind))

    def _look_into_graph(self, graph: Graph, prefix: str) -> None:
        op_of = self._framework.op
        for operation in graph.operations:
            name = self._names.setdefault(id(operation), join(prefix, operation.name))
            if self._framework.is_layer(operation):
                self._look(operation, name)
            elif (op := op_of(operation)) is not None:
                self.operations[name] = operation
                self.in_order.append(LayerInfo(name, op))
        for call in graph.nodes:
            user = graph.activation_after(call, op_of, self._gone)
            activation = None if user is None else self._names[id(user.operation)]
            self.calls.append((self._names[id(call.operation)], activation))


class Wrapping:
    """What comes in the place of each layer and around each functional operation.

    Parameters
    ----------
    framework : Framework
        The model's Keras.
    state : WrappedState
        Has the plans.
    kinds : mapping of str to LayerKind
        How each layer is quantized, by its name.
    folding : Folding
        Which batch norms go into which layers.
    """

    def __init__(
        self, framework: Framework, state: WrappedState, kinds: Mapping[str, LayerKind], folding: Folding
    ) -> None:
        self._framework = framework
        self._plans = state.plans
        self._kinds = kinds
        self._folding = folding

    def replace(self, layer: Any, name: str) -> Any | None:
        """Return the wrapped layer, or a layer with a batch norm in it; None where nothing changes."""
        if not self._framework.is_layer(layer):
            return None  # see `call_operation`
        if id(layer) in self._folding.gone:
            dtype = self._framework.dtype_policy(layer)
            return self._framework.passing(name=layer.name, dtype=dtype)
        name = name or "model"
        norm = self._folding.norms.get(id(layer))
        plan = self._plans.get(name)
        quantized = plan is not None and (plan.weights or plan.activation is not None)
        if norm is None and not quantized:
            return None
        if norm is None:
            copied = self._framework.remade(layer, name)
        else:
            copied = folded_copy(self._framework, layer, norm, name)
        return self._wrapped(copied, name, plan) if plan is not None and quantized else copied

    def _wrapped(self, layer: Any, name: str, plan: LayerPlan) -> Any:
        kind = self._kinds[name]
        inputs, output = {}, None
        if plan.activation is not None and plan.placement == "inputs":
            inputs = {each: self._held(plan, name, each) for each in kind.inputs}
        elif plan.activation is not None:
            output = self._held(plan, name, "output")
        weights = {attribute: self._built(each, f"{name}.{attribute}") for attribute, each in plan.weights.items()}
        make: Any = self._framework.wrapper
        wrapper = make(layer, weights, input_holders=inputs, input_names=kind.inputs, output_holder=output)
        wrapper.keep(plan=plan)
        return wrapper

    def _built(self, plan: QuantizerPlan, subject: str) -> Any:
        """Return the quantizer of a plan."""
        return build_quantizer(plan, self._framework.backend, self._framework.quantizer, subject)

    def _held(self, plan: LayerPlan, name: str, tensor: str, layer_name: str | None = None) -> Any:
        """Return the holder of one of a layer's tensors."""
        assert plan.activation is not None  # noqa: S101 - holders are made only where there is a plan for them
        make: Any = self._framework.holder
        holder = make(self._built(plan.activation, f"{name}: {tensor}"), name=layer_name)
        holder.keep(plan=plan, tensor=tensor)
        return holder

    def call_operation(self, operation: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a functional operation with activation quantizers at its inputs or behind it."""
        plan = self._plans.get(name)
        if plan is None or plan.activation is None:
            return operation(*args, **kwargs)
        if plan.placement == "outputs":
            holder = self._held(plan, name, "output", f"{operation.name}_output_holder")
            return holder(operation(*args, **kwargs))
        held: dict[int, Any] = {}

        def hold(value: Any) -> Any:
            if id(value) not in held:
                index = len(held)
                layer_name = f"{operation.name}_input_{index}_holder"
                held[id(value)] = self._held(plan, name, f"input {index}", layer_name)(value)
            return held[id(value)]

        args, kwargs = self._framework.map_symbolic(hold, (args, kwargs))
        return operation(*args, **kwargs)
