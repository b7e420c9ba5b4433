"""A wrapped PyTorch model as core looks at it: to diagnose it, to follow its training, and to report on it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from trainable_core.backend.view import Forward, ModelView, QuantizedTensor, See, VariableKey
from trainable_core.errors import ModelError
from trainable_core.qparams import Float32
from trainable_torch import kernels
from trainable_torch.calibration import put_back
from trainable_torch.description import quantized_tensors
from trainable_torch.distillation import main_output
from trainable_torch.holder import ActivationQuantizationHolder
from trainable_torch.quantizers.base import BasePytorchTrainableQuantizer
from trainable_torch.ranks import require_whole
from trainable_torch.state import present_state
from trainable_torch.statistics import batch_norms
from trainable_torch.training import call_with, evaluating
from trainable_torch.wrapper import CALL, QuantizationWrapper


class TorchView(ModelView):
    """What core asks of PyTorch.

    Parameters
    ----------
    qmodel : Module
        What `wrap` or `finalize` returned.
    what : str
        The verb, for errors.
    forward : callable, optional
        ``forward(qmodel, batch)``, when batches need another call.
    """

    package = "trainable_torch"
    model: nn.Module

    def __init__(self, qmodel: nn.Module, what: str, forward: Forward | None = None) -> None:
        state = present_state(qmodel)
        require_whole(qmodel, what)
        super().__init__(qmodel, state, tuple(quantized_tensors(qmodel, state)), forward)

    # ---- the model as it stands -------------------------------------------------------------------------------------

    def values(self, tensor: QuantizedTensor) -> Float32:
        """Return a weight's float values."""
        return _array(_weight(tensor))

    @torch.no_grad()
    def quantized(self, tensor: QuantizedTensor) -> Float32:
        """Return what a weight's quantizer makes of it in evaluation mode."""
        weight = _weight(tensor)
        with evaluating(tensor.quantizer):
            return _array(tensor.quantizer(weight))

    def batch_norms(self) -> dict[str, tuple[Float32, Float32]]:
        """Return moving mean and variance of each batch norm that the model has."""
        return {
            name: (_array(norm.running_mean), _array(norm.running_var))
            for name, norm in batch_norms(self.model).items()
        }

    # ---- the model while it runs ------------------------------------------------------------------------------------

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Evaluate eagerly and without gradients; leave buffers, modes, random state and notes as they were."""
        calls = [vars(each)[CALL] for each in self.model.modules() if isinstance(each, QuantizationWrapper)]
        noted = [dict(call.read) for call in calls]
        try:
            with _eagerly(), put_back(self.model, random=True), evaluating(self.model):
                yield
        finally:
            for call, read in zip(calls, noted, strict=True):
                call.read.clear()
                call.read.update(read)

    @contextmanager
    def watching(self, seen: Mapping[QuantizedTensor, See]) -> Iterator[None]:
        """Show inputs and outputs of holders, by hooks on them."""
        handles = [tensor.part.register_forward_hook(_shown(see)) for tensor, see in seen.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def quantizing(self, layers: Collection[str] | None) -> Iterator[None]:
        """Let only some layers quantize."""
        silent = [each.part for each in self.tensors() if layers is not None and each.layer.name not in layers]
        wrappers = [part for part in silent if isinstance(part, QuantizationWrapper)]
        holders: list[Any] = [part for part in silent if isinstance(part, ActivationQuantizationHolder)]
        try:
            for wrapper in wrappers:
                wrapper.quantizes_weights = False
            for holder in holders:
                holder.observer = _PASSING
            yield
        finally:
            for wrapper in wrappers:
                wrapper.quantizes_weights = True
            for holder in holders:
                holder.observer = None

    @contextmanager
    def replacing(self, values: Mapping[QuantizedTensor, Float32]) -> Iterator[None]:
        """Let quantizers of weights return given values."""
        replaced = {id(tensor.quantizer): (tensor.quantizer, array) for tensor, array in values.items()}
        try:
            for quantizer, array in replaced.values():
                vars(quantizer)["forward"] = partial(_given, array)
                kernels.forget(quantizer)
            yield
        finally:
            for quantizer, _ in replaced.values():
                vars(quantizer).pop("forward", None)
                kernels.forget(quantizer)  # it tells functions apart by their ids, and a later one may have the same

    @contextmanager
    def outputs_of(self, tensor: QuantizedTensor) -> Iterator[list[Float32]]:
        """Note the outputs of a weight's layer, by a hook."""
        found: list[Float32] = []

        def hook(_layer: nn.Module, _args: Any, output: Any) -> None:
            value = main_output(output)
            if isinstance(value, Tensor) and not value.is_nested:
                found.append(_array(value).copy())  # what comes behind may write into it in place

        handle = tensor.part.register_forward_hook(hook)
        try:
            yield found
        finally:
            handle.remove()

    def call(self, batch: Any) -> Any:
        """Call the model with a batch: a mapping is its keyword arguments."""
        return call_with(self.model, batch)

    def call_teacher(self, teacher: nn.Module, batch: Any) -> Any:
        """Call another model in evaluation mode."""
        with evaluating(teacher), put_back(teacher, random=False):
            if self.forward is not None:
                return self.forward(teacher, batch)
            return call_with(teacher, batch)

    def main_output(self, outputs: Any) -> Float32:
        """Return the values of the logits, or of the first output."""
        return _array(_main(outputs))

    def gradients(
        self, batch: Any, variables: Mapping[VariableKey, Any], upstream: Callable[[Float32], Float32]
    ) -> Mapping[VariableKey, Float32 | None]:
        """Return gradients with the quantizers in training mode; nothing is accumulated in the parameters."""
        with put_back(self.model, random=True), torch.enable_grad():
            with _training(self.model):
                output = _main(self.run(batch))
            if not output.requires_grad:
                return dict.fromkeys(variables)
            given = torch.as_tensor(upstream(_array(output)), dtype=output.dtype, device=output.device)
            found = torch.autograd.grad(output, list(variables.values()), given, allow_unused=True)
        return {key: None if each is None else _array(each) for key, each in zip(variables, found, strict=True)}


# ---- values ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _weight(tensor: QuantizedTensor) -> Tensor:
    """Return a weight as a forward in evaluation mode reads it, and leave the layer as it was."""
    wrapper: QuantizationWrapper = tensor.part
    computed = {name: vars(wrapper)[name] for name in getattr(wrapper, "read_names", ()) if name in vars(wrapper)}
    try:
        with evaluating(wrapper):  # in training mode, reading a computed weight may go on computing it
            wrapper.compute_weights()
            weights = {str(name): weight for name, weight, _ in wrapper.get_weights_vars()}
    finally:
        vars(wrapper).update(computed)
    weight: Tensor = weights[tensor.tensor]
    return weight.detach()


def _array(values: Tensor) -> Float32:
    array: Float32 = np.asarray(values.detach().to("cpu", torch.float32).numpy())
    return array


def _main(outputs: Any) -> Tensor:
    found = main_output(outputs)
    if not isinstance(found, Tensor):
        problem = f"diagnose: the model returned {type(found).__name__}, and no tensor is found in it"
        raise ModelError(problem, "forward=lambda qmodel, batch: ... returns the tensor that counts.")
    return found


def _shown(see: See) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    def hook(_holder: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        given = args[0] if args else None
        before, after = (each.data if isinstance(each, PackedSequence) else each for each in (given, output))
        for x, q in _pairs(before, after):
            see(_array(x), partial(_array, q))

    return hook


def _pairs(before: Any, after: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what a holder got and returned as plain tensors of floating point numbers."""
    if not isinstance(before, Tensor) or not isinstance(after, Tensor) or not before.is_floating_point():
        return
    if before.is_nested:
        yield from zip(before.unbind(), after.unbind(), strict=True)
    else:
        yield before, after


# ---- the model's states ---------------------------------------------------------------------------------------------


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Let quantizers compute as in training; batch norms, dropout and whatever has no quantizer don't."""
    parts = QuantizationWrapper, ActivationQuantizationHolder, BasePytorchTrainableQuantizer
    modes = {each: each.training for each in model.modules() if isinstance(each, parts)}
    try:
        for each in modes:
            each.training = True
        yield
    finally:
        for each, mode in modes.items():
            each.training = mode


@contextmanager
def _eagerly() -> Iterator[None]:
    """Leave compiled forwards aside, which would be compiled anew for each state of the model; without gradients."""
    with torch.inference_mode(mode=False), torch.no_grad():
        if hasattr(torch.compiler, "set_stance"):  # PyTorch 2.6
            with torch.compiler.set_stance("force_eager"):
                yield
        else:
            yield


class _Passing:
    """An observer that only lets a holder pass on what it gets."""

    def update(self, values: Any) -> None:
        """Do nothing."""


_PASSING: Any = _Passing()


def _given(values: Float32, weight: Tensor, *_: Any, **__: Any) -> Tensor:
    """Return given values as a tensor like a weight."""
    return torch.as_tensor(values, dtype=weight.dtype, device=weight.device)
