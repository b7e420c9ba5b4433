"""Which weights a model's forward writes into: a constraint, a mask, or an average that is kept by hand.

Such code means the float parameter, and reads it in the forward, where a quantized layer shows its quantized weight:
what it writes would be lost. It is found in the source.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any, TypeGuard

from torch import nn

from trainable_torch.structure.surroundings import functions_of

_UNWRITTEN = frozenset(("requires_grad_", "retain_grad_", "share_memory_", "apply_", "rename_"))
"""Methods that end like those that write, and write nothing into the tensor that is asked for."""

Write = tuple[str, str]
"""Who holds a weight that is written into, as the last step of its name, and the attribute: ``("conv", "weight")``.

The holder is ``"self"``, or empty where it is a local variable.
"""


def written(model: nn.Module, name: str, layer: nn.Module, attribute: str) -> str:
    """Return where a weight of a layer may be written into while the model runs; empty where it is not.

    Parameters
    ----------
    model : Module
        The model.
    name : str
        The layer's name in it.
    layer : Module
        The layer.
    attribute : str
        Its attribute; dots lead to a part of the layer.
    """
    *inside, key = attribute.split(".")
    steps = [*name.split("."), *inside] if name else inside
    owner, owners = model, [model]
    for step in steps:
        owner = getattr(owner, step)
        owners.append(owner)
    for depth, each in enumerate(owners):
        wanted = {("self", key)} if depth == len(steps) else {(steps[-1], key), ("", key)}
        if each is layer and depth < len(steps):
            wanted = {(steps[-1], key)}
        cls: Any = type(each)
        found = wanted & _writes(cls)
        if found:
            return f"{type(each).__name__}.forward"
    return ""


@functools.lru_cache(maxsize=1024)
def _writes(cls: Any) -> frozenset[Write]:
    """Return what the code that a class's forward may run writes into."""
    if cls.__module__.startswith("torch."):
        return frozenset()
    found: set[Write] = set()
    waiting, done = ["forward"], set()
    while waiting:
        name = waiting.pop()
        if name in done:
            continue
        done.add(name)
        for function in functions_of(cls, None, name):
            try:
                tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
            except (OSError, TypeError, SyntaxError):
                continue
            own = next((each.args.args[0].arg for each in ast.walk(tree) if _takes_arguments(each)), "self")
            found |= {write for target in _targets(tree) if (write := _held(target, own)) is not None}
            waiting += [
                node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and _is(node.value, own)
            ]
    return frozenset(found)


def _takes_arguments(node: ast.AST) -> TypeGuard[ast.FunctionDef]:
    return isinstance(node, ast.FunctionDef) and bool(node.args.args)


def _is(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _targets(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield what is written into: what is assigned, and what methods and functions change in place."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            yield from (each.value if isinstance(each, ast.Subscript) else _data(each) for each in node.targets)
        elif isinstance(node, ast.AugAssign):
            yield node.target.value if isinstance(node.target, ast.Subscript) else node.target
        elif isinstance(node, ast.Call):
            method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            if method.endswith("_") and not method.endswith("__") and method not in _UNWRITTEN:
                yield from (node.func.value, *node.args[:1])  # type: ignore[attr-defined] # it has a method
            yield from (keyword.value for keyword in node.keywords if keyword.arg == "out")


def _data(target: ast.AST) -> ast.AST:
    """Return a target of which the values are assigned; an attribute that is assigned itself is another parameter."""
    return target if isinstance(target, ast.Attribute) and target.attr == "data" else ast.Pass()


def _held(target: ast.AST, own: str) -> Write | None:
    """Return who holds what is written into, where that is an attribute or its ``data``."""
    while isinstance(target, ast.Subscript) or (isinstance(target, ast.Attribute) and target.attr == "data"):
        target = target.value
    if not isinstance(target, ast.Attribute):
        return None
    holder = target.value
    while isinstance(holder, ast.Subscript):
        holder = holder.value
        if isinstance(holder, ast.Attribute):
            return "", target.attr
    if isinstance(holder, ast.Attribute):
        return holder.attr, target.attr
    if isinstance(holder, ast.Name):
        return ("self" if holder.id == own else ""), target.attr
    return None
