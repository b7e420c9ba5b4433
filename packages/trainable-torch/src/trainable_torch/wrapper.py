"""The quantization wrapper: mctq's, mended."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from mct_quantizers import PytorchQuantizationWrapper
from mct_quantizers.common.constants import POSITIONAL_WEIGHT, QUANTIZED_POSITIONAL_WEIGHT
from torch import Tensor, nn

from trainable_core.backend.building import require_quantizer
from trainable_core.backend.unlisted import UnlistedSubclass
from trainable_core.enums import QuantizationTarget
from trainable_core.errors import InvalidArgumentError
from trainable_torch import kernels
from trainable_torch.holder import ActivationQuantizationHolder
from trainable_torch.kernels import cache
from trainable_torch.quantizers.base import BasePytorchTrainableQuantizer


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


class QuantizationWrapper(nn.Module, metaclass=UnlistedSubclass, of=PytorchQuantizationWrapper):
    """A layer whose weights, and if asked inputs and output, are quantized as it is called.

    Parameters
    ----------
    module : Module or callable
        The layer, or a function with constants.
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

    Notes
    -----
    Mended against mctq 1.7. The wrapper and its layer share one dictionary of parameters and one of buffers: nothing is
    moved, renamed or copied. So tied weights stay tied, float checkpoints find their keys, ``load_state_dict`` with
    ``assign=True`` is seen by layer and wrapper alike, and `deepcopy` and `pickle` work after a training forward,
    because quantized weights are handed to the layer for the length of one call and never stored in it. Attributes the
    wrapper doesn't have are the layer's. In eval mode, without gradients, a weight is fake-quantized when it or its
    quantizer changed (`trainable_torch.kernels.cache` says how that is seen), not at every call; a compiled model
    computes it. What the layer would keep of quantized tensors for backward is made again in the backward pass
    (`trainable_torch.kernels.recomputing`).
    """

    layer: Any
    weights_quantizers: WeightsQuantizers

    def __init__(  # noqa: PLR0913 - mctq's six, and three of ours
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
    ) -> None:
        nn.Module.__init__(self)
        object.__setattr__(self, "layer", module)  # not a child: its parameters are the wrapper's own
        self.weight_values = dict(weight_values or {})
        self.op_call_args = list(op_call_args or [])
        self.op_call_kwargs = dict(op_call_kwargs or {})
        self.is_inputs_as_list = is_inputs_as_list
        self.is_str_attr = not self.weight_values
        self.input_names = tuple(input_names)
        self.quantizes_weights = True
        self._check(weights_quantizers)
        for attribute, quantizer in weights_quantizers.items():
            quantizer.initialize_quantization(tuple(self._weight_of(attribute).shape), str(attribute), self)
        if isinstance(module, nn.Module):
            self._parameters = module._parameters  # noqa: SLF001 - shared on purpose, see Notes
            self._buffers = module._buffers  # noqa: SLF001
            self._non_persistent_buffers_set = module._non_persistent_buffers_set  # noqa: SLF001
            self._modules.update(module._modules)  # noqa: SLF001
            self.training = module.training
        else:
            for position, value in self.weight_values.items():
                self.register_parameter(f"{POSITIONAL_WEIGHT}_{position}", nn.Parameter(value, requires_grad=False))
        self.weights_quantizers = WeightsQuantizers(weights_quantizers)
        self.input_holders = nn.ModuleDict(dict(input_holders or {}))
        self.output_holder = output_holder

    def _check(self, weights_quantizers: Mapping[Any, Any]) -> None:
        if not isinstance(weights_quantizers, Mapping):
            problem = f"weights_quantizers must be a mapping, got {type(weights_quantizers).__name__}"
            raise InvalidArgumentError("QuantizationWrapper", problem)
        wanted: type = str if self.is_str_attr else int
        if any(not isinstance(attribute, wanted) for attribute in weights_quantizers):
            raise InvalidArgumentError(
                "QuantizationWrapper",
                f"weights_quantizers must be keyed by {wanted.__name__}, got {list(weights_quantizers)}",
            )
        if not self.is_str_attr and set(weights_quantizers) != set(self.weight_values):
            raise InvalidArgumentError(
                "QuantizationWrapper",
                f"quantizers for positions {list(weights_quantizers)}, values for {list(self.weight_values)}",
            )
        for attribute, quantizer in weights_quantizers.items():
            require_quantizer(quantizer, QuantizationTarget.Weights, f"QuantizationWrapper: {attribute!r}")
            if self.is_str_attr and not isinstance(self._weight_of(attribute), Tensor):
                raise InvalidArgumentError("QuantizationWrapper", f"the layer has no weight {attribute!r}")

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the wrapper, or else of the layer."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            layer = self.__dict__.get("layer")
            if layer is None or name.startswith("__"):
                raise
            return getattr(layer, name)

    def _weight_of(self, attribute: str | int) -> Any:
        if not self.is_str_attr:
            value = self._parameters.get(f"{POSITIONAL_WEIGHT}_{attribute}")
            return self.weight_values[attribute] if value is None else value  # type: ignore[index]
        owner = self.layer
        for part in str(attribute).split("."):
            owner = getattr(owner, part, None)
        return owner

    # ---- mctq's interface -------------------------------------------------------------------------------------------

    @property
    def is_weights_quantization(self) -> bool:
        """Whether any weight is quantized."""
        return bool(self.weights_quantizers)

    @property
    def num_weights_quantizers(self) -> int:
        """Number of quantized weights."""
        return len(self.weights_quantizers)

    def get_weights_vars(self) -> list[tuple[Any, Any, Any]]:
        """Return (attribute, float weight as it is now, quantizer) of each quantized weight."""
        return [(attribute, self._weight_of(attribute), q) for attribute, q in self.weights_quantizers.items()]

    def get_quantized_weights(self) -> dict[Any, Tensor]:
        """Return each quantized weight's quantized value, by attribute."""
        return {attribute: self._quantized(weight, q) for attribute, weight, q in self.get_weights_vars()}

    def _quantized(self, weight: Tensor, quantizer: Any) -> Tensor:
        trainable = isinstance(quantizer, BasePytorchTrainableQuantizer)

        def compute() -> Tensor:
            result: Tensor = quantizer(weight, self.training) if trainable else quantizer(weight)
            return result

        if torch.compiler.is_compiling() or not isinstance(quantizer, nn.Module):
            return compute()
        if self.training:
            kernels.forget(quantizer)
            return compute()
        if trainable and torch.is_grad_enabled() and _learns(weight, quantizer):
            return compute()
        return kernels.evaluated(quantizer, weight, compute)

    def convert_to_inferable_quantizers(self) -> None:
        """Put inferable quantizers in the trainable ones' place, holders included; does nothing the second time."""
        trainable = [(a, q) for a, q in self.weights_quantizers.items() if isinstance(q, BasePytorchTrainableQuantizer)]
        for attribute, inferable in [(a, q.convert2inferable()) for a, q in trainable]:  # all of them, or none
            self.weights_quantizers[attribute] = inferable
        for holder in self.holders:
            holder.convert_to_inferable_quantizers()

    # ---- calling ----------------------------------------------------------------------------------------------------

    @property
    def holders(self) -> list[ActivationQuantizationHolder]:
        """Holders of inputs and output."""
        inputs: list[Any] = list(self.input_holders.values())
        return inputs if self.output_holder is None else [*inputs, self.output_holder]

    def train(self, mode: bool = True) -> QuantizationWrapper:  # noqa: FBT001, FBT002 - torch's signature
        """Set the training mode of wrapper, layer and quantizers."""
        super().train(mode)
        if mode:
            for quantizer in self.weights_quantizers.values():
                kernels.forget(quantizer)
        if isinstance(self.layer, nn.Module):
            self.layer.training = mode  # its children are the wrapper's and are set already
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:  # noqa: FBT001 - torch's signature
        owner: Any = self.layer if isinstance(self.layer, nn.Module) else super()
        owner._save_to_state_dict(destination, prefix, keep_vars)  # noqa: SLF001 - the layer's own way, with extra state

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if not isinstance(self.layer, nn.Module):
            super()._load_from_state_dict(state_dict, prefix, *args)
            return
        *others, unexpected, errors = args
        foreign: list[str] = []
        layer: Any = self.layer
        layer._load_from_state_dict(state_dict, prefix, *others, foreign, errors)  # noqa: SLF001 - as in saving
        known = {f"{prefix}{name}" for name in self._modules}  # the layer knows nothing of quantizers and holders
        unexpected += [key for key in foreign if not any(key.startswith(f"{name}.") for name in known)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the layer's output with quantized weights, inputs and output."""
        outputs = self._as_one(args[0]) if self.training and len(args) == 1 and not kwargs else None
        if outputs is None:
            if len(self.input_holders):
                args, kwargs = self._quantize_inputs(args, kwargs)
            outputs = self._call(args, {**self.op_call_kwargs, **kwargs})
        if self.output_holder is None:
            return outputs
        if isinstance(outputs, tuple):
            return (self.output_holder(outputs[0]), *outputs[1:])
        return self.output_holder(outputs)

    def _as_one(self, x: Any) -> Any:
        """Return what the layer and its quantizers give as one function, or None: call them one by one.

        Nothing is remembered between calls, so whoever exchanges a quantizer, a holder or the layer is served at once.
        """
        layer, modules = self.layer, self.__dict__["_modules"]
        holders: Any = modules["input_holders"]._modules  # noqa: SLF001 - attributes of modules cost ten times as much
        weights: Any = modules["weights_quantizers"]
        attributes = weights._attributes  # noqa: SLF001 - as above
        if len(holders) > 1 or len(attributes) > 1 or not self.quantizes_weights or not isinstance(layer, nn.Module):
            return None
        if self.op_call_args or self.op_call_kwargs:
            return None
        watched: list[Any] = [layer]
        of_x = of_weight = None
        for holder in holders.values():
            of_x = holder.activation_holder_quantizer
            if type(holder) is not ActivationQuantizationHolder or holder.observer is not None:
                return None
            if not isinstance(of_x, BasePytorchTrainableQuantizer):
                return None
            watched += (holder, of_x)
        for attribute, key in attributes.items():
            of_weight = weights._modules.get(key)  # noqa: SLF001 - as above
            if attribute != "weight" or not isinstance(of_weight, BasePytorchTrainableQuantizer):
                return None
            watched.append(of_weight)
        # a graph that read the kept weights would be guarded by them, and they come and go with other models
        if not torch.compiler.is_compiling() and cache.WEIGHTS:
            kernels.forget(of_weight)
        return kernels.call_layer(layer, x, (of_x, of_weight), watched=watched)

    def _quantize_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        values = list(args)
        for name, holder in self.input_holders.items():
            index = self.input_names.index(name)
            if index < len(values):
                values[index] = holder(values[index])
            elif name in kwargs:
                kwargs = {**kwargs, name: holder(kwargs[name])}
        return tuple(values), kwargs

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        quantized = self.get_quantized_weights() if self.quantizes_weights else {}
        kept = kernels.recomputed([*quantized.values(), *args, *kwargs.values()])
        if not self.is_str_attr:
            values = list(args)
            for position in sorted(self.weight_values):
                weight = quantized.get(position, self._weight_of(position))
                setattr(self, f"{QUANTIZED_POSITIONAL_WEIGHT}_{position}", weight.detach())
                values.insert(position, weight)
            args = tuple(values)
            quantized = {}
        args = ((list(args),) if self.is_inputs_as_list else args) + tuple(self.op_call_args)
        if isinstance(self.layer, nn.Linear | nn.MultiheadAttention):
            args, kwargs = self._with_one_kernel(args, kwargs)
        with kept:
            if not quantized:
                return self.layer(*args, **kwargs)
            return torch.func.functional_call(self.layer, quantized, args, kwargs, tie_weights=False)

    def _with_one_kernel(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments laid out so that PyTorch takes the same kernel whether a gradient is needed or not.

        A trainable and a deployed model differ in what needs a gradient, and that decides between kernels of different
        rounding: for strided batches of matrices, and for self-attention in eval mode.
        """
        attends = isinstance(self.layer, nn.MultiheadAttention)
        names = ("query", "key", "value") if attends else ("input",)
        values, keywords = list(args), dict(kwargs)
        for index, name in enumerate(names):
            place: Any = (values, index) if index < len(values) else (keywords, name)
            if place[0] is keywords and name not in keywords:
                continue
            laid_out = _laid_out(place[0][place[1]], batch_first=attends and self.layer.batch_first)
            # the key is another object than the query, else the two may be fused
            place[0][place[1]] = laid_out.view_as(laid_out) if name == "key" else laid_out
        return tuple(values), keywords


def _learns(weight: Tensor, quantizer: nn.Module) -> bool:
    return weight.requires_grad or any(parameter.requires_grad for parameter in quantizer.parameters())


def _laid_out(tensor: Any, *, batch_first: bool) -> Any:
    """Return the tensor contiguous; with the batch first, contiguous once the sequence comes first as inside."""
    if not isinstance(tensor, Tensor) or tensor.is_nested:
        return tensor
    if batch_first and tensor.dim() == 3:  # noqa: PLR2004 - batch, sequence, features
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    return tensor.contiguous()
