"""A quantized model learns from a float one; defined by `trainable_core.reference.distillation`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trainable_core.errors import ModelError, ShapeMismatchError
from trainable_core.reference.distillation import SUBJECT, checked_weights
from trainable_torch.state import state_of
from trainable_torch.training import evaluating


def distill(
    qmodel: nn.Module,
    teacher: nn.Module,
    *,
    temperature: float = 1.0,
    logits: float = 1.0,
    features: Mapping[str, float] | Sequence[str] | None = None,
    axis: int = -1,
) -> Distillation:
    """Return what runs a wrapped model and its teacher, and gives the term that the one learns from the other by.

    Parameters
    ----------
    qmodel : Module
        A wrapped, calibrated model.
    teacher : Module
        The float model, or any other of the same outputs; it is called in evaluation mode and does not learn.
    temperature : float
        Of the softmax of both models' logits.
    logits : float
        Factor of the term for the logits; 0 leaves them out.
    features : mapping of str to float, or sequence of str, optional
        Modules whose outputs are to be those of the teacher's modules of the same names, with the factors of their mean
        squared distances. A convolution with a folded batch norm gives what the teacher's batch norm gives: name that.
    axis : int
        Axis of the classes.

    Returns
    -------
    Distillation
        Called with a batch as the model is, it returns the model's output, and the term to add to the loss.

    Raises
    ------
    ModelError
        When `qmodel` is not wrapped, or the teacher is no module.
    InvalidArgumentError
        When a factor is negative, a name is unknown, or all factors are 0.

    Examples
    --------
    >>> distillation = distill(qmodel, model, temperature=4.0, features=["body"])  # doctest: +SKIP
    >>> outputs, term = distillation(x)  # doctest: +SKIP
    >>> loss = cross_entropy(outputs, y) + term  # doctest: +SKIP
    """
    state_of(qmodel)
    if not isinstance(teacher, nn.Module):
        raise ModelError(f"{SUBJECT}: the teacher is {type(teacher).__name__}, not a torch.nn.Module")
    names = [dict(model.named_modules()) for model in (qmodel, teacher)]
    weights = checked_weights(temperature, logits, features, *names)
    return Distillation(qmodel, teacher, temperature, logits, weights, axis)


class Distillation:
    """What `distill` returns; see there."""

    def __init__(
        self,
        qmodel: nn.Module,
        teacher: nn.Module,
        temperature: float,
        logits: float,
        weights: dict[str, float],
        axis: int,
    ) -> None:
        self.qmodel, self.teacher = qmodel, teacher
        self.temperature, self.logits, self.weights, self.axis = temperature, logits, weights, axis

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """Return what the model gives for a batch, and the term for the loss.

        Raises
        ------
        ShapeMismatchError
            When outputs or features of the two models differ in shape.
        ModelError
            When a layer of `features` was not reached.
        """
        with _outputs_of(self.qmodel, self.weights) as own:
            outputs = self.qmodel(*args, **kwargs)
        with torch.no_grad(), evaluating(self.teacher), _outputs_of(self.teacher, self.weights) as given:
            target = self.teacher(*args, **kwargs)
        terms = [] if not self.logits else [self.logits * self._of_logits(main_output(outputs), main_output(target))]
        for name, weight in self.weights.items():
            if name not in own or name not in given:
                raise ModelError(
                    f"{SUBJECT}: no forward reached {name!r} in {'both models' if name in own else 'the student'}"
                )
            student, teacher = own[name], given[name]
            _require_same(name, student, teacher)
            terms.append(weight * (student.float() - teacher.float()).square().mean())
        return outputs, torch.stack(terms).sum()

    def _of_logits(self, student: Tensor, teacher: Tensor) -> Tensor:
        _require_same("logits", student, teacher)
        q, p = ((each.float() / self.temperature).log_softmax(self.axis) for each in (student, teacher))
        count = max(p.numel() // p.shape[self.axis], 1)
        term: Tensor = (p.exp() * (p - q)).sum() * (self.temperature**2 / count)
        return term


def main_output(outputs: Any) -> Any:
    """Return the tensor that counts of what a model or layer gives: its logits, or the first of several."""
    if isinstance(outputs, Mapping):
        return outputs["logits"] if "logits" in outputs else next(iter(outputs.values()))
    return outputs[0] if isinstance(outputs, tuple | list) else getattr(outputs, "logits", outputs)


def _require_same(name: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ShapeMismatchError(
            f"{SUBJECT}: {name}", f"the teacher's shape {tuple(teacher.shape)}", tuple(student.shape)
        )


@contextmanager
def _outputs_of(model: nn.Module, names: Mapping[str, float]) -> Iterator[dict[str, Any]]:
    """Note what modules give while a model runs."""
    found: dict[str, Any] = {}

    def note(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            found[name] = main_output(output).clone()  # what comes behind may write into it in place

        return hook

    handles = [model.get_submodule(name).register_forward_hook(note(name)) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
