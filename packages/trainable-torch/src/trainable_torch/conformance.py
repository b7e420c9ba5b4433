"""The PyTorch backend as the conformance kit sees it."""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainable_core.conformance.adapter import Run
from trainable_core.enums import TieRule


class TorchAdapter:
    """See `trainable_core.conformance.adapter.Adapter`."""

    backend = "torch"
    tie_rule = TieRule.HALF_EVEN
    dtypes = ("float32", "float16", "bfloat16", "float64")
    modules = ("torch", "mct_quantizers")

    @property
    def devices(self) -> tuple[str, ...]:  # noqa: D102 - from here on, what `Adapter` says
        return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)

    def build(self, cls: type[Any], config: Any, shape: tuple[int, ...], arguments: Mapping[str, Any]) -> Any:  # noqa: D102
        quantizer = cls(config, **arguments)
        quantizer.initialize_quantization(shape, "tensor", None)
        return quantizer

    def run(  # noqa: D102
        self,
        quantizer: Any,
        x: NDArray[Any],
        *,
        training: bool,
        dtype: str = "float32",
        device: str = "cpu",
        upstream: NDArray[Any] | None = None,
    ) -> Run:
        given = torch.tensor(x).to(device, getattr(torch, dtype)).requires_grad_(upstream is not None)
        quantizer.to(device).train(training)
        quantizer.zero_grad()
        output = quantizer(given, training)
        found: dict[str, NDArray[Any]] = {}
        if upstream is not None:
            output.backward(torch.tensor(upstream).to(output))
            trained = {name: getattr(quantizer, name) for name in self.trained(quantizer)}
            found = {n: _numpy(torch.zeros_like(v) if v.grad is None else v.grad) for n, v in trained.items()}
        x_gradient = None if given.grad is None else _numpy(given.grad)
        values, after, found_dtype, place = _numpy(output), _numpy(given), str(output.dtype), output.device.type
        quantizer.to("cpu")
        return Run(values, found_dtype.removeprefix("torch."), place, after, x_gradient, found)

    def deploy(self, quantizer: Any, x: NDArray[Any]) -> NDArray[Any]:  # noqa: D102
        return _numpy(quantizer.convert2inferable()(torch.tensor(x)))

    def trained(self, quantizer: Any) -> list[str]:  # noqa: D102
        return [name for name, parameter in quantizer.named_parameters() if parameter.requires_grad]

    def descend(self, quantizer: Any, gradients: Mapping[str, NDArray[Any]]) -> None:  # noqa: D102
        chosen: list[nn.Parameter] = [getattr(quantizer, name) for name in self.trained(quantizer) if name in gradients]
        for name, parameter in quantizer.named_parameters():
            parameter.grad = torch.tensor(gradients[name]) if any(parameter is each for each in chosen) else None
        if chosen:
            torch.optim.SGD(chosen, lr=1.0).step()

    def freeze(self, quantizer: Any, *, frozen: bool) -> None:  # noqa: D102
        quantizer.freeze(frozen)

    def copy(self, quantizer: Any) -> Any:  # noqa: D102
        return copy.deepcopy(quantizer)

    def save(self, quantizer: Any) -> bytes:  # noqa: D102
        buffer = io.BytesIO()
        torch.save(quantizer.state_dict(), buffer)
        return buffer.getvalue()

    def restore(self, quantizer: Any, state: bytes) -> None:  # noqa: D102
        quantizer.load_state_dict(torch.load(io.BytesIO(state), weights_only=True))


def _numpy(tensor: Tensor) -> NDArray[Any]:
    tensor = tensor.detach().cpu()
    return np.array((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy())


ADAPTER = TorchAdapter()
