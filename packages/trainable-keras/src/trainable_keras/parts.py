"""What the quantization wrapper and the holder of either Keras are beside layers of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from trainable_core.backend.building import require_quantizer
from trainable_core.calibration import Observer
from trainable_core.calibration.unseen import Sight
from trainable_core.documents.plan import plan_document, plan_from_document
from trainable_core.documents.quantizer import quantizer_document, quantizer_from_document
from trainable_core.enums import QuantizationMethod, QuantizationTarget, TieRule
from trainable_core.errors import CalibrationError, InvalidArgumentError, ModelError, QuantizerStateError
from trainable_core.quantizer import BaseTrainableQuantizer
from trainable_core.recipe.plan import LayerPlan
from trainable_keras.batch_norm import Simulation, folded_values
from trainable_keras.bias import BiasQuantizer, remember
from trainable_keras.layers import weight_path
from trainable_keras.two_classes import TOLD, OfTwoClasses, base_class, held, let_read, own_class

if TYPE_CHECKING:
    from numpy.typing import NDArray

H = TypeVar("H", bound="KerasHolder")


@dataclass(eq=False)
class Told:
    """What is known of a quantized layer, or of a holder, beside its quantizers.

    Parameters
    ----------
    plan : LayerPlan, optional
        By which it was made.
    notes : dict, optional
        What `wrap` noted of the whole model, on the first of its parts.
    tensor : str
        Which tensor a holder quantizes.
    input_names : tuple of str
        Names of a layer's tensor arguments, in positional order.
    weights : dict of str to (layer, str)
        Where each quantized weight is kept: in which layer, under which attribute.
    quantizes_weights : bool
        Whether weights are quantized; not while the model is calibrated.
    trains_weights : bool
        Whether weights are quantized as in training though the model is in inference, while their roundings learn.
    read : set of str
        Weights that a call of the model has read through their quantizers.
    observer : Observer, optional
        What a holder shows its values to.
    sights : list of Sight
        What notes who reads the layer's weights, while calibration looks why a holder saw nothing.
    bias : BiasQuantizer, optional
        What makes an integer of the layer's bias.
    tie_rule : TieRule, optional
        Where a holder's values half way between two codes go; None leaves it to the quantizer, which rounds them up.
    simulation : Simulation, optional
        The batch norm behind a layer, whose work it does.
    """

    plan: LayerPlan | None = None
    notes: dict[str, Any] | None = None
    tensor: str = ""
    input_names: tuple[str, ...] = ()
    weights: dict[str, tuple[Any, str]] = field(default_factory=dict)
    quantizes_weights: bool = True
    trains_weights: bool = False
    read: set[str] = field(default_factory=set)
    observer: Observer | None = None
    sights: list[Sight] = field(default_factory=list)
    bias: BiasQuantizer | None = None
    tie_rule: TieRule | None = None
    simulation: Simulation | None = None

    def noted_config(self) -> dict[str, Any]:
        """Return the part of a config that tells plan and notes; JSON-clean."""
        return {"plan": None if self.plan is None else plan_document(self.plan), "notes": self.notes}

    def keep_noted(self, config: Mapping[str, Any]) -> None:
        """Take plan and notes from a config."""
        plan = config["plan"]
        self.plan, self.notes = None if plan is None else plan_from_document(plan), config["notes"]


def told_of(part: Any) -> Told:
    """Return what is known of a quantized layer or a holder."""
    told: Told = vars(part)[TOLD]
    return told


def key_of(holder: Any) -> str:
    """Return what tells a holder from the others of its model: the layer's name and the tensor's."""
    return f"{plan_of(holder).layer.name}: {told_of(holder).tensor}"


def plan_of(part: Any) -> LayerPlan:
    """Return the plan by which `wrap` made a quantized layer or a holder."""
    plan = told_of(part).plan
    assert plan is not None  # noqa: S101 - `wrap` puts a plan on every part
    return plan


class KerasPart:
    """A quantized layer, or a holder."""

    backend: ClassVar[str]
    """Name of the backend in the registry."""

    name: str
    trainable: Any

    @staticmethod
    def class_of(target: QuantizationTarget, method: QuantizationMethod, kind: str = "") -> type[Any]:
        """Return the backend's deployed class of a target and a grid, or one of those that mctq lacks."""
        raise NotImplementedError

    @classmethod
    def quantizer_of(cls, document: Mapping[str, Any]) -> Any:
        """Return the quantizer that `quantizer_document` was called on."""
        return quantizer_from_document(document, cls.backend, cls.class_of)


class KerasHolder(KerasPart):
    """An activation quantization holder."""

    activation_holder_quantizer: Any

    def start(self, quantizer: Any) -> None:
        """Initialize the quantizer and what the holder knows; called once, by its constructor."""
        vars(self)[TOLD] = Told()
        quantizer.initialize_quantization(None, "activation", self)

    @property
    def trainable_quantizer(self) -> Any | None:
        """The quantizer while it is trainable, None once it is inferable."""
        quantizer = self.activation_holder_quantizer
        return quantizer if isinstance(quantizer, BaseTrainableQuantizer) else None

    @property
    def deployable_quantizer(self) -> Any | None:
        """The quantizer while it is trainable and switched on."""
        quantizer = self.trainable_quantizer
        return quantizer if quantizer is not None and quantizer.quantization_config.enabled else None

    def observe(self, values: NDArray[Any]) -> None:
        """Let the observer see float32 values.

        Raises
        ------
        CalibrationError
            When they are not finite; names the tensor.
        """
        observer = told_of(self).observer
        assert observer is not None  # noqa: S101 - that is when it is called
        try:
            observer.update(values)
        except CalibrationError as error:
            subject = getattr(self.activation_holder_quantizer, "subject", "activation")
            hint = "look for the layer whose output diverges, or the bad batch."
            raise CalibrationError(subject, error.problem, hint) from error

    @property
    def sends_ties_to_even(self) -> bool:
        """Whether values half way between two codes go to the even one, and there is a grid yet."""
        quantizer = self.activation_holder_quantizer
        trainable = self.trainable_quantizer
        is_ready = trainable is None or (trainable.calibrated and trainable.quantization_config.enabled)
        return told_of(self).tie_rule is TieRule.HALF_EVEN and is_ready and hasattr(quantizer, "ops")

    def off_ties(self, inputs: Any) -> Any:
        """Return float32 values that the quantizer, which rounds half up, rounds by the holder's rule.

        A target declares the rule of its kernels, and `trainable_keras.exporting.fit_to_target` tells the holders.
        """
        quantizer: Any = self.activation_holder_quantizer
        f = quantizer.functions
        values = f.cast(inputs, "float32")
        if self.trainable_quantizer is None:
            scale = f.hide_shape(f.read(quantizer.grid_scale))
        else:
            scale = f.stop_gradient(quantizer.grid(f.rank(values)).scale)
        return f.show_shape(quantizer.ops.ties_to_even(values, scale), values)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return the input's own shape."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` rebuilds the holder from; JSON-clean."""
        quantizer, told = quantizer_document(self.activation_holder_quantizer), told_of(self)
        rule = {} if told.tie_rule is None else {"tie_rule": told.tie_rule.value}
        return {"name": self.name, "quantizer": quantizer, "tensor": told.tensor, **rule, **told.noted_config()}

    @classmethod
    def from_config(cls: type[H], config: Mapping[str, Any]) -> H:  # noqa: PYI019 - Self is not in Python 3.10
        """Return a holder equal to the one that `get_config` was called on."""
        make: Callable[..., H] = cls
        holder = make(cls.quantizer_of(config["quantizer"]), name=config["name"])
        told_of(holder).tensor = config["tensor"]
        told_of(holder).tie_rule = TieRule(config["tie_rule"]) if "tie_rule" in config else None
        told_of(holder).keep_noted(config)
        if told_of(holder).plan is not None:
            remember(key_of(holder), holder)
        return holder


class KerasWrapper(KerasPart, OfTwoClasses):
    """A quantized layer: it has a class made of this one and its own, and is the same object that it was."""

    weights_quantizers: dict[str, Any]
    input_holders: dict[str, Any]
    output_holder: Any

    holder_class: ClassVar[type[KerasHolder]]
    """The backend's holder."""

    # ---- what each Keras writes -------------------------------------------------------------------------------------

    @staticmethod
    def find_weight(layer: Any, attribute: str) -> Any | None:
        """Return the variable that an attribute path of a layer leads to, None when it leads to none."""
        raise NotImplementedError

    @staticmethod
    def value_of(variable: Any) -> Any:
        """Return a variable's value as a tensor."""
        raise NotImplementedError

    # ---- making one -------------------------------------------------------------------------------------------------

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
        QuantizerStateError
            When it is wrapped already.
        InvalidArgumentError
            When the quantizers are no mapping from its weights to quantizers of weights.
        """
        if not isinstance(layer, layer_class):
            raise ModelError(f"QuantizationWrapper needs a keras.layers.Layer, got {type(layer).__name__}")
        if isinstance(layer, KerasPart):
            raise QuantizerStateError(layer.name, "it is quantized already", "wrap the float layer.")
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

    # ---- mctq's interface -------------------------------------------------------------------------------------------

    @property
    def layer(self) -> Any:
        """The quantized layer, which is this one; a layer that has an attribute of that name keeps it."""
        return {**vars(self), **vars(self).get("_modules", {})}.get("layer", self)  # PyTorch has layers among modules

    @layer.setter
    def layer(self, value: Any) -> None:
        vars(self)["layer"] = value

    def __dir__(self) -> list[str]:
        """Return the attribute names without those of properties that lead to what another attribute leads to.

        Keras walks through the attributes of a layer as it saves and loads it.
        """
        return [name for name in super().__dir__() if name != "holders" and (name != "layer" or self.layer is not self)]

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
        return [(name, variable_of(self, name), q) for name, q in self.weights_quantizers.items()]

    def weight_now(self, attribute: str) -> Any:
        """Return a weight as it is quantized now: the layer's own, or folded with the batch norm that it simulates."""
        value, simulation = self.value_of(variable_of(self, attribute)), told_of(self).simulation
        if simulation is None or simulation.norm is None or attribute not in {simulation.kernel, "bias"}:
            return value
        fold = simulation.folded_bias if attribute == "bias" else simulation.folded_kernel
        return fold(self._kit.functions, self.value_of, value)

    def weights_now(self) -> list[tuple[str, Any, Any]]:
        """Return (attribute, weight as it is quantized now, quantizer) of each quantized weight."""
        return [(name, self.weight_now(name), q) for name, q in self.weights_quantizers.items()]

    def get_quantized_weights(self, training: Any = None, attributes: Iterable[str] | None = None) -> dict[str, Any]:
        """Return each quantized weight's quantized value, or that of some, by attribute."""
        quantized = {}
        wanted = self.weights_quantizers if attributes is None else attributes
        for attribute in (each for each in wanted if each in self.weights_quantizers):
            quantizer = self.weights_quantizers[attribute]
            arguments = {"training": training} if isinstance(quantizer, BaseTrainableQuantizer) else {}
            quantized[attribute] = quantizer(self.weight_now(attribute), **arguments)
        return quantized

    @property
    def holders(self) -> list[Any]:
        """Holders of inputs and output."""
        inputs = list(self.input_holders.values())
        return inputs if self.output_holder is None else [*inputs, self.output_holder]

    # ---- calling ----------------------------------------------------------------------------------------------------

    _wraps_call = True

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the layer's own class makes of its quantized inputs and weights, quantized where it is to be."""
        training = kwargs.get("training")
        if training is None:
            training = self._kit.training()
        values: Sequence[Any] = args
        if self.input_holders:
            values, kwargs = quantize_inputs(self, args, kwargs, training)
        told = told_of(self)
        if told.simulation is not None and not (told.simulation.norm is None and self._kit.infers_shapes()):
            return quantize_output(self, self._call_with_norm(told, values, kwargs, training), training)
        quantizes = self.weights_quantizers and told.quantizes_weights
        with held(self.quantized_for_call(told.trains_weights or training) if quantizes else {}):
            outputs = own_class(self).call(self, *values, **kwargs)
        return quantize_output(self, outputs, training)

    def _call_with_norm(self, told: Told, values: Sequence[Any], kwargs: dict[str, Any], training: Any) -> Any:
        """Return what the layer and the batch norm behind it, which it simulates, make of quantized inputs."""
        simulation, f = told.simulation, self._kit.functions
        assert simulation is not None  # noqa: S101 - who calls this has looked
        simulation.require_norm()
        quantizer_trains = told.trains_weights or training

        def own(given: Mapping[int, Any]) -> Any:
            with held(given):
                return own_class(self).call(self, *values, **kwargs)

        if not simulation.uses_batches(training):
            return own(self.quantized_for_call(quantizer_trains))
        bias = variable_of(self, "bias")
        nothing = {id(bias): f.zeros_like(self.value_of(bias))}
        float_weights = {*self.weights_quantizers, simulation.kernel}
        floats = {id(each): self.value_of(each) for each in (variable_of(self, name) for name in float_weights)}
        quantizes_bias = told.bias is not None and told.quantizes_weights
        on_grid: Any = told.bias if quantizes_bias else lambda each: each
        return simulation.normalized(
            f,
            self.value_of,
            self._kit.update,
            bias=self.value_of(bias),
            floats=own({**floats, **nothing}),
            quantized=lambda: own({**self.quantized_for_call(quantizer_trains), **nothing}),
            on_grid=on_grid,
        )

    def quantized_for_call(self, training: Any, attributes: Iterable[str] | None = None) -> dict[int, Any]:
        """Return the quantized values of the layer's weights, or of some, by the ``id`` of each."""
        told = told_of(self)
        quantized = self.get_quantized_weights(training, attributes) if told.quantizes_weights else {}
        folded = () if told.simulation is None else (told.simulation.kernel, "bias")
        for name in (each for each in folded if each not in quantized and (attributes is None or each in attributes)):
            quantized[name] = self.weight_now(name)
        bias = told.bias
        if bias is not None and told.quantizes_weights and (attributes is None or bias.attribute in attributes):
            quantized[bias.attribute] = bias(self.weight_now(bias.attribute))
        return {id(variable_of(self, attribute)): value for attribute, value in quantized.items()}

    def simulate(self, simulation: Simulation) -> None:
        """Let the layer do the work of the batch norm behind it; it needs a bias."""
        told = told_of(self)
        for attribute in (simulation.kernel, "bias"):
            if attribute not in told.weights:
                told.weights[attribute] = (self, self._let_read(attribute))
        told.simulation = simulation

    def take_over(self, assign: Callable[[Any, Any], None]) -> None:
        """Keep the folded kernel and bias as the layer's own: from here on it needs no batch norm."""
        simulation = told_of(self).simulation
        if simulation is not None:
            variables = [variable_of(self, name) for name in (simulation.kernel, "bias")]
            folded = folded_values(simulation, self._kit.functions, self.value_of, *variables)
            for variable, value in zip(variables, folded, strict=True):
                assign(variable, value)
            told_of(self).simulation = None

    @property
    def bias_quantizer(self) -> BiasQuantizer | None:
        """What makes an integer of the layer's bias; None where it stays float."""
        return told_of(self).bias

    def quantize_bias(self, bias: BiasQuantizer) -> None:
        """Let reads of the layer's bias go through its quantizer."""
        told = told_of(self)
        told.weights[bias.attribute] = (self, self._let_read(bias.attribute))
        told.bias = bias

    def _let_read(self, attribute: str) -> str:
        variable = self.weight_of(self, attribute)
        return let_read(self, base_class(self), variable, self, attribute)

    # ---- saving -----------------------------------------------------------------------------------------------------

    def _told_now(self) -> dict[str, Any]:
        return {"quantization": own_config(self), "inside": self._kit.inside_of(self)}

    @classmethod
    def of_config(cls, config: Mapping[str, Any], layer: Any) -> Any:
        """Quantize a layer as a config tells; returns the layer."""
        make: Callable[..., Any] = cls
        holder, output = cls.holder_class.from_config, config["output_holder"]
        wrapper = make(
            layer,
            {name: cls.quantizer_of(each) for name, each in config["weights_quantizers"].items()},
            input_holders={name: holder(each) for name, each in config["input_holders"].items()},
            input_names=config["input_names"],
            output_holder=None if output is None else holder(output),
        )
        told_of(wrapper).keep_noted(config)
        if config.get("bias") is not None:
            wrapper.quantize_bias(BiasQuantizer.of_config(config["bias"], wrapper.weights_quantizers))
        if config.get("simulation") is not None:
            wrapper.simulate(Simulation.of_config(config["simulation"]))
        return wrapper


def variable_of(wrapper: Any, attribute: str) -> Any:
    """Return the float variable of a quantized weight, also while the model runs."""
    owner, name = told_of(wrapper).weights[attribute]
    return vars(owner)[name]


def own_config(wrapper: Any) -> dict[str, Any]:
    """Return what makes a layer the quantized one that it is; JSON-clean."""
    told, output = told_of(wrapper), wrapper.output_holder
    return {
        "bias": None if told.bias is None else told.bias.config(),
        "weights_quantizers": {name: quantizer_document(q) for name, q in wrapper.weights_quantizers.items()},
        "input_holders": {name: holder.get_config() for name, holder in wrapper.input_holders.items()},
        "input_names": list(told.input_names),
        "output_holder": None if output is None else output.get_config(),
        **({} if told.simulation is None else {"simulation": told.simulation.config()}),
        **told.noted_config(),
    }


def deployed_quantizers(wrapper: Any) -> dict[str, Any]:
    """Return the quantizers of a layer's weights, trainable ones converted: all, or an error and nothing changed."""
    return {
        name: quantizer.convert2inferable() if isinstance(quantizer, BaseTrainableQuantizer) else quantizer
        for name, quantizer in wrapper.weights_quantizers.items()
    }


def start_wrapper(
    wrapper: Any, within: type[Any], weights_quantizers: Mapping[str, Any], input_names: Sequence[str]
) -> None:
    """Let reads of a layer's weights go through their quantizers; called once, by the wrapper's constructor.

    Parameters
    ----------
    wrapper : KerasWrapper
        The layer, which has the wrapper's class already.
    within : type
        The class of layers inside it that have some of these weights.
    weights_quantizers : mapping of str to quantizer
        By attribute.
    input_names : sequence of str
        Names of the layer's tensor arguments, in positional order.
    """
    told = vars(wrapper)[TOLD] = Told(input_names=tuple(input_names))
    for attribute in weights_quantizers:
        owner, _ = weight_path(wrapper, attribute)[-1]
        base = base_class(wrapper) if owner is wrapper else within
        name = let_read(owner, base, wrapper.weight_of(wrapper, attribute), wrapper, attribute)
        told.weights[attribute] = (owner, name)


def check_biases(parts: Iterable[Any], to_numpy: Callable[[Any], NDArray[Any]]) -> None:
    """Raise IntegerRangeError when int32 does not hold the code of a bias that is an integer; names the layer."""
    for part in parts:
        bias = part.bias_quantizer if isinstance(part, KerasWrapper) else None
        if bias is not None:
            bias.check(to_numpy(part.weight_now(bias.attribute)))


def freeze_like(wrapper: Any) -> None:
    """Let quantizers of a layer that does not train not train either."""
    if not wrapper.trainable:
        for each in [*wrapper.weights_quantizers.values(), *wrapper.holders]:
            each.trainable = False


# ---- calling --------------------------------------------------------------------------------------------------------


def argument_names(input_names: Sequence[str]) -> list[str]:
    """Return the names of a layer's tensor arguments, a list of tensors once."""
    return list(dict.fromkeys(name.partition(".")[0] for name in input_names))


def quantize_inputs(
    wrapper: Any, given: Sequence[Any], kwargs: dict[str, Any], training: Any
) -> tuple[list[Any], dict[str, Any]]:
    """Return a layer's arguments with those quantized that have a holder.

    Parameters
    ----------
    wrapper : KerasWrapper
        The layer.
    given : sequence
        Positional arguments.
    kwargs : dict
        The others.
    training : bool or tensor, optional
        Whether the model trains.
    """
    values, names = list(given), argument_names(told_of(wrapper).input_names)
    if "key" in names and len(values) <= names.index("key") and kwargs.get("key") is None:
        # an attention layer's key is its value, before either is quantized
        position = names.index("value")
        kwargs = {**kwargs, "key": values[position] if position < len(values) else kwargs["value"]}
    for name, holder in wrapper.input_holders.items():
        argument, _, item = name.partition(".")
        position = names.index(argument)
        if position < len(values):
            values[position] = _held(values[position], item, holder, training)
        elif kwargs.get(argument) is not None:
            kwargs = {**kwargs, argument: _held(kwargs[argument], item, holder, training)}
    return values, kwargs


def quantize_output(wrapper: Any, outputs: Any, training: Any) -> Any:
    """Return a layer's output quantized where it has a holder; of several the first."""
    holder = wrapper.output_holder
    if holder is None:
        return outputs
    if isinstance(outputs, tuple | list):
        return type(outputs)((holder(outputs[0], training=training), *outputs[1:]))
    return holder(outputs, training=training)


def _held(value: Any, item: str, holder: Any, training: Any) -> Any:
    """Return an argument quantized, or a list with one of its items quantized."""
    if not item and isinstance(value, list | tuple):
        item = "0"  # Keras 2 passes a recurrent layer's states with its input
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
