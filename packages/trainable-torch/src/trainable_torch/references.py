"""What the attributes of modules lead to: through containers, partials, bound methods and closures."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

_REGISTERED = ("_modules", "_parameters", "_buffers")
_DEPTH = 6


def with_cells(function: types.FunctionType, cells: Mapping[int, types.CellType]) -> types.FunctionType:
    """Return a copy of a function with other cells in its closure, which are given by the ``id`` of the former ones."""
    closure = tuple(cells.get(id(cell), cell) for cell in function.__closure__ or ()) or None
    result = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, closure
    )
    result.__kwdefaults__ = function.__kwdefaults__
    result.__dict__.update(vars(function))
    result.__qualname__, result.__doc__, result.__module__ = (
        function.__qualname__,
        function.__doc__,
        function.__module__,
    )
    result.__annotations__ = function.__annotations__
    return result


def is_empty(cell: types.CellType) -> bool:
    """Return whether a cell of a closure holds nothing yet."""
    try:
        cell.cell_contents  # noqa: B018 - reading it is the question
    except ValueError:
        return True
    return False


def parts_of(value: Any) -> list[Any]:
    """Return what a container, partial, bound method or function holds directly; nothing of other objects."""
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, types.MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if not is_empty(cell)]
        wrapped = [vars(value)["__wrapped__"]] if "__wrapped__" in vars(value) else []
        return [*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), *wrapped]
    return []


def leads_to(value: Any, is_wanted: Callable[[Any], bool]) -> bool:
    """Return whether a value is, or holds at some depth, an object that is wanted."""
    seen: set[int] = set()

    def looks(each: Any, depth: int) -> bool:
        if id(each) in seen:
            return False
        seen.add(id(each))
        return is_wanted(each) or (depth > 0 and any(looks(part, depth - 1) for part in parts_of(each)))

    return looks(value, _DEPTH)


def exchanged_in(module: nn.Module, exchange: Callable[[Any], Any]) -> None:
    """Exchange functions and bound methods in a module's attributes, hooks and containers, in place.

    Parameters
    ----------
    module : Module
        Its own attributes; not those of its children.
    exchange : callable
        Returns what stands in the place of a function or bound method.
    """
    exchanging = _Exchanging(exchange)
    for name, value in list(vars(module).items()):
        if name not in _REGISTERED:
            new = exchanging.result_for(value, _DEPTH)
            if new is not value:
                vars(module)[name] = new


class _Exchanging:
    """Exchanges functions in what it is given; containers that can be changed stay the same objects."""

    def __init__(self, exchange: Callable[[Any], Any]) -> None:
        self.exchange = exchange
        self.seen: set[int] = set()

    def result_for(self, value: Any, depth: int) -> Any:
        """Return what stands in the place of a value."""
        if isinstance(value, types.FunctionType):
            return self.exchange(value)
        if isinstance(value, types.MethodType):
            return self._method(value)
        if depth == 0 or id(value) in self.seen:
            return value
        if type(value) is tuple:
            return self._tuple(value, depth)
        if isinstance(value, functools.partial):
            return self._partial(value, depth)
        if isinstance(value, dict | list):
            self._fill(value, depth)
        elif _is_plain_object(value):
            self._fill(vars(value), depth)
        return value

    def _fill(self, container: Any, depth: int) -> None:
        self.seen.add(id(container))
        for key, each in list(container.items() if isinstance(container, dict) else enumerate(container)):
            new = self.result_for(each, depth - 1)
            if new is not each:
                container[key] = new

    def _method(self, method: types.MethodType) -> Any:
        found = self.exchange(method)
        if found is not method:
            return found
        function = self.exchange(method.__func__)
        return method if function is method.__func__ else types.MethodType(function, method.__self__)

    def _tuple(self, values: tuple[Any, ...], depth: int) -> tuple[Any, ...]:
        new = tuple(self.result_for(each, depth - 1) for each in values)
        return values if all(one is other for one, other in zip(new, values, strict=True)) else new

    def _partial(self, value: functools.partial[Any], depth: int) -> functools.partial[Any]:
        function, args = self.result_for(value.func, depth - 1), self._tuple(value.args, depth)
        keywords = {name: self.result_for(each, depth - 1) for name, each in value.keywords.items()}
        if function is value.func and args is value.args and all(keywords[k] is v for k, v in value.keywords.items()):
            return value
        new = type(value)(function, *args, **keywords)
        vars(new).update(vars(value))
        return new


def _is_plain_object(value: Any) -> bool:
    """Return whether a value is an instance of somebody's class, with attributes; no module, class, or PyTorch's."""
    if isinstance(value, nn.Module | type | types.ModuleType) or not hasattr(value, "__dict__"):
        return False
    return type(value).__module__.partition(".")[0] not in ("torch", "trainable_core")


def named_functions(model: nn.Module) -> Iterator[tuple[str, types.FunctionType]]:
    """Yield each function that a model's modules hold, with the name of the attribute."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name in _REGISTERED:
                continue
            found: list[types.FunctionType] = []
            leads_to(value, lambda each, found=found: isinstance(each, types.FunctionType) and found.append(each))  # type: ignore[misc]
            for function in found:
                yield f"{path}.{name}".lstrip("."), function
