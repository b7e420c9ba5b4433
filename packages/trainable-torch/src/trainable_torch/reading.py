"""Who reads a weight: the model as it runs, which gets the quantized value, or anybody else, who gets the float one.

Nothing is switched on or off, so nothing can be left on by an error, an interrupt or another thread. `wrap` marks each
module of the model; a weight is read by the model when a marked module is being called further up the stack, when a
compiler or exporter traces the read, or when activation checkpointing computes a forward again.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import nn

from trainable_core.errors import ModelError
from trainable_core.recipe.state import WrappedState
from trainable_torch.kernels import eligible

MARK = "_trainable_model"
"""Attribute by which each module of a wrapped model knows the model's `Membership`."""

ORIGIN = "_trainable_origin"
"""Attribute of each module of a wrapped model: its name when the model was wrapped."""

_CALLS = frozenset(("forward", "_call_impl", "__call__"))
"""Names of the functions that call a module: its own, and those of PyTorch that run its hooks as well."""


_MANAGERS = ("torch.distributed.", "torch.optim.", "accelerate.", "deepspeed.")
"""Packages that move, shard and replace parameters, also while a model runs; what they read is the parameter."""


class Membership:
    """What the modules of one wrapped model have in common, and no other module: copied with them, as one object.

    Parameters
    ----------
    names : set of str
        The names of all modules when the model was wrapped.
    """

    def __init__(self, names: frozenset[str]) -> None:
        self.names = names
        self.state: WrappedState | None = None


class _Thread(threading.local):
    """The models that a thread said it runs, innermost last."""

    def __init__(self) -> None:
        self.models: list[Membership] = []


_thread = _Thread()


def mark(model: nn.Module) -> None:
    """Mark every module of a model that has just been wrapped."""
    named = [(name, each) for name, each in model.named_modules() if not isinstance(each, torch.jit.ScriptModule)]
    membership = Membership(frozenset(name for name, _ in named))
    for name, module in named:
        object.__setattr__(module, MARK, membership)
        object.__setattr__(module, ORIGIN, name)


@contextmanager
def running(qmodel: nn.Module) -> Iterator[None]:
    """Let quantized weights be read as such by code of a model that is not reached by calling one of its modules.

    A model's ``forward`` needs no such thing, nor do its parts when they are called. A method that reads weights by
    itself does, as in ``with running(qmodel): scores = qmodel.similarity(x)``: nothing else tells it from an
    initializer, which must see the float weights.

    Parameters
    ----------
    qmodel : Module
        A wrapped or finalized model, or a part of one.

    Raises
    ------
    ModelError
        When it is neither.
    """
    membership = qmodel.__dict__.get(MARK) if isinstance(qmodel, nn.Module) else None
    if membership is None:
        problem = f"{type(qmodel).__name__} was not made by trainable_torch.wrap"
        raise ModelError(problem, "qmodel = trainable_torch.wrap(model, recipe).")
    _thread.models.append(membership)
    try:
        yield
    finally:
        _thread.models.pop()


def is_running(layer: nn.Module) -> bool:
    """Return whether the model that a wrapped layer belongs to is running in this thread; a lone layer never is."""
    if torch.compiler.is_compiling():
        return True
    reader = _reader()
    if reader is not None and _module_of(reader).startswith(_MANAGERS):
        return False
    if eligible.is_in_backward() and torch.is_grad_enabled():
        return True
    membership = layer.__dict__.get(MARK)
    if membership is None:
        return False
    return membership in _thread.models or _is_called(membership, reader)


def _reader() -> FrameType | None:
    """Return the frame of the code that reads a weight: the first that is not ours."""
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - the standard library has no other way up the stack
    while frame is not None and _module_of(frame).startswith("trainable_torch."):
        frame = frame.f_back
    return frame


def _is_called(membership: Membership, frame: FrameType | None) -> bool:
    """Return whether a module of a model is being called in a frame or further up the stack."""
    while frame is not None:
        code = frame.f_code
        if code.co_name in _CALLS and code.co_argcount and _is_of(frame.f_locals.get(code.co_varnames[0]), membership):
            return True
        frame = frame.f_back
    return False


def _module_of(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _is_of(module: Any, membership: Membership) -> bool:
    """Return whether a module that is called belongs to a model, or is the compiled form of one that does."""
    if not isinstance(module, nn.Module):
        return False
    attributes = module.__dict__
    if attributes.get(MARK) is membership:
        return True
    compiled = attributes.get("_modules", {}).get("_orig_mod")
    return compiled is not None and compiled.__dict__.get(MARK) is membership
