"""From a float model and a recipe to a model that trains quantized."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from os import PathLike
from typing import Any

import tensorflow as tf

from trainable_core.errors import ModelError, QuantizerStateError
from trainable_core.keras_folding import Folding
from trainable_core.keras_layers import LayerKind
from trainable_core.model_document import state_document, state_from_document
from trainable_core.plan import LayerInfo, LayerPlan, QuantizerPlan, WrappedState, build_quantizer
from trainable_core.recipe import QuantizationRecipe
from trainable_tfkeras.copying import Copier, children, join, plain_copy
from trainable_tfkeras.engine import keras, untracked
from trainable_tfkeras.folding import FoldedBatchNormalization, folded_copy, plan_folding
from trainable_tfkeras.holder import ActivationQuantizationHolder
from trainable_tfkeras.layers import is_operation, kind_of, layer_info
from trainable_tfkeras.quantizers.base import BaseKerasTrainableQuantizer
from trainable_tfkeras.tracing import graph_of, is_graph, layers_within, op_of
from trainable_tfkeras.wrapper import QuantizationWrapper

Recipe = QuantizationRecipe | Mapping[str, Any] | str | PathLike[str]

STATE = "trainable_state"
"""Attribute of a wrapped model that holds its `WrappedState`."""

Part = QuantizationWrapper | ActivationQuantizationHolder


def parts_of(model: Any) -> list[Part]:
    """Return a model's wrappers and the holders that stand by themselves, in the model's order."""
    parts = [each for each in layers_within(model) if isinstance(each, Part)]
    inside = {id(holder) for each in parts if isinstance(each, QuantizationWrapper) for holder in each.holders}
    return [each for each in parts if id(each) not in inside]


def state_of(model: Any) -> WrappedState:
    """Return what `wrap` noted on a model; one that Keras loaded from a file has it too.

    Raises
    ------
    ModelError
        When the model was not made by `wrap`.
    """
    state = getattr(model, STATE, None) if isinstance(model, keras.layers.Layer) else None
    if isinstance(state, WrappedState):
        return state
    if isinstance(model, keras.layers.Layer):
        for part in parts_of(model):
            if part.notes is not None:
                state = state_from_document(part.notes)
                _keep(model, state)
                return state
    check_keras(model, "the model")
    raise ModelError(
        f"{type(model).__name__} was not made by trainable_tfkeras.wrap",
        "qmodel = trainable_tfkeras.wrap(model, recipe).",
    )


def note(model: Any, state: WrappedState) -> None:
    """Keep what is known of a wrapped model: on it, and in the config of its first part, which Keras saves."""
    _keep(model, state)
    for part in parts_of(model)[:1]:
        with untracked(part):
            part.notes = state_document(state)


def _keep(model: Any, state: WrappedState) -> None:
    with untracked(model):
        setattr(model, STATE, state)


def check_keras(model: Any, what: str) -> None:
    """Raise ModelError, with what to do, for an object that is not of this process's Keras 2."""
    if isinstance(model, keras.layers.Layer):
        return
    found = f"{type(model).__module__}.{type(model).__name__}"
    home = keras.layers.Layer.__module__.partition(".")[0]
    for name in ("tf_keras", "keras"):
        if any(cls.__module__.partition(".")[0] == name for cls in type(model).__mro__):
            version = str(getattr(sys.modules.get(name), "__version__", ""))
            if version.startswith("3."):
                raise ModelError(
                    f"{what} is a Keras 3 object ({found}), and tf.keras is Keras 2 in this process",
                    "pip install trainable-keras and use trainable_keras, without TF_USE_LEGACY_KERAS in the "
                    "environment; or build the model with tf.keras.",
                )
            raise ModelError(
                f"{what} is an object of {name} ({found}), and tf.keras is {home} in this process",
                "build the model with tf.keras.",
            )
    raise ModelError(f"{what} must be a tf.keras.Model, got {found}")


def wrap(model: Any, recipe: Recipe) -> Any:
    """Return a new model whose weights and activations are quantized while it trains.

    Parameters
    ----------
    model : tf.keras.Model
        The float model, built; left untouched.
    recipe : QuantizationRecipe, mapping, or path
        Which tensors, on which grid, trained how.

    Returns
    -------
    tf.keras.Model
        A copy of the model, not compiled, in which layers sit in quantization wrappers and activation quantizers in
        holders. It needs `calibrate` before its first call.

    Raises
    ------
    ModelError
        When `model` is no Keras 2 model, is not built, or can't be copied.
    QuantizerStateError
        When it is wrapped already.
    TrainableError, pydantic.ValidationError
        When the recipe doesn't fit; the message names field or layer.
    """
    check_keras(model, "wrap: the model")
    if any(isinstance(each, Part) for each in layers_within(model)):
        raise QuantizerStateError(type(model).__name__, "it is wrapped already", "wrap the float model.")
    recipe = QuantizationRecipe.of(recipe)
    if not model.built:
        raise ModelError(
            f"{type(model).__name__} is not built: it has no weights yet",
            "call model.build(input_shape), or the model once with an example, before wrapping it.",
        )
    state = WrappedState(recipe)
    folding = plan_folding(model) if recipe.fold_batch_norm else Folding()
    state.folded = folding.folded
    state.left_out |= {name: f"batch norm not folded: {reason}" for name, reason in folding.kept.items()}
    seen = _Seen(model, folding, state)
    operations: dict[str, Any] = {}
    if recipe.quantizes_outputs or recipe.matches_functional(seen.infos):
        operations = seen.operations
        if not is_graph(model):
            state.left_out["functional operations"] = "only functional and Sequential models have a graph"
    infos = [info for info in seen.in_order if info.name in seen.kinds or info.name in operations]
    for plan in recipe.resolve(infos, unseen=state.left_out.get("functional operations", "")):
        name = plan.layer.name
        if plan.activation and plan.placement == "outputs" and name in seen.before_activation:
            plan = replace(plan, activation=None, reason="" if plan.weights else "quantized after its activation")  # noqa: PLW2901
        state.plans[name] = plan
        if plan.reason:
            state.left_out.setdefault(name, plan.reason)
    wrapping = _Wrapping(state, seen.kinds, folding)
    wrapped = Copier(wrapping.replace, wrapping.call_operation).copy(model)
    note(wrapped, state)
    return wrapped


class _Seen:
    """What a model consists of.

    Parameters
    ----------
    model : tf.keras.Model
        The float model.
    folding : Folding
        Batch norms that are folded are left out.
    state : WrappedState
        Told of layers of no known kind.
    """

    def __init__(self, model: Any, folding: Folding, state: WrappedState) -> None:
        self.kinds: dict[str, LayerKind] = {}
        self.operations: dict[str, Any] = {}
        self.in_order: list[LayerInfo] = []
        self.before_activation: set[str] = set()
        self._gone = frozenset(folding.gone)
        self._done: set[int] = set(folding.gone)
        self._state = state
        self._look(model, "")

    @property
    def infos(self) -> list[LayerInfo]:
        """What core needs to know of the layers; functional operations left out."""
        return [info for info in self.in_order if info.name in self.kinds]

    def _look(self, layer: Any, name: str) -> None:
        if id(layer) in self._done:
            return
        self._done.add(id(layer))
        kind = kind_of(layer)
        if kind is not None:
            self._note(layer, name or "model", kind)
        elif is_graph(layer):
            self._look_into_graph(layer, name)
        else:
            inside = list(children(layer))
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
        self.in_order.append(layer_info(name, layer, kind))

    def _look_into_graph(self, model: Any, prefix: str) -> None:
        graph = graph_of(model)
        for operation in graph.operations:
            name = join(prefix, operation.name)
            if not is_operation(operation):
                self._look(operation, name)
            else:
                op = op_of(operation)
                if op is not None:
                    self.operations[name] = operation
                    self.in_order.append(LayerInfo(name, op))
            if all(graph.activation_after(call, op_of, self._gone) for call in graph.calls(operation)):
                self.before_activation.add(name)


def build(plan: QuantizerPlan, subject: str) -> BaseKerasTrainableQuantizer:
    """Return the Keras quantizer of a plan."""
    quantizer: BaseKerasTrainableQuantizer = build_quantizer(plan, "tf_keras", BaseKerasTrainableQuantizer, subject)
    return quantizer


class _Wrapping:
    """What comes in the place of each layer and around each functional operation."""

    def __init__(self, state: WrappedState, kinds: Mapping[str, LayerKind], folding: Folding) -> None:
        self._plans = state.plans
        self._kinds = kinds
        self._folding = folding

    def replace(self, layer: Any, name: str) -> Any | None:
        """Return the wrapped layer, or a layer with a batch norm in it; None where nothing changes."""
        if is_operation(layer):
            return None  # see `call_operation`
        if id(layer) in self._folding.gone:
            return FoldedBatchNormalization(name=layer.name, dtype=layer._dtype_policy)  # noqa: SLF001 - not public in TensorFlow 2.15
        name = name or "model"
        norm = self._folding.norms.get(id(layer))
        plan = self._plans.get(name)
        quantized = plan is not None and (plan.weights or plan.activation is not None)
        if norm is None and not quantized:
            return None
        copied = plain_copy(layer, name) if norm is None else folded_copy(layer, norm, name)
        return self._wrapped(copied, name, plan) if plan is not None and quantized else copied

    def _wrapped(self, layer: Any, name: str, plan: LayerPlan) -> QuantizationWrapper:
        kind = self._kinds[name]
        inputs, output = {}, None
        if plan.activation is not None and plan.placement == "inputs":
            inputs = {each: _holder(plan, name, each) for each in kind.inputs}
        elif plan.activation is not None:
            output = _holder(plan, name, "output")
        weights = {attribute: build(each, f"{name}.{attribute}") for attribute, each in plan.weights.items()}
        wrapper = QuantizationWrapper(
            layer, weights, input_holders=inputs, input_names=kind.inputs, output_holder=output
        )
        with untracked(wrapper):
            wrapper.plan = plan
        return wrapper

    def call_operation(self, operation: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a functional operation with activation quantizers at its inputs or behind it."""
        plan = self._plans.get(name)
        if plan is None or plan.activation is None:
            return operation(*args, **kwargs)
        if plan.placement == "outputs":
            holder = _holder(plan, name, "output", f"{operation.name}_output_holder")
            return holder(operation(*args, **kwargs))
        held: dict[int, Any] = {}

        def hold(value: Any) -> Any:
            if not hasattr(value, "_keras_history"):  # what is_keras_tensor asks, but of tensors only
                return value
            if id(value) not in held:
                index = len(held)
                holder = _holder(plan, name, f"input {index}", f"{operation.name}_input_{index}_holder")
                held[id(value)] = holder(value)
            return held[id(value)]

        args, kwargs = tf.nest.map_structure(hold, (args, kwargs))
        return operation(*args, **kwargs)


def _holder(plan: LayerPlan, name: str, tensor: str, layer_name: str | None = None) -> ActivationQuantizationHolder:
    assert plan.activation is not None  # noqa: S101 - holders are made only where there is a plan for them
    holder = ActivationQuantizationHolder(build(plan.activation, f"{name}: {tensor}"), name=layer_name)
    with untracked(holder):
        holder.plan, holder.tensor = plan, tensor
    return holder


def trainable_quantizers(model: Any) -> Iterator[BaseKerasTrainableQuantizer]:
    """Yield a model's trainable quantizers, each once."""
    for layer in layers_within(model):
        if isinstance(layer, BaseKerasTrainableQuantizer):
            yield layer
