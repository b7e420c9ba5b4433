"""What the quantization wrapper and the holder of either Keras are beside layers of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from trainable_core.backend.building import require_quantizer
from trainable_core.calibration import Observer
from trainable_core.documents.plan import plan_document, plan_from_document
from trainable_core.documents.quantizer import quantizer_document, quantizer_from_document
from trainable_core.enums import QuantizationMethod, QuantizationTarget
from trainable_core.errors import CalibrationError, InvalidArgumentError, ModelError
from trainable_core.quantizer import BaseTrainableQuantizer
from trainable_core.recipe.plan import LayerPlan

if TYPE_CHECKING:
    from numpy.typing import NDArray

P = TypeVar("P", bound="KerasPart")
H = TypeVar("H", bound="KerasHolder")
W = TypeVar("W", bound="KerasWrapper")


class KerasPart:
    """What a wrapper and a holder share: the plan they were made by, and what `wrap` noted on the first of a model."""

    backend: ClassVar[str]
    """Name of the backend in the registry."""

    name: str
    plan: LayerPlan | None
    notes: dict[str, Any] | None

    @staticmethod
    def class_of(target: QuantizationTarget, method: QuantizationMethod) -> type[Any]:
        """Return the backend's deployed class of a target and a grid."""
        raise NotImplementedError

    def keep(self, **values: Any) -> None:
        """Set attributes as they are; a backend whose Keras makes containers of its own of them overrides it."""
        for name, value in values.items():
            setattr(self, name, value)

    @classmethod
    def quantizer_of(cls, document: Mapping[str, Any]) -> Any:
        """Return the quantizer that `quantizer_document` was called on."""
        return quantizer_from_document(document, cls.backend, cls.class_of)

    def noted_config(self) -> dict[str, Any]:
        """Return the part of `get_config` that tells plan and notes; JSON-clean."""
        return {"plan": None if self.plan is None else plan_document(self.plan), "notes": self.notes}

    def keep_noted(self: P, config: Mapping[str, Any]) -> P:  # noqa: PYI019 - Self is not in Python 3.10
        """Take plan and notes from a config; returns the layer."""
        plan = config["plan"]
        self.keep(plan=None if plan is None else plan_from_document(plan), notes=config["notes"])
        return self


class KerasHolder(KerasPart):
    """An activation quantization holder."""

    activation_holder_quantizer: Any
    observer: Observer | None
    tensor: str

    def start(self, quantizer: Any) -> None:
        """Initialize the quantizer and what the holder knows; called once, by its constructor."""
        self.keep(observer=None, plan=None, tensor="", notes=None)
        quantizer.initialize_quantization(None, "activation", self)

    @property
    def trainable_quantizer(self) -> Any | None:
        """The quantizer while it is trainable, None once it is inferable."""
        quantizer = self.activation_holder_quantizer
        return quantizer if isinstance(quantizer, BaseTrainableQuantizer) else None

    def observe(self, values: NDArray[Any]) -> None:
        """Let the observer see float32 values.

        Raises
        ------
        CalibrationError
            When they are not finite; names the tensor.
        """
        assert self.observer is not None  # noqa: S101 - that is when it is called
        try:
            self.observer.update(values)
        except CalibrationError as error:
            subject = getattr(self.activation_holder_quantizer, "subject", "activation")
            hint = "look for the layer whose output diverges, or the bad batch."
            raise CalibrationError(subject, error.problem, hint) from error

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return the input's own shape."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` rebuilds the holder from; JSON-clean."""
        quantizer = quantizer_document(self.activation_holder_quantizer)
        return {"name": self.name, "quantizer": quantizer, "tensor": self.tensor, **self.noted_config()}

    @classmethod
    def from_config(cls: type[H], config: Mapping[str, Any]) -> H:  # noqa: PYI019 - Self is not in Python 3.10
        """Return a holder equal to the one that `get_config` was called on."""
        make: Callable[..., H] = cls
        holder = make(cls.quantizer_of(config["quantizer"]), name=config["name"])
        holder.keep(tensor=config["tensor"])
        return holder.keep_noted(config)


class KerasWrapper(KerasPart):
    """A quantization wrapper of one layer."""

    layer: Any
    weights_quantizers: dict[str, Any]
    input_holders: dict[str, Any]
    input_names: tuple[str, ...]
    output_holder: Any
    quantizes_weights: bool

    holder_class: ClassVar[type[KerasHolder]]
    """The backend's holder."""

    @staticmethod
    def find_weight(layer: Any, attribute: str) -> Any | None:
        """Return the variable that an attribute path of a layer leads to, None when it leads to none."""
        raise NotImplementedError

    @staticmethod
    def value_of(variable: Any) -> Any:
        """Return a variable's value as a tensor."""
        raise NotImplementedError

    @classmethod
    def weight_of(cls, layer: Any, attribute: str) -> Any:
        """Return the variable that an attribute path of a layer leads to.

        Raises
        ------
        InvalidArgumentError
            When there is none.
        """
        found = cls.find_weight(layer, attribute)
        if found is None:
            raise InvalidArgumentError("QuantizationWrapper", f"the layer has no weight {attribute!r}")
        return found

    @classmethod
    def check(cls, layer: Any, layer_class: Any, weights_quantizers: Any) -> None:
        """Refuse what a wrapper can't be made of, before anything is changed.

        Parameters
        ----------
        layer : layer
            What is to be wrapped.
        layer_class : type
            Class of the framework's layers.
        weights_quantizers : mapping of str to quantizer
            By attribute.

        Raises
        ------
        ModelError
            When it is no layer, or not built.
        InvalidArgumentError
            When the quantizers are no mapping from its weights to quantizers of weights.
        """
        if not isinstance(layer, layer_class):
            raise ModelError(f"QuantizationWrapper needs a keras.layers.Layer, got {type(layer).__name__}")
        if not layer.built:
            raise ModelError(f"layer {layer.name!r} is not built", "build the model, or call it once with an example.")
        if not isinstance(weights_quantizers, Mapping):
            problem = f"weights_quantizers must be a mapping, got {type(weights_quantizers).__name__}"
            raise InvalidArgumentError("QuantizationWrapper", problem)
        if not all(isinstance(attribute, str) for attribute in weights_quantizers):
            problem = f"weights_quantizers must be keyed by str, got {list(weights_quantizers)}"
            raise InvalidArgumentError("QuantizationWrapper", problem)
        for attribute, quantizer in weights_quantizers.items():
            require_quantizer(quantizer, QuantizationTarget.Weights, f"QuantizationWrapper: {attribute!r}")
            cls.weight_of(layer, attribute)

    def initialize_quantizers(self) -> None:
        """Initialize the quantizers of the layer's weights; called once, by the constructor."""
        for attribute, quantizer in self.weights_quantizers.items():
            shape = tuple(self.weight_of(self.layer, attribute).shape)
            quantizer.initialize_quantization(shape, attribute, self)

    # ---- mctq's interface -------------------------------------------------------------------------------------------

    @property
    def is_weights_quantization(self) -> bool:
        """Whether any weight is quantized."""
        return bool(self.weights_quantizers)

    @property
    def num_weights_quantizers(self) -> int:
        """Number of quantized weights."""
        return len(self.weights_quantizers)

    def get_weights_vars(self) -> list[tuple[str, Any, Any]]:
        """Return (attribute, float weight, quantizer) of each quantized weight."""
        return [(name, self.weight_of(self.layer, name), q) for name, q in self.weights_quantizers.items()]

    def get_quantized_weights(self, training: Any = None) -> dict[str, Any]:
        """Return each quantized weight's quantized value, by attribute."""
        quantized = {}
        for attribute, weight, quantizer in self.get_weights_vars():
            arguments = {"training": training} if isinstance(quantizer, BaseTrainableQuantizer) else {}
            quantized[attribute] = quantizer(self.value_of(weight), **arguments)
        return quantized

    def deployed_quantizers(self) -> dict[str, Any]:
        """Return the weights' quantizers, trainable ones converted: all of them, or an error and nothing changed."""
        return {
            name: quantizer.convert2inferable() if isinstance(quantizer, BaseTrainableQuantizer) else quantizer
            for name, quantizer in self.weights_quantizers.items()
        }

    # ---- calling ----------------------------------------------------------------------------------------------------

    @property
    def holders(self) -> list[Any]:
        """Holders of inputs and output."""
        inputs = list(self.input_holders.values())
        return inputs if self.output_holder is None else [*inputs, self.output_holder]

    def argument_names(self) -> list[str]:
        """Return the names of the layer's tensor arguments, a list of tensors once."""
        return list(dict.fromkeys(name.partition(".")[0] for name in self.input_names))

    def quantize_inputs(
        self, given: Sequence[Any], kwargs: dict[str, Any], training: Any
    ) -> tuple[list[Any], dict[str, Any]]:
        """Return the layer's arguments with those quantized that have a holder.

        Parameters
        ----------
        given : sequence
            Positional arguments.
        kwargs : dict
            The others.
        training : bool or tensor, optional
            Whether the model trains.
        """
        values, names = list(given), self.argument_names()
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

    def quantize_output(self, outputs: Any, training: Any) -> Any:
        """Return the layer's output quantized where it has a holder; of several the first."""
        if self.output_holder is None:
            return outputs
        if isinstance(outputs, tuple | list):
            return type(outputs)((self.output_holder(outputs[0], training=training), *outputs[1:]))
        return self.output_holder(outputs, training=training)

    # ---- saving -----------------------------------------------------------------------------------------------------

    def own_config(self) -> dict[str, Any]:
        """Return what `get_config` tells beside the layer; JSON-clean."""
        return {
            "name": self.name,
            "weights_quantizers": {name: quantizer_document(q) for name, q in self.weights_quantizers.items()},
            "input_holders": {name: holder.get_config() for name, holder in self.input_holders.items()},
            "input_names": list(self.input_names),
            "output_holder": None if self.output_holder is None else self.output_holder.get_config(),
            **self.noted_config(),
        }

    @classmethod
    def of_config(cls: type[W], config: Mapping[str, Any], layer: Any) -> W:  # noqa: PYI019 - Self is not in Python 3.10
        """Return the wrapper that `own_config` tells of, around a layer."""
        make: Callable[..., W] = cls
        holder, output = cls.holder_class.from_config, config["output_holder"]
        wrapper = make(
            layer,
            {name: cls.quantizer_of(each) for name, each in config["weights_quantizers"].items()},
            input_holders={name: holder(each) for name, each in config["input_holders"].items()},
            input_names=config["input_names"],
            output_holder=None if output is None else holder(output),
            name=config["name"],
        )
        return wrapper.keep_noted(config)

    def around(self: W, layer: Any) -> W:  # noqa: PYI019 - Self is not in Python 3.10
        """Return a wrapper with equal quantizers around another layer, such as a copy of this one's."""
        return self.of_config(self.own_config(), layer)


def _held(value: Any, item: str, holder: Any, training: Any) -> Any:
    """Return an argument quantized, or a list with one of its items quantized."""
    if not item:
        return holder(value, training=training)
    values = list(value)
    if int(item) < len(values):
        values[int(item)] = holder(values[int(item)], training=training)
    return type(value)(values) if isinstance(value, tuple) else values


# ---- the parts of a model -------------------------------------------------------------------------------------------


def parts_among(layers: Sequence[Any]) -> list[Any]:
    """Return the wrappers, and the holders that stand by themselves, among a model's layers, in their order."""
    parts = [each for each in layers if isinstance(each, KerasPart)]
    inside = {id(holder) for each in parts if isinstance(each, KerasWrapper) for holder in each.holders}
    return [each for each in parts if id(each) not in inside]


def holders_of(part: KerasPart) -> list[KerasHolder]:
    """Return the holders of a wrapper, or a holder itself."""
    return part.holders if isinstance(part, KerasWrapper) else [part] if isinstance(part, KerasHolder) else []
