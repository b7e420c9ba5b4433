"""The activation quantization holder: mctq's, mended."""

from __future__ import annotations

from typing import Any

import torch
from mct_quantizers import PytorchActivationQuantizationHolder
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from trainable_core.backend.building import require_quantizer
from trainable_core.backend.unlisted import UnlistedSubclass
from trainable_core.calibration import Observer
from trainable_core.enums import QuantizationTarget
from trainable_core.errors import CalibrationError
from trainable_torch.kernels import eligible
from trainable_torch.quantizers.base import BasePytorchTrainableQuantizer


class ActivationQuantizationHolder(nn.Module, metaclass=UnlistedSubclass, of=PytorchActivationQuantizationHolder):
    """A module that quantizes what passes through it.

    Parameters
    ----------
    activation_holder_quantizer : BasePytorchTrainableQuantizer or mctq inferable quantizer
        The quantizer; initialized here.

    Notes
    -----
    Mended against mctq: the quantizer is told whether the model trains, so ``eval()`` reaches it; conversion is
    idempotent; integer tensors pass untouched. While `observer` is set, values are seen and passed on as they are.
    """

    observer: Observer | None

    def __init__(self, activation_holder_quantizer: Any) -> None:
        nn.Module.__init__(self)
        require_quantizer(activation_holder_quantizer, QuantizationTarget.Activation, type(self).__name__)
        self.activation_holder_quantizer = activation_holder_quantizer
        self.observer = None
        activation_holder_quantizer.initialize_quantization(None, "activation", self)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; one of mctq's stock quantizers, which are no modules, may take the place of a module."""
        if name == "activation_holder_quantizer" and not isinstance(value, nn.Module):
            self._modules.pop(name, None)
        super().__setattr__(name, value)

    @property
    def trainable_quantizer(self) -> BasePytorchTrainableQuantizer | None:
        """The quantizer while it is trainable, None once it is inferable."""
        quantizer = self.activation_holder_quantizer
        return quantizer if isinstance(quantizer, BasePytorchTrainableQuantizer) else None

    def forward(self, inputs: Any) -> Any:
        """Return the input quantized; of packed sequences and nested tensors, their values."""
        if not isinstance(inputs, Tensor):
            if isinstance(inputs, PackedSequence):
                return PackedSequence(self.forward(inputs.data), *inputs[1:])
            return inputs
        if not inputs.is_floating_point():
            return inputs
        if inputs.is_nested:
            return self._of_nested(inputs)
        if self.observer is not None:
            values = eligible.values_of(inputs)
            try:
                self.observer.update(values)
            except CalibrationError as error:
                subject = getattr(self.activation_holder_quantizer, "subject", "activation")
                hint = "look for the layer whose output diverges, or the bad batch."
                raise CalibrationError(subject, error.problem, hint) from error
            return inputs
        quantizer = self.activation_holder_quantizer
        if isinstance(quantizer, BasePytorchTrainableQuantizer):
            result: Tensor = quantizer(inputs, self.training)
        else:
            result = quantizer(inputs)
        return result

    def _of_nested(self, inputs: Tensor) -> Tensor:
        """Return a nested tensor with its values quantized; the operations of quantizers take plain ones."""
        if inputs.layout is torch.jagged:
            values: Any = self.forward(inputs.values())
            return torch.nested.nested_tensor_from_jagged(values, inputs.offsets(), inputs.lengths())  # type: ignore[attr-defined] # of nested tensors
        return torch.nested.as_nested_tensor([self.forward(each) for each in inputs.unbind()])

    def convert_to_inferable_quantizers(self) -> None:
        """Put the inferable quantizer in the trainable one's place; does nothing the second time."""
        quantizer = self.trainable_quantizer
        if quantizer is not None:
            self.activation_holder_quantizer = quantizer.convert2inferable()
