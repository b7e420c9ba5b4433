"""The quantization wrapper: mctq's, mended."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf
from mct_quantizers import KerasQuantizationWrapper

from trainable_core.enums import QuantizationTarget
from trainable_core.errors import ModelError
from trainable_core.model_document import plan_document, plan_from_document
from trainable_core.plan import LayerPlan, require_quantizer
from trainable_core.saved_quantizer import quantizer_document, quantizer_from_document
from trainable_tfkeras.copying import build_by, build_configs
from trainable_tfkeras.engine import Tensor, keras, read, untracked
from trainable_tfkeras.holder import ActivationQuantizationHolder
from trainable_tfkeras.inferable import class_of
from trainable_tfkeras.layers import owner_of, weight_of
from trainable_tfkeras.quantizers.base import BaseKerasTrainableQuantizer, count_step


@keras.saving.register_keras_serializable(package="trainable_tfkeras")
class QuantizationWrapper(KerasQuantizationWrapper):  # type: ignore[misc] # mctq is untyped
    """A layer whose weights, and if asked inputs and output, are quantized as it is called.

    Parameters
    ----------
    layer : tf.keras.layers.Layer
        The layer, built.
    weights_quantizers : mapping of str to quantizer
        By attribute (``"kernel"``, ``"query_dense.kernel"``).
    input_holders : mapping of str to ActivationQuantizationHolder, optional
        Quantizers of inputs, by the name of the layer's argument; ``"inputs.1"`` is the second of a list.
    input_names : sequence of str
        Names of the layer's tensor arguments, in positional order.
    output_holder : ActivationQuantizationHolder, optional
        Quantizer of the output; of the first one when the layer returns several.
    name : str, optional
        Name of the wrapper; by default the layer's.

    Notes
    -----
    Mended against mctq: the layer keeps its weights (mctq puts tensors in their place, which leak out of the graph they
    were made in); it is called whole, so that masks, dtype policies, activity regularizers and several inputs work; a
    layer that does not train stays so; there is no ``steps`` weight; weights of layers inside the layer can be
    quantized; converting twice changes nothing.

    For the call, the layer is copied (its attributes, not its variables) with tensors in the place of quantized
    weights, so replicas that run beside each other don't disturb each other. Attributes the wrapper doesn't have are
    the layer's.
    """

    weights_quantizers: dict[str, Any]

    def __init__(
        self,
        layer: Any,
        weights_quantizers: Mapping[str, Any],
        *,
        input_holders: Mapping[str, ActivationQuantizationHolder] | None = None,
        input_names: Sequence[str] = ("inputs",),
        output_holder: ActivationQuantizationHolder | None = None,
        name: str | None = None,
    ) -> None:
        if not isinstance(layer, keras.layers.Layer):
            raise ModelError(f"a wrapper needs a tf.keras layer, got {type(layer).__name__}")
        if not layer.built:
            raise ModelError(f"layer {layer.name!r} is not built", "build the model, or call it once with an example.")
        for quantizer in weights_quantizers.values():
            require_quantizer(quantizer, QuantizationTarget.Weights, type(self).__name__)
        for attribute in weights_quantizers:
            owner_of(layer, attribute)
        super().__init__(layer, dict(weights_quantizers), name=name or layer.name, dtype="float32", autocast=False)
        self.supports_masking = layer.supports_masking
        with untracked(self):
            self.input_names = tuple(input_names)
            self.quantizes_weights = True
            self.plan: LayerPlan | None = None
            self.notes: dict[str, Any] | None = None
            self._accepted = tuple(inspect.signature(layer.call).parameters)
        self.input_holders = dict(input_holders or {})
        self.output_holder = output_holder
        for attribute, quantizer in self.weights_quantizers.items():
            quantizer.initialize_quantization(tuple(weight_of(layer, attribute).shape), attribute, self)
        self.built = True

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the layer that the wrapper doesn't have."""
        layer = vars(self).get("layer")
        if layer is None or name.startswith("_"):
            message = f"{type(self).__name__!r} object has no attribute {name!r}"
            raise AttributeError(message)
        return getattr(layer, name)

    # ---- mctq's interface -------------------------------------------------------------------------------------------

    def get_weights_vars(self) -> list[tuple[str, Any, Any]]:
        """Return (attribute, float weight, quantizer) of each quantized weight."""
        return [(name, weight_of(self.layer, name), q) for name, q in self.weights_quantizers.items()]

    def get_quantized_weights(self, training: Any = None) -> dict[str, Tensor]:
        """Return each quantized weight's quantized value, by attribute."""
        quantized = {}
        for attribute, weight, quantizer in self.get_weights_vars():
            arguments = {"training": training} if isinstance(quantizer, BaseKerasTrainableQuantizer) else {}
            quantized[attribute] = quantizer(read(weight), **arguments)
        return quantized

    def convert_to_inferable_quantizers(self) -> None:
        """Put inferable quantizers in the trainable ones' place, holders included; does nothing the second time."""
        quantizers = dict(self.weights_quantizers)
        for name, quantizer in quantizers.items():
            if isinstance(quantizer, BaseKerasTrainableQuantizer):
                quantizers[name] = quantizer.convert2inferable()
        self.weights_quantizers = quantizers  # all at once: the layer stays whole when one of them can't
        for holder in self.holders:
            holder.convert_to_inferable_quantizers()
        # held anew, so that variables come in the order in which a wrapper is made: the HDF5 format goes by it
        inputs, output = dict(self.input_holders), self.output_holder
        self.input_holders, self.output_holder = {}, None
        self.input_holders, self.output_holder = inputs, output

    # ---- calling ----------------------------------------------------------------------------------------------------

    @property
    def holders(self) -> list[ActivationQuantizationHolder]:
        """Holders of inputs and output."""
        inputs = list(self.input_holders.values())
        return inputs if self.output_holder is None else [*inputs, self.output_holder]

    def build(self, input_shape: Any) -> None:
        """Do nothing but note the shape: the layer is built before it is wrapped."""
        keras.layers.Layer.build(self, input_shape)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the layer's output with quantized weights, inputs and output; takes the layer's own arguments."""
        names = self._argument_names()
        first = names[0] if names else "inputs"
        if not args and first in kwargs:  # Keras wants the first argument by position, whatever it is called
            args = (kwargs.pop(first),)
        # and saves only those others that have a name in the signature of `call`, or are passed by name
        kwargs |= zip(self._accepted[1:], args[1:], strict=False)
        return super().__call__(*args[:1], **kwargs)

    def call(self, inputs: Any, **kwargs: Any) -> Any:
        """Return the layer's output with quantized weights, inputs and output."""
        training = kwargs.pop("training", None)
        mask = kwargs.pop("mask", None)
        values = [inputs]
        if self.input_holders:
            values, kwargs = self._quantize_inputs(values, kwargs, training)
        if mask is not None and "mask" in self._accepted:
            kwargs = {**kwargs, "mask": mask}
        if training is not None and "training" in self._accepted:
            kwargs = {**kwargs, "training": training}
        layer = self.layer
        if self.weights_quantizers and self.quantizes_weights:
            count_step(self.weights_quantizers.values(), training)
            layer = with_weights(layer, self.get_quantized_weights(training))
        outputs = layer(*values, **kwargs)
        if self.output_holder is None:
            return outputs
        if isinstance(outputs, tuple | list):
            return type(outputs)((self.output_holder(outputs[0], training=training), *outputs[1:]))
        return self.output_holder(outputs, training=training)

    def _quantize_inputs(
        self, given: list[Any], kwargs: dict[str, Any], training: Any
    ) -> tuple[list[Any], dict[str, Any]]:
        values = list(given)
        names = self._argument_names()
        if "key" in names and len(values) <= names.index("key") and kwargs.get("key") is None:
            # an attention layer's key is its value, before either is quantized
            position = names.index("value")
            kwargs = {**kwargs, "key": values[position] if position < len(values) else kwargs["value"]}
        for name, holder in self.input_holders.items():
            argument, _, item = name.partition(".")
            position = names.index(argument)
            if position < len(values):
                values[position] = _held(values[position], item, holder, training)
            elif kwargs.get(argument) is not None:
                kwargs = {**kwargs, argument: _held(kwargs[argument], item, holder, training)}
        return values, kwargs

    def _argument_names(self) -> list[str]:
        return list(dict.fromkeys(name.partition(".")[0] for name in self.input_names))

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return what the layer says."""
        return self.layer.compute_output_shape(input_shape)

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        """Return what the layer says."""
        return self.layer.compute_mask(inputs, mask)

    # ---- saving -----------------------------------------------------------------------------------------------------

    def get_build_config(self) -> None:
        """Return nothing: how the layer was built is part of `get_config`."""

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` rebuilds the wrapper from; JSON-clean when the layer's own config is."""
        output, layer = self.output_holder, keras.layers.serialize(self.layer)
        layer.pop("build_config", None)
        return {
            "name": self.name,
            "trainable": self.trainable,
            "layer": layer,
            "builds": build_configs(self.layer),
            "weights_quantizers": {name: quantizer_document(q) for name, q in self.weights_quantizers.items()},
            "input_holders": {name: holder.get_config() for name, holder in self.input_holders.items()},
            "input_names": list(self.input_names),
            "output_holder": None if output is None else output.get_config(),
            "plan": None if self.plan is None else plan_document(self.plan),
            "notes": self.notes,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> QuantizationWrapper:
        """Return a wrapper equal to the one that `get_config` was called on."""
        holder, output = ActivationQuantizationHolder.from_config, config["output_holder"]
        layer = keras.layers.deserialize(config["layer"])
        build_by(layer, config["builds"])
        layer.built = True
        wrapper = cls(
            layer,
            {
                name: quantizer_from_document(each, "tf_keras", class_of)
                for name, each in config["weights_quantizers"].items()
            },
            input_holders={name: holder(each) for name, each in config["input_holders"].items()},
            input_names=config["input_names"],
            output_holder=None if output is None else holder(output),
            name=config["name"],
        )
        with untracked(wrapper):
            wrapper.plan = None if config["plan"] is None else plan_from_document(config["plan"])
            wrapper.notes = config["notes"]
        if not config["trainable"]:
            wrapper.trainable = False
        return wrapper


def with_weights(layer: Any, weights: Mapping[str, Tensor]) -> Any:
    """Return a shallow copy of a layer with tensors in the place of some of its weights, in their compute dtype."""
    copies: dict[int, Any] = {}
    for attribute, value in weights.items():
        steps = owner_of(layer, attribute)
        for owner, _ in steps:
            if id(owner) not in copies:
                copies[id(owner)] = _shallow(owner)
        for (owner, name), (inner, _) in itertools.pairwise(steps):
            vars(copies[id(owner)])[name] = copies[id(inner)]
        owner, name = steps[-1]
        # a weight that Keras casts as it is read (mixed precision) is an AutoCastVariable
        casts = hasattr(getattr(owner, name), "true_dtype")
        vars(copies[id(owner)])[name] = tf.cast(value, owner.compute_dtype) if casts else value
    return copies.get(id(layer), layer)


def _shallow(layer: Any) -> Any:
    copied = object.__new__(type(layer))
    vars(copied).update(vars(layer))
    # While Keras writes a SavedModel it puts functions of the layer as it is, or its bound `call`, on the instance.
    vars(copied).pop("call", None)
    return copied


def _held(value: Any, item: str, holder: ActivationQuantizationHolder, training: Any) -> Any:
    """Return an argument quantized, or a list with one of its items quantized."""
    if not item:
        return holder(value, training=training)
    values = list(value)
    if int(item) < len(values):
        values[int(item)] = holder(values[int(item)], training=training)
    return type(value)(values) if isinstance(value, tuple) else values
