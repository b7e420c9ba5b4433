"""A copy of a deployed Keras 2 model with mct-quantizers' own layers in place of ours; see `trainable_keras.mctq`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import tensorflow as tf
from mct_quantizers import KerasActivationQuantizationHolder, KerasQuantizationWrapper

from trainable_core.backend.inferable import Refusals
from trainable_core.quantizer import BaseTrainableQuantizer
from trainable_keras.copying import join
from trainable_keras.framework import Framework
from trainable_keras.graph import children
from trainable_keras.inferable import difference, probe
from trainable_keras.keras2.copying import Copier, plain_copy
from trainable_keras.keras2.engine import keras, to_numpy
from trainable_keras.keras2.folding import FoldedBatchNormalization
from trainable_keras.keras2.holder import ActivationQuantizationHolder
from trainable_keras.keras2.inferable import InferableQuantizer
from trainable_keras.keras2.tracing import graph_of
from trainable_keras.keras2.wrapper import QuantizationWrapper
from trainable_keras.parts import KerasPart


def stock_copy(framework: Framework, model: Any) -> Any:
    """Return a copy of a deployed model with mctq's own layers.

    Raises
    ------
    UnsupportedConfigError
        When mctq can't express something; names every layer and tensor.
    """
    stock = Stock()
    for name, part, in_graph in _parts(model, "", in_graph=False):
        stock.check(name, part, in_graph=in_graph)
    stock.refusals.raise_if_any()
    return StockCopier(framework, stock).copy(model)


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


class Stock:
    """mctq's counterparts of a model's quantizers."""

    def __init__(self) -> None:
        self.refusals = Refusals("to_mctq")
        self.quantizers: dict[int, Any] = {}
        self._holders: dict[int, Any] = {}
        self._wrappers: dict[int, Any] = {}

    def check(self, name: str, part: Any, *, in_graph: bool) -> None:
        """Build mctq's quantizers of a part, or note why they can't be."""
        if not in_graph:
            self.refusals.add(name, "it is called by the code of a layer, and only calls in a graph can be converted")
        if isinstance(part, ActivationQuantizationHolder):
            self._check_holder(name, "activation", part)
            return
        if getattr(part.layer, "compute_dtype", "float32") != "float32":
            self.refusals.add(name, f"it computes in {part.layer.compute_dtype}, and mctq's quantizers in float32 only")
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

    def layer(self, wrapper: Any, name: str) -> Any:
        """Return mctq's wrapper of a layer, or the layer where no weight is quantized."""
        if id(wrapper) not in self._wrappers:
            layer = plain_copy(wrapper.layer, name)
            weights = {
                a: self.quantizers[id(q)] for a, q in wrapper.weights_quantizers.items() if id(q) in self.quantizers
            }
            stock = KerasQuantizationWrapper(layer, weights, name=wrapper.name) if weights else layer
            if not wrapper.trainable:
                stock.trainable = False
            self._wrappers[id(wrapper)] = stock
        return self._wrappers[id(wrapper)]


def _passing(layer: Any, name: str) -> Any:  # noqa: ARG001 - as `Replace` has it
    """Return a layer of Keras's own that passes its input on, in the place of ours."""
    return keras.layers.Activation("linear", name=layer.name) if isinstance(layer, FoldedBatchNormalization) else None


class StockCopier(Copier):
    """Copies one deployed model; wrappers and holders become mctq's.

    Parameters
    ----------
    framework : Framework
        Keras 2.
    stock : Stock
        Has the quantizers.
    """

    def __init__(self, framework: Framework, stock: Stock) -> None:
        super().__init__(framework, _passing)
        self._stock = stock

    def call(self, operation: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the copy of a layer at its place in a copied graph, with its holders before and behind it."""
        stock = self._stock
        if isinstance(operation, ActivationQuantizationHolder):
            return stock.hold(args[0] if args else kwargs["inputs"], operation, operation.name)
        if isinstance(operation, FoldedBatchNormalization):
            return self.copy(operation, name)(*args[:1])
        if not isinstance(operation, QuantizationWrapper):
            return super().call(operation, name, args, kwargs)
        values, names = list(args), operation.argument_names()
        for tensor, holder in operation.input_holders.items():
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
        outputs = stock.layer(operation, name)(*values[:1], **kwargs)
        behind, holder_name = operation.output_holder, f"{operation.name}_output_holder"
        if behind is None:
            return outputs
        if isinstance(outputs, tuple | list):
            return type(outputs)((stock.hold(outputs[0], behind, holder_name), *outputs[1:]))
        return stock.hold(outputs, behind, holder_name)

    def in_sequence(self, layer: Any, name: str) -> list[Any]:
        """Return what comes in the place of a layer of a Sequential model."""
        stock = self._stock
        if isinstance(layer, ActivationQuantizationHolder):
            held = stock.holder(layer, layer.name)
            return [] if held is None else [held]
        if not isinstance(layer, QuantizationWrapper):
            return super().in_sequence(layer, name)
        before = [stock.holder(h, f"{layer.name}_{each}_holder") for each, h in layer.input_holders.items()]
        behind = layer.output_holder
        after = [] if behind is None else [stock.holder(behind, f"{layer.name}_output_holder")]
        return [each for each in [*before, stock.layer(layer, name), *after] if each is not None]
