"""What tracking does for any trainer: at which steps it looks, what it writes, and what it warns of."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainable_core.backend.codes import number_of_codes
from trainable_core.backend.routine import StepRoutine, check_count, check_repeatable
from trainable_core.backend.view import ModelView, QuantizedTensor
from trainable_core.enums import VariableGroup
from trainable_core.errors import InvalidArgumentError, ModelError
from trainable_core.qparams import Float32, QParams, lower_bound
from trainable_core.quantizer import BaseTrainableQuantizer
from trainable_core.tracking.alarm import Alarm, batch_norm_numbers
from trainable_core.tracking.measure import (
    ActivationNumbers,
    Numbers,
    WeightMemory,
    grid_numbers,
    reported,
    weight_numbers,
)
from trainable_core.tracking.writers import Scalar, writer_for

SUBJECT = "track"


class TrackingRoutine(StepRoutine):
    """Writes what a model's quantizers are doing every so many steps; a backend says how gradients are seen.

    Parameters
    ----------
    view : ModelView
        The model.
    path : path
        Where to; see `trainable_core.tracking.writers.writer_for`.
    every : int
        Number of optimizer steps between two records.
    batches : iterable, optional
        What activations are looked at with, in evaluation mode; read anew each time. None: they are not.
    writes : bool
        Whether this process is the one of its job that looks and writes.

    Raises
    ------
    InvalidArgumentError
        When `every` is not a whole number from 1, or the batches can be read only once.
    CalibrationError
        When `batches` are one batch.
    ModelError
        When the model has no trainable quantizer.
    DocumentError
        When the path can't be written to.
    """

    def __init__(
        self,
        view: ModelView,
        path: object,
        every: int,
        batches: Iterable[Any] | None,
        *,
        writes: bool = True,
    ) -> None:
        check_count(SUBJECT, "every", every, 1)
        check_repeatable(SUBJECT, batches)
        if batches is not None:
            view.check_batches(batches, SUBJECT)
        self.view, self.every, self.batches = view, every, batches
        self.alarm = Alarm()
        self.tracked = _tracked(view)
        self._writer = writer_for(path) if writes else None
        self._memories: dict[str, WeightMemory] = {}
        self._first: dict[tuple[str, int], Float32] = {}
        self._last: dict[str, list[NDArray[Any]]] = {}
        self._recorded = -1
        self._started = False

    # ---- what a backend writes --------------------------------------------------------------------------------------

    @abstractmethod
    def begin(self) -> None:
        """Begin to see gradients; called again when a training goes on."""

    @abstractmethod
    def finish(self) -> None:
        """See no more gradients."""

    @abstractmethod
    def gradients(self) -> Mapping[str, float | None] | None:
        """Return the norm of the gradient of each quantizer's variables in the last step, by the tensor's name.

        None of those that had no gradient; None where the framework does not show any.
        """

    # ---- what a trainer calls ---------------------------------------------------------------------------------------

    def start(self, step: int = 0) -> None:
        """Begin, or go on, after `step` optimizer steps; writes the first record."""
        self.step, self._started = step, True
        self.begin()
        if self._recorded != step:  # else a second `fit` goes on where the first one ended
            self.record()

    def step_end(self, step: int | None = None) -> None:
        """Count an optimizer step, and write a record if one is due.

        Raises
        ------
        InvalidArgumentError
            When `start` was not called.
        """
        if not self._started:
            raise InvalidArgumentError(SUBJECT, "step_end was called before start", "call start() before the loop.")
        self.step = self.step + 1 if step is None else step
        if self.step % self.every == 0:
            self.record(after_step=True)

    def before_evaluation(self) -> None:
        """Do nothing: evaluations change nothing that is tracked."""

    def end(self) -> None:
        """Write the last record, and look no more."""
        if self._recorded != self.step:
            self.record()
        self.finish()

    @property
    def looks_next(self) -> bool:
        """Whether the step that is under way ends with a record."""
        return self._writer is not None and (self.step + 1) % self.every == 0

    @property
    def problems(self) -> Mapping[str, Mapping[str, str]]:
        """What was warned of, and what came later: by the kind of warning, a reason for each tensor."""
        return self.alarm.problems

    # ---- a record ---------------------------------------------------------------------------------------------------

    def record(self, *, after_step: bool = False) -> None:
        """Write what there is to say at this step, and warn of what is wrong for the first time.

        Parameters
        ----------
        after_step : bool
            Whether it comes right after an optimizer step that was announced by `looks_next`, so that the gradients of
            that step are known.
        """
        if self._writer is None:
            return
        grids = {name: grid for name, tensor in self.tracked.items() if (grid := tensor.grid) is not None}
        self._recorded = self.step
        gradients = self.gradients() if after_step else None
        numbers = {name: self._numbers(name, grid, gradients, after_step=after_step) for name, grid in grids.items()}
        for name, found in self._of_activations(grids).items():
            numbers[name].update(found)
        for name, (mean, variance) in self.view.batch_norms().items():
            numbers[name] = batch_norm_numbers(mean, variance)
            self.alarm.statistic(name, "variance", numbers[name]["variance"])
        lost = self._writer.write(
            Scalar(self.step, name, quantity, float(value))
            for name, told in numbers.items()
            for quantity, value in told.items()
        )
        if lost:
            self.alarm.lost(str(self._writer.path), lost)
        self.alarm.sound()

    def _numbers(
        self, name: str, grid: QParams, gradients: Mapping[str, float | None] | None, *, after_step: bool
    ) -> Numbers:
        tensor = self.tracked[name]
        start = self._first.setdefault((name, number_of_codes(grid)), grid.scale.copy())  # of several widths, each
        found = {**reported(tensor.quantizer), **grid_numbers(grid, start)}
        if start.shape == grid.scale.shape:
            self.alarm.grid(name, grid.scale, start, _smallest_scale(tensor, grid))
        gradient = None if gradients is None else gradients.get(name)
        if gradient is not None:
            found["gradient"] = gradient
        learned = tensor.quantizer.get_trainable_variables(VariableGroup.QPARAMS)
        values = [np.array(tensor.quantizer.to_numpy(variable)) for variable in learned]
        before, self._last[name] = self._last.get(name, []), values
        if values and after_step:
            moved = len(before) != len(values) or not all(map(np.array_equal, before, values))
            self.alarm.learning(name, gradient, known=gradients is not None, moved=moved)
        if tensor.is_weight:
            memory = self._memories.setdefault(name, WeightMemory())
            found |= weight_numbers(self.view, tensor, grid, memory)
        return found

    def _of_activations(self, grids: Mapping[str, QParams]) -> dict[str, Numbers]:
        if self.batches is None:
            return {}
        seen = {name: ActivationNumbers(grid) for name, grid in grids.items() if not self.tracked[name].is_weight}
        shown = {self.tracked[name]: each.update for name, each in seen.items()}
        self.view.look(self.batches, shown, SUBJECT)
        found = {name: each.numbers() for name, each in seen.items()}
        for name, numbers in found.items():
            if "largest" in numbers:
                self.alarm.statistic(name, "largest value", numbers["largest"])
        return found


def _tracked(view: ModelView) -> dict[str, QuantizedTensor]:
    """Return the tensors with trainable quantizers by name, of those that share a quantizer the first."""
    found: dict[int, QuantizedTensor] = {}
    for tensor in view.tensors():
        if isinstance(tensor.quantizer, BaseTrainableQuantizer):
            found.setdefault(id(tensor.quantizer), tensor)
    if not found:
        problem = "track: the model has no trainable quantizer"
        raise ModelError(problem, "it follows what `wrap` returned, not what `finalize` did.")
    return {tensor.name: tensor for tensor in found.values()}


def _smallest_scale(tensor: QuantizedTensor, grid: QParams) -> float:
    """Return the step of a grid whose threshold is at its lower bound."""
    return float(lower_bound(tensor.quantizer.quantization_config.min_threshold)) / max(grid.quant_max, 1)
