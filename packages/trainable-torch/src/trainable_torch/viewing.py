"""A wrapped PyTorch model as core looks at it, to follow its training and to report on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainable_core.backend.view import ModelView, QuantizedTensor, See
from trainable_core.qparams import Float32
from trainable_torch.calibration import put_back
from trainable_torch.description import place_of_holder
from trainable_torch.holder import ActivationQuantizationHolder
from trainable_torch.statistics import batch_norms
from trainable_torch.structure.operations import CONTAINER
from trainable_torch.training import call_with, evaluating
from trainable_torch.wrapper import QuantizationWrapper


class TorchView(ModelView):
    """What core asks of PyTorch."""

    model: nn.Module

    def tensors(self) -> list[QuantizedTensor]:
        """Return the model's quantized tensors; `named_modules` tells a holder behind the layer that it belongs to."""
        found: list[QuantizedTensor] = []
        for path, module in self.model.named_modules():
            if isinstance(module, QuantizationWrapper):
                found += [
                    QuantizedTensor(path or "model", str(attribute), quantizer, weight=(module, attribute))
                    for attribute, quantizer in module.weights_quantizers.items()
                ]
            elif isinstance(module, ActivationQuantizationHolder):
                layer, tensor = place_of_holder(path.removeprefix(f"{CONTAINER}."))
                found.append(QuantizedTensor(layer, tensor, module.activation_holder_quantizer, holder=module))
        return found

    def values(self, tensor: QuantizedTensor) -> Float32:
        """Return a weight's float values."""
        return _array(_weight(tensor))

    @torch.no_grad()
    def quantized(self, tensor: QuantizedTensor) -> Float32:
        """Return what a weight's quantizer makes of it in evaluation mode."""
        weight = _weight(tensor)
        with evaluating(tensor.quantizer):
            return _array(tensor.quantizer(weight))

    @contextmanager
    def seeing(self, seen: Mapping[Any, See]) -> Iterator[None]:
        """Show what reaches some holders, by hooks on them, while the model runs in evaluation mode."""
        hooks = [holder.register_forward_pre_hook(_shown(see)) for holder, see in seen.items()]
        try:
            with evaluating(self.model), torch.no_grad(), put_back(self.model, random=True):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def call(self, batch: Any) -> Any:
        """Call the model with a batch: a mapping is its keyword arguments."""
        return call_with(self.model, batch)

    def is_tensor(self, batches: Any) -> bool:
        """Return whether this is one batch."""
        return isinstance(batches, Tensor)

    def batch_norms(self) -> dict[str, tuple[Float32, Float32]]:
        """Return moving mean and variance of each batch norm that the model has."""
        return {
            name: (_array(norm.running_mean), _array(norm.running_var))
            for name, norm in batch_norms(self.model).items()
        }


@torch.no_grad()
def _weight(tensor: QuantizedTensor) -> Tensor:
    """Return a weight, in evaluation mode: where it is computed, as by `spectral_norm`, training mode would go on."""
    wrapper, attribute = tensor.weight
    with evaluating(wrapper):
        weight: Tensor = next(weight for name, weight, _ in wrapper.get_weights_vars() if name == attribute)
    return weight.detach()


def _array(values: Tensor) -> Float32:
    array: Float32 = values.detach().to("cpu", torch.float32).numpy()
    return array


def _shown(see: See) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(_holder: nn.Module, args: tuple[Any, ...]) -> None:
        value = args[0] if args else None
        if not isinstance(value, Tensor):
            value = getattr(value, "data", None)  # of a packed sequence, its values
        if isinstance(value, Tensor) and value.is_floating_point() and not value.is_nested:
            see(np.asarray(value.detach().to("cpu", torch.float32)))

    return hook
