"""What hurts a quantized model, what of it trains, and what to change: what core's loops need of Keras."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from trainable_core.calibration.batches import inputs_of
from trainable_core.diagnosis import model as core
from trainable_core.diagnosis import suggestion
from trainable_core.diagnosis.model import DiagnosedModel, Forward, Place, Seen, VariableKey, trained_variables
from trainable_core.diagnosis.objective import Objective
from trainable_core.diagnosis.report import Diagnosis
from trainable_core.diagnosis.suggestion import Budget, Suggestion
from trainable_core.errors import ModelError
from trainable_keras.calibration import calls_replaced, in_inference, put_back
from trainable_keras.distillation import main_output
from trainable_keras.framework import Framework
from trainable_keras.graph import layers_within
from trainable_keras.parts import KerasHolder, KerasWrapper, holders_of, plan_of, told_of, variable_of
from trainable_keras.wrapping import parts_of, state_of, trainable_quantizers

Array = NDArray[Any]


def diagnose(
    framework: Framework,
    qmodel: Any,
    batches: Iterable[Any],
    teacher: Any,
    *,
    objective: Objective,
    gradients: bool,
    forward: Forward | None,
    progress: bool | None,
) -> Diagnosis:
    """Return what hurts a quantized model; see `trainable_keras.diagnose`."""
    return core.diagnose(
        KerasDiagnosis(framework, qmodel, forward),
        batches,
        teacher=_checked_teacher(framework, "diagnose", teacher),
        objective=objective,
        gradients=gradients,
        show_progress=partial(_bar, "diagnose", progress),
    )


def suggest(  # noqa: PLR0913 - as the verb
    framework: Framework,
    qmodel: Any,
    batches: Iterable[Any],
    budget: Budget,
    teacher: Any,
    *,
    widths: Sequence[int],
    objective: Objective,
    forward: Forward | None,
    progress: bool | None,
) -> Suggestion:
    """Return bits for each layer under a budget; see `trainable_keras.suggest`."""
    return suggestion.suggest(
        KerasDiagnosis(framework, qmodel, forward),
        batches,
        budget,
        teacher=_checked_teacher(framework, "suggest", teacher),
        widths=widths,
        objective=objective,
        show_progress=partial(_bar, "suggest", progress),
    )


def _checked_teacher(framework: Framework, what: str, teacher: Any) -> Any:
    if teacher is not None and not isinstance(teacher, framework.module.Model):
        raise ModelError(f"{what}: the teacher is {type(teacher).__name__}, no model of the same Keras")
    return teacher


def _bar(what: str, progress: bool | None, total: int | None) -> Any:  # noqa: FBT001 - as the verbs have it
    return tqdm(desc=what, total=total, disable=None if progress is None else not progress, leave=False)


class KerasDiagnosis(DiagnosedModel):
    """What core's loops ask of Keras.

    Parameters
    ----------
    framework : Framework
        The Keras that the model belongs to.
    qmodel : keras.Model
        A wrapped model.
    forward : callable or None
        As `diagnose` has it.
    """

    package = "trainable_keras"

    def __init__(self, framework: Framework, qmodel: Any, forward: Forward | None) -> None:
        super().__init__(qmodel, state_of(framework, qmodel), forward)
        self.framework = framework
        self.layers = layers_within(qmodel)
        self._places = list(_places(qmodel))

    def places(self) -> Sequence[Place]:
        """Return the model's quantizers in its order."""
        return self._places

    def is_tensor(self, batches: Any) -> bool:
        """Return whether this is one batch."""
        return bool(self.framework.functions.is_tensor(batches)) or hasattr(batches, "__array__")

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Call eagerly, and leave variables and notes as they were."""
        told = [told_of(each) for each in self.layers if isinstance(each, KerasWrapper)]
        noted = [set(each.read) for each in told]
        try:
            with self.framework.eagerly(), put_back(self.framework, self.model):
                yield
        finally:
            for each, read in zip(told, noted, strict=True):
                each.read = read

    @contextmanager
    def quantizing(self, layers: Collection[str] | None) -> Iterator[None]:
        """Let only some layers quantize."""
        silent = [each.part for each in self._places if layers is not None and each.layer.name not in layers]
        wrappers = [told_of(part) for part in silent if isinstance(part, KerasWrapper)]
        holders = [part for part in silent if isinstance(part, KerasHolder)]
        try:
            for told in wrappers:
                told.quantizes_weights = False
            with calls_replaced([(holder, _passing) for holder in holders]):
                yield
        finally:
            for told in wrappers:
                told.quantizes_weights = True

    @contextmanager
    def watching(self, seen: Seen) -> Iterator[None]:
        """Show what holders are called with and return."""
        replaced = [(each.part, partial(self._shown, each, seen)) for each in self._places if not each.is_weight]
        with calls_replaced(replaced):
            yield

    def _shown(self, place: Place, seen: Seen, call: Callable[..., Any]) -> Callable[..., Any]:
        def called(inputs: Any, *args: Any, **kwargs: Any) -> Any:
            output = call(inputs, *args, **kwargs)
            values = self.framework.functions.to_numpy(inputs)
            if values.dtype.kind == "f" or values.dtype.name == "bfloat16":
                seen(place, values.astype(np.float32), self._array(output))
            return output

        return called

    def weight(self, place: Place) -> Array:
        """Return a weight's float values."""
        return self._array(variable_of(place.part, place.tensor))

    def quantized_weight(self, place: Place) -> Array:
        """Return what a weight's quantizer makes of it."""
        return self._array(place.part.get_quantized_weights(False, (place.tensor,))[place.tensor])  # noqa: FBT003 - mctq's call

    @contextmanager
    def replacing(self, values: Mapping[Place, Array]) -> Iterator[None]:
        """Let quantizers of weights return given values."""
        f = self.framework.functions
        arrays = {id(place.quantizer): (place.quantizer, array) for place, array in values.items()}

        def giving(array: Array, _call: Callable[..., Any]) -> Callable[..., Any]:
            return lambda weight, *_, **__: f.cast(f.floats(array), f.dtype_of(weight))

        with calls_replaced([(quantizer, partial(giving, array)) for quantizer, array in arrays.values()]):
            yield

    @contextmanager
    def outputs_of(self, place: Place) -> Iterator[list[Array]]:
        """Note the outputs of a weight's layer."""
        found: list[Array] = []

        def noted(call: Callable[..., Any]) -> Callable[..., Any]:
            def called(*args: Any, **kwargs: Any) -> Any:
                output = call(*args, **kwargs)
                value = main_output(output)
                if self.framework.functions.is_tensor(value):
                    found.append(self._array(value))
                return output

            return called

        with calls_replaced([(place.part, noted)]):
            yield found

    def call(self, batch: Any) -> Any:
        """Call the model with a batch's inputs."""
        return self.model(inputs_of(batch), training=False)

    def call_teacher(self, teacher: Any, batch: Any) -> Any:
        """Call another model in inference."""
        return teacher(inputs_of(batch), training=False) if self.forward is None else self.forward(teacher, batch)

    def main_output(self, outputs: Any) -> Array:
        """Return the values of the first output."""
        return self._array(self._main(outputs))

    def _main(self, outputs: Any) -> Any:
        found = main_output(outputs)
        if not self.framework.functions.is_tensor(found):
            problem = f"the model returned {type(found).__name__}, and no tensor is found in it"
            raise ModelError(problem, "forward=lambda qmodel, batch: ... returns the tensor that counts.")
        return found

    def variables(self) -> Mapping[VariableKey, Any]:
        """Return the quantizers' variables that are trained."""
        return trained_variables(trainable_quantizers(self.model))

    def gradients(
        self, batch: Any, variables: Mapping[VariableKey, Any], upstream: Callable[[Array], Array]
    ) -> Mapping[VariableKey, Array | None]:
        """Return gradients with the quantizers in training mode."""

        def output() -> Any:
            if self.forward is not None:
                return self._main(self.forward(self.model, batch))
            return self._main(self.model(inputs_of(batch), training=True))

        with put_back(self.framework, self.model), in_inference(self.framework, self.layers):
            given = upstream(self._array(output()))
        with put_back(self.framework, self.model), in_inference(self.framework, self.layers):
            named = {f"{number} {name}": each for (number, name), each in variables.items()}
            found = self.framework.pull_back(output, named, given)
        return {key: None if each is None else self._array(each) for key, each in zip(variables, found, strict=True)}

    def _array(self, tensor: Any) -> Array:
        array: Array = self.framework.functions.to_numpy(tensor).astype(np.float32)
        return array


def _passing(_call: Callable[..., Any]) -> Callable[..., Any]:
    """Return what stands in the place of a holder's call, and passes its input on."""
    return lambda inputs, *_, **__: inputs


def _places(qmodel: Any) -> Iterator[Place]:
    """Yield the quantizers of a model in its order, as `describe` lists them."""
    for part in parts_of(qmodel):
        plan = plan_of(part)
        if isinstance(part, KerasWrapper):
            for attribute, quantizer in part.weights_quantizers.items():
                yield Place(plan.layer, attribute, plan.weights[attribute], quantizer, part)
        for holder in holders_of(part):
            of_holder = plan_of(holder).activation
            assert of_holder is not None  # noqa: S101 - there is a holder, so there was a plan for it
            yield Place(plan.layer, told_of(holder).tensor, of_holder, holder.activation_holder_quantizer, holder)
