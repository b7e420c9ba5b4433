"""From a plan to the quantizer it asks for, and the checks that `wrap` and `finalize` of every backend make."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable
from typing import Any

from trainable_core.enums import QuantizationTarget
from trainable_core.errors import (
    InvalidArgumentError,
    NothingQuantizedWarning,
    QuantizerDefinitionError,
    QuantizerStateError,
    nearest,
)
from trainable_core.quantizer import BaseTrainableQuantizer, modifiers_of
from trainable_core.recipe.layers import HOLDS
from trainable_core.recipe.plan import LayerPlan, QuantizerPlan
from trainable_core.registry.process import get_trainable_quantizer_class


def build_quantizer(plan: QuantizerPlan, backend: str, base: type[BaseTrainableQuantizer], subject: str) -> Any:
    """Return the quantizer of a plan.

    Parameters
    ----------
    plan : QuantizerPlan
        Config, training method and arguments.
    backend : str
        Which backend's class.
    base : type
        The backend's base class, which the quantizer must have.
    subject : str
        What the quantizer is called in errors, such as ``"fc.weight"``.

    Raises
    ------
    UnknownQuantizerError, DuplicateQuantizerError, UnknownBackendError
        When not exactly one class is registered.
    QuantizerDefinitionError
        When the class is not of this backend.
    InvalidArgumentError
        When the class doesn't take an argument of the plan.
    UnsupportedConfigError
        When a modifier is unknown, or can't stand on the quantizer.
    """
    config = plan.config
    cls: Any = get_trainable_quantizer_class(
        config.target, plan.training_method, config.quantization_method, backend=backend
    )
    if not issubclass(cls, base):
        raise QuantizerDefinitionError(cls, f"it is not a {base.__name__}")
    parameters = inspect.signature(cls).parameters
    accepted = [name for name in list(parameters)[1:] if parameters[name].kind is not inspect.Parameter.VAR_KEYWORD]
    for argument in plan.arguments:
        if argument not in accepted:
            raise InvalidArgumentError(
                f"{subject}: arguments.{argument}",
                f"{cls.__name__} takes {', '.join(accepted) or 'no arguments'}" + nearest(argument, accepted),
            )
    quantizer = cls(config, **plan.arguments)
    quantizer.subject = subject
    quantizer.modify(modifiers_of(plan.modifiers, backend, subject))
    return quantizer


def require_quantizer(quantizer: object, target: QuantizationTarget, subject: str) -> None:
    """Raise InvalidArgumentError unless this is a trainable or an inferable quantizer for the target."""
    if not callable(getattr(quantizer, "initialize_quantization", None)):
        raise InvalidArgumentError(subject, f"it needs a quantizer, got {type(quantizer).__name__}")
    found = getattr(getattr(quantizer, "quantization_target", None), "name", target.name)
    if found != target.name:
        raise InvalidArgumentError(subject, f"it quantizes {target}, {type(quantizer).__name__} is for {found}")


def require_calibrated(quantizers: Iterable[BaseTrainableQuantizer], model: str, backend: str) -> None:
    """Raise QuantizerStateError, with the names of their tensors, when quantizers have no numbers yet."""
    missing = sorted(q.subject for q in quantizers if q.quantization_config.enabled and not q.calibrated)
    if missing:
        raise QuantizerStateError(
            model, f"not calibrated: {', '.join(missing)}", f"{backend}.calibrate(qmodel, batches)."
        )


def warn_if_nothing_is_quantized(model: str, plans: Iterable[LayerPlan], *, stacklevel: int = 3) -> None:
    """Warn when none of the plans has a quantizer, and say of each layer why.

    Parameters
    ----------
    model : str
        What the model is called.
    plans : iterable of LayerPlan
        Of all its layers, those included that can't be quantized.
    stacklevel : int
        How many calls above the one to `warnings.warn` the user's call of `wrap` is.
    """
    reasons: dict[str, list[str]] = {}
    for plan in plans:
        if plan.weights or plan.activation is not None:
            return
        if plan.layer.obstacle == HOLDS:
            continue
        reason = plan.reason or "it has no weights, and the recipe puts no activation quantizer there"
        reasons.setdefault(reason, []).append(plan.layer.name)
    warnings.warn(NothingQuantizedWarning(model, reasons), stacklevel=stacklevel)
