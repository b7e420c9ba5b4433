"""A copy of a deployed Keras 2 model with mct-quantizers' own layers in place of ours; see `trainable_keras.mctq`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import tensorflow as tf
from mct_quantizers import KerasActivationQuantizationHolder, KerasQuantizationWrapper

from trainable_core.backend.inferable import Refusals
from trainable_core.enums import TieRule
from trainable_core.quantizer import BaseTrainableQuantizer
from trainable_keras.configs import BIASED
from trainable_keras.copying import attributes_without, copy_model, join
from trainable_keras.framework import Framework
from trainable_keras.graph import ADDED, Graph, children
from trainable_keras.inferable import difference, probe
from trainable_keras.keras2.engine import keras, to_numpy
from trainable_keras.keras2.folding import FoldedBatchNormalization
from trainable_keras.keras2.holder import ActivationQuantizationHolder
from trainable_keras.keras2.inferable import InferableQuantizer
from trainable_keras.keras2.tracing import graph_of
from trainable_keras.parts import KerasPart, argument_names, told_of
from trainable_keras.two_classes import READINGS, TOLD, own_class


def stock_copy(framework: Framework, model: Any) -> Any:
    """Return a copy of a deployed model with mctq's own layers.

    Raises
    ------
    UnsupportedConfigError
        When mctq can't express something; names every layer and tensor.
    """
    stock, copied = Stock(), copy_model(framework, model)
    for name, part, in_graph in _parts(copied, "", in_graph=False):
        stock.check(name, part, in_graph=in_graph)
    stock.refusals.raise_if_any()
    return StockModel(stock).made(copied)


def _parts(layer: Any, name: str, *, in_graph: bool) -> Iterator[tuple[str, Any, bool]]:
    """Yield (name, part, whether a graph calls it) of a model's wrappers and holders."""
    if isinstance(layer, KerasPart):
        yield name, layer, in_graph
    elif (graph := graph_of(layer)) is not None:
        for each in graph.operations:
            yield from _parts(each, join(name, each.name), in_graph=True)
    else:
        for child_name, child in children(layer):
            yield from _parts(child, join(name, child_name), in_graph=False)


@dataclass
class Wrapped:
    """A quantized layer and what is around it.

    Parameters
    ----------
    layer : layer
        The layer, of two classes until mctq's counterpart is asked for.
    weights : dict of str to quantizer
        Its quantizers.
    names : list of str
        Names of its tensor arguments.
    inputs : dict of str to ActivationQuantizationHolder
        What its inputs pass through.
    output : ActivationQuantizationHolder, optional
        What its output passes through.
    stock : layer, optional
        mctq's counterpart, once it is made.
    """

    layer: Any
    weights: dict[str, Any]
    names: list[str]
    inputs: dict[str, Any]
    output: Any
    stock: Any = None


class Stock:
    """mctq's counterparts of a model's quantizers."""

    def __init__(self) -> None:
        self.refusals = Refusals("to_mctq")
        self.quantizers: dict[int, Any] = {}
        self._holders: dict[int, Any] = {}
        self.wrapped: dict[int, Wrapped] = {}

    def check(self, name: str, part: Any, *, in_graph: bool) -> None:
        """Build mctq's quantizers of a part, or note why they can't be."""
        if not in_graph:
            self.refusals.add(name, "it is called by the code of a layer, and only calls in a graph can be converted")
        if isinstance(part, ActivationQuantizationHolder):
            self._check_holder(name, "activation", part)
            return
        self.wrapped[id(part)] = Wrapped(
            part,
            dict(part.weights_quantizers),
            argument_names(told_of(part).input_names),
            dict(part.input_holders),
            part.output_holder,
        )
        if part.compute_dtype != "float32":
            self.refusals.add(name, f"it computes in {part.compute_dtype}, and mctq's quantizers in float32 only")
        for attribute, weight, quantizer in part.get_weights_vars():
            if "." in attribute:
                reason = "mctq's wrapper quantizes a layer's own weights, and this one is of a layer inside"
                self.refusals.add(f"{name}: {attribute}", reason)
            else:
                self._check_quantizer(f"{name}: {attribute}", quantizer, weight)
        for tensor, holder in part.input_holders.items():
            self._check_holder(name, tensor, holder)
        if part.output_holder is not None:
            self._check_holder(name, "output", part.output_holder)

    def _check_holder(self, name: str, tensor: str, holder: Any) -> None:
        if told_of(holder).tie_rule is TieRule.HALF_EVEN:
            problem = "its ties go to the even code, as the recipe's target has it, and mctq's go up"
            self.refusals.add(f"{name}: {tensor}", problem)
        self._check_quantizer(f"{name}: {tensor}", holder.activation_holder_quantizer, None)

    def _check_quantizer(self, tensor: str, quantizer: Any, weight: Any) -> None:
        if isinstance(quantizer, BaseTrainableQuantizer):
            return  # switched off by its config
        if type(quantizer).__module__.partition(".")[0] == "mct_quantizers":
            self.quantizers[id(quantizer)] = quantizer
            return
        if not isinstance(quantizer, InferableQuantizer) or type(quantizer).__module__ != InferableQuantizer.__module__:
            kind = f"{type(quantizer).__module__}.{type(quantizer).__name__}"
            self.refusals.add(tensor, f"mctq has no counterpart of {kind}")
            return
        values = probe(quantizer) if weight is None else to_numpy(weight)
        try:
            stock = quantizer.to_mctq()
            ours, theirs = (to_numpy(each(tf.constant(values))) for each in (quantizer, stock))
        except Exception as error:  # noqa: BLE001 - mctq checks by assertions, and its kernels raise what they like
            told = str(error).splitlines()[0]
            self.refusals.add(tensor, f"mctq's {type(quantizer).__name__} refuses it: {told}")
            return
        found = difference(quantizer, values, ours, theirs)
        if found:
            self.refusals.add(tensor, f"mctq's {type(quantizer).__name__} computes otherwise: {found}")
        self.quantizers[id(quantizer)] = stock

    def holder(self, holder: Any, name: str) -> Any:
        """Return mctq's holder of one of ours, None where nothing is quantized."""
        quantizer = self.quantizers.get(id(holder.activation_holder_quantizer))
        if quantizer is None:
            return None
        if id(holder) not in self._holders:
            self._holders[id(holder)] = KerasActivationQuantizationHolder(quantizer, name=name)
        return self._holders[id(holder)]

    def hold(self, value: Any, holder: Any, name: str) -> Any:
        """Return a tensor behind mctq's holder; integers pass untouched."""
        stock = self.holder(holder, name) if value.dtype.is_floating else None
        if stock is not None and value.dtype != tf.float32:
            self.refusals.add(name, f"its input is {value.dtype.name}, and mctq's quantizers take float32 only")
            self.refusals.raise_if_any()
        return value if stock is None else stock(value)

    def layer(self, wrapped: Wrapped) -> Any:
        """Return mctq's wrapper of a layer, or the layer where no weight is quantized."""
        if wrapped.stock is None:
            weights = {n: self.quantizers[id(q)] for n, q in wrapped.weights.items() if id(q) in self.quantizers}
            trains, layer = wrapped.layer.trainable, _float(wrapped.layer)
            wrapped.stock = KerasQuantizationWrapper(layer, weights, name=layer.name) if weights else layer
            if not trains:
                wrapped.stock.trainable = False
        return wrapped.stock


class StockModel:
    """Makes graphs anew with mctq's wrappers and holders in the place of ours.

    Parameters
    ----------
    stock : Stock
        Has the quantizers.
    """

    def __init__(self, stock: Stock) -> None:
        self._stock = stock
        self._made: dict[int, Any] = {}

    def made(self, layer: Any) -> Any:
        """Return what comes in the place of a layer: itself, but for graphs and batch norms that are folded."""
        if id(layer) not in self._made:
            vars(layer).update(_inbound_nodes_value=[], _outbound_nodes_value=[])  # it is called in another graph now
            if isinstance(layer, FoldedBatchNormalization):
                self._made[id(layer)] = keras.layers.Activation("linear", name=layer.name)
            else:
                graph = graph_of(layer)
                self._made[id(layer)] = layer if graph is None else self._graph(layer, graph)
        return self._made[id(layer)]

    def _graph(self, model: Any, graph: Graph) -> Any:
        if isinstance(model, keras.Sequential):
            (given,) = (_input_like(tensor) for tensor in model.inputs)
            layers = [given._keras_history.layer, *(new for each in model.layers for new in self._in_sequence(each))]  # noqa: SLF001 - its input layer
            made = _class_for(model, keras.Sequential)(layers, name=model.name)
        else:
            inputs = [_input_like(tensor) for tensor in model.inputs]
            known = {id(old): new for old, new in zip(model.inputs, inputs, strict=True)}

            def new(value: Any) -> Any:
                return known.get(id(value), value)

            for call in graph.nodes:
                outputs = self._call(call.operation, *tf.nest.map_structure(new, (call.args, call.kwargs)))
                known.update({id(old): each for old, each in zip(call.outputs, tf.nest.flatten(outputs), strict=True)})
            # as they were given: one tensor, a list or a dictionary
            given = (model._nested_inputs, model._nested_outputs)  # noqa: SLF001 - nowhere else
            made = _class_for(model, keras.Model)(*tf.nest.map_structure(new, given), name=model.name)
        if not model.trainable:
            made._trainable = False  # noqa: SLF001 - the setter would freeze every layer inside too
        return made

    def _call(self, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call what comes in the place of a layer, with holders before and behind it."""
        stock = self._stock
        if isinstance(operation, ActivationQuantizationHolder):
            return stock.hold(args[0] if args else kwargs["inputs"], operation, operation.name)
        if isinstance(operation, FoldedBatchNormalization):
            return self.made(operation)(*args[:1])
        wrapped = stock.wrapped.get(id(operation))
        if wrapped is None:
            return self.made(operation)(*args, **kwargs)
        values, names = list(args), wrapped.names
        for tensor, holder in wrapped.inputs.items():
            argument, _, item = tensor.partition(".")
            holder_name = f"{operation.name}_{tensor.replace('.', '_')}_holder"
            index = names.index(argument)
            given: Any = (values, index) if index < len(values) else (kwargs, argument)
            if given[0] is kwargs and kwargs.get(argument) is None:
                continue
            value = given[0][given[1]]
            if item:
                held = list(value)
                held[int(item)] = stock.hold(held[int(item)], holder, holder_name)
            else:
                held = stock.hold(value, holder, holder_name)
            given[0][given[1]] = held
        kwargs |= dict(zip(names[1:], values[1:], strict=False))  # mctq's wrapper takes one argument by position
        behind, holder_name = wrapped.output, f"{operation.name}_output_holder"
        outputs = stock.layer(wrapped)(*values[:1], **kwargs)
        if behind is None:
            return outputs
        if isinstance(outputs, tuple | list):
            return type(outputs)((stock.hold(outputs[0], behind, holder_name), *outputs[1:]))
        return stock.hold(outputs, behind, holder_name)

    def _in_sequence(self, layer: Any) -> list[Any]:
        """Return what comes in the place of a layer of a Sequential model."""
        stock = self._stock
        if isinstance(layer, ActivationQuantizationHolder):
            held = stock.holder(layer, layer.name)
            return [] if held is None else [held]
        wrapped = stock.wrapped.get(id(layer))
        if wrapped is None:
            return [self.made(layer)]
        before = [stock.holder(h, f"{layer.name}_{each}_holder") for each, h in wrapped.inputs.items()]
        behind = wrapped.output
        after = [] if behind is None else [stock.holder(behind, f"{layer.name}_output_holder")]
        return [each for each in [*before, stock.layer(wrapped), *after] if each is not None]


def _input_like(tensor: Any) -> Any:
    """Return a symbolic input like a model's."""
    layer = tensor._keras_history.layer  # noqa: SLF001 - where its config is
    return type(layer).from_config(layer.get_config()).output


def _class_for(model: Any, base: Any) -> Any:
    """Return the class to make a graph of: the model's own if it takes what Keras's takes."""
    own = own_class(model)
    return own if vars(own).get("__init__") is None or own is base else base


def _float(wrapper: Any) -> Any:
    """Return a quantized layer as one of its own class, without quantizers."""
    added = [vars(wrapper)[name] for name in ADDED]
    left = attributes_without(wrapper, {*ADDED, READINGS, TOLD, BIASED})
    tracked = [each for each in wrapper._self_tracked_trackables if all(each is not one for one in added)]  # noqa: SLF001 - there is no public way
    vars(wrapper).clear()
    vars(wrapper).update(left, _self_tracked_trackables=tracked, _inbound_nodes_value=[], _outbound_nodes_value=[])
    wrapper.__class__ = own_class(wrapper)
    return wrapper
