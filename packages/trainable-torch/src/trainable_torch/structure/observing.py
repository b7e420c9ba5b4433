"""What a run of a model shows of its structure: which operation is fed by which, also where tracing can't follow.

The run is written down as a `torch.fx.Graph`, like a trace, so whoever reads traces reads runs as well. Its nodes carry
what only a run knows: shapes, and in which module an operation was called.
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from trainable_core.calibration.batches import inputs_of
from trainable_core.errors import ModelError
from trainable_torch.copying import copied
from trainable_torch.kernels import eligible
from trainable_torch.layers import kind_of
from trainable_torch.structure.dataflow import SIZE_ATTRIBUTES, reads_values
from trainable_torch.structure.operands import operands, operation_kind
from trainable_torch.structure.overrides import change_of, own_class, tensors_of

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
WITH_OWN_OPERATION = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
"""Layers that call one function with their weight and bias."""
SHAPE, OPERATION, ACTIVATION = "shape", "operation", "activation"
"""Keys in a node's ``meta``: the shape of its result; of a functional operation, its module, op kind and ordinal; and
whether its result follows from parameters or from real numbers that the model was given, and not from indices, sizes
and constants alone, as a mask does."""

MASKED = -1e4
"""Attention masks add this or less to what they hide."""


@dataclass
class Run:
    """What one run of a model showed.

    Parameters
    ----------
    graph : fx.Graph
        Calls of layers are ``call_module`` nodes; functions and methods are ``call_function`` nodes with the function
        that PyTorch reports. Sizes and types of tensors are not read by any node.
    readers : mapping of str to set of str
        Names of the modules in whose forward the values of a parameter or buffer were read, by its name.
    users : mapping of str to set of str
        The same for whatever is asked of a parameter or buffer, its size and type included.
    calls : Counter of str
        How often each module was called.
    last : mapping of str to list of bool
        By layer: whether each call's last operation was the layer's own, with its own weight and bias.
    operations : mapping of str to list
        By module: of each call, op kind and number of inputs of the functional operations, in order; no inputs where
        an operation works on no activations, or adds a mask to them.
    """

    graph: fx.Graph
    readers: dict[str, set[str]] = field(default_factory=dict)
    users: dict[str, set[str]] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    last: dict[str, list[bool]] = field(default_factory=dict)
    operations: dict[str, list[tuple[tuple[str, int], ...]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Observed:
    """A model's runs in eval mode and in train mode; the latter is a reason where the model can't be called in it."""

    evaluated: Run
    trained: Run | str


def observe(model: nn.Module, example: Any) -> Observed:
    """Return what a run of a copy of the model shows, in both modes, without gradients.

    Parameters
    ----------
    model : Module
        Left as it is.
    example : batch or callable
        What the model is called with: a mapping is its keyword arguments, of a tuple or list only the first item
        counts, as in `calibrate`. A callable is given the model and calls it itself.

    Raises
    ------
    ModelError
        When the model can't be called with it.
    """
    try:
        return Observed(_run(model, example, training=False), _trained(model, example))
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} can't be called with the example: {type(error).__name__}: {error}",
            "pass what calibrate takes as one batch, or a function that is given the model and calls it.",
        ) from error


def _trained(model: nn.Module, example: Any) -> Run | str:
    try:
        return _run(model, example, training=True)
    except Exception as error:  # noqa: BLE001 - a model may need more in train mode, such as labels
        text = str(error).split("\n", 1)[0]
        return f"in train mode it can't be called with the example: {type(error).__name__}: {text}"


def _run(model: nn.Module, example: Any, *, training: bool) -> Run:
    """Return what a run of a copy shows; batch norms keep their statistics."""
    run = copied(model).train(training)
    for module in run.modules():
        if isinstance(module, eligible.NORMALIZATION):
            module.training = False
            continue
        base = own_class(module, WITH_OWN_OPERATION)
        if base is not None and change_of(module, base):
            _show_bias(module)
    if not callable(example) or isinstance(example, Tensor | Mapping):
        example = example if isinstance(example, Mapping) else inputs_of(example)
        if any(parameter.is_meta for parameter in run.parameters()):
            example = _on_meta(example)
    recorder = _Recorder(run)
    devices = sorted({each.device for each in run.parameters() if each.is_cuda}, key=str)
    with torch.random.fork_rng(devices), torch.no_grad(), recorder.hooked(), _Below(recorder), recorder:
        recorder.keep(_call(run, example))
    return recorder.finish()


def _show_bias(layer: Any) -> None:
    """Give a layer without bias one of zeros: else a run can't show whether its forward would take one."""
    if layer._parameters.get("bias", layer) is None and layer._parameters.get("weight") is not None:  # noqa: SLF001 - own ones
        weight = layer._parameters["weight"]  # noqa: SLF001 - as above
        layer.bias = nn.Parameter(weight.new_zeros(channels_of(layer)))


def channels_of(layer: Any) -> int:
    """Return how many channels a layer puts out."""
    weight = layer._parameters.get("weight", layer.weight)  # noqa: SLF001 - a subclass may compute what it calls so
    return int(weight.shape[1] * layer.groups if isinstance(layer, TRANSPOSED) else weight.shape[0])


def _call(model: nn.Module, example: Any) -> Any:
    if isinstance(example, Mapping):
        return model(**example)
    return example(model) if callable(example) and not isinstance(example, Tensor) else model(example)


def _on_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    return {key: _on_meta(each) for key, each in value.items()} if isinstance(value, Mapping) else value


def is_leaf(module: nn.Module) -> bool:
    """Return whether a run, like a trace, shows a module as one operation: a layer, or a module of PyTorch."""
    if kind_of(module) is not None:
        return True
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return False
    return type(module).__module__.startswith(("torch.nn.", "torch.ao.nn."))


class _Recorder(TorchFunctionMode):
    """Writes down a run while it is entered."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.run = Run(fx.Graph())
        self.names: dict[nn.Module, str] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self.names.setdefault(module, name)
        self.stack: list[nn.Module] = []
        self.operations: list[list[tuple[str, int]]] = []
        self.leaf_calls: list[_LeafCall] = []
        self.nodes: dict[int, tuple[weakref.ref[Tensor], fx.Node]] = {}
        self.owned: dict[int, str] = {}
        for module, name in self.names.items():
            for attribute, tensor in [*module._parameters.items(), *module._buffers.items()]:  # noqa: SLF001 - own ones
                if tensor is not None:
                    self.owned.setdefault(id(tensor), f"{name}.{attribute}".lstrip("."))
        self.output: Any = None
        self.is_aside = False
        self.depth = 0

    # ---- modules ----------------------------------------------------------------------------------------------------

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Watch every call of a module."""
        handles: list[Any] = []
        for module in self.names:
            if isinstance(module, torch.jit.ScriptModule):
                continue  # it takes no hooks
            handles += [
                module.register_forward_pre_hook(self._enter, with_kwargs=True),
                module.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self.leaf_calls:
            self.run.calls[self.names[module]] += 1
            if is_leaf(module):
                self.leaf_calls.append(_LeafCall(module, _tensors((args, kwargs))))
        self.stack.append(module)
        self.operations.append([])

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        left, operations = self.stack.pop(), self.operations.pop()
        while left is not module:  # an exception has left the ones inside
            left, operations = self.stack.pop(), self.operations.pop()
        if not self.leaf_calls:
            self.run.operations.setdefault(self.names[module], []).append(tuple(operations))
        if not self.leaf_calls or self.leaf_calls[-1].module is not module or module in self.stack:
            return
        call = self.leaf_calls.pop()
        name = self.names[module]
        with self._aside():
            self._node("call_module", name, args, kwargs, output)
        self.run.last.setdefault(name, []).append(call.ends_with_own_operation(output))

    # ---- functions --------------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function, and write it down."""
        kwargs = kwargs or {}
        name = name_of(func)
        if self.is_aside:
            return func(*args, **kwargs)
        read = self._note_reads(name, args, kwargs)
        if name in SIZE_ATTRIBUTES:
            return func(*args, **kwargs)
        kind = operation_kind(func)
        inputs = len(operands(func, args, kwargs)) if kind else 0
        self.depth += 1
        try:
            result = func(*args, **kwargs)
        finally:
            self.depth -= 1
        if self.leaf_calls:
            self.leaf_calls[-1].note(name, args, kwargs, result)
        elif read:
            node = self._node("call_function", func, args, kwargs, result, name)
            if kind and inputs and self.stack:
                self._note_operation(node, kind, inputs, operands(func, args, kwargs))
        else:
            self._note_constants(result)
        return result

    def _note_reads(self, name: str, args: Any, kwargs: Any) -> list[Tensor]:
        """Note who asks anything of a parameter or buffer; return the tensors whose values are read."""
        here = self.names[self.stack[-1]] if self.stack else ""
        for tensor in _tensors((args, kwargs)):
            if id(tensor) in self.owned:
                self.run.users.setdefault(self.owned[id(tensor)], set()).add(here)
        if name in SIZE_ATTRIBUTES:
            return []
        read = [
            *(tensor for i, arg in enumerate(args) if reads_values(name, i) for tensor in _tensors(arg)),
            *(tensor for key, arg in kwargs.items() if reads_values(name, 1) for tensor in _tensors(arg)),
        ]
        for tensor in read:
            if id(tensor) in self.owned:
                self.run.readers.setdefault(self.owned[id(tensor)], set()).add(here)
            if self.leaf_calls and id(tensor) in self.nodes and not self.leaf_calls[-1].has(tensor):
                self._use(tensor)  # a layer that reads more than it is given
        return read

    def _note_constants(self, result: Any) -> None:
        """Note that tensors are made of sizes and numbers alone."""
        for tensor in _tensors(result):
            known = self.nodes.get(id(tensor))
            if id(tensor) not in self.owned and (known is None or known[0]() is not tensor):
                self._node_of(tensor).meta[ACTIVATION] = False

    def _note_operation(self, node: fx.Node, kind: str, inputs: int, given: list[Tensor]) -> None:
        ordinal = sum(each == kind for each, _ in self.operations[-1])
        is_quantizable = node.meta[ACTIVATION] and not self._adds_mask(kind, given)
        self.operations[-1].append((kind, inputs if is_quantizable else 0))
        node.meta[OPERATION] = (self.names[self.stack[-1]], kind, ordinal)

    def _adds_mask(self, kind: str, tensors: list[Tensor]) -> bool:
        """Return whether an operation adds a tensor that is no activation and hides something."""
        if kind != "add":
            return False
        added = [tensor for tensor in tensors if not self._node_of(tensor).meta[ACTIVATION] and not tensor.is_meta]
        with self._aside():  # else the look at it would count as a use by the model
            return any(bool((tensor <= MASKED).any()) for tensor in added)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Let what follows be no part of the run."""
        self.is_aside = True
        try:
            yield
        finally:
            self.is_aside = False

    # ---- the graph --------------------------------------------------------------------------------------------------

    def _node(self, op: str, target: Any, args: Any, kwargs: Any, result: Any, name: str = "") -> fx.Node:
        args = tuple(self._argument(arg, read=not name or reads_values(name, i)) for i, arg in enumerate(args))
        kwargs = {key: self._argument(arg, read=not name or reads_values(name, 1)) for key, arg in kwargs.items()}
        node = self.run.graph.create_node(op, target, args, kwargs)
        node.meta[ACTIVATION] = any(each.meta[ACTIVATION] for each in node.all_input_nodes) or (
            op == "call_module" and any(True for _ in self.model.get_submodule(target).parameters())
        )
        for tensor in _tensors(result):
            self.nodes[id(tensor)] = weakref.ref(tensor), node
        if isinstance(result, Tensor):
            node.meta[SHAPE] = tuple(result.shape)
        return node

    def _argument(self, value: Any, *, read: bool) -> Any:
        """Return what stands for a value in a node."""
        if isinstance(value, Tensor):
            return self._node_of(value) if read else None
        if isinstance(value, tuple | list):
            return tuple(self._argument(each, read=read) for each in value)
        if isinstance(value, Mapping):
            return tuple(self._argument(each, read=read) for each in value.values())
        return value if value is None or isinstance(value, bool | int | float | str) else type(value).__name__

    def _node_of(self, tensor: Tensor) -> fx.Node:
        known = self.nodes.get(id(tensor))
        if known is not None and known[0]() is tensor:
            return known[1]
        name = self.owned.get(id(tensor))
        graph = self.run.graph
        node = graph.create_node("get_attr", name) if name else graph.create_node("placeholder", "given")
        node.meta[SHAPE] = tuple(tensor.shape)
        node.meta[ACTIVATION] = tensor.is_floating_point() and (not name or isinstance(tensor, nn.Parameter))
        self.nodes[id(tensor)] = weakref.ref(tensor), node
        return node

    def note_use(self, tensors: list[Tensor]) -> None:
        """Note that somebody unknown looks at tensors."""
        here = self.names[self.stack[-1]] if self.stack and self.leaf_calls else "somewhere"
        for tensor in tensors:
            name = self.owned.get(id(tensor))
            if name is not None:
                self.run.readers.setdefault(name, set()).add(here)
                self.run.users.setdefault(name, set()).add(here)
            elif id(tensor) in self.nodes and not (self.leaf_calls and self.leaf_calls[-1].has(tensor)):
                self._use(tensor)

    def _use(self, tensor: Tensor) -> None:
        self.run.graph.create_node("call_function", _read, (self._node_of(tensor),))

    def keep(self, output: Any) -> None:
        """Keep the model's output until the run is finished: what of it is a layer's is used by someone else."""
        self.output = output

    def finish(self) -> Run:
        """Return the run; tensors that are still alive are used by whoever keeps them."""
        returned = {id(tensor) for tensor in _tensors(self.output)}
        results = [(key, *known) for key, known in self.nodes.items() if known[1].op.startswith("call")]
        if any(reference() is not None for key, reference, _ in results if key not in returned):
            gc.collect()  # it takes a quarter of a second, and mostly nothing is left
        for _, reference, node in results:
            if reference() is not None:
                self.run.graph.create_node("call_function", _read, (node,))
        self.output = None
        return self.run


class _Below(TorchDispatchMode):
    """Sees what is computed without a function of PyTorch's Python interface: by scripts and extensions."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # PyTorch's has no annotations
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call an operator, and note its inputs as used unless a function that is written down has called it."""
        if self.recorder.depth == 0 and not self.recorder.is_aside:
            self.recorder.note_use(_tensors((args, kwargs or {})))
        return func(*args, **(kwargs or {}))


def _read(*values: Any) -> None:
    """Stand in a graph for a use that is not known further."""


@dataclass
class _LeafCall:
    """A call of a layer, while it runs: whether its last operation is its own."""

    module: nn.Module
    given: list[Tensor]
    seen: list[bool] = field(default_factory=list)
    result: Tensor | None = None

    def has(self, tensor: Tensor) -> bool:
        return any(tensor is each for each in (*self.given, *tensors_of(self.module)))

    def note(self, name: str, args: Any, kwargs: Any, result: Any) -> None:
        own: Any = self.module
        weight, bias = getattr(own, "weight", None), getattr(own, "bias", None)
        read = _tensors((args, kwargs))
        if self.result is not None and any(each is self.result for each in read):
            self.seen.append(False)  # something comes after it
        if not any(each is weight or each is bias for each in read if each is not None):
            return
        named = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
        is_own = name in OWN_OPERATIONS and named.get("weight") is weight and named.get("bias") is bias
        self.seen.append(is_own and isinstance(result, Tensor))
        self.result = result if is_own else None

    def ends_with_own_operation(self, output: Any) -> bool:
        return self.seen == [True] and output is self.result


OWN_OPERATIONS = frozenset(
    ("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
)
"""Names of the functions that linear layers and convolutions call with their weight and bias."""


def name_of(function: Callable[..., Any]) -> str:
    """Return the name of a function or method; of a property's getter, the property's name."""
    name = getattr(function, "__name__", "")
    return getattr(getattr(function, "__self__", None), "__name__", name) if name == "__get__" else name


def _tensors(value: Any) -> list[Tensor]:
    """Return the tensors in arguments or in an output."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [tensor for each in value for tensor in _tensors(each)]
    return [tensor for each in value.values() for tensor in _tensors(each)] if isinstance(value, Mapping) else []
