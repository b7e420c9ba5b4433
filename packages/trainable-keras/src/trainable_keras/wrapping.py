"""From a float Keras model and a recipe to a wrapped one: what is seen, planned and put in."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from trainable_core.backend.building import build_quantizer, warn_if_nothing_is_quantized
from trainable_core.documents.plan import state_document, state_from_document
from trainable_core.errors import DocumentError, ModelError, QuantizerStateError, UnsupportedConfigError
from trainable_core.quantizer import BaseTrainableQuantizer
from trainable_core.recipe.document import QuantizationRecipe, RecipeSource
from trainable_core.recipe.layers import HOLDS, LayerInfo, LayerKind
from trainable_core.recipe.placement import Call, behind_activations
from trainable_core.recipe.plan import LayerPlan, QuantizerPlan
from trainable_core.recipe.state import WrappedState
from trainable_keras.configs import BIASED
from trainable_keras.copying import ModelCopier, join
from trainable_keras.documents import NAMES
from trainable_keras.folding import Folding, folded_copy, plan_folding
from trainable_keras.framework import Framework
from trainable_keras.graph import Graph, children, layers_within
from trainable_keras.parts import KerasHolder, KerasPart, parts_among, told_of
from trainable_keras.two_classes import Passing

STATE = "trainable_state"
"""Attribute of a wrapped model that holds its `WrappedState`."""


@dataclass(frozen=True)
class Names:
    """What a file calls the layers of a model, in the model's order: rules of its recipe are meant by these names.

    Parameters
    ----------
    path : object
        The file, for errors.
    names : sequence of str
        Names of all its layers, and of functional operations where the recipe was for these too.
    """

    path: object
    names: Sequence[str]

    def of(self, infos: Sequence[LayerInfo], operations: Collection[str]) -> list[LayerInfo]:
        """Return those infos that the file has names for: all, or those of layers.

        Raises
        ------
        DocumentError
            When the model has another number of layers.
        """
        layers = [info for info in infos if info.name not in operations]
        for found in (layers, list(infos)):
            if len(found) == len(self.names):
                return found
        problem = f"it is for another architecture: it has {len(self.names)} layers, this model has {len(layers)}"
        raise DocumentError(self.path, problem)


def wrap(framework: Framework, model: Any, recipe: RecipeSource, names: Names | None = None) -> Any:
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
    folds = recipe.folds
    found = folding = plan_folding(framework, model) if folds else Folding()
    state.left_out |= {name: f"batch norm not folded: {reason}" for name, reason in found.kept.items()}
    if folds == "after":
        folding, state.foldable = Folding(), found.folded
    state.folded = folding.folded
    seen = Seen(model, framework, folding, state)
    seen.plan(recipe, state, names)
    copier = framework.copier(framework)
    with framework.strategy_of(model):
        wrapped = copier.copy(model)
        wrapping = Wrapping(framework, state, seen, folding, copier)
        wrapping.fold()
        wrapping.add_biases(found.norms if folds == "after" else ())
        wrapping.quantize_layers()
        wrapping.quantize_operations()
        wrapping.compose(wrapped)
    state.note_foldable()
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
        if (notes := told_of(part).notes) is not None:
            state = state_from_document(notes)
            framework.keep(model, STATE, state)
            return state
    raise ModelError(
        f"{type(model).__name__} was not made by trainable_keras.wrap",
        "qmodel = trainable_keras.wrap(model, recipe).",
    )


def note(framework: Framework, model: Any, state: WrappedState) -> None:
    """Keep what is known of a wrapped model: on it, and in the config of its first part, which Keras saves."""
    framework.keep(model, STATE, state)
    framework.track_parameters(model)
    for part in parts_of(model)[:1]:
        told_of(part).notes = state_document(state)


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
        self.layers: dict[str, Any] = {}
        self.graphs: dict[str, Any] = {}
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

    def plan(self, recipe: QuantizationRecipe, state: WrappedState, names: Names | None = None) -> None:
        """Note the plan of each layer and functional operation, and why what is not quantized is not."""
        operations: dict[str, Any] = {}
        if names is None and (recipe.quantizes_outputs or recipe.matches_functional(self.infos)):
            operations = self.operations
            if not self._is_graph:
                state.left_out["functional operations"] = "only functional and Sequential models have a graph"
        infos = [info for info in self.in_order if info.name not in self.operations or info.name in operations]
        if names is not None:
            infos = names.of(self.in_order, self.operations)
        told = [info.name for info in infos] if names is None else list(names.names)
        called = {info.name: name for info, name in zip(infos, told, strict=True)}
        plans = recipe.resolve(
            [replace(info, name=name) for info, name in zip(infos, told, strict=True)],
            unseen=state.left_out.get("functional operations", ""),
        )
        if recipe.quantizes_outputs:
            calls = [(called[name], called.get(after or "")) for name, after in self.calls if name in called]
            plans = behind_activations(recipe, plans, calls)
        plans = [replace(plan, layer=info) for plan, info in zip(plans, infos, strict=True)]
        state.structure[NAMES] = told
        state.note(plans)
        warn_if_nothing_is_quantized(self._model_name, plans, stacklevel=5)

    def _look(self, layer: Any, name: str) -> None:
        if id(layer) in self._done:
            if id(layer) in self._gone and name:
                self._leave_out(name, "it is folded into the layer before it", "normalization")
            return
        self._done.add(id(layer))
        kind = self._framework.kind(layer)
        graph = None if kind is not None else self._framework.graph(layer)
        if kind is not None:
            self._note(layer, name or "model", kind)
            if kind.weights:
                return  # weights of layers inside are named by their paths
        inside = list(children(layer))
        if kind is None:
            self._note_unknown(layer, name, inside, is_graph=graph is not None)
        if graph is not None:
            self.graphs[name] = layer
            self._look_into_graph(graph, name)
        for child_name, child in inside:
            if not isinstance(child, self._framework.module.layers.InputLayer):
                self._look(child, join(name, child_name))

    def _note_unknown(self, layer: Any, name: str, inside: Sequence[tuple[str, Any]], *, is_graph: bool) -> None:
        """Note a layer of no known kind, and whether it has weights that only it knows what to do with."""
        held = {id(variable) for _, child in inside for variable in child.variables}
        if any(id(variable) not in held for variable in layer.trainable_variables):
            reason = f"{type(layer).__name__} is of no known kind; see register_layer"
            self._state.left_out[name or "model"] = reason
            self._leave_out(name or ("" if inside else "model"), reason)
        else:
            nothing = f"{type(layer).__name__} has no weights and is of no known kind"
            self._leave_out(name, HOLDS if inside or is_graph else nothing)

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
        self.layers[name] = layer
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
    """What becomes of the layers and functional operations of a copied model.

    Parameters
    ----------
    framework : Framework
        The model's Keras.
    state : WrappedState
        Has the plans.
    seen : Seen
        The layers of the original by their names, and how each is quantized.
    folding : Folding
        Which batch norms go into which layers.
    copier : ModelCopier
        Has made the copy.
    """

    def __init__(
        self, framework: Framework, state: WrappedState, seen: Seen, folding: Folding, copier: ModelCopier
    ) -> None:
        self._framework = framework
        self._plans = state.plans
        self._seen = seen
        self._folding = folding
        self._copier = copier

    def fold(self) -> None:
        """Let layers do the work of the batch norms behind them."""
        for key, norm in self._folding.norms.items():
            layer = self._copier.copy_with_id(key)
            if not layer.use_bias:
                vars(layer)[BIASED] = True
            folded_copy(self._framework, layer, norm, layer.name)
            self._framework.kit.pass_on(self._copier.copy_of(norm))

    def add_biases(self, layers: Iterable[int]) -> None:
        """Give layers, by the ``id`` of the originals, the bias that a batch norm is folded into after training."""
        for key in layers:
            layer = self._copier.copy_with_id(key)
            if not layer.use_bias:
                self._framework.kit.add_bias(layer)
                self._framework.assign(layer.bias, np.zeros(tuple(layer.bias.shape), np.float32))

    def quantize_layers(self) -> None:
        """Make quantized layers of those that a plan is for."""
        for name, layer in self._seen.layers.items():
            plan = self._plans.get(name)
            if plan is not None and (plan.weights or plan.activation is not None):
                self._quantize(self._copier.copy_of(layer), name, plan)

    def quantize_operations(self) -> None:
        """Put holders around the functional operations that a plan is for."""
        names = (name for name in self._seen.operations if name in self._plans)
        planned = {name for name in names if self._plans[name].activation is not None}
        for prefix, original in self._seen.graphs.items():
            graph = self._framework.graph(original)
            assert graph is not None  # noqa: S101 - it was one when it was seen
            if any(join(prefix, each.name) in planned for each in graph.operations):
                model = self._copier.copy_of(original)
                self._framework.rerun(model, partial(self._call, prefix))
                if not model.trainable:
                    for holder in (each for each in layers_within(model) if isinstance(each, KerasHolder)):
                        holder.trainable = False

    def compose(self, model: Any) -> None:
        """Let what holds quantized layers that its own config doesn't tell of tell of them."""
        for layer in layers_within(model):
            inside = [each for each in layers_within(layer) if each is not layer]
            quantized = any(isinstance(each, KerasPart | Passing) for each in inside)
            if quantized and not isinstance(layer, KerasPart) and not self._framework.tells_its_layers(layer):
                self._framework.kit.compose(layer)

    def _quantize(self, layer: Any, name: str, plan: LayerPlan) -> None:
        kind = self._seen.kinds[name]
        inputs, output = {}, None
        if plan.activation is not None and plan.placement == "inputs":
            inputs = {each: self._held(plan, name, each) for each in kind.inputs}
        elif plan.activation is not None:
            output = self._held(plan, name, "output")
        weights = {attribute: self._built(each, f"{name}.{attribute}") for attribute, each in plan.weights.items()}
        make: Any = self._framework.wrapper
        make(layer, weights, input_holders=inputs, input_names=kind.inputs, output_holder=output)
        told_of(layer).plan = plan

    def _built(self, plan: QuantizerPlan, subject: str) -> Any:
        """Return the quantizer of a plan."""
        return build_quantizer(plan, self._framework.backend, self._framework.quantizer, subject)

    def _held(self, plan: LayerPlan, name: str, tensor: str, layer_name: str | None = None) -> Any:
        """Return the holder of one of a layer's tensors."""
        assert plan.activation is not None  # noqa: S101 - holders are made only where there is a plan for them
        make: Any = self._framework.holder
        holder = make(self._built(plan.activation, f"{name}: {tensor}"), name=layer_name)
        told_of(holder).plan, told_of(holder).tensor = plan, tensor
        return holder

    def _call(self, prefix: str, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a functional operation with activation quantizers at its inputs or behind it."""
        name = join(prefix, operation.name)
        plan = None if self._framework.is_layer(operation) else self._plans.get(name)
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
