"""The quantization wrapper: mctq's, mended. A layer that is wrapped stays the object it is."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from mct_quantizers import PytorchQuantizationWrapper
from mct_quantizers.common.constants import POSITIONAL_WEIGHT, QUANTIZED_POSITIONAL_WEIGHT
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from trainable_core.backend.building import require_quantizer
from trainable_core.backend.unlisted import UnlistedSubclass
from trainable_core.enums import QuantizationTarget
from trainable_core.errors import InvalidArgumentError, TrainableError
from trainable_torch import batch_norm, kernels
from trainable_torch.holder import ActivationQuantizationHolder
from trainable_torch.inferable import InferableQuantizer
from trainable_torch.layer_class import Reads, become, stand_in_front
from trainable_torch.quantizers.base import BasePytorchTrainableQuantizer
from trainable_torch.reading import is_running

_is_compiling = torch.compiler.is_compiling

CALL = "_quantized_call"
"""Attribute of a wrapped layer that says how it is called."""

PART_OF = "_quantized_part_of"
"""Attribute of a layer inside a wrapped one: owner and attribute, by the weight's name."""


class WeightsQuantizers(nn.ModuleDict):
    """Quantizers by weight attribute (or position of a constant), dots and numbers in the names allowed.

    mctq's stock inferable quantizers are no modules; they are kept beside the modules under the same kind of key.
    """

    def __init__(self, quantizers: Mapping[Any, Any]) -> None:
        super().__init__()
        self._attributes: dict[Any, str] = {}
        self._stock: dict[str, Any] = {}
        for attribute, quantizer in quantizers.items():
            self[attribute] = quantizer

    def __setitem__(self, attribute: Any, quantizer: Any) -> None:
        """Put a quantizer in the place of an attribute's."""
        key = self._attributes.setdefault(attribute, str(attribute).replace(".", "__"))
        if isinstance(quantizer, nn.Module):
            self._stock.pop(key, None)
            super().__setitem__(key, quantizer)
        else:
            self._modules.pop(key, None)
            self._stock[key] = quantizer

    def __getitem__(self, attribute: Any) -> Any:
        """Return an attribute's quantizer."""
        key = self._attributes[attribute]
        return self._modules[key] if key in self._modules else self._stock[key]

    def __contains__(self, attribute: object) -> bool:
        """Return whether the attribute is quantized."""
        return attribute in self._attributes

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the attributes."""
        return iter(self._attributes)

    def __len__(self) -> int:
        """Return how many weights are quantized."""
        return len(self._attributes)

    def keys(self) -> list[Any]:  # type: ignore[override]
        """Return the attributes."""
        return list(self._attributes)

    def values(self) -> list[Any]:  # type: ignore[override]
        """Return the quantizers."""
        return [self[attribute] for attribute in self._attributes]

    def items(self) -> list[tuple[Any, Any]]:  # type: ignore[override]
        """Return (attribute, quantizer) pairs."""
        return [(attribute, self[attribute]) for attribute in self._attributes]


class _Values(threading.local):
    """The quantized weights of the layers that a thread is calling, by layer and name."""

    def __init__(self) -> None:
        self.by_layer: dict[tuple[int, str], Tensor] = {}


_values = _Values()


@dataclass(eq=False)
class _Call:
    """How a wrapped layer is called.

    Its positional arguments have `input_names`. The next three are mctq's. `forward` is what somebody put into the
    layer in the place of its class's forward; `function` is what is called where no layer is, with its constants in
    `weight_values`. `quantizes` says whether weights are quantized, which calibration switches off. `overwrites` says
    whether the layer writes into its inputs though it has no attribute ``inplace`` that says so; None where that is not
    known yet, as of a class that is not PyTorch's before its first call. `read` says whether each weight has been read
    through its quantizer so far. `bias` is the attribute of a bias that is quantized, or empty. `norm` is the batch
    norm whose work the layer does, and `given` what reads of its weight and bias give while a compiler traces it.
    """

    input_names: tuple[str, ...]
    op_call_args: list[Any]
    op_call_kwargs: dict[str, Any]
    is_inputs_as_list: bool
    forward: Any = None
    function: Any = None
    weight_values: dict[int, Tensor] = field(default_factory=dict)
    quantizes: bool = True
    overwrites: bool | None = False
    read: dict[Any, bool] = field(default_factory=dict)
    bias: str = ""
    norm: Any = None
    given: dict[str, Tensor] = field(default_factory=dict)


class _Part(Reads):
    """A layer inside a wrapped one that holds one of its weights, as attention's output projection does."""

    def read_weight(self, name: str, weight: Any) -> Any:
        """Return the weight as the wrapped layer's quantizer makes it, while the model runs."""
        owner, attribute = self.__dict__[PART_OF][name]
        return owner.read_weight(attribute, weight)


def read_through(module: nn.Module, aliases: Mapping[str, tuple[QuantizationWrapper, str]]) -> None:
    """Let a module read parameters of its own as those of wrapped layers, which they are.

    Parameters
    ----------
    module : Module
        Gets a class made of two.
    aliases : mapping of str to (QuantizationWrapper, str)
        Layer and attribute, by the module's own name for the parameter.
    """
    if aliases:
        become(module, _Part, aliases)
        module.__dict__.setdefault(PART_OF, {}).update(aliases)


class QuantizationWrapper(Reads, nn.Module, metaclass=UnlistedSubclass, of=PytorchQuantizationWrapper):
    """A layer whose weights, and if asked inputs and output, are quantized as it is called.

    Parameters
    ----------
    module : Module or callable
        The layer, which is itself changed and returned; or a function with constants.
    weights_quantizers : mapping of str (or int, for constants) to quantizer
        By attribute (``"weight"``, ``"out_proj.weight"``) or by position of the constant.
    weight_values, op_call_args, op_call_kwargs, is_inputs_as_list
        As mctq's: constants of a function by position, and how it is called.
    input_holders : mapping of str to ActivationQuantizationHolder, optional
        Quantizers of inputs, by the name of the layer's argument.
    input_names : sequence of str
        Names of the layer's positional arguments, in order.
    output_holder : ActivationQuantizationHolder, optional
        Quantizer of the output; of the first one when the layer returns a tuple.
    bias : str
        Attribute of a bias that the layer's `bias_quantizer` quantizes, which is set later; empty where none does.
    norm : SimulatedBatchNorm, optional
        The batch norm behind the layer, whose work it does: its `weight` is folded before it is quantized. The layer
        needs a bias, and only its own class's forward.

    Raises
    ------
    InvalidArgumentError, ModelError, QuantizerStateError
        When quantizers and layer don't fit together, or the layer is wrapped already; nothing is changed then.

    Notes
    -----
    Mended against mctq 1.7, whose wrapper is another object around the layer. Here ``QuantizationWrapper(layer, ...) is
    layer``: the layer gets a class made of this one and its own (`trainable_torch.layer_class`), and quantizers as
    children. So it stays where it is and what it is for whoever holds it in a list, asks for its class, sets its mode,
    hooks it, loads a float checkpoint into it or ties its weights. Its parameters stay the float ones. While the layer
    or the model around it runs (`trainable_torch.reading`), whoever reads a quantized weight gets the quantized value;
    nothing of it is stored in the layer, so `deepcopy` and `pickle` work after a training forward.

    In eval mode, without gradients, a weight is fake-quantized when it or its quantizer changed
    (`trainable_torch.kernels.cache` says how that is seen), not at every call; a compiled model computes it. What the
    layer would keep of quantized tensors for backward is made again in the backward pass
    (`trainable_torch.kernels.recomputing`).
    """

    weights_quantizers: WeightsQuantizers
    input_holders: nn.ModuleDict
    output_holder: Any

    def __new__(  # noqa: PLR0913 - as `__init__`, and without arguments to copy one
        cls,
        module: Any = None,
        weights_quantizers: Any = None,
        weight_values: Any = None,
        op_call_args: Any = None,  # noqa: ARG004 - for `__init__`
        op_call_kwargs: Any = None,  # noqa: ARG004 - as above
        is_inputs_as_list: bool = False,  # noqa: ARG004, FBT001, FBT002 - as above; mctq's signature
        *,
        input_holders: Any = None,  # noqa: ARG004 - as above
        input_names: Any = None,  # noqa: ARG004 - as above
        output_holder: Any = None,  # noqa: ARG004 - as above
        bias: str = "",
        norm: Any = None,
    ) -> Any:
        """Return the layer itself, with a class made of two; for a function a module of its own."""
        if not isinstance(module, nn.Module):
            return object.__new__(cls)
        if weight_values:
            problem = "a layer has weights by name; constants by position are for functions"
            raise InvalidArgumentError("QuantizationWrapper", problem)
        _check(weights_quantizers, module, {})
        names = {attribute for attribute in weights_quantizers if "." not in attribute}
        parts: dict[str, set[str]] = {}
        for attribute in set(weights_quantizers) - names:
            path, _, name = attribute.rpartition(".")
            parts.setdefault(path, set()).add(name)
        changed: list[tuple[nn.Module, type]] = []
        try:
            for path, of_part in parts.items():
                part = module.get_submodule(path)
                changed.append((part, type(part)))
                become(part, _Part, of_part)
            changed.append((module, type(module)))
            folded = set() if norm is None else {"weight", "bias"}
            needed = (*_ATTRIBUTES, BIAS_QUANTIZER) if bias else _ATTRIBUTES
            become(module, cls, names | folded | {bias} - {""}, needed)
        except TrainableError:
            for each, own in changed:
                object.__setattr__(each, "__class__", own)
            raise
        return module

    def __init__(  # noqa: PLR0913 - mctq's six, and four of ours
        self,
        module: Any,
        weights_quantizers: Mapping[Any, Any],
        weight_values: Mapping[int, Tensor] | None = None,
        op_call_args: Sequence[Any] | None = None,
        op_call_kwargs: Mapping[str, Any] | None = None,
        is_inputs_as_list: bool = False,  # noqa: FBT001, FBT002 - mctq's signature
        *,
        input_holders: Mapping[str, ActivationQuantizationHolder] | None = None,
        input_names: Sequence[str] = ("input",),
        output_holder: ActivationQuantizationHolder | None = None,
        bias: str = "",
        norm: Any = None,
    ) -> None:
        call = _Call(tuple(input_names), list(op_call_args or []), dict(op_call_kwargs or {}), is_inputs_as_list)
        call.bias, call.norm = bias, norm
        if module is self:
            call.forward = self.__dict__.pop("forward", None)
            call.overwrites = (
                None if call.forward or not type(self).own_class.__module__.startswith("torch.nn.") else False
            )
        else:
            values = dict(weight_values or {})
            _check(weights_quantizers, module, values)
            nn.Module.__init__(self)
            call.function, call.weight_values = module, values
            for position, value in values.items():
                self.register_parameter(f"{POSITIONAL_WEIGHT}_{position}", nn.Parameter(value, requires_grad=False))
        call.read = dict.fromkeys(weights_quantizers, False)
        object.__setattr__(self, CALL, call)
        for attribute, quantizer in weights_quantizers.items():
            weight = self._weight_of(attribute)
            quantizer.initialize_quantization(tuple(weight.shape), str(attribute), self)
            if isinstance(quantizer, nn.Module) and not weight.is_meta:
                quantizer.to(weight.device)
            path, _, name = str(attribute).rpartition(".")
            if path:
                self.get_submodule(path).__dict__.setdefault(PART_OF, {})[name] = (self, attribute)
        self.weights_quantizers = WeightsQuantizers(weights_quantizers)
        self.input_holders = nn.ModuleDict(dict(input_holders or {}))
        self.output_holder = output_holder
        place = next((p.device for p in self._parameters.values() if p is not None and not p.is_meta), None)
        if place is not None:
            for holder in self.holders:
                holder.to(place)

    def _weight_of(self, attribute: str | int) -> Any:
        call: _Call = self.__dict__[CALL]
        if call.function is not None:
            value = self._parameters.get(f"{POSITIONAL_WEIGHT}_{attribute}")
            return call.weight_values[attribute] if value is None else value  # type: ignore[index]
        path, _, name = str(attribute).rpartition(".")
        owner: Any = self.get_submodule(path) if path else self
        return owner.float_weight(name)

    def read_weight(self, name: str, weight: Any) -> Any:
        """Return a weight quantized while the model runs, and as it is for everybody else."""
        if not isinstance(weight, Tensor):
            return weight
        if _is_compiling():
            given: dict[str, Tensor] = self.__dict__[CALL].given
            return given[name] if name in given else self._effective(name, weight)
        value = _values.by_layer.get((id(self), name))
        if value is None and not is_running(self):
            return weight
        call: _Call = self.__dict__[CALL]
        if name in call.read:
            call.read[name] = True
        return self._effective(name, weight) if value is None else value

    # ---- mctq's interface -------------------------------------------------------------------------------------------

    @property
    def layer(self) -> Any:
        """The layer: this object; or the function."""
        for place in (self._modules, self._parameters, self._buffers, self.__dict__):
            if "layer" in place:
                return place["layer"]  # the layer's own attribute
        call: _Call = self.__dict__[CALL]
        return self if call.function is None else call.function

    @layer.setter
    def layer(self, value: Any) -> None:
        self.__dict__["layer"] = value

    @property
    def weight_values(self) -> dict[int, Tensor]:
        """Constants of a function, by position."""
        values: dict[int, Tensor] = self.__dict__[CALL].weight_values
        return values

    @property
    def op_call_args(self) -> list[Any]:
        """Positional arguments of every call, behind the inputs."""
        arguments: list[Any] = self.__dict__[CALL].op_call_args
        return arguments

    @property
    def op_call_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of every call."""
        arguments: dict[str, Any] = self.__dict__[CALL].op_call_kwargs
        return arguments

    @property
    def is_inputs_as_list(self) -> bool:
        """Whether a function takes its inputs as one list."""
        return bool(self.__dict__[CALL].is_inputs_as_list)

    @property
    def is_str_attr(self) -> bool:
        """Whether quantizers are by attribute: false for a function with constants."""
        return not self.weight_values

    @property
    def quantizes_weights(self) -> bool:
        """Whether readers get quantized weights while the model runs; calibration looks at the model without."""
        return bool(self.__dict__[CALL].quantizes)

    @quantizes_weights.setter
    def quantizes_weights(self, quantizes: bool) -> None:
        self.__dict__[CALL].quantizes = quantizes

    @property
    def is_weights_quantization(self) -> bool:
        """Whether any weight is quantized."""
        return bool(self.weights_quantizers)

    @property
    def num_weights_quantizers(self) -> int:
        """Number of quantized weights."""
        return len(self.weights_quantizers)

    def get_weights_vars(self) -> list[tuple[Any, Any, Any]]:
        """Return (attribute, float weight as it is quantized now, quantizer) of each quantized weight.

        It is the layer's own, or the folded one where the layer does the work of a batch norm.
        """
        return [(a, self._folded(a, self._weight_of(a)), q) for a, q in self.weights_quantizers.items()]

    def own_weights(self) -> dict[Any, Tensor]:
        """Return the layer's own weight of each attribute that is quantized."""
        return {attribute: self._weight_of(attribute) for attribute in self.weights_quantizers}

    @property
    def batch_norm(self) -> Any:
        """The batch norm whose work the layer does while it trains; None where there is none."""
        return self.__dict__[CALL].norm

    @torch.no_grad()
    def take_over(self) -> None:
        """Keep the folded weight and bias as the layer's own: from here on it needs no batch norm."""
        for name in ("weight", "bias") if self.batch_norm is not None else ():
            own = self.float_weight(name)
            own.copy_(self._folded(name, own))
        self.__dict__[CALL].norm = None

    def _folded(self, attribute: str | int, weight: Tensor) -> Tensor:
        """Return a weight or bias with the layer's batch norm folded into it, where it has one."""
        norm = self.__dict__[CALL].norm
        if norm is None or attribute not in {"weight", "bias"}:
            return weight
        if attribute == "bias":
            return batch_norm.folded_bias(norm, weight)
        return batch_norm.folded_weight(self, norm, weight)

    def _effective(self, attribute: str | int, weight: Tensor) -> Tensor:
        """Return what the model computes with in the place of a weight or bias."""
        call: _Call = self.__dict__[CALL]
        if call.quantizes and (attribute in self.weights_quantizers or attribute == call.bias):
            return self._quantized(attribute, weight)
        return self._folded(attribute, weight)

    @property
    def weights_read(self) -> dict[Any, bool]:
        """Whether a forward has read each weight through its quantizer so far; compiled forwards don't count."""
        return dict(self.__dict__[CALL].read)

    def get_quantized_weights(self) -> dict[Any, Tensor]:
        """Return each quantized weight's quantized value, by attribute."""
        return {a: self._quantized(a, self._weight_of(a)) for a in self.weights_quantizers}

    def compute_weights(self) -> None:
        """Let the layer's hooks compute the weights that they keep in it, as before a forward."""
        for hook in list(self._forward_pre_hooks.values()):
            # `weight_norm` and `spectral_norm` call it one way, pruning the other
            if getattr(hook, "name", getattr(hook, "_tensor_name", None)) in type(self).read_names:
                hook(self, ())

    def quantized_bias(self, bias: Tensor) -> Tensor:
        """Return the layer's bias on the grid of the layer's sums of products, where it has a `bias_quantizer`."""
        quantizer = self._modules.get(BIAS_QUANTIZER)
        if quantizer is None:
            return bias
        passing = _is_compiling() or self.batch_norm is not None  # a folded bias is another tensor each time
        if passing or self.training or (torch.is_grad_enabled() and bias.requires_grad):
            result: Tensor = quantizer(bias)
            return result
        return kernels.evaluated(quantizer, bias, lambda: quantizer(bias))

    @property
    def quantizes_bias(self) -> bool:
        """Whether the layer's bias is an integer on the grid of its sums of products."""
        return BIAS_QUANTIZER in self._modules

    @torch.no_grad()
    def integer_bias(self) -> tuple[str, Tensor] | None:
        """Return the attribute of an int32 bias and its value in real units; None where the bias is float."""
        call: _Call = self.__dict__[CALL]
        bias = self._weight_of(call.bias) if self.quantizes_bias else None
        return None if bias is None else (call.bias, self.quantized_bias(self._folded(call.bias, bias)).clone())

    def check_bias(self) -> None:
        """Raise IntegerRangeError when int32 does not hold a code of the layer's quantized bias."""
        quantizer: Any = self._modules.get(BIAS_QUANTIZER)
        bias = self._weight_of(self.__dict__[CALL].bias) if quantizer is not None else None
        if bias is not None and not bias.is_meta:
            quantizer.check(self._folded(self.__dict__[CALL].bias, bias))

    def _quantized(self, attribute: str | int, weight: Tensor) -> Tensor:
        call: _Call = self.__dict__[CALL]
        weight = self._folded(attribute, weight)
        if attribute == call.bias:
            return self.quantized_bias(weight)
        quantizer = self.weights_quantizers[attribute]
        trainable = isinstance(quantizer, BasePytorchTrainableQuantizer)

        def compute() -> Tensor:
            result: Tensor = quantizer(weight, self.training) if trainable else quantizer(weight)
            return result

        if _is_compiling() or not isinstance(quantizer, nn.Module) or call.norm is not None:
            return compute()  # a folded weight is another tensor each time
        if self.training:
            kernels.forget(quantizer)
            return compute()
        if torch.is_grad_enabled() and trainable and _learns(weight, quantizer):
            return compute()
        return kernels.evaluated(quantizer, weight, compute)

    def convert_to_inferable_quantizers(self) -> None:
        """Put inferable quantizers in the trainable ones' place, holders included; does nothing the second time."""
        trainable = [(a, q) for a, q in self.weights_quantizers.items() if isinstance(q, BasePytorchTrainableQuantizer)]
        for attribute, inferable in [(a, q.convert2inferable()) for a, q in trainable]:  # all of them, or none
            self.weights_quantizers[attribute] = inferable
        for holder in self.holders:
            holder.convert_to_inferable_quantizers()

    def set_quantize_weights(self, quantized_weights: Mapping[Any, Any]) -> None:
        """Refuse: a quantized weight is never stored in the layer."""
        problem = f"set_quantize_weights({list(quantized_weights)}): quantized weights are not stored in the layer"
        raise InvalidArgumentError("QuantizationWrapper", problem, "assign the float weight instead.")

    # ---- calling ----------------------------------------------------------------------------------------------------

    @property
    def holders(self) -> list[ActivationQuantizationHolder]:
        """Holders of inputs and output."""
        inputs: list[Any] = list(self.input_holders.values())
        return inputs if self.output_holder is None else [*inputs, self.output_holder]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the layer's output with quantized weights, inputs and output."""
        call: _Call = self.__dict__[CALL]
        outputs, overwritten = None, None
        if len(args) == 1 and not kwargs and call.function is None and not _is_compiling():
            outputs = self._as_one(args[0], call)
        if outputs is None:
            modules: Any = self._modules
            if len(modules["input_holders"]):
                overwritten = _Overwritten() if _may_overwrite(self, call) else None
                args, kwargs = self._quantize_inputs(args, kwargs, overwritten)
            if call.op_call_kwargs:
                kwargs = {**call.op_call_kwargs, **kwargs}
            outputs = self._call(args, kwargs) if call.function is None else self._call_function(args, kwargs)
            if overwritten is not None:
                outputs = overwritten.passed_on(outputs, call)
        if self.output_holder is None:
            return outputs
        return _first_held(outputs, self.output_holder)

    def _as_one(self, x: Any, call: _Call) -> Any:
        """Return what the layer and its quantizers give as one function, or None: call them one by one.

        Nothing is remembered between calls, so whoever exchanges a quantizer or a holder is served at once.
        """
        modules: Any = self._modules
        holders: Any = modules["input_holders"]._modules  # noqa: SLF001 - attributes of modules cost ten times as much
        weights: Any = modules["weights_quantizers"]
        attributes = weights._attributes  # noqa: SLF001 - as above
        if len(holders) > 1 or len(attributes) > 1 or not call.quantizes or call.forward is not None:
            return None
        if call.op_call_args or call.op_call_kwargs or getattr(x, "is_nested", False) or call.norm is not None:
            return None
        watched: list[Any] = []
        of_x = of_weight = None
        for holder in holders.values():
            of_x = holder._modules.get("activation_holder_quantizer")  # noqa: SLF001 - as above
            if of_x is None or type(holder) is not ActivationQuantizationHolder or holder.observer is not None:
                return None
            watched += (holder, of_x)
        for attribute, key in attributes.items():
            of_weight = weights._modules.get(key)  # noqa: SLF001 - as above
            if of_weight is None or attribute != "weight":
                return None
            watched.append(of_weight)
        quantizers = of_x, of_weight
        on_grid = self.quantized_bias if call.bias else None
        if self.training:
            if not _are(BasePytorchTrainableQuantizer, quantizers):
                return None
            kernels.forget(of_weight)
        elif not _are_constant(quantizers, x):
            return None
        outputs = kernels.call_layer(self, type(self).own_class, x, quantizers, watched=watched, on_grid=on_grid)
        if outputs is not None and of_weight is not None:
            call.read["weight"] = True
        return outputs

    def _quantize_inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], overwritten: _Overwritten | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        values, names = list(args), self.__dict__[CALL].input_names
        for name, holder in self.input_holders.items():
            quantize = holder if overwritten is None else overwritten.watching(holder)
            index = names.index(name)
            if index < len(values):
                values[index] = quantize(values[index])
            elif name in kwargs:
                kwargs = {**kwargs, name: quantize(kwargs[name])}
        return tuple(values), kwargs

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the layer's own forward, for which its weights are the quantized ones."""
        call: _Call = self.__dict__[CALL]
        if "read_names" not in vars(type(self)):
            stand_in_front(type(self))
        if call.is_inputs_as_list:
            args = (list(args),)
        args += tuple(call.op_call_args)
        if isinstance(self, nn.Linear | nn.MultiheadAttention | nn.RNNBase):
            args, kwargs = self._with_one_kernel(args, kwargs)
        if call.norm is not None:
            return self._call_with_norm(call, args, kwargs)
        if not call.quantizes or _is_compiling():
            return self._own_forward(call, args, kwargs)
        quantized = self.get_quantized_weights()
        bias = self._weight_of(call.bias) if call.bias else None
        if bias is not None:
            quantized[call.bias] = self.quantized_bias(bias)
        return self._call_with(quantized, call, args, kwargs)

    def _call_with(self, values: dict[Any, Tensor], call: _Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the layer's own forward, for which its weights are these."""
        if _is_compiling():
            call.given = values
            try:
                return self._own_forward(call, args, kwargs)
            finally:
                call.given = {}
        before = _values.by_layer
        _values.by_layer = {**before, **{(id(self), name): value for name, value in values.items()}}
        try:
            with kernels.recomputed([*values.values(), *args, *kwargs.values()]):
                return self._own_forward(call, args, kwargs)
        finally:
            _values.by_layer = before

    def _call_with_norm(self, call: _Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do the layer's work and the batch norm's, whose statistics are those of the batch in training."""
        weight, bias = self.float_weight("weight"), self.float_weight("bias")
        if not call.norm.training:
            values = {name: self._effective(name, own) for name, own in (("weight", weight), ("bias", bias))}
            return self._call_with(values, call, args, kwargs)
        nothing = torch.zeros_like(bias)
        axis = -1 if isinstance(self, nn.Linear) else 1 - weight.dim()
        batch = batch_norm.Batch(
            call.norm, self._call_with({"weight": weight, "bias": nothing}, call, args, kwargs), axis, bias
        )
        values = {"weight": self._effective("weight", weight), "bias": nothing}
        quantizes_bias = call.quantizes and bool(call.bias)
        on_grid = self.quantized_bias if quantizes_bias else _unchanged
        return batch.normalized(self._call_with(values, call, args, kwargs), on_grid)

    def _own_forward(self, call: _Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if call.forward is not None:
            return call.forward(*args, **kwargs)
        return type(self).own_class.forward(self, *args, **kwargs)

    def _call_function(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function with its constants quantized."""
        call: _Call = self.__dict__[CALL]
        quantized = self.get_quantized_weights() if call.quantizes else {}
        values = list(args)
        with kernels.recomputed([*quantized.values(), *args, *kwargs.values()]):
            for position in sorted(call.weight_values):
                weight = quantized.get(position, self._weight_of(position))
                setattr(self, f"{QUANTIZED_POSITIONAL_WEIGHT}_{position}", weight.detach())
                values.insert(position, weight)
            given: list[Any] = [values] if call.is_inputs_as_list else values
            return call.function(*given, *call.op_call_args, **kwargs)

    def _with_one_kernel(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments laid out so that PyTorch takes the same kernel whether a gradient is needed or not.

        A trainable and a deployed model differ in what needs a gradient, and that decides between kernels of different
        rounding: for strided batches of matrices, as where the batch comes first in a recurrent layer, and for
        self-attention in eval mode.
        """
        attends = isinstance(self, nn.MultiheadAttention)
        names = ("query", "key", "value") if attends else ("input",)
        values, keywords = list(args), dict(kwargs)
        for index, name in enumerate(names):
            place: Any = (values, index) if index < len(values) else (keywords, name)
            if place[0] is keywords and name not in keywords:
                continue
            laid_out = _laid_out(place[0][place[1]], batch_first=getattr(self, "batch_first", False))
            # the key is another object than the query, else the two may be fused
            place[0][place[1]] = laid_out.view_as(laid_out) if name == "key" else laid_out
        return tuple(values), keywords


def _first_held(outputs: Any, holder: Any) -> Any:
    """Return what a layer gives with its output, or the first of several, quantized; its type stays."""
    if isinstance(outputs, list) or (isinstance(outputs, tuple) and not isinstance(outputs, PackedSequence)):
        if not outputs:
            return outputs
        values = _first_held(outputs[0], holder), *outputs[1:]
        return type(outputs)(*values) if hasattr(outputs, "_fields") else type(outputs)(values)
    return holder(outputs)


def check_biases(qmodel: nn.Module) -> None:
    """Raise IntegerRangeError when int32 does not hold the code of a bias that is an integer; names the layer."""
    for module in qmodel.modules():
        if isinstance(module, QuantizationWrapper):
            module.check_bias()


def _unchanged(bias: Tensor) -> Tensor:
    return bias


_ATTRIBUTES = "weights_quantizers", "input_holders", "output_holder"
BIAS_QUANTIZER = "bias_quantizer"
"""Attribute of a wrapped layer that holds the `BiasQuantizer` of its bias, where it has one."""


def _may_overwrite(layer: Any, call: _Call) -> bool:
    """Return whether a layer writes into its inputs, or may: then who reads an input later must read the result."""
    return call.overwrites is not False or bool(getattr(layer, "inplace", False))


class _Overwritten:
    """The inputs of a call that may be overwritten, each with the quantized tensor that the layer gets instead.

    What the layer writes into a quantized tensor is written into the input as well, after the layer. The quantizer
    therefore gets a copy of the input: it needs the values from before for its own gradient.
    """

    def __init__(self) -> None:
        self._pairs: list[tuple[Tensor, Tensor, Any, Any]] = []

    def watching(self, holder: Any) -> Any:
        """Return a function that quantizes as the holder does, and remembers."""

        def quantize(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return holder(x)
            quantized = holder(x.clone())
            self._pairs.append((x, quantized, _state(quantized), quantized.grad_fn))
            return quantized

        return quantize

    def passed_on(self, outputs: Any, call: _Call) -> Any:
        """Return the outputs, after writing into the inputs what the layer wrote into the quantized ones."""
        seen = False
        for x, quantized, before, node in self._pairs:
            if _is_compiling():
                written = outputs is quantized
            else:
                now = _state(quantized)
                written = not _is_same(now, before)
            if written:
                seen = True
                # where autograd has not seen it, it is not to see it here
                unseen = quantized.requires_grad and quantized.grad_fn is node
                with torch.set_grad_enabled(torch.is_grad_enabled() and not unseen):
                    x.copy_(quantized)
                outputs = x if outputs is quantized and not unseen else outputs
        if call.overwrites is None and not _is_compiling():
            call.overwrites = seen
        return outputs


def _state(tensor: Tensor) -> Any:
    """Return what changes when somebody writes into a tensor: a counter, or where there is none a copy."""
    if _is_compiling():
        return None
    return tensor.clone() if tensor.is_inference() else tensor._version  # noqa: SLF001 - autograd's counter has no public name


def _is_same(now: Any, before: Any) -> bool:
    return torch.equal(now.nan_to_num(), before.nan_to_num()) if isinstance(now, Tensor) else bool(now == before)


_OURS = BasePytorchTrainableQuantizer, InferableQuantizer


def _are(classes: type | tuple[type, ...], quantizers: tuple[Any, Any]) -> bool:
    """Return whether those of two quantizers that are there, at least one, are of some classes."""
    of_x, of_weight = quantizers
    if of_x is None:
        return isinstance(of_weight, classes)
    return isinstance(of_x, classes) and (of_weight is None or isinstance(of_weight, classes))


def _are_constant(quantizers: tuple[Any, Any], x: Any) -> bool:
    """Return whether two quantizers are ours, and neither has a part in the autograd graph of a call in eval mode."""
    if not torch.is_grad_enabled():
        return _are(_OURS, quantizers)
    if quantizers[0] is not None and isinstance(x, Tensor) and x.requires_grad:
        return False  # the gradient passes through it
    return _are(InferableQuantizer, quantizers)


def _check(weights_quantizers: Any, module: Any, values: Mapping[int, Tensor]) -> None:
    """Check that quantizers and what they are for fit together."""
    if not isinstance(weights_quantizers, Mapping):
        problem = f"weights_quantizers must be a mapping, got {type(weights_quantizers).__name__}"
        raise InvalidArgumentError("QuantizationWrapper", problem)
    if not (isinstance(module, nn.Module) or callable(module)):
        problem = f"it wraps a torch.nn.Module or a function, got {type(module).__name__}"
        raise InvalidArgumentError("QuantizationWrapper", problem)
    wanted: type = int if values else str
    if any(not isinstance(attribute, wanted) for attribute in weights_quantizers):
        problem = f"weights_quantizers must be keyed by {wanted.__name__}, got {list(weights_quantizers)}"
        raise InvalidArgumentError("QuantizationWrapper", problem)
    if values and set(weights_quantizers) != set(values):
        problem = f"quantizers for positions {list(weights_quantizers)}, values for {list(values)}"
        raise InvalidArgumentError("QuantizationWrapper", problem)
    for attribute, quantizer in weights_quantizers.items():
        require_quantizer(quantizer, QuantizationTarget.Weights, f"QuantizationWrapper: {attribute!r}")
        if not values:
            *path, name = str(attribute).split(".")
            owner = module
            for part in path:
                owner = getattr(owner, part, None)
            if not isinstance(owner, nn.Module) or not isinstance(getattr(owner, name, None), Tensor):
                raise InvalidArgumentError("QuantizationWrapper", f"the layer has no weight {attribute!r}")


def _learns(weight: Tensor, quantizer: nn.Module) -> bool:
    return weight.requires_grad or any(parameter.requires_grad for parameter in quantizer.parameters())


def _laid_out(tensor: Any, *, batch_first: bool) -> Any:
    """Return the tensor contiguous; with the batch first, contiguous once the sequence comes first as inside."""
    if not isinstance(tensor, Tensor) or tensor.is_nested:
        return tensor
    if batch_first and tensor.dim() == 3:  # noqa: PLR2004 - batch, sequence, features
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    return tensor.contiguous()
