"""Copies of models: what reached into the model reaches into the copy."""

from __future__ import annotations

import copy
import inspect
import types
from collections import OrderedDict
from typing import Any, TypeVar

from torch import Tensor, nn

from trainable_torch.references import exchanged_in, is_empty, leads_to, named_functions, with_cells

Model = TypeVar("Model", bound=nn.Module)


def copied(model: Model) -> Model:
    """Return a deep copy of a model in which nothing leads back to the model, unlike in that of `copy.deepcopy`.

    Notes
    -----
    `copy.deepcopy` takes functions as they are. A hook, a lambda or a replaced forward that uses a module of the model
    by its closure would use that of the given model; here it gets a closure on the copy. Parameters lose their
    attributes and hooks there, and keep them here. ``weight_norm``, ``spectral_norm`` and pruning put a computed weight
    into the layer at each forward, and a model may keep what it has computed, which `copy.deepcopy` refuses: the copy
    has the values.
    """
    memo: dict[int, Any] = {}
    _without_graph(model, memo)
    result = copy.deepcopy(model, memo)
    _separate(result)
    _Closures(memo).move(result)
    for tensor in [*model.parameters(), *model.buffers()]:
        _keep_attributes(tensor, memo)
    return result


def _without_graph(model: nn.Module, memo: dict[int, Any]) -> None:
    """Let the values of tensors of the autograd graph be copied, wherever a model keeps them."""

    def see(value: Any) -> None:
        if isinstance(value, Tensor) and not value.is_leaf:
            memo[id(value)] = value.detach().clone()

    for module in model.modules():
        for value in vars(module).values():
            _each(value, see)


def _separate(model: nn.Module) -> None:
    """Give each module dictionaries of its own, where `copy.copy` of a layer made several have the same ones."""
    seen: set[int] = set()
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if name.startswith("_") and type(value) in (dict, OrderedDict):
                if id(value) in seen:
                    vars(module)[name] = copy.copy(value)
                seen.add(id(vars(module)[name]))


def _each(value: Any, see: Any, depth: int = 4) -> None:
    see(value)
    if depth and type(value) in (list, tuple, dict, set):
        for each in value.values() if isinstance(value, dict) else value:
            _each(each, see, depth - 1)


class _Closures:
    """Gives the functions in a copy closures on what was copied, in the place of the originals."""

    def __init__(self, memo: dict[int, Any]) -> None:
        self.memo = memo
        self.moved: dict[int, tuple[Any, Any]] = {}  # with the originals, so that no other object gets their ids
        self.cells: dict[int, types.CellType] = {}

    def move(self, model: nn.Module) -> None:
        for module in model.modules():
            exchanged_in(module, self.exchange)

    def exchange(self, value: Any) -> Any:
        """Return what stands for a function in the copy."""
        if not isinstance(value, types.FunctionType):
            return value
        if id(value) not in self.moved:
            self.moved[id(value)] = value, value
            if leads_to(value, self._was_copied):
                self._move(value)
        return self.moved[id(value)][1]

    def _move(self, function: types.FunctionType) -> None:
        changed = [
            cell for cell in function.__closure__ or () if not is_empty(cell) and self._changes(cell.cell_contents)
        ]
        new = [cell for cell in changed if id(cell) not in self.cells]
        for cell in new:  # functions may share a variable, and still do
            self.cells[id(cell)] = types.CellType()
        result = with_cells(function, self.cells)
        self.moved[id(function)] = function, result  # before its parts: it may lead to itself
        for cell in new:
            self.cells[id(cell)].cell_contents = self._copy_of(cell.cell_contents)
        result.__defaults__ = tuple(map(self._copy_of, function.__defaults__ or ())) or None
        result.__kwdefaults__ = {key: self._copy_of(value) for key, value in (function.__kwdefaults__ or {}).items()}
        result.__dict__.update({key: self._copy_of(value) for key, value in vars(function).items()})

    def _changes(self, value: Any) -> bool:
        return leads_to(value, self._was_copied) or id(value) in self.memo

    def _was_copied(self, value: Any) -> bool:
        return isinstance(value, nn.Module | Tensor) and self.memo.get(id(value), value) is not value

    def _copy_of(self, value: Any) -> Any:
        """Return what a cell of a closure or a default of an argument holds in the copy."""
        if isinstance(value, types.FunctionType):
            return self.exchange(value)
        known = self.memo.get(id(value))
        if known is not None:
            return known
        return copy.deepcopy(value, self.memo) if leads_to(value, self._was_copied) else value


def _keep_attributes(tensor: Tensor, memo: dict[int, Any]) -> None:
    """Give a tensor's copy the attributes and hooks of the tensor."""
    result = memo.get(id(tensor))
    if not isinstance(result, Tensor) or type(result) is not type(tensor):
        return
    for name, value in vars(tensor).items():
        if name not in vars(result):
            vars(result)[name] = copy.deepcopy(value, memo)
    for hooks, register in (("_backward_hooks", "register_hook"), ("_post_accumulate_grad_hooks", None)):
        for hook in list((getattr(tensor, hooks, None) or {}).values()):
            if result.is_leaf and result.requires_grad and not getattr(result, hooks, None):
                getattr(result, register or "register_post_accumulate_grad_hook")(_Closures(memo).exchange(hook))


def reached_by_name(model: nn.Module, result: nn.Module) -> dict[str, str]:
    """Return which functions in a model's copy use the given model by a global name, and what that means.

    Parameters
    ----------
    model, result : Module
        The given model and its copy.
    """
    own = set(model.modules())
    found = {}
    for path, function in named_functions(result):
        code, names = function.__code__, function.__globals__
        reached = [name for name in code.co_names if isinstance(names.get(name), nn.Module) and names[name] in own]
        if reached:
            what = inspect.getattr_static(function, "__qualname__", "a function")
            found[path] = (
                f"{what} uses {reached[0]!r} of the given model by a global name: what it computes with it stays "
                "float, and trains the given model; let the function be a method, or give it the module as an argument"
            )
    return found
