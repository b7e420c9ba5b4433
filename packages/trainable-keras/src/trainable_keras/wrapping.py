"""From a float Keras model and a recipe to a wrapped one: what is seen, planned and put in; neither Keras is imported.

A backend tells what it knows of its models, and makes layers, through one `Framework`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, Generic, TypeVar

from trainable_core.backend.building import build_quantizer
from trainable_core.documents.plan import state_document, state_from_document
from trainable_core.errors import ModelError, QuantizerStateError
from trainable_core.quantizer import BaseTrainableQuantizer
from trainable_core.recipe.document import QuantizationRecipe
from trainable_core.recipe.layers import LayerInfo, LayerKind
from trainable_core.recipe.plan import LayerPlan, QuantizerPlan
from trainable_core.recipe.state import WrappedState
from trainable_keras.copying import ModelCopier, join
from trainable_keras.folding import Folding
from trainable_keras.graph import Graph
from trainable_keras.parts import KerasHolder, KerasWrapper, parts_among

Recipe = QuantizationRecipe | Mapping[str, Any] | str | PathLike[str]

STATE = "trainable_state"
"""Attribute of a wrapped model that holds its `WrappedState`."""

Q = TypeVar("Q", bound=BaseTrainableQuantizer)


def _no_check(model: Any) -> None:
    """Refuse nothing."""


@dataclass(frozen=True, kw_only=True)
class Framework(Generic[Q]):
    """One Keras, as far as wrapping a model is concerned: what it tells of models, and what it makes.

    Parameters
    ----------
    backend, package : str
        Name of the backend in the registry, and of its package in hints.
    layer, quantizer, wrapper, holder, copier : type
        Class of its layers; the backend's base class of trainable quantizers, its wrapper, holder and copier.
    check : callable
        ``check(model, what)`` raises ModelError, with what to do, for an object that is not of this Keras.
    check_layers : callable
        Raises ModelError for a model with layers that can be neither wrapped nor left alone.
    layers_within : callable
        Returns a layer and all layers inside it, each once.
    children : callable
        Returns (name, layer) of the layers held in attributes.
    graph : callable
        Returns a model's graph, None for what has none.
    is_layer : callable
        Returns whether it is a layer, not a functional operation.
    kind, op : callable
        Return how a layer is quantized, and the op kind of a layer or functional operation; None when it is unknown.
    info : callable
        ``info(name, layer, kind)`` returns what a recipe needs to know of a layer.
    folding : callable
        Returns which batch norms can be folded into the layer before them.
    plain_copy : callable
        ``plain_copy(layer, name)`` returns a copy of a layer.
    folded_copy : callable
        ``folded_copy(layer, norm, name)`` returns a copy that does its own work and a batch norm's.
    passing : callable
        Returns the layer that stands in the place of a folded batch norm.
    map_symbolic : callable
        ``map_symbolic(function, values)`` returns nested values with `function` of each symbolic tensor in its place.
    keep : callable
        Sets an attribute of a model as it is.
    """

    backend: str
    package: str
    layer: type
    quantizer: type[Q]
    wrapper: type[KerasWrapper]
    holder: type[KerasHolder]
    copier: type[ModelCopier]
    check: Callable[[Any, str], None]
    layers_within: Callable[[Any], list[Any]]
    children: Callable[[Any], Iterable[tuple[str, Any]]]
    graph: Callable[[Any], Graph | None]
    is_layer: Callable[[Any], bool]
    kind: Callable[[Any], LayerKind | None]
    op: Callable[[Any], str | None]
    info: Callable[[str, Any, LayerKind], LayerInfo]
    folding: Callable[[Any], Folding]
    plain_copy: Callable[[Any, str], Any]
    folded_copy: Callable[[Any, Any, str], Any]
    passing: Callable[[Any], Any]
    map_symbolic: Callable[[Callable[[Any], Any], Any], Any]
    check_layers: Callable[[Any], None] = _no_check
    keep: Callable[[Any, str, Any], None] = setattr

    def parts_of(self, model: Any) -> list[Any]:
        """Return a model's wrappers and the holders that stand by themselves, in the model's order."""
        return parts_among(self.layers_within(model))

    def quantizers_in(self, model: Any) -> Iterator[Q]:
        """Yield a model's trainable quantizers, each once."""
        for layer in self.layers_within(model):
            if isinstance(layer, self.quantizer):
                yield layer

    def state_of(self, model: Any) -> WrappedState:
        """Return what `wrap` noted on a model; one that Keras loaded from a file has it too.

        Raises
        ------
        ModelError
            When the model was not made by `wrap`.
        """
        if isinstance(model, self.layer):
            state = getattr(model, STATE, None)
            if isinstance(state, WrappedState):
                return state
            for part in self.parts_of(model):
                if part.notes is not None:
                    state = state_from_document(part.notes)
                    self.keep(model, STATE, state)
                    return state
        self.check(model, "the model")
        raise ModelError(
            f"{type(model).__name__} was not made by {self.package}.wrap",
            f"qmodel = {self.package}.wrap(model, recipe).",
        )

    def note(self, model: Any, state: WrappedState) -> None:
        """Keep what is known of a wrapped model: on it, and in the config of its first part, which Keras saves."""
        self.keep(model, STATE, state)
        for part in self.parts_of(model)[:1]:
            part.keep(notes=state_document(state))

    def build(self, plan: QuantizerPlan, subject: str) -> Q:
        """Return the quantizer of a plan."""
        quantizer: Q = build_quantizer(plan, self.backend, self.quantizer, subject)
        return quantizer

    def hold(self, plan: LayerPlan, name: str, tensor: str, layer_name: str | None = None) -> Any:
        """Return the holder of one of a layer's tensors."""
        assert plan.activation is not None  # noqa: S101 - holders are made only where there is a plan for them
        make: Any = self.holder
        holder = make(self.build(plan.activation, f"{name}: {tensor}"), name=layer_name)
        holder.keep(plan=plan, tensor=tensor)
        return holder

    def wrap(self, model: Any, recipe: Recipe) -> Any:
        """Return a new model whose weights and activations are quantized while it trains; see the backend's `wrap`."""
        self.check(model, "wrap: the model")
        if self.parts_of(model):
            raise QuantizerStateError(type(model).__name__, "it is wrapped already", "wrap the float model.")
        recipe = QuantizationRecipe.of(recipe)
        if not model.built:
            raise ModelError(
                f"{type(model).__name__} is not built: it has no weights yet",
                "call model.build(input_shape), or the model once with an example, before wrapping it.",
            )
        self.check_layers(model)
        state = WrappedState(recipe)
        folding = self.folding(model) if recipe.fold_batch_norm else Folding()
        state.folded = folding.folded
        state.left_out |= {name: f"batch norm not folded: {reason}" for name, reason in folding.kept.items()}
        seen = Seen(model, self, folding, state)
        seen.plan(recipe, state)
        wrapping = Wrapping(self, state, seen.kinds, folding)
        wrapped = self.copier(wrapping.replace, wrapping.call_operation).copy(model)
        self.note(wrapped, state)
        return wrapped


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

    def __init__(self, model: Any, framework: Framework[Any], folding: Folding, state: WrappedState) -> None:
        self.kinds: dict[str, LayerKind] = {}
        self.operations: dict[str, Any] = {}
        self.in_order: list[LayerInfo] = []
        self.before_activation: set[str] = set()
        self._is_graph = framework.graph(model) is not None
        self._framework = framework
        self._gone = frozenset(folding.gone)
        self._done: set[int] = set(folding.gone)
        self._state = state
        self._look(model, "")

    @property
    def infos(self) -> list[LayerInfo]:
        """What core needs to know of the layers; functional operations left out."""
        return [info for info in self.in_order if info.name in self.kinds]

    def plan(self, recipe: QuantizationRecipe, state: WrappedState) -> None:
        """Note the plan of each layer and functional operation, and why what is not quantized is not."""
        operations: dict[str, Any] = {}
        if recipe.quantizes_outputs or recipe.matches_functional(self.infos):
            operations = self.operations
            if not self._is_graph:
                state.left_out["functional operations"] = "only functional and Sequential models have a graph"
        infos = [info for info in self.in_order if info.name in self.kinds or info.name in operations]
        for plan in recipe.resolve(infos, unseen=state.left_out.get("functional operations", "")):
            name = plan.layer.name
            if plan.activation and plan.placement == "outputs" and name in self.before_activation:
                plan = replace(plan, activation=None, reason="" if plan.weights else "quantized after its activation")  # noqa: PLW2901
            state.plans[name] = plan
            if plan.reason:
                state.left_out.setdefault(name, plan.reason)

    def _look(self, layer: Any, name: str) -> None:
        if id(layer) in self._done:
            return
        self._done.add(id(layer))
        kind = self._framework.kind(layer)
        if kind is not None:
            self._note(layer, name or "model", kind)
        elif (graph := self._framework.graph(layer)) is not None:
            self._look_into_graph(graph, name)
        else:
            inside = list(self._framework.children(layer))
            for child_name, child in inside:
                self._look(child, join(name, child_name))
            held = {id(variable) for _, child in inside for variable in child.variables}
            if any(id(variable) not in held for variable in layer.trainable_variables):
                self._state.left_out[name or "model"] = (
                    f"{type(layer).__name__} is of no known kind; see register_layer"
                )

    def _note(self, layer: Any, name: str, kind: LayerKind) -> None:
        if kind.unsupported:
            self._state.left_out[name] = kind.unsupported
            return
        self.kinds[name] = kind
        self.in_order.append(self._framework.info(name, layer, kind))

    def _look_into_graph(self, graph: Graph, prefix: str) -> None:
        op_of = self._framework.op
        for operation in graph.operations:
            name = join(prefix, operation.name)
            if self._framework.is_layer(operation):
                self._look(operation, name)
            elif (op := op_of(operation)) is not None:
                self.operations[name] = operation
                self.in_order.append(LayerInfo(name, op))
            if all(graph.activation_after(call, op_of, self._gone) for call in graph.calls(operation)):
                self.before_activation.add(name)


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
        self, framework: Framework[Any], state: WrappedState, kinds: Mapping[str, LayerKind], folding: Folding
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
            return self._framework.passing(layer)
        name = name or "model"
        norm = self._folding.norms.get(id(layer))
        plan = self._plans.get(name)
        quantized = plan is not None and (plan.weights or plan.activation is not None)
        if norm is None and not quantized:
            return None
        if norm is None:
            copied = self._framework.plain_copy(layer, name)
        else:
            copied = self._framework.folded_copy(layer, norm, name)
        return self._wrapped(copied, name, plan) if plan is not None and quantized else copied

    def _wrapped(self, layer: Any, name: str, plan: LayerPlan) -> Any:
        kind = self._kinds[name]
        inputs, output = {}, None
        if plan.activation is not None and plan.placement == "inputs":
            inputs = {each: self._framework.hold(plan, name, each) for each in kind.inputs}
        elif plan.activation is not None:
            output = self._framework.hold(plan, name, "output")
        weights = {
            attribute: self._framework.build(each, f"{name}.{attribute}") for attribute, each in plan.weights.items()
        }
        make: Any = self._framework.wrapper
        wrapper = make(layer, weights, input_holders=inputs, input_names=kind.inputs, output_holder=output)
        wrapper.keep(plan=plan)
        return wrapper

    def call_operation(self, operation: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a functional operation with activation quantizers at its inputs or behind it."""
        plan = self._plans.get(name)
        if plan is None or plan.activation is None:
            return operation(*args, **kwargs)
        if plan.placement == "outputs":
            holder = self._framework.hold(plan, name, "output", f"{operation.name}_output_holder")
            return holder(operation(*args, **kwargs))
        held: dict[int, Any] = {}

        def hold(value: Any) -> Any:
            if id(value) not in held:
                index = len(held)
                layer_name = f"{operation.name}_input_{index}_holder"
                held[id(value)] = self._framework.hold(plan, name, f"input {index}", layer_name)(value)
            return held[id(value)]

        args, kwargs = self._framework.map_symbolic(hold, (args, kwargs))
        return operation(*args, **kwargs)
