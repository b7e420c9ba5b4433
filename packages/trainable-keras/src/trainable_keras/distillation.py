"""A quantized model learns from a float one; defined by `trainable_core.reference.distillation`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trainable_core.errors import ModelError, ShapeMismatchError
from trainable_core.reference.distillation import SUBJECT, checked_weights
from trainable_keras.calibration import calls_replaced
from trainable_keras.folding import named_layers
from trainable_keras.framework import Framework
from trainable_keras.functions import Functions, Tensor
from trainable_keras.wrapping import state_of


def distill(
    framework: Framework,
    qmodel: Any,
    teacher: Any,
    *,
    temperature: float,
    logits: float,
    features: Mapping[str, float] | Sequence[str] | None,
    axis: int,
) -> Any:
    """Return a model that trains another one to give what a teacher gives; see `trainable_keras.distill`."""
    state_of(framework, qmodel)
    if not isinstance(teacher, framework.module.Model):
        raise ModelError(f"{SUBJECT}: the teacher is {type(teacher).__name__}, no model of the same Keras")
    own, given = dict(named_layers(framework, qmodel)), dict(named_layers(framework, teacher))
    weights = checked_weights(temperature, logits, features, own, given)
    f = framework.functions

    def term(outputs: Tensor, student: Mapping[str, Tensor], inputs: Any) -> Tensor:
        found: dict[str, Tensor] = {}
        with calls_replaced([(given[name], _noted(found, name)) for name in weights]):
            target = teacher(inputs, training=False)
        terms = (
            [] if not logits else [logits * _of_logits(f, main_output(outputs), main_output(target), temperature, axis)]
        )
        for name, weight in weights.items():
            if name not in student or name not in found:
                raise ModelError(f"{SUBJECT}: no call reached {name!r}")
            one, other = f.cast(student[name], "float32"), f.stop_gradient(f.cast(found[name], "float32"))
            _require_same(name, one, other)
            terms.append(weight * f.sum((one - other) * (one - other)) / f.size(one))
        return f.total(terms)

    base: Any = framework.module.Model

    class Distillation(base):  # type: ignore[misc] # Keras is untyped
        """Calls the student, and in training adds the term to its losses."""

        def __init__(self) -> None:
            super().__init__(name=f"{qmodel.name}_distillation")
            self.student = qmodel

        def call(self, inputs: Any, training: Any = None) -> Any:
            """Return what the student gives."""
            if not training:
                return self.student(inputs, training=training)
            found: dict[str, Tensor] = {}
            with calls_replaced([(own[name], _noted(found, name)) for name in weights]):
                outputs = self.student(inputs, training=training)
            self.add_loss(term(outputs, found, inputs))
            return outputs

    return Distillation()


def _of_logits(f: Functions, student: Tensor, teacher: Tensor, temperature: float, axis: int) -> Tensor:
    _require_same("logits", student, teacher)
    q = _log_softmax(f, f.cast(student, "float32") / temperature, axis)
    p = f.stop_gradient(_log_softmax(f, f.cast(teacher, "float32") / temperature, axis))
    per_row = f.sum(f.exp(p) * (p - q), axis=axis)
    return f.sum(per_row) * temperature**2 / f.size(per_row)


def _log_softmax(f: Functions, x: Tensor, axis: int) -> Tensor:
    shifted = x - f.stop_gradient(f.max(x, axis=axis, keepdims=True))
    return shifted - f.log(f.sum(f.exp(shifted), axis=axis, keepdims=True))


def main_output(outputs: Any) -> Any:
    """Return a model's output, or the first of several."""
    while isinstance(outputs, Mapping | list | tuple):
        outputs = next(iter(outputs.values() if isinstance(outputs, Mapping) else outputs))
    return outputs


def _require_same(name: str, student: Tensor, teacher: Tensor) -> None:
    one, other = tuple(student.shape)[1:], tuple(teacher.shape)[1:]  # the batch may not be known yet
    if one != other:
        error = ShapeMismatchError(f"{SUBJECT}: {name}", f"the teacher's shape {other} behind the batch", one)
        vars(error).update(_keras_call_info_injected=True, ag_pass_through=True)  # Keras would make another type of it
        raise error


def _noted(found: dict[str, Tensor], name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def made_of(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            output = call(*args, **kwargs)
            found[name] = main_output(output)
            return output

        return called

    return made_of
