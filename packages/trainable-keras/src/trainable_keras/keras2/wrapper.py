"""Quantized layers of Keras 2: the classes that come before a layer's own; see `trainable_keras.two_classes`."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tensorflow as tf
from mct_quantizers import KerasQuantizationWrapper

from trainable_core.backend.unlisted import UnlistedSubclass
from trainable_core.errors import ModelError
from trainable_keras.batch_norm import Simulated
from trainable_keras.configs import BIASED, ConfigKit
from trainable_keras.copying import attributes_without
from trainable_keras.keras2.copying import build_by, build_configs, remade
from trainable_keras.keras2.engine import keras, read
from trainable_keras.keras2.folding import FoldedBatchNormalization
from trainable_keras.keras2.functions import FUNCTIONS
from trainable_keras.keras2.granularity import class_of
from trainable_keras.keras2.holder import ActivationQuantizationHolder
from trainable_keras.keras2.layers import TYPES
from trainable_keras.keras2.quantizers import count_step
from trainable_keras.keras2.tracing import graph_of
from trainable_keras.parts import KerasWrapper, deployed_quantizers, freeze_like, start_wrapper, variable_of
from trainable_keras.two_classes import Composite, Pending, Within, add_class, own_class

_ROOT = keras.layers.Layer.__module__.partition(".")[0]
_base_layer_utils: Any = importlib.import_module(f"{_ROOT}.src.engine.base_layer_utils")
_autocast: Any = importlib.import_module(f"{_ROOT}.src.mixed_precision.autocast_variable")
_saved_model: Any = importlib.import_module(f"{_ROOT}.src.saving.legacy.saved_model.utils")
PACKAGE = "trainable_keras.keras2"
_registered = keras.saving.register_keras_serializable(package=PACKAGE)


def read_uncast(variable: Any) -> Any:
    """Return a variable's value as a tensor, also while mixed precision casts what layers read."""
    with _autocast.enable_auto_cast_variables(None):
        return read(variable)


class Kit2(ConfigKit):
    """What layers of two classes ask of Keras 2."""

    package = PACKAGE
    goes_by_registration = False
    functions = FUNCTIONS
    saving = keras.saving

    def running(self) -> bool:
        """Return whether a layer is being called in this thread."""
        return bool(_base_layer_utils.call_context().in_call)

    def training(self) -> Any:
        """Return what the layer that is being called was told of training; None when nothing is known."""
        return _base_layer_utils.call_context().training

    def cast_like(self, value: Any, variable: Any) -> Any:
        """Return a tensor in the dtype in which a layer reads a variable."""
        return tf.cast(value, getattr(variable, "_cast_dtype", variable.dtype))

    def infers_shapes(self) -> bool:
        """Return whether a layer is called only to know the shape of its output."""
        return str(getattr(tf.compat.v1.get_default_graph(), "name", "")).endswith("_scratch_graph")

    def update(self, variable: Any, value: Any) -> None:
        """Set a variable to a tensor, as a layer does in its call."""
        variable.assign(value)

    def graph(self, layer: Any) -> Any:
        """Return the calls of a functional or Sequential model, None of what has no graph."""
        return graph_of(layer)

    def document(self, layer: Any) -> dict[str, Any]:
        """Return what Keras writes of a layer."""
        if _saved_model.in_tf_saved_model_scope():  # Keras would take it for what it writes of the layer of two classes
            return {"class_name": keras.saving.get_registered_name(type(layer)), "config": layer.get_config()}
        document: dict[str, Any] = keras.layers.serialize(layer)
        return document

    def of_document(self, document: Mapping[str, Any]) -> Any:
        """Return the layer that `document` was called on, not built."""
        told = {key: value for key, value in document.items() if value is not None}
        name = told["class_name"]
        stock = getattr(keras.layers, name, None)  # Keras does not find all of its own layers
        known = {name: stock} if stock is not None and told.get("registered_name", name) == name else None
        return keras.layers.deserialize(told, custom_objects=known)

    def build_config(self, layer: Any) -> Any:
        """Return how a layer and those inside it were built; JSON-clean."""
        return build_configs(layer) if layer.built else None

    def build(self, layer: Any, config: Any) -> None:
        """Build a layer as `build_config` says."""
        build_by(layer, config)

    def add_bias(self, layer: Any) -> None:
        """Give a built layer the bias that it got when a batch norm was folded into it."""
        remade(layer, layer.name, use_bias=True)
        vars(layer)[BIASED] = True

    def forget_variables(self, layer: Any) -> None:
        """Take its variables from a layer."""
        names = {name for name, value in vars(layer).items() if isinstance(value, tf.Variable)}
        left = attributes_without(layer, names)
        vars(layer).update({**left, **dict.fromkeys(names), "_trainable_weights": [], "_non_trainable_weights": []})


KIT = Kit2()


@_registered
class QuantizationWrapper(
    KerasWrapper,
    keras.layers.Wrapper,  # type: ignore[misc] # TensorFlow is untyped
    metaclass=UnlistedSubclass,
    of=KerasQuantizationWrapper,
):
    """A layer whose weights, and if asked inputs and output, are quantized as it is called.

    Making one changes the layer itself: it becomes an instance of this class too, and stays what it is and where it is.

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

    Notes
    -----
    The layer's own `call` runs. Its attributes that lead to a quantized weight give the quantized value while a model
    runs, whoever reads them, and the float variable at any other time.

    Mended against mctq: the layer keeps its weights (mctq puts tensors in their place, which leak out of the graph they
    were made in) and all that its own class does; a layer that does not train stays so; there is no ``steps`` weight;
    weights of layers inside the layer can be quantized; converting twice changes nothing.
    """

    _kit = KIT
    _behind = (KerasQuantizationWrapper, keras.layers.Wrapper)
    backend = "tf_keras"
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
            quantizer.initialize_quantization(tuple(variable_of(layer, attribute).shape), attribute, layer)
        self._hold(dict(weights_quantizers), dict(input_holders or {}), output_holder)

    def _hold(self, weights: dict[str, Any], inputs: dict[str, Any], output: Any) -> None:
        """Keep quantizers and holders, in this order: files go by it."""
        # Keras tracks the list alone: it could not read a SavedModel with a name such as "cell.kernel" in a dictionary
        self.__dict__.update(weights_quantizers=weights, input_holders=inputs, output_holder=output)
        self.quantizing_layers = [*weights.values(), *self.holders]
        freeze_like(self)
        if self.bias_quantizer is not None:
            self.bias_quantizer.follow(self.weights_quantizers)

    def quantized_for_call(self, training: Any, attributes: Iterable[str] | None = None) -> dict[int, Any]:
        """Return the quantized values of the layer's weights, or of some, by the ``id`` of each."""
        names = self.weights_quantizers if attributes is None else attributes
        count_step([self.weights_quantizers[name] for name in names if name in self.weights_quantizers], training)
        return super().quantized_for_call(training, attributes)

    def convert_to_inferable_quantizers(self) -> None:
        """Put inferable quantizers in the trainable ones' place, holders included; does nothing the second time."""
        deployed = deployed_quantizers(self)
        for holder in self.holders:
            holder.convert_to_inferable_quantizers()
        inputs, output = dict(self.input_holders), self.output_holder
        self._hold({}, {}, None)
        self._hold(deployed, inputs, output)


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

    @property
    def _tracking_metadata(self) -> str:
        """Refuse to be part of a SavedModel that Keras is to read again; a SavedModel to serve has no metadata.

        Raises
        ------
        ModelError
            Always: Keras reads the layers inside before the layer is built, and their quantizers would be lost.
        """
        problem = f"layer {self.name!r} ({own_class(self).__name__}) with quantized layers inside"  # type: ignore[attr-defined] # a layer's
        raise ModelError(f"{problem} can't be read from a SavedModel", "save the model as a .keras file.")


@_registered
class PendingLayer(Pending):
    """A layer that is quantized as soon as it is built."""

    _kit = KIT


Kit2.pending, Kit2.composite, Kit2.wrapper, Kit2.passing = (
    PendingLayer,
    CompositeLayer,
    QuantizationWrapper,
    FoldedBatchNormalization,
)
Kit2.simulated = SimulatedBatchNormalization
FoldedBatchNormalization._kit = KIT  # noqa: SLF001 - ours
