"""The quantization wrapper: what mctq's is for Keras 2, native."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from trainable_core.enums import QuantizationTarget
from trainable_core.errors import ModelError, UnsupportedConfigError
from trainable_core.model_document import plan_document, plan_from_document
from trainable_core.plan import LayerPlan, require_quantizer
from trainable_core.saved_quantizer import quantizer_document, quantizer_from_document
from trainable_keras.engine import Tensor, read
from trainable_keras.holder import ActivationQuantizationHolder
from trainable_keras.inferable import class_of
from trainable_keras.layers import weight_of
from trainable_keras.quantizers.base import BaseKerasTrainableQuantizer


@keras.saving.register_keras_serializable(package="trainable_keras")
class QuantizationWrapper(keras.layers.Layer):  # type: ignore[misc] # keras is untyped
    """A layer whose weights, and if asked inputs and output, are quantized as it is called.

    Parameters
    ----------
    layer : keras.layers.Layer
        The layer, built.
    weights_quantizers : mapping of str to quantizer
        By attribute (``"kernel"``, ``"query_dense.kernel"``).
    input_holders : mapping of str to ActivationQuantizationHolder, optional
        Quantizers of inputs, by the name of the layer's argument; ``"inputs.1"`` is the second of a list.
    input_names : sequence of str
        Names of the layer's tensor arguments, in positional order.
    output_holder : ActivationQuantizationHolder, optional
        Quantizer of the output; of the first one when the layer returns several.

    Notes
    -----
    The layer is called inside a `keras.StatelessScope` in which every variable of the layer has its value, and each
    quantized weight its quantized value; what the layer changes (batch statistics, seeds) is assigned back. *Every*
    variable: a scope hides those around it, and JAX trains in one. The layer itself is never changed, so it may be of
    any type. Attributes the wrapper doesn't have are the layer's.

    mctq's own wrapper can't be built on Keras 3: it sets a kernel that is a property there.
    """

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
        _check(layer, weights_quantizers)
        super().__init__(name=name or layer.name, dtype="float32", autocast=False)
        self.layer = layer
        self.supports_masking = layer.supports_masking
        self.input_names = tuple(input_names)
        self.quantizes_weights = True
        self.weights_quantizers = dict(weights_quantizers)
        self.input_holders = dict(input_holders or {})
        self.output_holder = output_holder
        self.plan: LayerPlan | None = None
        self.notes: dict[str, Any] | None = None
        for attribute, quantizer in self.weights_quantizers.items():
            quantizer.initialize_quantization(tuple(weight_of(layer, attribute).shape), attribute, self)
        self._takes_training = "training" in inspect.signature(layer.call).parameters
        self.built = True

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the layer that the wrapper doesn't have."""
        try:
            return super().__getattr__(name)  # on the torch engine, layers and variables are found by it
        except AttributeError:
            if name == "layer" or name.startswith("_"):
                message = f"{type(self).__name__!r} object has no attribute {name!r}"
                raise AttributeError(message) from None
        return getattr(self.layer, name)

    # ---- mctq's interface -------------------------------------------------------------------------------------------

    @property
    def is_weights_quantization(self) -> bool:
        """Whether any weight is quantized."""
        return bool(self.weights_quantizers)

    @property
    def num_weights_quantizers(self) -> int:
        """Number of quantized weights."""
        return len(self.weights_quantizers)

    def get_weights_vars(self) -> list[tuple[str, keras.Variable, Any]]:
        """Return (attribute, float weight, quantizer) of each quantized weight."""
        return [(name, weight_of(self.layer, name), q) for name, q in self.weights_quantizers.items()]

    def get_quantized_weights(self, training: bool | None = None) -> dict[str, Tensor]:  # noqa: FBT001 - Keras's word
        """Return each quantized weight's quantized value, by attribute."""
        quantized = {}
        for attribute, weight, quantizer in self.get_weights_vars():
            arguments = {"training": training} if isinstance(quantizer, BaseKerasTrainableQuantizer) else {}
            quantized[attribute] = quantizer(read(weight), **arguments)
        return quantized

    def convert_to_inferable_quantizers(self) -> None:
        """Put inferable quantizers in the trainable ones' place, holders included; does nothing the second time."""
        trainable = [
            (name, q) for name, q in self.weights_quantizers.items() if isinstance(q, BaseKerasTrainableQuantizer)
        ]
        inferable = [(name, quantizer, quantizer.convert2inferable()) for name, quantizer in trainable]  # all, or none
        self._tracker.unlock()
        for name, quantizer, deployed in inferable:
            self._tracker.untrack(quantizer)
            self.weights_quantizers[name] = deployed
        self._tracker.lock()
        for holder in self.holders:
            holder.convert_to_inferable_quantizers()

    # ---- calling ----------------------------------------------------------------------------------------------------

    @property
    def holders(self) -> list[ActivationQuantizationHolder]:
        """Holders of inputs and output."""
        inputs = list(self.input_holders.values())
        return inputs if self.output_holder is None else [*inputs, self.output_holder]

    def call(self, *args: Any, training: bool | None = None, **kwargs: Any) -> Any:
        """Return the layer's output with quantized weights, inputs and output."""
        if self.input_holders:
            args, kwargs = self._quantize_inputs(args, kwargs, training)
        outputs = self._call_layer(args, kwargs, training)
        if self.output_holder is None:
            return outputs
        if isinstance(outputs, tuple | list):
            return type(outputs)((self.output_holder(outputs[0], training=training), *outputs[1:]))
        return self.output_holder(outputs, training=training)

    def _quantize_inputs(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        training: bool | None,  # noqa: FBT001 - Keras's word
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        values = list(args)
        missing = "key" in self.input_names and len(values) <= self._position("key") and kwargs.get("key") is None
        if missing:  # an attention layer's key is its value, before either is quantized
            position = self._position("value")
            kwargs = {**kwargs, "key": values[position] if position < len(values) else kwargs["value"]}
        for name, holder in self.input_holders.items():
            argument, _, item = name.partition(".")
            position = self._position(argument)
            if position < len(values):
                values[position] = _held(values[position], item, holder, training)
            elif kwargs.get(argument) is not None:
                kwargs = {**kwargs, argument: _held(kwargs[argument], item, holder, training)}
        return tuple(values), kwargs

    def _position(self, argument: str) -> int:
        arguments = list(dict.fromkeys(name.partition(".")[0] for name in self.input_names))
        return arguments.index(argument)

    def _call_layer(self, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool | None) -> Any:  # noqa: FBT001 - as above
        layer = self.layer
        if self._takes_training and training is not None:
            kwargs = {**kwargs, "training": training}
        if not (self.weights_quantizers and self.quantizes_weights):
            return layer(*args, **kwargs)
        quantized = self.get_quantized_weights(training)
        replaced = {id(weight): quantized[name] for name, weight, _ in self.get_weights_vars()}
        variables = list(layer.variables)
        with keras.StatelessScope(
            [(variable, replaced.get(id(variable), variable.value)) for variable in variables], collect_losses=True
        ) as scope:
            before = {id(variable): scope.get_current_value(variable) for variable in variables}
            outputs = layer(*args, **kwargs)
        for variable in variables:
            value = scope.get_current_value(variable)
            if value is not before[id(variable)] and id(variable) not in replaced:
                variable.assign(value)
        for loss in scope.losses:
            self.add_loss(loss)
        return outputs

    def compute_output_spec(self, *args: Any, training: bool | None = None, **kwargs: Any) -> Any:
        """Return what the layer says; a symbolic call works before calibration."""
        if self._takes_training and training is not None:
            kwargs = {**kwargs, "training": training}
        return self.layer.compute_output_spec(*args, **kwargs)

    def compute_output_shape(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the layer says."""
        return self.layer.compute_output_shape(*args, **kwargs)

    def compute_mask(self, inputs: Any, previous_mask: Any) -> Any:
        """Return what the layer says."""
        if isinstance(inputs, tuple) and len(inputs) == 1:
            inputs, previous_mask = inputs[0], previous_mask[0] if isinstance(previous_mask, tuple) else previous_mask
        return self.layer.compute_mask(inputs, previous_mask)

    # ---- saving -----------------------------------------------------------------------------------------------------

    def build(self, input_shape: Any = None) -> None:
        """Do nothing: the layer is built before it is wrapped."""

    def get_build_config(self) -> None:
        """Return nothing: the layer's own build config is part of `get_config`."""

    def build_from_config(self, config: Any) -> None:
        """Do nothing: the layer was built by `from_config`."""

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` rebuilds the wrapper from; JSON-clean when the layer's own config is."""
        return {**self._own_config(), "layer": keras.saving.serialize_keras_object(self.layer)}

    def _own_config(self) -> dict[str, Any]:
        output = self.output_holder
        return {
            "name": self.name,
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
        return cls._made(config, keras.saving.deserialize_keras_object(config["layer"]))

    def around(self, layer: Any) -> QuantizationWrapper:
        """Return a wrapper with equal quantizers around another layer, such as a copy of this one's."""
        return self._made(self._own_config(), layer)

    @classmethod
    def _made(cls, config: Mapping[str, Any], layer: Any) -> QuantizationWrapper:
        holder, output = ActivationQuantizationHolder.from_config, config["output_holder"]
        quantizers = config["weights_quantizers"]
        wrapper = cls(
            layer,
            {name: quantizer_from_document(each, "keras", class_of) for name, each in quantizers.items()},
            input_holders={name: holder(each) for name, each in config["input_holders"].items()},
            input_names=config["input_names"],
            output_holder=None if output is None else holder(output),
            name=config["name"],
        )
        wrapper.plan = None if config["plan"] is None else plan_from_document(config["plan"])
        wrapper.notes = config["notes"]
        return wrapper


def _check(layer: Any, weights_quantizers: Any) -> None:
    """Refuse what a wrapper can't be made of, before anything is changed."""
    if not isinstance(layer, keras.layers.Layer):
        raise ModelError(f"QuantizationWrapper needs a keras.layers.Layer, got {type(layer).__name__}")
    if not layer.built:
        raise ModelError(f"layer {layer.name!r} is not built", "build the model, or call it once with an example.")
    if not isinstance(weights_quantizers, Mapping):
        problem = f"weights_quantizers must be a mapping, got {type(weights_quantizers).__name__}"
        raise UnsupportedConfigError("QuantizationWrapper", problem)
    if not all(isinstance(attribute, str) for attribute in weights_quantizers):
        problem = f"weights_quantizers must be keyed by str, got {list(weights_quantizers)}"
        raise UnsupportedConfigError("QuantizationWrapper", problem)
    for attribute, quantizer in weights_quantizers.items():
        require_quantizer(quantizer, QuantizationTarget.Weights, f"QuantizationWrapper: {attribute!r}")
        weight_of(layer, attribute)


def _held(value: Any, item: str, holder: ActivationQuantizationHolder, training: bool | None) -> Any:  # noqa: FBT001 - Keras's word
    """Return an argument quantized, or a list with one of its items quantized."""
    if not item:
        return holder(value, training=training)
    values = list(value)
    if int(item) < len(values):
        values[int(item)] = holder(values[int(item)], training=training)
    return type(value)(values) if isinstance(value, tuple) else values
