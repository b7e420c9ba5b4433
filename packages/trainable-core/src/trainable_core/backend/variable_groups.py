"""A wrapped model's trainable variables in the groups that an optimizer treats apart, and at which pace they learn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

from trainable_core.enums import QuantizationMethod, VariableGroup
from trainable_core.errors import InvalidArgumentError
from trainable_core.quantizer import BaseTrainableQuantizer

THRESHOLD, SCALE = "threshold", "scale"
PACES = (THRESHOLD, SCALE)


def variable_groups(
    variables: Iterable[Any],
    quantizers: Iterable[BaseTrainableQuantizer],
    weights: Mapping[str, Any] | None,
    qparams: Mapping[str, Any] | None,
    pace: str = THRESHOLD,
) -> list[dict[str, Any]]:
    """Return ``{"params": [...], "name": "WEIGHTS" or "QPARAMS", **options}`` for each group that has variables.

    Parameters
    ----------
    variables : iterable
        Every trainable variable of the model.
    quantizers : iterable of BaseTrainableQuantizer
        Its trainable quantizers; theirs are QPARAMS, without weight decay unless `qparams` has one.
    weights, qparams : mapping, optional
        Options of the two groups.
    pace : {"threshold", "scale"}
        With ``scale``, the learning rates of thresholds and ranges are multiplied by `pace_factor`, and there is one
        group QPARAMS for each factor.

    Raises
    ------
    InvalidArgumentError
        When an option would replace the variables or the name, when `pace` is unknown, or when it needs a learning rate
        and there is none.
    """
    for part, options in (("weights", weights), ("qparams", qparams)):
        if options is not None and not isinstance(options, Mapping):
            raise InvalidArgumentError(f"parameter_groups: {part}", f"options must be a mapping, got {options!r}")
        for reserved in sorted({"params", "name"} & set(options or {})):
            raise InvalidArgumentError(f"parameter_groups: {part}", f"{reserved!r} is not an option")
    if pace not in PACES:
        raise InvalidArgumentError("parameter_groups: pace", f"{pace!r} is not one of {', '.join(PACES)}")
    learned: dict[int, tuple[Any, float]] = {}
    for quantizer in quantizers:
        for variable in quantizer.get_trainable_variables(VariableGroup.QPARAMS):
            learned[id(variable)] = variable, pace_factor(quantizer, variable) if pace == SCALE else 1.0
    others = [variable for variable in variables if id(variable) not in learned]
    groups: list[dict[str, Any]] = []
    if others:
        groups.append({"params": others, "name": VariableGroup.WEIGHTS.name, **(weights or {})})
    options = {"weight_decay": 0.0, **(qparams or {})}
    key, rate = _learning_rate(options, weights or {})
    if pace == SCALE and (not isinstance(rate, Real) or isinstance(rate, bool)):
        problem = f"pace 'scale' multiplies the learning rate, and it is {rate!r}"
        raise InvalidArgumentError("parameter_groups: qparams", problem, f'give qparams={{"{key}": ...}}.')
    for factor in sorted({factor for _, factor in learned.values()}):
        members = [variable for variable, each in learned.values() if each == factor]
        paced = {key: rate * factor} if pace == SCALE else {}
        groups.append({"params": members, "name": VariableGroup.QPARAMS.name, **options, **paced})
    return groups


def _learning_rate(qparams: Mapping[str, Any], weights: Mapping[str, Any]) -> tuple[str, Any]:
    """Return what the frameworks call a learning rate, as far as the options have it, and the one of QPARAMS."""
    for options in (qparams, weights):
        for key in ("lr", "learning_rate"):
            if key in options:
                return key, options[key]
    return "lr", None


def pace_factor(quantizer: BaseTrainableQuantizer, variable: Any) -> float:
    """Return what a learning rate is multiplied by, so that SGD on a threshold moves the scale as SGD on it would.

    Parameters
    ----------
    quantizer : BaseTrainableQuantizer
        What the variable belongs to.
    variable : variable
        One of its own.

    Returns
    -------
    float
        ``4**(n_bits - signed)`` for a threshold, ``4**n_bits`` for the end of a range, and 1 for every other variable.

    Notes
    -----
    With ``threshold = c * scale`` the chain rule gives ``dL/dthreshold = dL/dscale / c``, and a step of the threshold
    is one of the scale divided by c: two factors of c for SGD. Optimizers that divide by the gradient's size, such as
    Adam, see neither.
    """
    if quantizer.grid_parameters:  # they stand for numbers in units of their own
        return 1.0
    for width in quantizer.structure.widths:
        if any(each is variable for each in quantizer.grid_variables(width).values()):
            uniform = quantizer.quantization_config.quantization_method is QuantizationMethod.UNIFORM
            return 4.0 ** (width - int(quantizer.signed and not uniform))
    return 1.0
