"""A wrapped model's trainable variables in the groups that an optimizer treats apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from trainable_core.enums import VariableGroup
from trainable_core.errors import InvalidArgumentError
from trainable_core.quantizer import BaseTrainableQuantizer


def variable_groups(
    variables: Iterable[Any],
    quantizers: Iterable[BaseTrainableQuantizer],
    weights: Mapping[str, Any] | None,
    qparams: Mapping[str, Any] | None,
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

    Raises
    ------
    InvalidArgumentError
        When an option would replace the variables or the name.
    """
    for part, options in (("weights", weights), ("qparams", qparams)):
        if options is not None and not isinstance(options, Mapping):
            raise InvalidArgumentError(f"parameter_groups: {part}", f"options must be a mapping, got {options!r}")
        for reserved in sorted({"params", "name"} & set(options or {})):
            raise InvalidArgumentError(f"parameter_groups: {part}", f"{reserved!r} is not an option")
    learned: dict[int, Any] = {}
    for quantizer in quantizers:
        for variable in quantizer.get_trainable_variables(VariableGroup.QPARAMS):
            learned[id(variable)] = variable
    others = [variable for variable in variables if id(variable) not in learned]
    groups: list[dict[str, Any]] = []
    if others:
        groups.append({"params": others, "name": VariableGroup.WEIGHTS.name, **(weights or {})})
    if learned:
        name = VariableGroup.QPARAMS.name
        groups.append({"params": list(learned.values()), "name": name, "weight_decay": 0.0, **(qparams or {})})
    return groups
