"""Quantizers around functional operations in models that can't be traced: found by an example, matched at every call.

The model stays as it is. While it runs, a `TorchFunctionMode` sees each operation, and knows it by the module in whose
forward it is called, its op kind, and how many of that kind the call has had before. The forward of every module that
was seen checks in the end that nothing was missing.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from trainable_core.errors import ModelError, QuantizerStateError
from trainable_torch.holder import ActivationQuantizationHolder
from trainable_torch.kernels import eligible
from trainable_torch.reading import MARK
from trainable_torch.structure.observing import Observed, Run, is_leaf
from trainable_torch.structure.operands import is_in_place, operands, operation_kind, replaced

NO_ACTIVATIONS = "it works on indices, constants or a mask, and not on activations alone"
"""Why an operation has no quantizers, whose number of inputs is 0."""

CONTAINER = "functional_quantizers"
"""Name of the child of a wrapped model that holds the quantizers of its functional operations."""


@dataclass(frozen=True)
class Operation:
    """A functional operation, as it is known at every call.

    Parameters
    ----------
    name : str
        What rules and descriptions call it.
    module : str
        Name of the module in whose forward it is called.
    kind : str
        Its op kind.
    ordinal : int
        How many operations of this kind the module's forward calls before it.
    inputs : int
        How many different tensors of real numbers it is given; 0 where it works on no activations (`NO_ACTIVATIONS`).
    """

    name: str
    module: str
    kind: str
    ordinal: int
    inputs: int


@dataclass(frozen=True)
class Operations:
    """The functional operations of a model.

    Parameters
    ----------
    of_modules : mapping of str to tuple, or None
        Kind and number of inputs of each operation, in order, by the module that calls it; None for modules that the
        example did not reach.
    left_out : mapping of str to str
        Why the operations of a module are left alone, by its name.
    """

    of_modules: Mapping[str, tuple[tuple[str, int], ...] | None]
    left_out: Mapping[str, str] = field(default_factory=dict)

    def named(self, taken: Iterable[str]) -> list[Operation]:
        """Return every operation under a name that is not taken."""
        names, found = set(taken), []
        for module, calls in self.of_modules.items():
            counts: Counter[str] = Counter()
            for kind, inputs in calls or ():
                ordinal = counts[kind]
                counts[kind] += 1
                name = f"{module}.{kind}".lstrip(".") + (f"_{ordinal}" if ordinal else "")
                while name in names:
                    name += "_function"
                names.add(name)
                found.append(Operation(name, module, kind, ordinal, inputs))
        return found

    def to_document(self) -> dict[str, Any]:
        """Return the operations JSON-clean."""
        return {
            "of_modules": {name: calls and [list(call) for call in calls] for name, calls in self.of_modules.items()}
        }

    @classmethod
    def from_document(cls, document: Any) -> Operations:
        """Return the operations of a document; ModelError when it is not one."""
        try:
            found = {
                str(name): None if calls is None else tuple((str(kind), int(inputs)) for kind, inputs in calls)
                for name, calls in document["of_modules"].items()
            }
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"its functional operations are damaged: {error!r}") from error
        return cls(found)


def learned(model: nn.Module, observed: Observed) -> Operations | str:
    """Return the functional operations that a model's runs showed, or why they can't be known.

    Operations of a module are left alone where they differ between two calls, or between the model's modes.
    """
    if isinstance(observed.trained, str):
        return observed.trained
    inside = {child for module in model.modules() if is_leaf(module) for child in module.modules()}
    found: dict[str, tuple[tuple[str, int], ...] | None] = {}
    left_out: dict[str, str] = {}
    for name, module in model.named_modules():
        if module in inside or type(module).forward is nn.Module.forward:
            continue
        evaluated, trained = (_calls(run, name) for run in (observed.evaluated, observed.trained))
        if len(evaluated) > 1 or len(trained) > 1:
            left_out[name] = "its functional operations differ from one of its calls to another"
        elif evaluated and trained and evaluated != trained:
            left_out[name] = "its functional operations differ between train mode and eval mode"
        else:
            found[name] = next(iter(evaluated | trained), None)
    return Operations(found, left_out)


def _calls(run: Run, name: str) -> set[tuple[tuple[str, int], ...]]:
    return set(run.operations.get(name, ()))


# ---- the quantizers -------------------------------------------------------------------------------------------------


@dataclass
class Held:
    """An operation with its quantizers: of its inputs in order, and of its output; none where it stays float."""

    name: str
    inputs: int
    of_inputs: list[ActivationQuantizationHolder | None] = field(default_factory=list)
    of_output: ActivationQuantizationHolder | None = None


_FLOAT = Held("", 0)


def hold(
    root: nn.Module,
    operation: Operation,
    inputs: Mapping[int, Callable[[str], Any]],
    output: Callable[[str], Any] | None,
) -> Held:
    """Add the quantizers of an operation to a model.

    Parameters
    ----------
    root : Module
        The model; gets a child that holds them.
    operation : Operation
        Which one.
    inputs : mapping of int to callable
        What returns the holder of each input that gets one, for a subject, by the input's place.
    output : callable or None
        The same for the output.
    """
    held = Held(operation.name, operation.inputs)
    path, _, last = operation.name.rpartition(".")
    home = _home(root, path)
    if output is not None:
        held.of_output = output(f"{operation.name}: output")
        home.add_module(f"{last}_output_holder", held.of_output)
    if inputs:
        held.of_inputs = [None] * operation.inputs
    for index, make in inputs.items():
        held.of_inputs[index] = make(f"{operation.name}: input {index}")
        home.add_module(f"{last}_input_{index}_holder", held.of_inputs[index])
    return held


def _home(root: nn.Module, path: str) -> nn.Module:
    """Return the module of a path in the model's container of quantizers, made where it is missing."""
    if CONTAINER not in root._modules:  # noqa: SLF001 - an attribute of this name may be something else
        if hasattr(root, CONTAINER):
            raise ModelError(f"{type(root).__name__} has an attribute {CONTAINER!r}", "rename it.")
        root.add_module(CONTAINER, _Container())
    home: nn.Module = root.get_submodule(CONTAINER)
    for step in path.split(".") if path else []:
        if step not in home._modules:  # noqa: SLF001 - a container's own attributes are no places
            home.add_module(step, _Container())
        home = home._modules[step]  # type: ignore[assignment]  # noqa: SLF001 - as above
    return home


class _Container(nn.Module):
    """Holds quantizers under the names of the operations they stand at."""

    def forward(self, inputs: Any) -> Any:
        """Return what it is given: a model that calls all its children, as `nn.Sequential` does, calls this as well."""
        return inputs


def install(root: nn.Module, operations: Operations, named: Sequence[Operation], held: Mapping[str, Held]) -> None:
    """Let the quantizers take part in every forward of a model.

    Parameters
    ----------
    root : Module
        The model.
    operations : Operations
        All that is known of its operations.
    named : sequence of Operation
        The same by name.
    held : mapping of str to Held
        Those with quantizers, by name.
    """
    if eligible.CALL_CODE is None:
        problem = f"functional operations of {type(root).__name__} can't be followed with PyTorch {torch.__version__}"
        raise ModelError(problem, "leave them out by a rule with skip: true.")
    kinds = frozenset(each.kind for each in named if each.name in held)
    tables: dict[str, dict[str, list[Held]]] = {}
    for each in named:
        if each.kind in kinds:
            table = tables.setdefault(each.module, {}).setdefault(each.kind, [])
            table.append(held.get(each.name, Held(each.name, each.inputs)))
    for name, calls in operations.of_modules.items():
        try:
            module = root.get_submodule(name)
        except AttributeError:
            raise ModelError(f"this model has no module {name!r}, whose operations are quantized") from None
        known = None if calls is None else tables.get(name, {})
        module.__dict__["forward"] = Forward(module, name or "model", kinds, known)


# ---- while the model runs -------------------------------------------------------------------------------------------


_OF_FUNCTIONS = frozenset(("__code__", "__name__", "__qualname__", "__defaults__", "__kwdefaults__", "__annotations__"))


class Forward:
    """The forward of one module, with quantizers around its functional operations; stands on the instance.

    Parameters
    ----------
    module : Module
        The module.
    name : str
        Its name in the model.
    kinds : frozenset of str
        Op kinds of which the model has quantized operations.
    table : dict, or None
        The operations of these kinds that the module's forward calls, in order; None if the example did not reach it.
    """

    def __init__(
        self, module: nn.Module, name: str, kinds: frozenset[str], table: dict[str, list[Held]] | None
    ) -> None:
        self.module, self.name, self.kinds, self.table = module, name, kinds, table
        self.own = vars(module).get("forward")  # one that was replaced on the instance before
        _in_eager_mode()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state of a copy or of a pickle."""
        self.__dict__.update(state)
        _in_eager_mode()

    def __getattr__(self, name: str) -> Any:
        """Return what a function has and an object hasn't, such as a signature, from the module's own forward."""
        if name == "__signature__":
            return inspect.signature(self._own_forward())
        if name not in _OF_FUNCTIONS:
            raise AttributeError(name)
        return getattr(self._own_forward(), name)

    def _own_forward(self) -> Callable[..., Any]:
        own: Callable[..., Any] = type(self.module).forward.__get__(self.module) if self.own is None else self.own
        return own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module's own forward."""
        return _EAGER[0](self, args, kwargs)


_EAGER: list[Callable[..., Any]] = []


def _in_eager_mode() -> None:
    """Make the function that a compiler leaves alone; PyTorch's compiler takes seconds to import, so not earlier."""
    if not _EAGER:
        reason = "the quantizers of functional operations that an example showed work in eager mode only"
        _EAGER.append(torch.compiler.disable(_called, reason=reason))


def _called(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call = _Call(forward)
    outermost = not _RUNNING.calls
    _RUNNING.calls.append(call)
    try:
        if outermost:
            with _Operations():
                result = forward._own_forward()(*args, **kwargs)  # noqa: SLF001 - one class in two places
        else:
            result = forward._own_forward()(*args, **kwargs)  # noqa: SLF001 - as above
    finally:
        _RUNNING.calls.pop()
    call.finish()
    return result


@dataclass
class _Call:
    """A call of a module while it runs."""

    forward: Forward
    counts: Counter[str] = field(default_factory=Counter)

    def next(self, kind: str, inputs: int) -> Held:
        """Return the operation that comes next."""
        table, ordinal = self.forward.table, self.counts[kind]
        self.counts[kind] += 1
        if table is None:
            raise self._refused(f"it computes an operation of kind {kind!r}, and the example did not reach it")
        known = table.get(kind, [])
        if not any(each.inputs for each in known) and (known or torch.compiler.is_exporting()):
            return _FLOAT  # an exporter computes masks that the model leaves out where they hide nothing
        if ordinal >= len(known):
            raise self._refused(f"it computes more than the {len(known)} operations of kind {kind!r} of the example")
        if known[ordinal].inputs not in (0, inputs):
            was = known[ordinal].inputs
            raise self._refused(f"its operation {known[ordinal].name} has {inputs} inputs, and {was} with the example")
        return known[ordinal]

    def finish(self) -> None:
        """Refuse a call in which operations were missing."""
        for kind, known in (self.forward.table or {}).items():
            if self.counts[kind] != len(known) and any(each.inputs for each in known):
                problem = (
                    f"it computed {self.counts[kind]} operations of kind {kind!r}, and {len(known)} with the example"
                )
                raise self._refused(problem)

    def _refused(self, problem: str) -> QuantizerStateError:
        """Return an error; not a TypeError, which Python would take for an operator that is not defined."""
        hint = "wrap the model with an example that it is called like, or leave the operations out by a rule."
        return QuantizerStateError(self.forward.name, problem, hint)


class _Running(threading.local):
    """What is running in a thread."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []


_RUNNING = _Running()


class _Operations(TorchFunctionMode):
    """Puts the quantizers around the operations of the modules that are running."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function, its inputs or its output quantized if it is an operation with quantizers."""
        kwargs = kwargs or {}
        kind = operation_kind(func)
        if kind is None or not _RUNNING.calls or kind not in _RUNNING.calls[-1].forward.kinds:
            return func(*args, **kwargs)
        tensors = operands(func, args, kwargs)
        call = _call_of(_caller()) if tensors else None
        if call is None:
            return func(*args, **kwargs)
        held = call.next(kind, len(tensors))
        if held.of_output is None and not held.of_inputs:
            return func(*args, **kwargs)
        # an operation in place works on a copy: what it and the quantizers keep for backward must not be changed
        changed = args[0] if is_in_place(func, args, kwargs) else None
        given = {id(tensor): tensor if tensor is not changed else tensor.clone() for tensor in tensors}
        if held.of_inputs:
            given = {
                key: tensor if holder is None else holder(tensor)
                for (key, tensor), holder in zip(given.items(), held.of_inputs, strict=True)
            }
            if changed is not None and id(changed) in given:
                given[id(changed)] = given[id(changed)].clone()
        result = func(*replaced(args, given), **replaced(kwargs, given))
        if held.of_output is not None:
            result = held.of_output(result)
        return result if changed is None else changed.copy_(result)


def _call_of(module: Any) -> _Call | None:
    attributes = getattr(module, "__dict__", None)  # an exporter calls objects that stand for modules and share these
    return next((call for call in reversed(_RUNNING.calls) if vars(call.forward.module) is attributes), None)


_PACKAGE = __name__.partition(".")[0] + "."


def _caller() -> Any:
    """Return the innermost module of the model that is being called; None for code of this package.

    A module that is not registered in the model, such as an activation made on the fly, belongs to its caller.
    """
    frame: Any = sys._getframe(2)  # noqa: SLF001 - the function that called the operation
    while frame is not None:
        if frame.f_code is eligible.CALL_CODE:
            module = frame.f_locals["self"]
            if MARK in module.__dict__:
                return module
        name = frame.f_globals.get("__name__", "")
        if name.startswith(_PACKAGE) and name != __name__:
            return None
        frame = frame.f_back
    return None
