"""From a float Keras model and a recipe to a wrapped one: what is seen, planned and put in."""

from __future__ import annotations

import itertools
from collections import Counter
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
from trainable_core.recipe.routes import OWN, Origin, Routes, routes
from trainable_core.recipe.state import WrappedState
from trainable_keras.batch_norm import Simulated
from trainable_keras.bias import BiasQuantizer
from trainable_keras.configs import BIASED
from trainable_keras.copying import ModelCopier, join
from trainable_keras.documents import NAMES
from trainable_keras.flow import flow_of
from trainable_keras.folding import Folding, folded_copy, inherits_call, plan_folding, simulation_of, unsimulated
from trainable_keras.framework import Framework
from trainable_keras.graph import Graph, children, layers_within
from trainable_keras.operations import CLAMPS, activation_name
from trainable_keras.origins import UNSEEN, inputs_of_calls
from trainable_keras.parts import KerasHolder, KerasPart, KerasWrapper, key_of, parts_among, plan_of, told_of
from trainable_keras.separable import split
from trainable_keras.two_classes import Passing

BIASES, ISLANDS = "biases", "islands"
"""Keys of a model's structure: which input each int32 bias has its scale from, and what is computed in float."""

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
    if not model.built:
        raise ModelError(
            f"{type(model).__name__} is not built: it has no weights yet",
            "call model.build(input_shape), or the model once with an example, before wrapping it.",
        )
    framework.check_layers(model)
    if recipe.quantizes_float_inputs:
        with framework.strategy_of(model):
            model = split(framework, model)
    state = WrappedState(recipe)
    folds = recipe.folds
    found = folding = plan_folding(framework, model) if folds else Folding()
    for key, norm in list(found.norms.items()) if state.simulates else ():
        if reason := unsimulated(model, found.layers[key], norm):
            found.keep(key, reason)
    state.left_out |= {name: f"batch norm not folded: {reason}" for name, reason in found.kept.items()}
    if folds in {"after", "training"}:
        folding, state.foldable = Folding(), found.folded
    state.folded = folding.folded
    seen = Seen(model, framework, found if state.simulates else folding, state)
    seen.plan(recipe, state, names)
    copier = framework.copier(framework)
    with framework.strategy_of(model):
        wrapped = copier.copy(model)
        wrapping = Wrapping(framework, state, seen, folding, copier)
        wrapping.fold()
        wrapping.add_biases(found.norms if folds in {"after", "training"} else ())
        wrapping.quantize_layers()
        kept = wrapping.simulate(found) if state.simulates else []
        wrapping.quantize_operations()
        wrapping.quantize_biases()
        wrapping.compose(wrapped)
    state.note_foldable(kept)
    note(framework, wrapped, state)
    return wrapped


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
        self._folds = frozenset(folding.norms)
        self.routes = Routes()
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
        if recipe.quantizes_float_inputs or recipe.quantizes_biases:
            self._find_routes(plans, state)
        state.note(plans)
        warn_if_nothing_is_quantized(self._model_name, plans, stacklevel=5)

    def _find_routes(self, plans: Sequence[LayerPlan], state: WrappedState) -> None:
        """Note which inputs get quantizers of their own, and whose scale each bias follows."""
        framework = self._framework
        quantized = {p.layer.name for p in plans if p.activation is not None and p.placement == "outputs"}
        calls: dict[str, list[list[Origin]]] = {}
        looked_into: set[int] = set()
        for prefix, model in self.graphs.items():
            graph = None if id(model) in looked_into else framework.graph(model)
            if graph is None:
                continue
            flow = flow_of(graph, framework.model_graph, prefix)
            looked_into |= flow.inside
            found = inputs_of_calls(
                flow,
                lambda operation: self._names.get(id(operation), ""),
                quantized,
                is_layer=framework.is_layer,
                passes=lambda operation: id(operation) in self._gone or framework.passes(operation),
                joins=lambda operation: framework.op(operation) == "cat",
            )
            for name, each in found.items():
                calls.setdefault(name, []).extend(each)
        inputs = {name: list(kind.inputs) for name, kind in self.kinds.items()}
        inputs |= {
            name: [str(index) for index in range(len(calls[name][0]))] for name in self.operations if name in calls
        }
        self.routes = routes(plans, inputs, calls, unseen=UNSEEN)
        self.routes.islands |= self._float_activations(plans)
        state.islands = dict(self.routes.islands)
        state.structure[ISLANDS] = dict(state.islands)

    def _float_activations(self, plans: Sequence[LayerPlan]) -> dict[str, str]:
        """Return why layers are computed in float whose own activation function is more than a clamp."""
        found = {}
        for plan in plans:
            layer = self.layers.get(plan.layer.name)
            function = activation_name(layer) if plan.integer and plan.weights and layer is not None else ""
            if function not in ("", *CLAMPS):
                found[plan.layer.name] = f"its activation function {function} is computed in float"
        return found

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
        info = self._framework.info(name, layer, kind)
        if kind.bias and id(layer) in self._folds:  # it has one as soon as the batch norm is folded into it
            info = replace(info, bias=kind.bias)
        if info.bias and not info.bias_obstacle and not self._computes_as_keras(layer):
            cls = type(layer).__name__
            info = replace(info, bias_obstacle=f"{cls} may add it to something else than the products of its kernel")
        self.in_order.append(replace(info, clamps=self._framework.clamp(layer) is not None))

    def _computes_as_keras(self, layer: Any) -> bool:
        """Return whether a layer's output is computed by a class of Keras's own."""
        layers = self._framework.module.layers
        own = next((cls for cls in type(layer).__mro__ if getattr(layers, cls.__name__, None) is cls), None)
        return own is not None and inherits_call(layer, own)

    def _look_into_graph(self, graph: Graph, prefix: str) -> None:
        op_of = self._framework.op
        for operation in graph.operations:
            name = self._names.setdefault(id(operation), join(prefix, operation.name))
            if self._framework.is_layer(operation):
                self._look(operation, name)
            elif (op := op_of(operation)) is not None:
                self.operations[name] = operation
                clamps = self._framework.clamp(operation) is not None
                self.in_order.append(LayerInfo(name, op, clamps=clamps))
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
        self._state = state
        self._held_inputs: dict[tuple[str, str], Any] = {}
        self._held_outputs: dict[str, Any] = {}
        tensors = Counter(tensor for each in seen.routes.inputs.values() for tensor in each.values())
        self._shared = {tensor for tensor, count in tensors.items() if count > 1 and tensor.startswith("t")}
        """Float tensors that several layers or operations read: each has one quantizer, behind it."""

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

    def simulate(self, found: Folding) -> list[str]:
        """Let quantized layers do the work of the batch norms behind them; return the names of the others'."""
        kept = []
        for key, norm in found.norms.items():
            layer, copied = self._copier.copy_with_id(key), self._copier.copy_of(norm)
            name = next(name for name, each in found.named.items() if each is norm)
            if not isinstance(layer, KerasWrapper):
                kept.append(name)
                continue
            simulation = simulation_of(self._framework, layer, plan_of(layer).layer.name)
            layer.simulate(simulation)
            self._framework.kit.simulate(copied)
            simulation.take(copied)
        return kept

    def quantize_layers(self) -> None:
        """Make quantized layers of those that a plan is for."""
        for name, layer in self._seen.layers.items():
            plan = self._plans.get(name)
            if plan is not None and (plan.weights or plan.activation is not None or self._own_inputs(name)):
                self._quantize(self._copier.copy_of(layer), name, plan)

    def quantize_operations(self) -> None:
        """Put holders around the functional operations that a plan is for."""
        names = [name for name in self._seen.operations if name in self._plans]
        planned = {name for name in names if self._plans[name].activation is not None}
        planned |= {name for name in names if self._plans[name].float_inputs is not None}
        planned |= {
            name for name, each in self._seen.routes.inputs.items() if not self._shared.isdisjoint(each.values())
        }
        for prefix, original in self._seen.graphs.items():
            graph = self._framework.graph(original)
            assert graph is not None  # noqa: S101 - it was one when it was seen
            if any(join(prefix, each.name) in planned for each in graph.operations):
                model = self._copier.copy_of(original)
                self._framework.rerun(model, partial(self._call, prefix, {}))
                if not model.trainable:
                    for holder in (each for each in layers_within(model) if isinstance(each, KerasHolder)):
                        holder.trainable = False

    def compose(self, model: Any) -> None:
        """Let what holds quantized layers that its own config doesn't tell of tell of them."""
        for layer in layers_within(model):
            inside = [each for each in layers_within(layer) if each is not layer]
            quantized = any(isinstance(each, KerasPart | Passing | Simulated) for each in inside)
            if quantized and not isinstance(layer, KerasPart) and not self._framework.tells_its_layers(layer):
                self._framework.kit.compose(layer)

    def _quantize(self, layer: Any, name: str, plan: LayerPlan) -> None:
        kind = self._seen.kinds[name]
        inputs, output = {}, None
        for key in self._own_inputs(name):
            inputs[key] = self._held_inputs[name, key] = self._held(_of_input(plan), name, key)
        if plan.activation is not None and plan.placement == "inputs":
            inputs = {each: self._held(plan, name, each) for each in kind.inputs}
            self._held_inputs |= {(name, each): holder for each, holder in inputs.items()}
        elif plan.activation is not None:
            output = self._held_outputs[name] = self._held(plan, name, "output")
        weights = {attribute: self._built(each, f"{name}.{attribute}") for attribute, each in plan.weights.items()}
        make: Any = self._framework.wrapper
        make(layer, weights, input_holders=inputs, input_names=kind.inputs, output_holder=output)
        told_of(layer).plan = plan

    def _own_inputs(self, name: str) -> list[str]:
        """Return the inputs of a layer that a quantizer of its own reads."""
        needed = self._seen.routes.inputs.get(name, {})
        return [key for key, tensor in needed.items() if tensor not in self._shared]

    def quantize_biases(self) -> None:
        """Give the layers with int32 biases what puts these on their grids, once all holders are there."""
        for name, producer in self._seen.routes.biases.items():
            plan, kind = self._plans[name], self._seen.kinds[name]
            subject = f"{name}.{plan.layer.bias}"
            key = (name, kind.inputs[0])
            source = self._held_inputs.get(key) if producer == OWN else self._held_outputs.get(producer)
            if source is None:
                reason = self._state.left_out.get(producer or name, "it has no quantizer")
                raise UnsupportedConfigError(subject, f"bias: int32 needs the quantizer of {producer}: {reason}")
            self._state.biases[subject] = key_of(source)
            layer = self._copier.copy_of(self._seen.layers[name])
            (attribute,) = plan.weights
            shape, axis = (getattr(plan.layer.weights[attribute], each) for each in ("shape", "channels_axis"))
            bias = self._framework.types.find_weight(layer, plan.layer.bias)
            repeats = int(bias.shape[0]) // shape[axis]  # type: ignore[union-attr] # `LayerInfo` says that it is there
            layer.quantize_bias(
                BiasQuantizer(
                    plan.layer.bias,
                    key_of(source),
                    source,
                    layer.weights_quantizers,
                    weight=attribute,
                    repeats=repeats,
                    subject=subject,
                )
            )
        if self._state.biases:
            self._state.structure[BIASES] = dict(self._state.biases)

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

    def _call(self, prefix: str, held: dict[str, Any], operation: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Call an operation of a graph with activation quantizers at its inputs or behind it."""
        name = join(prefix, operation.name)
        args, kwargs = self._with_inputs(name, held, operation, args, kwargs)
        plan = None if self._framework.is_layer(operation) else self._plans.get(name)
        if plan is None or plan.activation is None:
            return operation(*args, **kwargs)
        if plan.placement == "outputs":
            holder = self._held_outputs[name] = self._held(plan, name, "output", f"{operation.name}_output_holder")
            return holder(operation(*args, **kwargs))
        known: dict[int, Any] = {}

        def hold(value: Any) -> Any:
            if id(value) not in known:
                index = len(known)
                layer_name = f"{operation.name}_input_{index}_holder"
                known[id(value)] = self._held(plan, name, f"input {index}", layer_name)(value)
            return known[id(value)]

        args, kwargs = self._framework.map_symbolic(hold, (args, kwargs))
        return operation(*args, **kwargs)

    def _with_inputs(
        self, name: str, held: dict[str, Any], operation: Any, args: tuple[Any, ...], kwargs: Any
    ) -> tuple[tuple[Any, ...], Any]:
        """Return arguments with quantizers at the float tensors that need one; tensors that are shared share it.

        Parameters
        ----------
        name : str
            Of the layer or operation.
        held : dict
            The holders of shared tensors in this graph, by what tells the tensor; with their output.
        operation : layer or operation
            What is called.
        args, kwargs : tuple, dict
            Its arguments.
        """
        is_layer = self._framework.is_layer(operation)
        needed = self._seen.routes.inputs.get(name, {})
        needed = {key: tensor for key, tensor in needed.items() if not is_layer or tensor in self._shared}
        if not needed:
            return args, kwargs
        keys = self._seen.kinds[name].inputs if is_layer else None
        places: dict[int, int] = {}
        count = itertools.count()

        def hold(value: Any) -> Any:
            index = next(count) if is_layer else places.setdefault(id(value), len(places))
            key = (keys[index] if index < len(keys) else "") if keys is not None else str(index)
            if key not in needed:
                return value
            tensor = needed[key]
            if tensor not in held:
                place = key if is_layer else f"input {key}"
                layer_name = f"{operation.name}_input_{key.replace('.', '_')}_holder"
                holder = self._held(_of_input(self._plans[name]), name, place, layer_name)
                held[tensor] = holder, holder(value)
            holder, output = held[tensor]
            self._held_inputs[name, key] = holder
            return output

        found: tuple[tuple[Any, ...], Any] = self._framework.map_symbolic(hold, (args, kwargs))
        return found


def _of_input(plan: LayerPlan) -> LayerPlan:
    """Return the plan of the quantizer of an input that no other quantizer reaches."""
    return replace(plan, activation=plan.float_inputs)
