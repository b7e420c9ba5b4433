"""Quantized layers of Keras 3: the classes that come before a layer's own; see `trainable_keras.two_classes`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras

from trainable_core.quantizer import BaseTrainableQuantizer
from trainable_keras.batch_norm import Simulated
from trainable_keras.configs import BIASED, ConfigKit
from trainable_keras.keras3.copying import remade, scopes, unlocked
from trainable_keras.keras3.engine import call_context, dtype_read, infers_shapes, read_uncast
from trainable_keras.keras3.folding import FoldedBatchNormalization
from trainable_keras.keras3.functions import FUNCTIONS
from trainable_keras.keras3.granularity import class_of
from trainable_keras.keras3.holder import ActivationQuantizationHolder
from trainable_keras.keras3.layers import TYPES
from trainable_keras.keras3.tracing import graph_of
from trainable_keras.parts import KerasWrapper, deployed_quantizers, freeze_like, start_wrapper, variable_of
from trainable_keras.two_classes import Composite, Pending, Within, add_class, own_class

PACKAGE = "trainable_keras"
_registered = keras.saving.register_keras_serializable(package=PACKAGE)


class Kit3(ConfigKit):
    """What layers of two classes ask of Keras 3."""

    package = PACKAGE
    goes_by_registration = True
    functions = FUNCTIONS
    saving = keras.saving

    def running(self) -> bool:
        """Return whether a layer is being called in this thread."""
        return call_context() is not None

    def training(self) -> Any:
        """Return what the layer that is being called was told of training; None when nothing is known."""
        return getattr(call_context(), "training", None)

    def cast_like(self, value: Any, variable: keras.Variable) -> Any:
        """Return a tensor in the dtype in which a layer reads a variable."""
        return keras.ops.cast(value, dtype_read(variable))

    def infers_shapes(self) -> bool:
        """Return whether a layer is called only to know the shape of its output."""
        return infers_shapes()

    def update(self, variable: Any, value: Any) -> None:
        """Set a variable to a tensor, as a layer does in its call."""
        variable.assign(value)

    def graph(self, layer: Any) -> Any:
        """Return the calls of a functional or Sequential model, None of what has no graph."""
        return graph_of(layer)

    def document(self, layer: Any) -> dict[str, Any]:
        """Return what Keras writes of a layer."""
        document: dict[str, Any] = keras.saving.serialize_keras_object(layer)
        return document

    def of_document(self, document: Mapping[str, Any]) -> Any:
        """Return the layer that `document` was called on, not built."""
        return keras.saving.deserialize_keras_object(dict(document))

    def build_config(self, layer: Any) -> Any:
        """Return how a layer was built; JSON-clean, None when that is not known."""
        return own_class(layer).get_build_config(layer) if layer.built else None

    def build(self, layer: Any, config: Any) -> None:
        """Build a layer as `build_config` says."""
        if not layer.built:
            layer.build_from_config(config)

    def add_bias(self, layer: Any) -> None:
        """Give a built layer the bias that it got when a batch norm was folded into it."""
        remade(layer, layer.name, use_bias=True)
        vars(layer)[BIASED] = True

    def forget_variables(self, layer: Any) -> None:
        """Take its variables from a layer."""
        with unlocked(layer):
            for name, value in list(vars(layer).items()):
                if isinstance(value, keras.Variable):
                    layer._tracker.untrack(value)  # noqa: SLF001 - there is no public way
                    setattr(layer, name, None)


KIT = Kit3()


@_registered
class QuantizationWrapper(KerasWrapper, keras.layers.Layer):  # type: ignore[misc] # keras is untyped
    """A layer whose weights, and if asked inputs and output, are quantized as it is called.

    Making one changes the layer itself: it becomes an instance of this class too, and stays what it is and where it is.

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
    The layer's own `call` runs. Its attributes that lead to a quantized weight give the quantized value while a model
    runs, whoever reads them, and the float variable at any other time.

    mctq's own wrapper can't be built on Keras 3: it sets a kernel that is a property there.
    """

    _kit = KIT
    backend = "keras"
    class_of = staticmethod(class_of)
    holder_class = ActivationQuantizationHolder
    find_weight = staticmethod(TYPES.find_weight)
    value_of = staticmethod(read_uncast)

    def __new__(
        cls,
        layer: Any,
        weights_quantizers: Mapping[str, Any],
        *,
        input_holders: Mapping[str, ActivationQuantizationHolder] | None = None,  # noqa: ARG004 - for the constructor
        input_names: Sequence[str] = ("inputs",),  # noqa: ARG004 - as above
        output_holder: ActivationQuantizationHolder | None = None,  # noqa: ARG004 - as above
    ) -> Any:
        """Return the layer, of two classes."""
        QuantizationWrapper.check(layer, keras.layers.Layer, weights_quantizers)
        add_class(layer, QuantizationWrapper)
        return layer

    def __init__(
        self,
        layer: Any,
        weights_quantizers: Mapping[str, Any],
        *,
        input_holders: Mapping[str, ActivationQuantizationHolder] | None = None,
        input_names: Sequence[str] = ("inputs",),
        output_holder: ActivationQuantizationHolder | None = None,
    ) -> None:
        start_wrapper(layer, LayerWithin, weights_quantizers, input_names)
        for attribute, quantizer in weights_quantizers.items():
            weight = variable_of(layer, attribute)
            # In an HDF5 file a variable's path holds no other variables. Quantizers may add theirs to the layer.
            with scopes(f"{weight.path}_quantizer"), unlocked(layer):
                quantizer.initialize_quantization(tuple(weight.shape), attribute, layer)
        self._hold(dict(weights_quantizers), dict(input_holders or {}), output_holder)

    def _hold(self, weights: dict[str, Any], inputs: dict[str, Any], output: Any) -> None:
        """Keep quantizers and holders, in this order: files go by it."""
        with unlocked(self):
            self.weights_quantizers = weights
            self.input_holders = inputs
            self.output_holder = output
        freeze_like(self)
        if self.bias_quantizer is not None:
            self.bias_quantizer.follow(weights)

    def convert_to_inferable_quantizers(self) -> None:
        """Put inferable quantizers in the trainable ones' place, holders included; does nothing the second time."""
        deployed, inputs, output = deployed_quantizers(self), dict(self.input_holders), self.output_holder
        if any(isinstance(each, BaseTrainableQuantizer) for each in self.weights_quantizers.values()):
            for each in [*self.weights_quantizers.values(), *self.holders]:
                self._tracker.untrack(each)
            self._hold(deployed, inputs, output)
        for holder in self.holders:
            holder.convert_to_inferable_quantizers()


@_registered
class LayerWithin(Within):
    """A layer whose weights are quantized by the layer around it."""

    _kit = KIT


@_registered
class SimulatedBatchNormalization(Simulated):
    """A batch norm whose folding the layer before it simulates."""

    _kit = KIT


@_registered
class CompositeLayer(Composite):
    """A layer with quantized layers inside."""

    _kit = KIT


@_registered
class PendingLayer(Pending):
    """A layer that is quantized as soon as it is built."""

    _kit = KIT


Kit3.pending, Kit3.composite, Kit3.wrapper, Kit3.passing = (
    PendingLayer,
    CompositeLayer,
    QuantizationWrapper,
    FoldedBatchNormalization,
)
Kit3.simulated = SimulatedBatchNormalization
FoldedBatchNormalization._kit = KIT  # noqa: SLF001 - ours
