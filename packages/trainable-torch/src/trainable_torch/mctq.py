"""From a deployed model to one that is made of nothing but mct-quantizers' own classes.

Every wrapped layer becomes mctq's `PytorchQuantizationWrapper`, every holder its `PytorchActivationQuantizationHolder`,
every deployed quantizer its inferable one. A layer whose input or output is quantized too becomes a ``Sequential`` of
these. Each stays the object it is in its model, so lists and attributes that hold it go on holding it.

mctq can't express everything, and computes some things otherwise. Whatever would be lost or differ is found first:
quantizers are run beside mctq's, weights on their values and activations on their whole grid, and the code of the model
is followed through both models, to see that it does the same with the new layers.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from mct_quantizers import PytorchActivationQuantizationHolder, PytorchQuantizationWrapper
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode, resolve_name

from trainable_core.backend.inferable import Refusals
from trainable_core.errors import ModelError, QuantizerStateError
from trainable_torch.finalized import finalize
from trainable_torch.holder import ActivationQuantizationHolder
from trainable_torch.inferable import InferableQuantizer
from trainable_torch.layers import kind_of, leave_fused_paths
from trainable_torch.quantizers.base import BasePytorchTrainableQuantizer
from trainable_torch.ranks import require_whole
from trainable_torch.state import state_of
from trainable_torch.training import call_with
from trainable_torch.wrapper import QuantizationWrapper

_OURS = ("trainable_torch", "trainable_core")
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def to_mctq(model: nn.Module, example: Any = None) -> nn.Module:
    """Return a new model made of mct-quantizers' own classes, which opens where only mct-quantizers is installed.

    Parameters
    ----------
    model : Module
        What `finalize` returned; left as it is.
    example : optional
        A batch, as `calibrate` takes them. It is needed where the model can't be traced symbolically: the model is then
        run with it, to see that its code does the same with mctq's layers.

    Returns
    -------
    Module
        In eval mode. Layers, and the model itself, are of their own classes, wrappers, holders and quantizers of
        mctq's. On finite values it gives what `model` gives.

    Raises
    ------
    ModelError
        When the model was not made by `wrap`, is sharded over ranks, or can't be followed without an example.
    QuantizerStateError
        When it is not finalized.
    UnsupportedConfigError
        When mctq can't express something, or computes it otherwise; names every layer and tensor, and the reason.

    Notes
    -----
    NaN becomes the lowest code of mctq's quantizers, where ours keep it. mctq's ONNX operators divide by the scale,
    which its quantizers multiply by the inverse of, so a value next to a tie may differ by a step there.
    """
    state_of(model)
    require_whole(model, "to_mctq")
    _require_finalized(model)
    refusals = Refusals("to_mctq")
    copied = finalize(model)
    parts = {name: part for name, part in copied.named_modules() if _is_part(part)}
    inside = {holder for part in parts.values() if isinstance(part, QuantizationWrapper) for holder in part.holders}
    parts = {name: part for name, part in parts.items() if part not in inside}
    _check_dtypes(copied, refusals)
    stock = {name or "model": _Stock(name or "model", part, refusals) for name, part in parts.items()}
    if isinstance(copied, fx.GraphModule):
        _check_reads(copied, parts, refusals)
    refusals.raise_if_any()
    for each in stock.values():
        each.replace()
    converted = _cleaned(copied)
    leave_fused_paths(converted)
    _check_code(model, converted, {name: each.part for name, each in stock.items()}, example, refusals)
    refusals.raise_if_any()
    return converted


def _is_part(module: nn.Module) -> bool:
    return isinstance(module, QuantizationWrapper | ActivationQuantizationHolder)


def _require_finalized(model: nn.Module) -> None:
    waiting = [
        m for m in model.modules() if isinstance(m, BasePytorchTrainableQuantizer) and m.quantization_config.enabled
    ]
    if waiting:
        raise QuantizerStateError(
            type(model).__name__, f"{waiting[0].subject} is still trainable", "to_mctq(finalize(qmodel))."
        )


def _check_dtypes(model: nn.Module, refusals: Refusals) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            refusals.add(name, "it is on the meta device and has no values")
        elif parameter.is_floating_point() and parameter.dtype != torch.float32:
            refusals.add(name, f"it is {parameter.dtype}, in which mctq's quantizers compute; ours compute in float32")


class _Stock:
    """mctq's counterpart of a wrapper or a holder.

    Parameters
    ----------
    name : str
        The part's name in the model.
    part : Module
        Ours, in the copy that is converted.
    refusals : Refusals
        Takes what can't be expressed.
    """

    def __init__(self, name: str, part: Any, refusals: Refusals) -> None:
        self.name, self.part, self.refusals = name, part, refusals
        self.weights: dict[Any, Any] = {}
        self.before: Any = None
        self.behind: Any = None
        self.bias: tuple[str, Tensor] | None = None
        if isinstance(part, ActivationQuantizationHolder):
            self.behind = self._holder(part, "activation")
            return
        self.bias = part.integer_bias()
        for attribute, weight, quantizer in part.get_weights_vars():
            built = self._quantizer(quantizer, str(attribute), weight)
            if built is not None:
                self.weights[attribute] = built
        self._inputs(part)
        if part.output_holder is not None:
            self.behind = self._holder(part.output_holder, "output")

    def _inputs(self, part: QuantizationWrapper) -> None:
        inputs = list(part.input_holders)
        if not inputs:
            return
        layer = plain_layer(part)
        kind = kind_of(layer) if isinstance(layer, nn.Module) else None
        if len(inputs) > 1 or kind is None or inputs[0] != kind.inputs[0]:
            self.refuse(", ".join(inputs), "mctq's wrapper quantizes no inputs, and its holder passes one tensor on")
            return
        self.before = self._holder(part.input_holders[inputs[0]], inputs[0])

    def refuse(self, tensor: str, reason: str) -> None:
        """Note why a tensor can't be expressed."""
        self.refusals.add(f"{self.name}: {tensor}", reason)

    def _holder(self, holder: Any, tensor: str) -> Any:
        quantizer = self._quantizer(holder.activation_holder_quantizer, tensor, None)
        return None if quantizer is None else PytorchActivationQuantizationHolder(quantizer).eval()

    def _quantizer(self, quantizer: Any, tensor: str, weight: Tensor | None) -> Any:
        """Return mctq's quantizer, None where nothing is quantized or it can't be expressed."""
        if isinstance(quantizer, BasePytorchTrainableQuantizer):
            return None  # switched off by its config
        if type(quantizer).__module__.partition(".")[0] == "mct_quantizers":
            return quantizer
        if type(quantizer).__module__ != InferableQuantizer.__module__:
            self.refuse(tensor, f"mctq has no counterpart of {type(quantizer).__module__}.{type(quantizer).__name__}")
            return None
        if weight is not None and not self._is_own_parameter(tensor):
            return None
        try:
            stock = quantizer.to_mctq()
            difference = _difference(quantizer, stock, weight)
        except Exception as error:  # noqa: BLE001 - mctq checks by assertions, and its kernels raise what they like
            self.refuse(tensor, f"mctq's {type(quantizer).__name__} refuses it: {str(error).splitlines()[0]}")
            return None
        if difference:
            self.refuse(tensor, f"mctq's {type(quantizer).__name__} computes otherwise: {difference}")
            return None
        return stock

    def _is_own_parameter(self, attribute: str) -> bool:
        if own_class(self.part) is None:
            return True  # a constant of a function
        if "." in attribute:
            self.refuse(attribute, "mctq's wrapper quantizes a layer's own weights, and this one is of a layer inside")
        elif self.part._parameters.get(attribute) is None:  # noqa: SLF001 - the layer's own, as mctq's wrapper takes it
            self.refuse(attribute, "it is computed, and mctq's wrapper quantizes what a layer stores")
        else:
            return True
        return False

    def replace(self) -> None:
        """Make the part mctq's, in place: whoever holds it goes on holding it."""
        hooks = {name: self.part.__dict__[name] for name in _HOOKS}
        if isinstance(self.part, ActivationQuantizationHolder):
            made = self.behind if self.behind is not None else nn.Identity()
        else:
            layer = plain_layer(self.part)
            if self.bias is not None:  # mctq's layers have float biases, and this one is on its grid
                layer._parameters[self.bias[0]] = nn.Parameter(self.bias[1], requires_grad=False)  # noqa: SLF001 - as below
            parts = {"input_holder": self.before, "layer": self._wrapped(layer), "output_holder": self.behind}
            needed = OrderedDict((name, part) for name, part in parts.items() if part is not None)
            made = nn.Sequential(needed) if len(needed) > 1 else needed["layer"]
        self.part.__dict__.clear()
        self.part.__dict__.update({**made.__dict__, **hooks})
        object.__setattr__(self.part, "__class__", type(made))
        self.part.eval()

    def _wrapped(self, layer: Any) -> Any:
        if not self.weights:
            return layer
        if isinstance(layer, nn.Module):
            return PytorchQuantizationWrapper(layer, self.weights)
        part = self.part
        values = {position: value.detach() for position, value, _ in part.get_weights_vars()}
        arguments = list(part.op_call_args), dict(part.op_call_kwargs), part.is_inputs_as_list
        return PytorchQuantizationWrapper(layer, self.weights, values, *arguments)


def own_class(wrapper: Any) -> Any:
    """Return the class that a wrapped layer has of its own, None for a function."""
    return getattr(type(wrapper), "own_class", None) or (
        type(wrapper.layer) if isinstance(wrapper.layer, nn.Module) else None
    )


def plain_layer(wrapper: Any) -> Any:
    """Return the layer without anything of ours, with the same parameters and children; a function as it is."""
    cls = own_class(wrapper)
    if cls is None:
        return wrapper.layer
    source = wrapper if getattr(type(wrapper), "own_class", None) else wrapper.layer
    layer = cls.__new__(cls)
    fields = {name: value for name, value in source.__dict__.items() if not _is_ours(value)}
    for name in ("_parameters", "_buffers", "_modules"):
        fields[name] = {key: value for key, value in fields[name].items() if not _is_ours(value)}
    ours = ("input_holders", "output_holder")
    fields["_modules"] = {name: value for name, value in fields["_modules"].items() if name not in ours}
    if source is wrapper:
        fields |= {name: OrderedDict() for name in _HOOKS}
    layer.__dict__.update(fields)
    if isinstance(layer, nn.RNNBase):
        layer._flat_weights = [getattr(layer, name, None) for name in layer._flat_weights_names]  # noqa: SLF001 - as its __setstate__
    return layer


def _is_ours(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] in _OURS


def _difference(quantizer: InferableQuantizer, stock: Any, weight: Tensor | None) -> str:
    """Return where mctq's quantizer gives another value than ours, an empty string where it gives the same."""
    values = _probe(quantizer) if weight is None else weight.detach()
    for name in ("scales", "zero_points"):
        if isinstance(getattr(stock, name, None), Tensor):  # mctq puts them on a GPU when there is one
            setattr(stock, name, getattr(stock, name).to(values.device))
    with torch.no_grad():
        ours, theirs = quantizer(values), stock(values.clone())
    wrong = ~((ours == theirs) | (ours.isnan() & theirs.isnan()))
    if not wrong.any():
        return ""
    place = tuple(int(index) for index in wrong.nonzero()[0])
    first, their, our = (float(each[place]) for each in (values, theirs, ours))
    return f"{int(wrong.sum())} of {wrong.numel()} values differ; {first} becomes {their}, and {our} in ours"


def _probe(quantizer: InferableQuantizer) -> Tensor:
    """Return values at and next to every code and every tie of a grid, and beyond its ends."""
    low, high, scale = (
        buffer.reshape(()) for buffer in (quantizer.grid_low, quantizer.grid_high, quantizer.grid_scale)
    )
    halves = torch.arange(2 * int(low) - 3, 2 * int(high) + 4, device=scale.device, dtype=torch.float64) / 2
    values = (halves * scale.double()).float()
    up, down = (values.new_full((), end) for end in (torch.inf, -torch.inf))
    far = values.new_tensor([torch.inf, -torch.inf, 3e38, -3e38, 0.0, -0.0])
    return torch.cat([values, torch.nextafter(values, up), torch.nextafter(values, down), far])


def _cleaned(model: nn.Module) -> nn.Module:
    """Return the model without what we noted on its modules; a graph of ours becomes PyTorch's."""
    for module in model.modules():
        for name, value in list(module.__dict__.items()):
            if _is_ours(value):
                del module.__dict__[name]
    if isinstance(model, fx.GraphModule) and any(_is_ours_class(cls) for cls in type(model).__mro__):
        hooks = {name: model.__dict__[name] for name in _HOOKS}
        graph = model.graph
        graph._tracer_cls = None  # noqa: SLF001 - ours; PyTorch's own traces a graph as well
        model = fx.GraphModule(model, graph, type(model).__name__)
        model.__dict__.update(hooks)
        model.__dict__.pop("_tracer_cls", None)
    return model.eval()


def _is_ours_class(cls: type) -> bool:
    return cls.__module__.partition(".")[0] in _OURS


# ---- what the model's code does with the layers ---------------------------------------------------------------------


_READ = (
    "the model reads it otherwise than by calling the layer: of mctq's wrapper it would get the float value, or none"
)


def _check_reads(model: fx.GraphModule, parts: Mapping[str, nn.Module], refusals: Refusals) -> None:
    """Note what a graph reads of a layer."""
    for node in model.graph.nodes:
        owner, _, attribute = str(node.target).rpartition(".")
        if node.op == "get_attr" and owner in parts:
            refusals.add(f"{owner}: {attribute}", _READ)


class _StoppedError(Exception):
    """Raised where a run of a model raises an error: the place is the part that was called last."""

    def __init__(self, model: nn.Module, place: str, error: Exception) -> None:
        self.model, self.place, self.error = model, place, error
        super().__init__(place)


def _told_of(error: Exception) -> str:
    """Return the first line of an error, with its class."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


class _ReadError(Exception):
    """The model reads an attribute of a layer, which mctq's wrapper lacks or has in float."""

    def __init__(self, name: str, attribute: str) -> None:
        self.name, self.attribute = name, attribute
        super().__init__(f"{name}.{attribute}")


def _check_code(
    model: nn.Module, converted: nn.Module, parts: Mapping[str, nn.Module], example: Any, refusals: Refusals
) -> None:
    """Follow the model's code through both models, and note where it does something else with mctq's layers.

    Raises
    ------
    ModelError
        When the code can't be followed.
    """
    if parts.get("model") is converted:
        return  # one layer, and no code around it
    ours = {name: part for name, part in model.named_modules() if name in parts}
    classes = {part: type(part) for part in parts.values()}
    try:
        before = _done(model, ours, example)
        if example is not None:
            _check_inputs(before, refusals)
        for name, part in parts.items():
            object.__setattr__(part, "__class__", _spied(name, part, ours[name]))
        after = _done(converted, parts, example)
    except _ReadError as read:
        refusals.add(f"{read.name}: {read.attribute}", _READ)
        return
    except _StoppedError as stopped:
        if stopped.model is not converted:
            raise stopped.error from None
        refusals.add(stopped.place, f"the model's code can't be run with mctq's layers: {_told_of(stopped.error)}")
        return
    finally:
        for part, cls in classes.items():
            object.__setattr__(part, "__class__", cls)
    same = sum(1 for _ in itertools.takewhile(bool, (one == other for one, other in zip(before, after, strict=False))))
    if same < max(len(before), len(after)):
        calls = [name for what, name, *_ in before[:same] if what == "call_module"]
        place = f"behind {calls[-1]}" if calls else "at its beginning"
        refusals.add(place, "the model's code does something else with mctq's layers: it asks for the class of a layer")


def _done(model: nn.Module, parts: Mapping[str, nn.Module], example: Any) -> list[tuple[Any, ...]]:
    """Return what the code of a model does: which functions and parts it calls, with what."""
    if example is not None:
        return _run(model, parts, example)
    try:
        return list(_traced(model, parts))
    except _ReadError:
        raise
    except Exception as error:  # whatever the model's code raises on a proxy
        problem = f"{type(model).__name__} can't be traced symbolically ({_told_of(error)})"
        hint = "to_mctq(deployed, example=batch): the code is then followed in a run."
        raise ModelError(problem, hint) from error


def _spied(name: str, part: nn.Module, ours: nn.Module) -> type:
    """Return a class like a part's that tells whoever reads an attribute that our part has."""
    cls = type(part)

    def getattribute(self: Any, attribute: str) -> Any:
        if attribute != "layer" and hasattr(ours, attribute):
            raise _ReadError(name, attribute)
        return cls.__getattr__(self, attribute)

    members = {"__getattr__": getattribute, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,), members)


def _traced(model: nn.Module, parts: Mapping[str, nn.Module]) -> Iterator[tuple[Any, ...]]:
    """Yield what the code of a model does, by symbolic tracing."""
    leaves = set(parts.values())

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            if m in leaves:
                return True
            return super().is_leaf_module(m, module_qualified_name) and leaves.isdisjoint(m.modules())

    places: dict[fx.Node, int] = {}
    for node in Tracer().trace(model).nodes:
        places[node] = len(places)
        told = fx.map_arg((node.args, node.kwargs), lambda each: ("node", places[each]))
        if node.op == "get_attr":
            owner = str(node.target).rpartition(".")[0]
            if owner in parts:
                raise _ReadError(owner, str(node.target).rpartition(".")[2])
        if node.op == "call_module" and isinstance(parts.get(str(node.target)), nn.Sequential) and len(told[0]) != 1:
            raise _ReadError(str(node.target), "another argument")
        yield node.op, node.target, told


class _Recorder(TorchFunctionMode):
    """Notes the functions that are called outside of the watched modules, and the calls of these."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, ...]] = []
        self.depth = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.depth == 0:
            self.seen.append(("call_function", resolve_name(func) or func))
        return func(*args, **(kwargs or {}))

    def watch(self, name: str, module: nn.Module) -> list[Any]:
        """Note the calls of a module from now on; returns the handles of its hooks."""

        def enter(_module: Any, args: Any, kwargs: Any) -> None:
            if self.depth == 0:
                given = [(each.dtype, tuple(each.shape)) for each in args if isinstance(each, Tensor)]
                self.seen.append(("call_module", name, given, len(args), sorted(kwargs)))
            self.depth += 1

        def leave(_module: Any, _args: Any, _output: Any) -> None:
            self.depth -= 1

        return [
            module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True),
            module.register_forward_hook(leave, always_call=True),
        ]


def _run(model: nn.Module, parts: Mapping[str, nn.Module], example: Any) -> list[tuple[Any, ...]]:
    """Return what the code of a model does in a run."""
    recorder = _Recorder()
    handles = [handle for name, part in parts.items() for handle in recorder.watch(name, part)]
    try:
        with torch.no_grad(), recorder:
            call_with(model, example)
    except _ReadError:
        raise
    except Exception as error:  # whatever the layers or the model's code raise
        calls = [name for what, name, *_ in recorder.seen if what == "call_module"]
        raise _StoppedError(model, f"at {calls[-1]}" if calls else "at its beginning", error) from error
    finally:
        for handle in handles:
            handle.remove()
    return recorder.seen


def _check_inputs(seen: list[tuple[Any, ...]], refusals: Refusals) -> None:
    for what, name, *told in seen:
        if what == "call_module":
            for dtype, _ in told[0]:
                if dtype.is_floating_point and dtype != torch.float32:
                    refusals.add(
                        name, f"its input is {dtype}, in which mctq's quantizers compute; ours compute in float32"
                    )
