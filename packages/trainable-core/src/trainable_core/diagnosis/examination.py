"""The loop of every backend's `diagnose`: one pass over the batches, and for each the model in its different states."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trainable_core.backend.building import require_calibrated
from trainable_core.backend.description import granularity_of
from trainable_core.backend.view import ModelView, QuantizedTensor, VariableKey
from trainable_core.calibration.params import MAX_BITS
from trainable_core.diagnosis.axes import output_axis
from trainable_core.diagnosis.findings import find
from trainable_core.diagnosis.objective import Average, Objective
from trainable_core.diagnosis.quality import QualityMeter, calibrated_weights
from trainable_core.diagnosis.report import Diagnosis, LayerFigures, QuantizerFigures, VariableFigures
from trainable_core.enums import LUT_METHODS, TrainingMethod
from trainable_core.errors import CalibrationError, ModelError
from trainable_core.quantizer import BaseTrainableQuantizer
from trainable_core.targets.known import TARGETS

Array = NDArray[Any]

ROWS = frozenset({"embedding"})
"""Op kinds whose thresholds may as well go along the rows that are looked up."""


UPSTREAM = (None, 0, 10)
"""Powers of two that the gradient of the main output is scaled to, one after the other while a variable's is zero.

As it is, it may be less than what a model of half precision can hold, and so may be the gradients behind it.
"""


class Progress(Protocol):
    """A progress bar."""

    def update(self, n: int = 1) -> Any:
        """Count runs of the model."""


ShowProgress = Callable[[int | None], AbstractContextManager[Progress]]


def checked(view: ModelView, batches: Any, what: str) -> Iterable[Any]:
    """Return the batches after a look at what can't be diagnosed, before the model is called.

    Raises
    ------
    ModelError
        When nothing is quantized.
    QuantizerStateError
        When a quantizer has no numbers yet.
    CalibrationError
        When `batches` are none, or one batch.
    """
    view.check_batches(batches, what)
    tensors = [each for each in view.tensors() if each.switched_on]
    if not tensors:
        raise ModelError(f"{what}: nothing of the model is quantized", "describe(qmodel) says why.")
    trainable = [each.quantizer for each in tensors if isinstance(each.quantizer, BaseTrainableQuantizer)]
    require_calibrated(trainable, type(view.model).__name__, view.package)
    found: Iterable[Any] = batches
    return found


def diagnose(
    view: ModelView,
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
    view : ModelView
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
    batches = checked(view, batches, "diagnose")
    return _Examination(view, objective, teacher, gradients=gradients).run(batches, show_progress)


class _Examination:
    """The figures of one model, summed up batch by batch."""

    def __init__(self, view: ModelView, objective: Objective, teacher: Any, *, gradients: bool) -> None:
        self.view, self.objective, self.teacher = view, objective, teacher
        self.tensors = [each for each in view.tensors() if each.switched_on]
        self.layers = {each.layer.name: each.layer for each in self.tensors}
        self.meters = {
            tensor: QualityMeter(tensor.plan.config, tensor.grid, tells_codes=_tells_codes(tensor))
            for tensor in self.tensors
        }
        self.axes: dict[QuantizedTensor, int | None] = {}
        self.alone, self.within = ({name: Average() for name in self.layers} for _ in range(2))
        self.whole, self.nothing = Average(), Average()
        self.variables = view.variables() if gradients else {}
        self.sums: dict[VariableKey, Array] = {}
        self.count = 0

    def run(self, batches: Iterable[Any], show_progress: ShowProgress) -> Diagnosis:
        runs = 2 + 2 * len(self.layers) + bool(self.variables) + (self.teacher is not None)
        known = _length(batches)
        with show_progress(None if known is None else runs * known) as bar, self.view.undisturbed():
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
        view = self.view
        for tensor in self.tensors:
            axis = tensor.plan.config.channels_axis
            if not tensor.is_weight or tensor.plan.config.blocks is not None or axis is None or tensor.layer.op in ROWS:
                continue
            weight = view.values(tensor)
            if weight.size and np.isfinite(weight).all() and weight.ndim > 1:

                def output(values: Array, tensor: QuantizedTensor = tensor) -> Array | None:
                    with view.replacing({tensor: values}), view.outputs_of(tensor) as found:
                        view.run(batch)
                    return found[0] if found else None

                self.axes[tensor] = output_axis(weight, axis, output)

    def _look(self, batch: Any, bar: Progress) -> None:
        """Run the model on a batch, once for each of its states."""
        view, objective = self.view, self.objective
        compares = objective.needs_arrays or bool(self.variables)
        reference: Array | None = None
        if self.teacher is not None:
            given = view.call_teacher(self.teacher, batch)
            reference = view.main_output(given) if compares else None
            bar.update(1)
        with view.quantizing(()):
            outputs = view.run(batch)
        values = view.main_output(outputs) if compares else None
        if reference is None:
            reference = values
        if reference is not None and values is not None:
            objective.check(reference, values)
        self.nothing.add(*objective.cost_of_float(outputs, values, reference, batch))
        if self.variables and reference is not None:
            self._add_gradients(batch, reference)
            bar.update(1)
        seen = {tensor: partial(self._seen, tensor) for tensor in self.tensors if not tensor.is_weight}
        with view.watching(seen):
            self.whole.add(*self._cost(batch, reference))
        bar.update(2)
        for name in self.layers:
            with view.quantizing((name,)):
                self.alone[name].add(*self._cost(batch, reference))
            with view.quantizing(self.layers.keys() - {name}):
                self.within[name].add(*self._cost(batch, reference))
            bar.update(2)

    def _cost(self, batch: Any, reference: Array | None) -> tuple[float, float]:
        outputs = self.view.run(batch)
        values = self.view.main_output(outputs) if self.objective.needs_arrays else None
        return self.objective.cost(outputs, values, reference, batch)

    def _seen(self, tensor: QuantizedTensor, values: Array, quantized: Callable[[], Array]) -> None:
        self.meters[tensor].update(values, quantized())

    def _add_gradients(self, batch: Any, reference: Array) -> None:
        found: dict[VariableKey, Array] = {}
        for exponent in UPSTREAM:
            scale = 1.0

            def upstream(values: Array, exponent: int | None = exponent) -> Array:
                nonlocal scale
                given = self.objective.upstream(values, reference)
                scale = 1.0 if exponent is None else scale_to(given, exponent)
                return np.asarray(given * np.float64(scale)).astype(np.float32)

            gradients = self.view.gradients(batch, self.variables, upstream)
            new = {key: np.asarray(each, np.float64) / scale for key, each in gradients.items() if each is not None}
            found |= {key: each for key, each in new.items() if key not in found or _tells_more(each, found[key])}
            if all(each.any() for each in found.values()):
                break
        for key, gradient in found.items():
            self.sums[key] = self.sums.get(key, 0) + gradient

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
        quantizers = tuple(self._quantizer(each) for each in self.tensors)
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
            left_out=dict(self.view.state.left_out),
            batches=self.count,
        )

    def _quantizer(self, tensor: QuantizedTensor) -> QuantizerFigures:
        config, meter = tensor.plan.config, self.meters[tensor]
        calibrated = None
        if tensor.is_weight:
            values = self.view.values(tensor)
            meter.update(values, self.view.quantized(tensor))
            finite = bool(np.isfinite(values).all())
            trainable = isinstance(tensor.quantizer, BaseTrainableQuantizer)
            if finite and trainable and meter.rounds_to_nearest and config.quantization_method not in LUT_METHODS:
                calibrated = calibrated_weights(tensor.quantizer, values)
        else:
            calibrated = meter.calibrated_activation()
        trainable = isinstance(tensor.quantizer, BaseTrainableQuantizer)
        widths = self._widths(tensor)
        return QuantizerFigures(
            layer=tensor.layer.name,
            op=tensor.layer.op,
            tensor=tensor.tensor,
            target=str(config.target),
            training_method=tensor.plan.training_method,
            method=str(config.quantization_method),
            n_bits=tensor.n_bits,
            granularity=granularity_of(
                config, tensor.plan.arguments, computed=tensor.plan.training_method == TrainingMethod.DYNAMIC
            ),
            quality=None if meter.empty else meter.quality(calibrated),
            axis=config.channels_axis if config.blocks is None else None,
            output_axis=self.axes.get(tensor),
            groups=self._can_have_groups(tensor),
            most_bits=max(widths),
            widths=widths,
            chooses=bool(tensor.candidates),
            modifiers=tensor.quantizer.report() if trainable else {},
        )

    def _can_have_groups(self, tensor: QuantizedTensor) -> bool:
        """Return whether a weight can have thresholds per group: it has an axis of inputs, and the target allows it."""
        weight = tensor.layer.weights.get(tensor.tensor)
        target = TARGETS[self.view.state.recipe.target]
        return tensor.is_weight and target.groups and weight is not None and weight.inputs_axis is not None

    def _widths(self, tensor: QuantizedTensor) -> tuple[int, ...]:
        """Return the widths that a quantizer may have: its candidates, its own of a table, or the target's."""
        if tensor.candidates:
            return tensor.candidates
        if tensor.grid is not None and tensor.grid.levels:  # a method with a table has it for a few widths
            return (tensor.n_bits,)
        target = TARGETS[self.view.state.recipe.target]
        grids = target.weights if tensor.is_weight else target.activations
        return tuple(grids.widths.get(tensor.plan.config.quantization_method, range(1, MAX_BITS + 1)))

    def _variables(self) -> Iterator[VariableFigures]:
        done: set[VariableKey] = set()
        for tensor in self.tensors:
            quantizer = tensor.quantizer
            for key, variable in self.variables.items():
                if key[0] != id(quantizer) or key in done:
                    continue
                done.add(key)
                value = np.asarray(quantizer.to_numpy(variable), np.float64)
                gradient = self.sums.get(key)
                start = quantizer.numbers_set.get(key[1])
                yield VariableFigures(
                    quantizer=tensor.name,
                    name=key[1],
                    value=_rms(value),
                    gradient=None if gradient is None else _rms(gradient) / self.count,
                    moved=None if start is None else _moved(value, start),
                )


def scale_to(gradient: Array, exponent: int) -> float:
    """Return the power of two that brings the largest element of a gradient up to ``2**exponent``, or to half of it.

    Examples
    --------
    >>> scale_to(np.float32([-3e-9, 1e-9]), 0) * 3e-9
    0.805306368
    """
    largest = float(np.abs(gradient).max(initial=0.0))
    return 2.0 ** (exponent - math.frexp(largest)[1]) if 0 < largest < math.inf else 1.0


def _tells_more(gradient: Array, known: Array) -> bool:
    """Return whether a gradient is finite and not zero, where the one that is known is zero."""
    return bool(gradient.any() and np.isfinite(gradient).all() and not known.any())


def _length(batches: Iterable[Any]) -> int | None:
    """Return the number of batches; None where it isn't known, as of a generator or of some data sets of TensorFlow."""
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        return None


def _tells_codes(tensor: QuantizedTensor) -> bool:
    """Return whether a quantizer's values are values of its grid."""
    return not (isinstance(tensor.quantizer, BaseTrainableQuantizer) and tensor.quantizer.deploys_values)


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
