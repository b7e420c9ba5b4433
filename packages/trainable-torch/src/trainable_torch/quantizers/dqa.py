"""DNN quantization with attention; defined by `trainable_core.reference.dqa`."""

from __future__ import annotations

import torch
from mct_quantizers import QuantizationTarget, mark_quantizer
from torch import Tensor

from trainable_core.backend.options import DqaOptions
from trainable_core.enums import TrainingMethod, VariableGroup
from trainable_core.reference import dqa
from trainable_torch import ops
from trainable_torch.quantizers.base import BasePytorchTrainableQuantizer
from trainable_torch.quantizers.ste import METHODS


class DqaQuantizer(DqaOptions, BasePytorchTrainableQuantizer):
    """Attention over bit widths, annealed to one of them; see `trainable_core.reference.dqa`.

    Its arguments are those of `trainable_core.backend.options.DqaOptions`.

    Notes
    -----
    In the first ``floor(t_end)`` training steps the output is the mixture. In every later one, and in eval mode, it is
    that of the width with the largest logit, which is what `convert2inferable` deploys. Equal logits choose the smaller
    width.
    """

    declaration = dqa.METHOD

    logits: Tensor

    @property
    def selected_width(self) -> int:
        """Width with the largest logit."""
        return self.widths[int(self.logits.detach().argmax())]

    def select_width(self, width: int) -> None:
        """Give `width` the largest logit."""
        self.assign(self.get_quantizer_variable("logits"), dqa.selecting_logits(self.widths, width))

    def add_variables(self) -> None:
        """Add the attention's logits, all equal."""
        self.add_quantizer_variable("logits", torch.zeros(len(self.widths)), VariableGroup.QPARAMS, trained=True)

    def attention(self) -> Tensor:
        """Return the softmax over widths at the present temperature, float32, shape (K,)."""
        temperature = self.temperature(self.current_step)
        return torch.softmax(self.logits / torch.as_tensor(temperature).to(torch.float32), 0)

    def regularization(self) -> Tensor | None:
        """Return ``bit_cost_weight`` times the expected bit width, or None for weight 0."""
        if not self.bit_cost_weight or not self.quantization_config.enabled:
            return None
        widths = torch.tensor(self.widths, dtype=torch.float32, device=self.logits.device)
        return self.bit_cost_weight * (self.attention() * widths).sum()

    def quantize(self, x: Tensor, training: bool) -> Tensor:  # noqa: FBT001 - the base's signature
        """Return the mixture of the widths, or the winner."""
        if not training and not torch.compiler.is_compiling():
            return ops.ste_fake_quantize(x, self.grid(x.dim()))
        candidates = [ops.ste_fake_quantize(x, self.grid(x.dim(), width)) for width in self.widths]
        winner = self.logits.detach().argmax()
        chosen = candidates[0]
        for index, candidate in enumerate(candidates[1:], start=1):
            chosen = torch.where(winner == index, candidate, chosen)
        if not training:
            return chosen
        mixed = sum(weight * candidate for weight, candidate in zip(self.attention(), candidates, strict=True))
        return self.until(dqa.schedule_end(self.temperature), mixed, chosen)


@mark_quantizer(QuantizationTarget.Weights, METHODS, TrainingMethod.DQA)
class DqaWeightsQuantizer(DqaQuantizer):
    """DQA for weights."""


@mark_quantizer(QuantizationTarget.Activation, METHODS, TrainingMethod.DQA)
class DqaActivationQuantizer(DqaQuantizer):
    """DQA for activations."""
