"""How a quantizer class says what it is: the marks of ``@mark_quantizer``, read as the keys it answers to."""

from __future__ import annotations

import inspect
from enum import Enum
from typing import TypeVar

from trainable_core.config import member
from trainable_core.enums import QuantizationMethod, QuantizationTarget
from trainable_core.errors import InvalidArgumentError, QuantizerDefinitionError, nearest
from trainable_core.key import Key, identifier_text, is_readable

E = TypeVar("E", bound=Enum)


def named(enum: type[E], argument: str, value: object) -> E:
    """Return the member that `value` names, or say which argument names nothing."""
    try:
        return member(enum, value)
    except ValueError as error:
        hint = nearest(getattr(value, "name", value), enum.__members__).strip().removeprefix("Hint: ")
        problem = f"{value!r} is not one of {', '.join(enum.__members__)}"
        raise InvalidArgumentError(argument, problem, hint) from error


def keys_of(cls: type, backend: str) -> list[Key]:
    """Return every key that a class marked with ``@mark_quantizer`` answers to in a backend.

    Raises
    ------
    QuantizerDefinitionError
        When the marks are missing or unknown, or when an argument after the config has no default.
    """
    target, methods = marks_of(cls)
    identifier = getattr(cls, "identifier", None)
    if identifier is None:
        raise QuantizerDefinitionError(cls, "its mark has no identifier, under which it would be looked up")
    text = identifier_text(identifier)
    if not is_readable(text):
        raise QuantizerDefinitionError(
            cls, f"its identifier {text!r} is blank, begins or ends with a space, or holds what can't be printed"
        )
    return [Key(backend, target, text, method) for method in methods]


def marks_of(cls: type) -> tuple[QuantizationTarget, list[QuantizationMethod]]:
    """Return what a class marked with ``@mark_quantizer`` quantizes, and on which grids; it need have no identifier.

    Enum members of `mct_quantizers` are read by name, so core needs no import of it.

    Raises
    ------
    QuantizerDefinitionError
        As `keys_of` does.
    """
    if not isinstance(cls, type):
        raise QuantizerDefinitionError(cls, "it is not a class")
    target = getattr(cls, "quantization_target", None)
    methods = getattr(cls, "quantization_method", None)
    if target is None and not methods:
        raise QuantizerDefinitionError(cls, "it is not marked with @mark_quantizer")
    if target is None or not methods:
        missing = "quantization_target" if target is None else "quantization_method"
        raise QuantizerDefinitionError(cls, f"its mark has no {missing}")
    for verb in ("initialize_quantization", "convert2inferable"):
        if not callable(getattr(cls, verb, None)):
            raise QuantizerDefinitionError(cls, f"it has no method {verb!r}")
    parameters = list(inspect.signature(cls).parameters.values())
    first, rest = (parameters[0] if parameters else None), parameters[1:]
    if first is None or first.kind is inspect.Parameter.KEYWORD_ONLY:
        raise QuantizerDefinitionError(cls, "its first argument must be the config")
    for parameter in rest:
        variadic = parameter.kind in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        if parameter.default is parameter.empty and not variadic:
            raise QuantizerDefinitionError(cls, f"argument {parameter.name!r} has no default")
    try:
        target = QuantizationTarget[target.name]
        methods = [QuantizationMethod[method.name] for method in methods]
    except (KeyError, AttributeError, TypeError) as error:
        raise QuantizerDefinitionError(cls, f"target {target!r} or methods {methods!r} are unknown") from error
    return target, methods
