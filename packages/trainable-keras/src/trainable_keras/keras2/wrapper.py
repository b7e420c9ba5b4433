"""The quantization wrapper: mctq's, mended."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf
from mct_quantizers import KerasQuantizationWrapper

from trainable_core.backend.unlisted import UnlistedSubclass
from trainable_keras.keras2.copying import build_by, build_configs
from trainable_keras.keras2.engine import Tensor, keras, read, untracked
from trainable_keras.keras2.holder import ActivationQuantizationHolder
from trainable_keras.keras2.inferable import class_of
from trainable_keras.keras2.layers import TYPES
from trainable_keras.keras2.quantizers import count_step
from trainable_keras.layers import weight_path
from trainable_keras.parts import KerasWrapper


@keras.saving.register_keras_serializable(package="trainable_keras.keras2")
class QuantizationWrapper(
    KerasWrapper,
    keras.layers.Wrapper,  # type: ignore[misc] # TensorFlow is untyped
    metaclass=UnlistedSubclass,
    of=KerasQuantizationWrapper,
):
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

    backend = "tf_keras"
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
        super().__init__(layer, dict(weights_quantizers), name=name or layer.name, dtype="float32", autocast=False)
        self.supports_masking = layer.supports_masking
        self.keep(
            input_names=tuple(input_names),
            quantizes_weights=True,
            plan=None,
            notes=None,
            _accepted=tuple(inspect.signature(layer.call).parameters),
        )
        self.input_holders = dict(input_holders or {})
        self.output_holder = output_holder
        self.initialize_quantizers()
        self.built = True
        if not layer.trainable:
            self.trainable = False  # nor may its quantizers learn; set on the wrapper, it lets all of them learn again

    def keep(self, **values: Any) -> None:
        """Set attributes as they are; Keras would make containers of its own of them."""
        with untracked(self):
            super().keep(**values)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the layer that the wrapper doesn't have."""
        layer = vars(self).get("layer")
        if layer is None or name.startswith("_"):
            message = f"{type(self).__name__!r} object has no attribute {name!r}"
            raise AttributeError(message)
        return getattr(layer, name)

    def convert_to_inferable_quantizers(self) -> None:
        """Put inferable quantizers in the trainable ones' place, holders included; does nothing the second time."""
        self.weights_quantizers = self.deployed_quantizers()
        for holder in self.holders:
            holder.convert_to_inferable_quantizers()
        # held anew, so that variables come in the order in which a wrapper is made: the HDF5 format goes by it
        inputs, output = dict(self.input_holders), self.output_holder
        self.input_holders, self.output_holder = {}, None
        self.input_holders, self.output_holder = inputs, output

    # ---- calling ----------------------------------------------------------------------------------------------------

    def build(self, input_shape: Any) -> None:
        """Do nothing but note the shape: the layer is built before it is wrapped."""
        keras.layers.Layer.build(self, input_shape)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the layer's output with quantized weights, inputs and output; takes the layer's own arguments."""
        names = self.argument_names()
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
            values, kwargs = self.quantize_inputs(values, kwargs, training)
        if mask is not None and "mask" in self._accepted:
            kwargs = {**kwargs, "mask": mask}
        if training is not None and "training" in self._accepted:
            kwargs = {**kwargs, "training": training}
        layer = self.layer
        if self.weights_quantizers and self.quantizes_weights:
            count_step(self.weights_quantizers.values(), training)
            layer = with_weights(layer, self.get_quantized_weights(training))
        return self.quantize_output(layer(*values, **kwargs), training)

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
        layer = keras.layers.serialize(self.layer)
        layer.pop("build_config", None)
        built = {"layer": layer, "builds": build_configs(self.layer)}
        return {**self.own_config(), **built, "trainable": self.trainable}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> QuantizationWrapper:
        """Return a wrapper equal to the one that `get_config` was called on."""
        layer = keras.layers.deserialize(config["layer"])
        build_by(layer, config["builds"])
        layer.built = True
        wrapper = cls.of_config(config, layer)
        if not config["trainable"]:
            wrapper.trainable = False
        return wrapper


def with_weights(layer: Any, weights: Mapping[str, Tensor]) -> Any:
    """Return a shallow copy of a layer with tensors in the place of some of its weights, in their compute dtype."""
    copies: dict[int, Any] = {}
    for attribute, value in weights.items():
        steps = weight_path(layer, attribute)
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
