"""The quantization wrapper: what mctq's is for Keras 2, native."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from trainable_core.quantizer import BaseTrainableQuantizer
from trainable_keras.keras3.engine import read
from trainable_keras.keras3.holder import ActivationQuantizationHolder
from trainable_keras.keras3.inferable import class_of
from trainable_keras.keras3.layers import TYPES
from trainable_keras.parts import KerasWrapper


@keras.saving.register_keras_serializable(package="trainable_keras")
class QuantizationWrapper(KerasWrapper, keras.layers.Layer):  # type: ignore[misc] # keras is untyped
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

    backend = "keras"
    class_of = staticmethod(class_of)
    holder_class = ActivationQuantizationHolder
    find_weight = staticmethod(TYPES.find_weight)
    value_of = staticmethod(read)

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
        self.check(layer, keras.layers.Layer, weights_quantizers)
        super().__init__(name=name or layer.name, dtype="float32", autocast=False)
        self.layer = layer
        self.supports_masking = layer.supports_masking
        self.input_names = tuple(input_names)
        self.quantizes_weights = True
        self.weights_quantizers = dict(weights_quantizers)
        self.input_holders = dict(input_holders or {})
        self.output_holder = output_holder
        self.keep(plan=None, notes=None)
        self.initialize_quantizers()
        self._takes_training = "training" in inspect.signature(layer.call).parameters
        self.built = True
        if not layer.trainable:
            self.trainable = False  # nor may its quantizers learn; set on the wrapper, it lets all of them learn again

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the layer that the wrapper doesn't have."""
        try:
            return super().__getattr__(name)  # on the torch engine, layers and variables are found by it
        except AttributeError:
            if name == "layer" or name.startswith("_"):
                message = f"{type(self).__name__!r} object has no attribute {name!r}"
                raise AttributeError(message) from None
        return getattr(self.layer, name)

    def convert_to_inferable_quantizers(self) -> None:
        """Put inferable quantizers in the trainable ones' place, holders included; does nothing the second time."""
        deployed = self.deployed_quantizers()
        self._tracker.unlock()
        for name, quantizer in deployed.items():
            if isinstance(self.weights_quantizers[name], BaseTrainableQuantizer):
                self._tracker.untrack(self.weights_quantizers[name])
                self.weights_quantizers[name] = quantizer
        self._tracker.lock()
        for holder in self.holders:
            holder.convert_to_inferable_quantizers()

    # ---- calling ----------------------------------------------------------------------------------------------------

    def call(self, *args: Any, training: bool | None = None, **kwargs: Any) -> Any:
        """Return the layer's output with quantized weights, inputs and output."""
        values: Sequence[Any] = args
        if self.input_holders:
            values, kwargs = self.quantize_inputs(args, kwargs, training)
        return self.quantize_output(self._call_layer(values, kwargs, training), training)

    def _call_layer(self, args: Sequence[Any], kwargs: dict[str, Any], training: bool | None) -> Any:  # noqa: FBT001 - as above
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
        layer._clear_losses()  # noqa: SLF001 - else JAX, which trains in a scope, counts a loss for each layer that knows it
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
        return {**self.own_config(), "layer": keras.saving.serialize_keras_object(self.layer)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> QuantizationWrapper:
        """Return a wrapper equal to the one that `get_config` was called on."""
        return cls.of_config(config, keras.saving.deserialize_keras_object(config["layer"]))
