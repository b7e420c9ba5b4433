# ruff: noqa: D102 - what each method does is said in trainable_core.conformance.adapter.Adapter
"""The PyTorch backend as the conformance kit sees it."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainable_core.conformance.adapter import Run
from trainable_core.enums import TieRule

Array = NDArray[Any]


def to_numpy(tensor: Tensor) -> Array:
    """Return a copy of a tensor's values; bfloat16, which NumPy lacks, as float32."""
    return np.array((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().cpu().numpy())


class TorchAdapter:
    """See `trainable_core.conformance.adapter.Adapter`."""

    backend, tie_rule, counts_calls, subnormals = "torch", TieRule.HALF_EVEN, False, True
    dtypes = ("float32", "float16", "bfloat16", "float64")
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    modules = ("torch", "mct_quantizers")

    def build(self, cls: type[Any], config: Any, shape: tuple[int, ...], arguments: Mapping[str, Any]) -> Any:
        (quantizer := cls(config, **arguments)).initialize_quantization(shape, "tensor", None)
        return quantizer

    def run(self, quantizer: Any, x: Array, *, training: bool, dtype: str, device: str, upstream: Array | None) -> Run:
        given = torch.tensor(x).to(device, getattr(torch, dtype)).requires_grad_(upstream is not None)
        quantizer.to(device).train(training).zero_grad()
        output = quantizer(given, training)
        variables: dict[str, Array] = {}
        if upstream is not None:
            output.backward(torch.tensor(upstream).to(output))
            for name, variable in self.trained(quantizer).items():
                variables[name] = to_numpy(torch.zeros_like(variable) if variable.grad is None else variable.grad)
        quantizer.to("cpu")
        gradient = None if given.grad is None else to_numpy(given.grad)
        name = str(output.dtype).removeprefix("torch.")
        return Run(to_numpy(output), name, output.device.type, to_numpy(given), gradient, variables)

    def deploy(self, quantizer: Any, x: Array) -> Array:
        return to_numpy(quantizer.convert2inferable()(torch.tensor(x)))

    def trained(self, quantizer: Any) -> dict[str, Tensor]:
        return {name: parameter for name, parameter in quantizer.named_parameters() if parameter.requires_grad}

    def descend(self, quantizer: Any, gradients: Mapping[str, Array]) -> None:
        for name, variable in self.trained(quantizer).items():
            variable.grad = torch.tensor(gradients[name]) if name in gradients else None
        torch.optim.SGD([*self.trained(quantizer).values(), torch.zeros(1)], lr=1.0).step()

    def copy(self, quantizer: Any) -> Any:
        return copy.deepcopy(quantizer)

    def save(self, quantizer: Any) -> bytes:
        torch.save(quantizer.state_dict(), buffer := io.BytesIO())
        return buffer.getvalue()

    def restore(self, quantizer: Any, state: bytes) -> None:
        quantizer.load_state_dict(torch.load(io.BytesIO(state), weights_only=True))

    def model(self) -> tuple[nn.Module, Tensor, Callable[[nn.Module], Array]]:
        batch = torch.linspace(-1.0, 1.0, 12).reshape(4, 3)
        return nn.Sequential(nn.Linear(3, 2)), batch, lambda model: to_numpy(model.eval()(batch))


ADAPTER = TorchAdapter()
