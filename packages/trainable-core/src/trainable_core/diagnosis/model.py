"""The loop of every backend's `diagnose`: one pass over the batches, and for each the model in its different states."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from trainable_core.backend.building import require_calibrated
from trainable_core.backend.description import granularity_of
from trainable_core.calibration.batches import check_batches, explained
from trainable_core.calibration.params import MAX_BITS
from trainable_core.diagnosis.axes import output_axis
from trainable_core.diagnosis.findings import find
from trainable_core.diagnosis.objective import Average, Objective
from trainable_core.diagnosis.quality import QualityMeter, calibrated_weights
from trainable_core.diagnosis.report import Diagnosis, LayerFigures, QuantizerFigures, VariableFigures
from trainable_core.enums import LUT_METHODS, QuantizationTarget, TrainingMethod, VariableGroup
from trainable_core.errors import CalibrationError, ModelError
from trainable_core.qparams import QParams
from trainable_core.quantizer import BaseTrainableQuantizer
from trainable_core.recipe.layers import LayerInfo
from trainable_core.recipe.plan import QuantizerPlan
from trainable_core.recipe.state import WrappedState
from trainable_core.targets.known import TARGETS

Array = NDArray[Any]
Forward = Callable[[Any, Any], Any]
Seen = Callable[["Place", Array, Array], None]
VariableKey = tuple[int, str]


ROWS = frozenset({"embedding"})
"""Op kinds whose thresholds may as well go along the rows that are looked up."""


class Progress(Protocol):
    """A progress bar."""

    def update(self, n: int = 1) -> Any:
        """Count runs of the model."""


ShowProgress = Callable[[int | None], AbstractContextManager[Progress]]


@dataclass(frozen=True, eq=False)
class Place:
    """A quantizer of a model, and where it stands.

    Parameters
    ----------
    layer : LayerInfo
        Its layer or functional operation, under its present name.
    tensor : str
        Weight attribute, input or output.
    plan : QuantizerPlan
        By which it was made.
    quantizer : BaseTrainableQuantizer or inferable quantizer
        The quantizer.
    part : any
        The wrapper or holder that has it, for the backend.
    """

    layer: LayerInfo
    tensor: str
    plan: QuantizerPlan
    quantizer: Any
    part: Any

    @property
    def is_weight(self) -> bool:
        """Whether it is that of a weight."""
        return self.plan.config.target is QuantizationTarget.Weights

    @property
    def switched_on(self) -> bool:
        """Whether it quantizes."""
        trainable = isinstance(self.quantizer, BaseTrainableQuantizer)
        return bool(self.quantizer.quantization_config.enabled) if trainable else True

    @property
    def qparams(self) -> QParams | None:
        """The grid as it is deployed; None where it is computed from each tensor, or not known."""
        if isinstance(self.quantizer, BaseTrainableQuantizer):
            no_grid = self.quantizer.computes_grid or self.quantizer.deploys_itself
            return None if no_grid else self.quantizer.deployed_qparams()
        found = (
            None if self.plan.training_method == TrainingMethod.DYNAMIC else getattr(self.quantizer, "qparams", None)
        )
        return found if isinstance(found, QParams) else None

    @property
    def n_bits(self) -> int:
        """Width of the codes; of several candidates the selected one."""
        if isinstance(self.quantizer, BaseTrainableQuantizer):
            return (
                self.quantizer.quantization_config.n_bits
                if self.quantizer.computes_grid
                else self.quantizer.selected_width
            )
        return int(getattr(self.quantizer, "num_bits", self.plan.config.n_bits))


class DiagnosedModel(ABC):
    """A wrapped model whose quantizers are looked at; a backend writes what only its framework can do.

    Parameters
    ----------
    model : model
        What `wrap` or `finalize` returned.
    state : WrappedState
        What it knows about itself.
    forward : callable or None
        ``forward(model, batch)``, called instead of `call`.
    """

    package: ClassVar[str]
    """Name of the backend's package, for hints."""

    def __init__(self, model: Any, state: WrappedState, forward: Forward | None) -> None:
        self.model, self.state, self.forward = model, state, forward

    # ---- what a backend writes --------------------------------------------------------------------------------------

    @abstractmethod
    def places(self) -> Sequence[Place]:
        """Return the model's quantizers in its order; one that tied weights share stands at each of its layers."""

    @abstractmethod
    def is_tensor(self, batches: Any) -> bool:
        """Return whether `batches` is itself a tensor: one batch, which the user forgot to put into a list."""

    @abstractmethod
    def undisturbed(self) -> AbstractContextManager[None]:
        """Return a context in which the model is in evaluation mode, and behind which it is to the bit what it was."""

    @abstractmethod
    def quantizing(self, layers: Collection[str] | None) -> AbstractContextManager[None]:
        """Let only some layers quantize, by their names; None: all of them."""

    @abstractmethod
    def watching(self, seen: Seen) -> AbstractContextManager[None]:
        """Show what reaches each activation's quantizer, and what it returns, as float32 arrays of one shape."""

    @abstractmethod
    def weight(self, place: Place) -> Array:
        """Return a weight's float values, float32."""

    @abstractmethod
    def quantized_weight(self, place: Place) -> Array:
        """Return what a weight's quantizer makes of it, float32."""

    @abstractmethod
    def replacing(self, values: Mapping[Place, Array]) -> AbstractContextManager[None]:
        """Let weights be read as given arrays, in the place of what their quantizers return."""

    @abstractmethod
    def outputs_of(self, place: Place) -> AbstractContextManager[list[Array]]:
        """Note the outputs of the layer of a weight, float32, at each of its calls; of several the first."""

    @abstractmethod
    def call(self, batch: Any) -> Any:
        """Call the model with a batch; `calibration.batches.inputs_of` leaves the labels out."""

    @abstractmethod
    def call_teacher(self, teacher: Any, batch: Any) -> Any:
        """Call another model in evaluation mode as this one is called."""

    @abstractmethod
    def main_output(self, outputs: Any) -> Array:
        """Return the values of the tensor that counts: the logits where they have a name, or the first output."""

    @abstractmethod
    def variables(self) -> Mapping[VariableKey, Any]:
        """Return the quantizers' variables that training is to change, by the quantizer's ``id`` and their names."""

    @abstractmethod
    def gradients(
        self, batch: Any, variables: Mapping[VariableKey, Any], upstream: Callable[[Array], Array]
    ) -> Mapping[VariableKey, Array | None]:
        """Return gradients of variables, as a training step has them; None where none arrives.

        Parameters
        ----------
        batch : any
            The batch.
        variables : mapping
            As `variables` returns them.
        upstream : callable
            Returns the gradient with respect to the main output, given its values.

        Notes
        -----
        Quantizers are in training mode, everything else in evaluation mode.
        """

    # ---- what is the same in every backend --------------------------------------------------------------------------

    def run(self, batch: Any) -> Any:
        """Return what the model gives for a batch."""
        if self.forward is not None:
            return self.forward(self.model, batch)
        return explained(batch, lambda: self.call(batch))

    def checked(self, batches: Any, what: str) -> Iterable[Any]:
        """Refuse what can't be diagnosed, before the model is called.

        Raises
        ------
        ModelError
            When nothing is quantized.
        QuantizerStateError
            When a quantizer has no numbers yet.
        CalibrationError
            When `batches` are none, or one batch.
        """
        check_batches(batches, self.forward, 0, single=self.is_tensor(batches), subject=what)
        places = [each for each in self.places() if each.switched_on]
        if not places:
            raise ModelError(f"{what}: nothing of the model is quantized", "describe(qmodel) says why.")
        trainable = [each.quantizer for each in places if isinstance(each.quantizer, BaseTrainableQuantizer)]
        require_calibrated(trainable, type(self.model).__name__, self.package)
        found: Iterable[Any] = batches
        return found


def diagnose(
    diagnosed: DiagnosedModel,
    batches: Iterable[Any],
    *,
    teacher: Any,
    objective: Objective,
    gradients: bool,
    show_progress: ShowProgress,
) -> Diagnosis:
    """Return what hurts a model; `trainable_torch.diagnose` documents the arguments.

    Parameters
    ----------
    diagnosed : DiagnosedModel
        The model.
    batches : iterable
        Read once.
    teacher : model or None
        What the outputs are compared with; None: the model itself without quantization.
    objective : Objective
        What a difference between outputs costs.
    gradients : bool
        Whether gradients of the quantizers' variables are computed.
    show_progress : callable
        Given the number of runs, or None where it isn't known, returns a progress bar as a context.
    """
    batches = diagnosed.checked(batches, "diagnose")
    return _Examination(diagnosed, objective, teacher, gradients=gradients).run(batches, show_progress)


class _Examination:
    """The figures of one model, summed up batch by batch."""

    def __init__(self, diagnosed: DiagnosedModel, objective: Objective, teacher: Any, *, gradients: bool) -> None:
        self.diagnosed, self.objective, self.teacher = diagnosed, objective, teacher
        self.places = [each for each in diagnosed.places() if each.switched_on]
        self.layers = {each.layer.name: each.layer for each in self.places}
        self.meters = {
            place: QualityMeter(place.plan.config, place.qparams, tells_codes=_tells_codes(place))
            for place in self.places
        }
        self.axes: dict[Place, int | None] = {}
        self.alone, self.within = ({name: Average() for name in self.layers} for _ in range(2))
        self.whole, self.nothing = Average(), Average()
        self.variables = diagnosed.variables() if gradients else {}
        self.sums: dict[VariableKey, Array] = {}
        self.count = 0

    def run(self, batches: Iterable[Any], show_progress: ShowProgress) -> Diagnosis:
        runs = 2 + 2 * len(self.layers) + bool(self.variables) + (self.teacher is not None)
        known = _length(batches)
        with show_progress(None if known is None else runs * known) as bar, self.diagnosed.undisturbed():
            for batch in batches:
                if not self.count:
                    self._look_at_axes(batch)
                self._look(batch, bar)
                self.count += 1
            if not self.count:
                hint = "a generator can be read only once; pass a fresh one."
                raise CalibrationError("diagnose", "the batches are empty", hint)
            return self._diagnosis()

    def _look_at_axes(self, batch: Any) -> None:
        """Find the weights whose thresholds go along another axis than that of their output channels."""
        diagnosed = self.diagnosed
        for place in self.places:
            axis = place.plan.config.channels_axis
            if not place.is_weight or place.plan.config.blocks is not None or axis is None or place.layer.op in ROWS:
                continue
            weight = diagnosed.weight(place)
            if weight.size and np.isfinite(weight).all() and weight.ndim > 1:

                def output(values: Array, place: Place = place) -> Array | None:
                    with diagnosed.replacing({place: values}), diagnosed.outputs_of(place) as found:
                        diagnosed.run(batch)
                    return found[0] if found else None

                self.axes[place] = output_axis(weight, axis, output)

    def _look(self, batch: Any, bar: Progress) -> None:
        """Run the model on a batch, once for each of its states."""
        diagnosed, objective = self.diagnosed, self.objective
        compares = objective.needs_arrays or bool(self.variables)
        reference: Array | None = None
        if self.teacher is not None:
            given = diagnosed.call_teacher(self.teacher, batch)
            reference = diagnosed.main_output(given) if compares else None
            bar.update(1)
        with diagnosed.quantizing(()):
            outputs = diagnosed.run(batch)
        values = diagnosed.main_output(outputs) if compares else None
        if reference is None:
            reference = values
        if reference is not None and values is not None:
            objective.check(reference, values)
        self.nothing.add(*objective.cost_of_float(outputs, values, reference, batch))
        if self.variables and reference is not None:
            self._add_gradients(batch, reference)
            bar.update(1)
        with diagnosed.watching(self._seen):
            self.whole.add(*self._cost(batch, reference))
        bar.update(2)
        for name in self.layers:
            with diagnosed.quantizing((name,)):
                self.alone[name].add(*self._cost(batch, reference))
            with diagnosed.quantizing(self.layers.keys() - {name}):
                self.within[name].add(*self._cost(batch, reference))
            bar.update(2)

    def _cost(self, batch: Any, reference: Array | None) -> tuple[float, float]:
        outputs = self.diagnosed.run(batch)
        values = self.diagnosed.main_output(outputs) if self.objective.needs_arrays else None
        return self.objective.cost(outputs, values, reference, batch)

    def _seen(self, place: Place, values: Array, quantized: Array) -> None:
        self.meters[place].update(values, quantized)

    def _add_gradients(self, batch: Any, reference: Array) -> None:
        def upstream(values: Array) -> Array:
            return self.objective.upstream(values, reference)

        found = self.diagnosed.gradients(batch, self.variables, upstream)
        for key, gradient in found.items():
            if gradient is not None:
                self.sums[key] = self.sums.get(key, 0) + np.asarray(gradient, np.float64)

    # ---- from sums to figures ---------------------------------------------------------------------------------------

    def _diagnosis(self) -> Diagnosis:
        whole, nothing = self.whole.value, self.nothing.value
        layers = tuple(
            LayerFigures(
                layer=name,
                op=layer.op,
                alone=_difference(self.alone[name].value, nothing),
                within=_difference(whole, self.within[name].value),
            )
            for name, layer in self.layers.items()
        )
        layers = tuple(sorted(layers, key=lambda each: -each.cost))
        quantizers = tuple(self._quantizer(each) for each in self.places)
        variables = tuple(self._variables())
        total = _difference(whole, nothing)
        return Diagnosis(
            metric=self.objective.name,
            unit=self.objective.unit,
            float_cost=nothing,
            greater_is_better=self.objective.greater_is_better and not self.objective.needs_arrays,
            total=total,
            findings=find(layers, quantizers, variables, total, self.objective.unit),
            layers=layers,
            quantizers=quantizers,
            variables=variables,
            left_out=dict(self.diagnosed.state.left_out),
            batches=self.count,
        )

    def _quantizer(self, place: Place) -> QuantizerFigures:
        config, meter = place.plan.config, self.meters[place]
        calibrated = None
        if place.is_weight:
            values = self.diagnosed.weight(place)
            meter.update(values, self.diagnosed.quantized_weight(place))
            finite = bool(np.isfinite(values).all())
            trainable = isinstance(place.quantizer, BaseTrainableQuantizer)
            if finite and trainable and meter.rounds_to_nearest and config.quantization_method not in LUT_METHODS:
                calibrated = calibrated_weights(place.quantizer, values)
        else:
            calibrated = meter.calibrated_activation()
        trainable = isinstance(place.quantizer, BaseTrainableQuantizer)
        return QuantizerFigures(
            layer=place.layer.name,
            op=place.layer.op,
            tensor=place.tensor,
            target=str(config.target),
            training_method=place.plan.training_method,
            method=str(config.quantization_method),
            n_bits=place.n_bits,
            granularity=granularity_of(
                config, place.plan.arguments, computed=place.plan.training_method == TrainingMethod.DYNAMIC
            ),
            quality=None if meter.empty else meter.quality(calibrated),
            axis=config.channels_axis if config.blocks is None else None,
            output_axis=self.axes.get(place),
            groups=self._can_have_groups(place),
            most_bits=self._most_bits(place),
            modifiers=place.quantizer.report() if trainable else {},
        )

    def _can_have_groups(self, place: Place) -> bool:
        """Return whether a weight can have thresholds per group: it has an axis of inputs, and the target allows it."""
        weight = place.layer.weights.get(place.tensor)
        target = TARGETS[self.diagnosed.state.recipe.target]
        return place.is_weight and target.groups and weight is not None and weight.inputs_axis is not None

    def _most_bits(self, place: Place) -> int:
        """Return the widest codes that a quantizer may have: the target's on such a grid, those of a table its own."""
        if place.qparams is not None and place.qparams.levels:  # a method with a table has it for a few widths
            return place.n_bits
        target = TARGETS[self.diagnosed.state.recipe.target]
        grids = target.weights if place.is_weight else target.activations
        return max(grids.widths.get(place.plan.config.quantization_method, (MAX_BITS,)))

    def _variables(self) -> Iterator[VariableFigures]:
        done: set[VariableKey] = set()
        for place in self.places:
            quantizer = place.quantizer
            for key, variable in self.variables.items():
                if key[0] != id(quantizer) or key in done:
                    continue
                done.add(key)
                value = np.asarray(quantizer.to_numpy(variable), np.float64)
                gradient = self.sums.get(key)
                start = quantizer.numbers_set.get(key[1])
                yield VariableFigures(
                    quantizer=f"{place.layer.name}{'.' if place.is_weight else ': '}{place.tensor}",
                    name=key[1],
                    value=_rms(value),
                    gradient=None if gradient is None else _rms(gradient) / self.count,
                    moved=None if start is None else _moved(value, start),
                )


def _length(batches: Iterable[Any]) -> int | None:
    """Return the number of batches; None where it isn't known, as of a generator or of some data sets of TensorFlow."""
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        return None


def _tells_codes(place: Place) -> bool:
    """Return whether a quantizer's values are values of its grid."""
    return not (isinstance(place.quantizer, BaseTrainableQuantizer) and place.quantizer.deploys_values)


def _difference(cost: float, base: float) -> float:
    """Return how much larger a cost is; infinite where both are."""
    return cost if np.isinf(cost) else cost - base


def _rms(values: Array) -> float:
    return float(np.sqrt(np.square(values).mean())) if values.size else 0.0


def _moved(value: Array, start: Array) -> float | None:
    """Return how far a variable is from where it started, relatively."""
    if np.shape(start) != value.shape:
        return None
    distance, before = _rms(value - start), _rms(np.asarray(start, np.float64))
    return distance / before if before else (None if distance else 0.0)


TRAINED_GROUPS = (VariableGroup.QPARAMS, VariableGroup.WEIGHTS)
"""Groups whose variables are looked at."""


def trained_variables(quantizers: Iterable[BaseTrainableQuantizer]) -> dict[VariableKey, Any]:
    """Return the variables of quantizers that training is to change; see `DiagnosedModel.variables`.

    Those with a value for each element of a tensor, as learned roundings are, are left out.
    """
    found: dict[VariableKey, Any] = {}
    for quantizer in quantizers:
        if not quantizer.quantization_config.enabled:
            continue
        trained = {id(each) for group in TRAINED_GROUPS for each in quantizer.get_trainable_variables(group)}
        for name in quantizer.variable_names:
            variable = quantizer.get_quantizer_variable(name)
            per_element = quantizer.tensor_shape is not None and tuple(variable.shape) == quantizer.values_shape
            if id(variable) in trained and not per_element:
                found[id(quantizer), name] = variable
    return found
