"""Whether code that can't be traced might reach into a part that can, and use its layers otherwise than the part does.

A part's trace tells how the part uses its layers, and nothing of the modules around it. Their source is read for
attribute names and loops: what could reach a layer is taken for reaching it.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from trainable_torch.references import is_empty
from trainable_torch.structure.overrides import tensors_of

_ENUMERATIONS = frozenset(
    (
        "modules", "children", "named_modules", "named_children", "get_submodule", "_modules", "__dict__", "apply",
        "parameters", "named_parameters", "get_parameter", "_parameters", "buffers", "named_buffers", "get_buffer",
        "state_dict", "vars", "getattr",
    )
)  # fmt: skip
"""Ways to reach what is inside a module without its name."""
_DESCRIBING = frozenset(("dtype", "device"))
"""Attributes of models that read a parameter for its type and place only."""
_DEPTH = 4


def reached_otherwise(model: nn.Module, name: str, part: nn.Module, layers: Iterable[nn.Module]) -> str:
    """Return how code outside of a part may use some of its layers; empty when it only calls the part.

    Parameters
    ----------
    model : Module
        The whole model.
    name : str
        The part's name in it.
    part : Module
        The part, whose own code is known.
    layers : iterable of Module
        Layers in the part.
    """
    inside = set(part.modules())
    indexed = hasattr(type(part), "__getitem__") or hasattr(type(part), "__iter__")
    wanted = {id(each) for each in (inside if indexed else inside - {part})}
    wanted |= {id(tensor) for layer in layers for tensor in tensors_of(layer)}
    for path, module in model.named_modules():
        if module not in inside:
            attribute = next((key for key, value in _attributes(module) if _holds(value, wanted)), "")
            if attribute:
                return f"{f'{path}.{attribute}'.lstrip('.')} holds it or the layer before it as well"
    inner = {own: path for path, own in part.named_modules()}
    steps = {step for layer in layers for step in inner[layer].split(".") if step.isidentifier()}
    reached = name.rpartition(".")[2]
    module, ancestors = model, [model]
    for step in name.split(".")[:-1]:
        module = getattr(module, step)
        ancestors.append(module)
    for ancestor in ancestors:
        if type(ancestor).__module__.startswith("torch.nn."):
            continue  # a container, which calls what it holds
        uses = _uses(ancestor)
        who = type(ancestor).__name__
        if uses is None:
            return f"{who} can't be traced, nor can its source be read"
        touched = sorted(uses.foreign & steps | uses.enumerations)
        if indexed and (reached in uses.passed or (not reached.isidentifier() and uses.looped & uses.opened)):
            touched.append(reached)
        if touched:
            return f"{who} can't be traced, and may use the layers otherwise: its code reads {touched[0]!r}"
    return ""


# ---- what is held ---------------------------------------------------------------------------------------------------


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    registered = ("_modules", "_parameters", "_buffers")
    return ((key, value) for key, value in vars(module).items() if key not in registered)


def _holds(value: Any, wanted: set[int], depth: int = _DEPTH) -> bool:
    """Return whether a value is, or leads to, one of some objects, which are given by their ``id``."""
    if id(value) in wanted:
        return True
    if depth == 0:
        return False
    held: Iterable[Any] = ()
    if isinstance(value, list | tuple | set | frozenset):
        held = value
    elif isinstance(value, dict):
        held = value.values()
    elif isinstance(value, functools.partial):
        held = (value.func, *value.args, *value.keywords.values())
    elif inspect.ismethod(value):
        held = (value.__self__,)
    elif inspect.isfunction(value):
        held = [cell.cell_contents for cell in value.__closure__ or () if not is_empty(cell)]
    return any(_holds(each, wanted, depth - 1) for each in held)


# ---- what code reads ------------------------------------------------------------------------------------------------


@dataclass
class _Uses:
    """Names that the code of a module's forward reads.

    Attributes of ``self`` are `own`, those of anything else `foreign`; those that are used otherwise than by calling
    them are `passed`. A loop binds local names in `looped`; those in `opened` are subscripted or looped over.
    `enumerations` are ways to reach what is inside a module without its name.
    """

    foreign: set[str] = field(default_factory=set)
    own: set[str] = field(default_factory=set)
    passed: set[str] = field(default_factory=set)
    looped: set[str] = field(default_factory=set)
    opened: set[str] = field(default_factory=set)
    enumerations: set[str] = field(default_factory=set)


def _uses(module: nn.Module) -> _Uses | None:
    """Return what the code that a module's forward may run reads; None when there is no source."""
    own = any(inspect.isroutine(value) for value in vars(module).values())
    cls: Any = type(module)
    return _uses_of(type(module), module) if own else _uses_of_class(cls)


@functools.lru_cache(maxsize=1024)
def _uses_of_class(cls: Any) -> _Uses | None:
    return _uses_of(cls, None)


def _uses_of(cls: type[nn.Module], module: nn.Module | None) -> _Uses | None:
    uses, waiting, done = _Uses(), ["forward", "__call__"], set()
    while waiting:
        name = waiting.pop()
        if name in done:
            continue
        done.add(name)
        for function in functions_of(cls, module, name):
            try:
                tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
            except (OSError, TypeError, SyntaxError):
                return None
            _read(tree, uses)
        waiting += [each for each in uses.own if each not in done and each not in _DESCRIBING]
    return uses


def functions_of(cls: type[nn.Module], module: nn.Module | None, name: str) -> Iterator[Callable[..., Any]]:
    """Yield the functions of one name that a module's classes define, PyTorch's own left out; and its own one."""
    found = [vars(module).get(name) if module is not None else None]
    found += [vars(each).get(name) for each in cls.__mro__ if not each.__module__.startswith("torch.")]
    for value in found:
        each = value.fget if isinstance(value, property) else value
        each = getattr(each, "__func__", each)
        function = inspect.unwrap(each) if callable(each) else None
        if inspect.isfunction(function):
            yield function


def _read(tree: ast.AST, uses: _Uses) -> None:
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    first = {
        id(arg)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "next"
        for arg in node.args
    }
    harmless = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call) and id(node) in first}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            on_self = isinstance(node.value, ast.Name) and node.value.id == "self"
            (uses.own if on_self else uses.foreign).add(node.attr)
            if id(node) not in called:
                uses.passed.add(node.attr)
            if node.attr in _ENUMERATIONS and id(node) not in harmless:
                uses.enumerations.add(node.attr)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _ENUMERATIONS:
            if node.func.id == "vars" or not _names_something(node):
                uses.enumerations.add(node.func.id)
            else:
                uses.foreign.add(node.args[1].value)  # type: ignore[attr-defined]
        elif isinstance(node, ast.For | ast.comprehension):
            uses.looped |= _names(node.target)
            uses.opened |= _names(node.iter)
        elif isinstance(node, ast.Subscript | ast.Starred):
            uses.opened |= _names(node.value)


def _names_something(call: ast.Call) -> bool:
    """Return whether a call of getattr names its attribute."""
    return len(call.args) > 1 and isinstance(call.args[1], ast.Constant) and isinstance(call.args[1].value, str)


def _names(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
