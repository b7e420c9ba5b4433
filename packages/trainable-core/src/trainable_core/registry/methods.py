"""The training methods there are: the built-ins, collected from their modules, and what a plugin's class declares."""

from __future__ import annotations

import functools
import inspect
import pkgutil
from dataclasses import replace
from importlib import import_module
from types import ModuleType
from typing import Any

from trainable_core import reference
from trainable_core.enums import QuantizationTarget
from trainable_core.errors import InvalidArgumentError, QuantizerDefinitionError
from trainable_core.reference.method import DECLARED, Method, Option

BASE = "trainable_core.quantizer"
"""Module of core's base class; `registry` is below it."""

CONFIG_ARGUMENTS = 2
"""Arguments that every quantizer's constructor begins with: the config, and whether to freeze."""


@functools.cache
def built_in_methods() -> dict[str, Method]:
    """Return the built-in methods by name: those of all modules of `trainable_core.reference` that have a ``METHOD``.

    Examples
    --------
    >>> method = built_in_methods()["DQA"]
    >>> method.own_variables, [option.name for option in method.options]
    (('logits',), ['temperature', 'bit_cost_weight'])
    """
    names = sorted(module.name for module in pkgutil.iter_modules(reference.__path__))
    modules = [import_module(f"{reference.__name__}.{name}") for name in names]
    found: list[Method] = [module.METHOD for module in modules if hasattr(module, "METHOD")]
    return {method.name: method for method in found}


def built_in_modules(package: str) -> dict[str, ModuleType]:
    """Return a backend's modules of the built-in methods, by method; a method that the backend lacks is left out.

    Parameters
    ----------
    package : str
        Import path of the backend's quantizers; the module of a method has the name of the reference's.
    """
    found: dict[str, ModuleType] = {}
    for method in built_in_methods().values():
        name = f"{package}.{method.module.rpartition('.')[2]}"
        try:
            found[method.name] = import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
    return found


def built_in_classes(package: str) -> list[type[Any]]:
    """Return the marked quantizer classes in a backend's modules of the built-in methods; see `built_in_modules`."""
    return [
        each
        for module in built_in_modules(package).values()
        for each in vars(module).values()
        if isinstance(each, type) and each.__module__ == module.__name__ and "identifier" in vars(each)
    ]


def declaring_classes(package: str) -> dict[str, type[Any]]:
    """Return the class with the declaration of each built-in method in a backend, by method.

    For a backend that makes its marked classes from these, one for each target.
    """
    return {
        name: each
        for name, module in built_in_modules(package).items()
        for each in vars(module).values()
        if isinstance(each, type) and vars(each).get("declaration") is built_in_methods()[name]
    }


def declaration_of(cls: type[Any], name: str) -> Method:
    """Return what a quantizer class that is registered under `name` declares.

    That is its attribute ``declaration``, or the built-in method's of this name, or else what its class attributes say;
    a subclass of a method's quantizer under another name inherits everything but the oracle.
    """
    inherited = getattr(cls, "declaration", None)
    if inherited is not None and inherited.name == name:
        return inherited  # type: ignore[no-any-return] # class attributes are untyped here
    known = built_in_methods().get(name)
    if known is not None:
        return known
    base = Method(name) if inherited is None else replace(inherited, name=name, module="", oracle=None)
    said = {field: getattr(cls, field) for field in DECLARED if getattr(cls, field, None) is not None}
    return replace(base, options=options_of(cls), **said)


def options_of(cls: type[Any]) -> tuple[Option, ...]:
    """Return the arguments of a constructor beyond the config and the freeze."""
    try:
        parameters = list(inspect.signature(cls).parameters.values())[CONFIG_ARGUMENTS:]
    except (TypeError, ValueError):  # a class without a signature that Python can tell
        return ()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return tuple(Option(each.name, each.default) for each in parameters if each.kind not in variadic)


def check_class(cls: type[Any], name: str, target: QuantizationTarget) -> None:
    """Require that what a class declares about itself is well formed and fits together.

    Raises
    ------
    QuantizerDefinitionError
        When a declared field has an unknown value, when `grid_parameters` come without both of their methods or without
        `learns_grid`, or when a class for activations declares `deploys_values`.
    """
    try:
        declared = declaration_of(cls, name)
    except InvalidArgumentError as error:
        raise QuantizerDefinitionError(cls, str(error)) from error
    if declared.deploys_values and target is not QuantizationTarget.Weights:
        raise QuantizerDefinitionError(cls, "it declares deploys_values, and only weights can be stored as values")
    if declared.grid_parameters:
        for method in ("encode_grid", "decode_grid"):
            owner = next((base.__module__ for base in cls.__mro__ if method in vars(base)), BASE)
            if owner == BASE:
                raise QuantizerDefinitionError(cls, f"it declares grid_parameters and has no method {method!r}")
        if not declared.learns_grid:
            raise QuantizerDefinitionError(cls, "it declares grid_parameters, which are trained only with learns_grid")


def check_estimator(cls: type[Any]) -> None:
    """Require that a class says how a tensor is fake-quantized: it has one of the methods that its base names.

    Raises
    ------
    QuantizerDefinitionError
        When it has none of them.
    """
    base = next((each for each in cls.__mro__ if "estimated_by" in vars(each)), None)
    names: tuple[str, ...] = () if base is None else base.estimated_by  # type: ignore[attr-defined] # seen a line above
    if names and all(getattr(cls, name) is getattr(base, name) for name in names):
        missing = f"it has no `{names[0]}`, nor any of {', '.join(names[1:])}"
        raise QuantizerDefinitionError(cls, f"{missing}: nothing says how a tensor is fake-quantized")


def check_declared(cls: type[Any], declared: Method, target: QuantizationTarget, grids: tuple[Any, ...]) -> None:
    """Require that a class is marked for nothing, and takes no arguments, but what its ``declaration`` says.

    Raises
    ------
    QuantizerDefinitionError
        When it is marked for another target or grid, or when its constructor's further arguments are not the declared
        options with their defaults.
    """
    if target not in declared.targets:
        raise QuantizerDefinitionError(cls, f"{declared.name} is not declared for {target}")
    extra = [str(grid) for grid in grids if grid not in declared.grids_of(target)]
    if extra:
        raise QuantizerDefinitionError(cls, f"{declared.name} is not declared for {', '.join(extra)} of {target}")
    own, wanted = ({each.name: each.default for each in options} for options in (options_of(cls), declared.options))
    if own != wanted:
        raise QuantizerDefinitionError(cls, f"its arguments are {own}, {declared.name} declares {wanted}")
